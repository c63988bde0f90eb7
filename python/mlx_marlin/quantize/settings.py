"""What a conversion is asked for, checked before anything is read."""

from __future__ import annotations

from dataclasses import dataclass

from .. import codec
from .allocation import MODES
from .embedding import check_embed_bits

KEPT, LEFT_OUT = 16, 0
"""Instead of a width: what the checkpoint has stays as it is, or is left out."""


def all_widths(codebook: str) -> tuple[float, ...]:
    """The widths that exist for a codebook: half rates for mul1 only."""
    return tuple(k for k, name in codec.FORMATS if name == codebook)


@dataclass(frozen=True)
class Settings:
    """The arguments of a conversion that its result depends on, checked; see :func:`convert`.

    ``bits`` is ``None`` where a table gives the widths.
    """

    bits: float | None
    head_bits: float
    embed_bits: int | None
    mtp_bits: float
    vision_bits: int
    codebook: str
    half_rates: bool
    mixed: str
    seed: int

    @property
    def widths(self) -> tuple[float, ...]:
        """Those that a linear may have."""
        return tuple(k for k in all_widths(self.codebook) if self.half_rates or not codec.is_half_rate(k))

    def check_width(self, key: str, wanted: float, others: str, more: tuple[int, ...]) -> None:
        """See that a single width is one that these settings allow, or one of some numbers that mean something else.

        Raises:
            ValueError: If it is not.
        """
        if isinstance(wanted, bool) or wanted not in (*self.widths, *more):
            listed = ", ".join(map(str, self.widths))
            kind = f"codebook {self.codebook}" if self.half_rates else "half_rates=False"
            raise ValueError(f"{key} must be one of {listed} ({kind}), {others}, got {wanted}")


def check_bits(bits: float) -> None:
    """See that a size can be one.

    Raises:
        ValueError: If it cannot.
    """
    if not 1 <= bits <= codec.MAX_BITS:
        raise ValueError(f"bits must lie in 1..{codec.MAX_BITS}, got {bits}")


def check_settings(settings: Settings) -> Settings:
    """The same settings.

    Raises:
        ValueError: If one of them cannot be.
    """
    codec.check_codebook(settings.codebook)
    if settings.mixed not in MODES:
        raise ValueError(f"mixed must be one of {', '.join(MODES)}, got {settings.mixed!r}")
    check_embed_bits(settings.embed_bits)
    if settings.bits is not None:
        check_bits(settings.bits)
    settings.check_width("head_bits", settings.head_bits, "or 16 to leave the head in half precision", (KEPT,))
    kept = "16 to keep {} as they are, or 0 to leave them out"
    settings.check_width("mtp_bits", settings.mtp_bits, kept.format("prediction layers"), (KEPT, LEFT_OUT))
    if settings.vision_bits not in (*range(1, codec.MAX_BITS + 1), KEPT, LEFT_OUT):
        raise ValueError(
            f"vision_bits must be a whole number from 1 to {codec.MAX_BITS}, {kept.format('towers')}, "
            f"got {settings.vision_bits}"
        )
    return settings
