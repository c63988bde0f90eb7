"""What a conversion is asked for, checked before anything is read."""

from __future__ import annotations

from dataclasses import dataclass

from .. import codec
from .allocate import MODES
from .embedding import check_embed_bits


@dataclass(frozen=True)
class Settings:
    """The arguments of a conversion that its result depends on, checked; see :func:`convert`."""

    bits: float
    head_bits: float
    embed_bits: int | None
    codebook: str
    half_rates: bool
    mixed: str
    seed: int

    @property
    def widths(self) -> tuple[float, ...]:
        """Those that a linear may have."""
        half_rates = self.half_rates and self.codebook == "mul1"
        return tuple(k for k in codec.WIDTHS if half_rates or not codec.is_half_rate(k))


def check_settings(
    bits: float, head_bits: float, embed_bits: int | None, codebook: str, half_rates: bool, mixed: str, seed: int
) -> Settings:
    """The settings of a conversion; the arguments are those of :func:`convert`.

    Raises:
        ValueError: If one of them cannot be.
    """
    codec.check_codebook(codebook)
    if mixed not in MODES:
        raise ValueError(f"mixed must be one of {', '.join(MODES)}, got {mixed!r}")
    settings = Settings(
        float(bits), head_bits, check_embed_bits(embed_bits), codebook, bool(half_rates), mixed, int(seed)
    )
    if not 1 <= bits <= codec.MAX_BITS:
        raise ValueError(f"bits must lie in 1..{codec.MAX_BITS}, got {bits}")
    if head_bits not in (*settings.widths, 16):
        listed = ", ".join(map(str, settings.widths))
        kind = f"codebook {codebook}" if half_rates else "half_rates=False"
        raise ValueError(
            f"head_bits must be one of {listed} ({kind}), or 16 to leave the head in half precision, got {head_bits}"
        )
    return settings
