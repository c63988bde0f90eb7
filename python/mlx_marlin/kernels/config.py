"""How a call runs: a kernel, its tiles, and the names of kernels."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import msgspec

from .. import codec

VARIANTS = ("decode", "prefill4", "base", "large_batch")
"""Families of kernels, by the number of rows that they are for, the fewest first; the position is the kernels' id."""

# Names come from users and from loops over VARIANTS, so that they are str to a type checker; files are held to these.
if TYPE_CHECKING:
    Variant = str
else:
    Variant = Literal[VARIANTS]
Triple = tuple[float, float, float]
"""(gate, up, down) bits: ints, half rates floats."""
_Size = Annotated[int, msgspec.Meta(ge=1, le=1 << 16)]

_BASE_NAMES = ("moe_trellis_swiglu", "moe_trellis_mixed_swiglu")
# As names write the widths: 2.5 is 2p5.
_WIDTH = "|".join(str(width).replace(".", "p") for width in codec.WIDTHS)
_NAME = re.compile(
    r"(?P<base>moe_trellis_(?:mixed_)?swiglu)"
    r"(?:_(?P<variant>decode|prefill4|large_batch))?"
    rf"(?:_(?P<gate>{_WIDTH})_(?P<up>{_WIDTH})_(?P<down>{_WIDTH}))?"
    r"(?P<fp32acc>_fp32acc)?"
)


@dataclass(frozen=True)
class KernelConfig:
    """How a call runs. What annotations ask for is checked where one is read from a file.

    On the CPU, ``tile_size_m`` is the rows per decoded panel, ``tile_size_n`` the columns per task and
    ``simdgroups`` the worker threads.

    Attributes:
        kernel_name: A name that :func:`parse_name` accepts; a file may have others, which run nowhere.
        tile_size_m: Rows per tile.
        tile_size_n: Columns per threadgroup or task.
        simdgroups: Simdgroups per threadgroup.
        use_fp32_acc: False rounds, which only calls of accuracy ``"half"`` allow, and a config that is passed to an op
            or a layer by hand. On a GPU: half-precision sums inside one 16-deep tile; on neural accelerators one half
            per activation instead of two. On the CPU: activations to 16 bits per 128-block, multiplied with mul1's byte
            sums as integers; a weight's rounding to a half is left out, so that a row of a product is off by 2.1e-4 of
            its norm, at most 5e-4; other codebooks stay exact. Sums across tiles are float32 always. A config written
            by hand leaves it off; :func:`default` turns it on for accuracy ``"float32"``.
        kernel_variant: One of :data:`VARIANTS`.
    """

    kernel_name: Annotated[str, msgspec.Meta(pattern=r"\A[A-Za-z0-9_]{1,128}\Z")]
    tile_size_m: _Size
    tile_size_n: _Size
    simdgroups: _Size
    use_fp32_acc: bool = False
    kernel_variant: Variant = "base"


@dataclass(frozen=True)
class KernelName:
    """A kernel name taken apart."""

    mixed: bool
    variant: str
    triple: Triple | None
    fp32acc: bool


def parse_name(name: str) -> KernelName:
    """Take a kernel name apart.

    Raises:
        ValueError: If no kernel has this name.
    """
    match = _NAME.fullmatch(name) if isinstance(name, str) else None
    if match is None or (match["gate"] and match["variant"] != "decode"):
        raise ValueError(
            f"no kernel is called {name!r}; names are moe_trellis_swiglu or moe_trellis_mixed_swiglu, then nothing, "
            "_decode, _prefill4, _large_batch or _decode_<gate>_<up>_<down> (2.5 bits: 2p5), then optionally _fp32acc"
        )
    triple: Triple | None = None
    if match["gate"]:
        triple = _named_width(match["gate"]), _named_width(match["up"]), _named_width(match["down"])
    return KernelName("mixed" in match["base"], match["variant"] or "base", triple, bool(match["fp32acc"]))


def _named_width(text: str) -> int | float:
    return codec.as_width(float(text.replace("p", ".")))


def make_name(variant: str, triple: Triple | None = None, *, mixed: bool = False, fp32acc: bool = False) -> str:
    """The kernel name of a variant; the inverse of :func:`parse_name`."""
    parts = [_BASE_NAMES[mixed]]
    if variant != "base":
        parts.append(variant)
    if triple is not None:
        parts.extend(str(codec.as_width(b)).replace(".", "p") for b in triple)
    if fp32acc:
        parts.append("fp32acc")
    name = "_".join(parts)
    parse_name(name)
    return name


def default_variant(rows: int) -> str:
    """The variant for a number of rows: decode at 1, prefill4 to 16, base to 32, large_batch above."""
    if rows <= 1:
        return "decode"
    if rows <= 16:
        return "prefill4"
    return "base" if rows <= 32 else "large_batch"
