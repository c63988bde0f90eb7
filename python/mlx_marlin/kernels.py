"""What is asked (:class:`Problem`), how it runs (:class:`KernelConfig`), and which configs are legal. Pure: no device, no MLX.

The default config handles every legal problem; tuning only adds speed.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from functools import lru_cache

VARIANTS = ("decode", "prefill4", "base", "large_batch")
ACTIVATIONS = ("silu", "gelu_tanh", "swiglu_oai")
DTYPES = ("float32", "float16", "bfloat16")
DEVICES = ("cpu", "gpu")
MAX_KERNEL_BITS = 8

_BASE_NAMES = ("moe_trellis_swiglu", "moe_trellis_mixed_swiglu")
_NAME = re.compile(
    r"(?P<base>moe_trellis_(?:mixed_)?swiglu)"
    r"(?:_(?P<variant>decode|prefill4|large_batch))?"
    r"(?:_(?P<gate>[1-8])_(?P<up>[1-8])_(?P<down>[1-8]))?"
    r"(?P<fp32acc>_fp32acc)?"
)

# Rows per decoded panel that make a variant on the CPU, largest number of rows last.
CPU_PANEL_ROWS = {"decode": (1, 2), "prefill4": (4,), "base": (8, 16), "large_batch": (32, 64)}
CPU_TASK_COLUMNS = (16, 32, 64, 128, 256)


@dataclass(frozen=True)
class Problem:
    """One call, described by shapes and dtypes only.

    Attributes:
        kind: ``"linear"`` or ``"swiglu"``.
        rows: Tokens, before top-k. May be 0.
        top_k: Experts per token; 1 for a linear.
        hidden: Logical input size.
        intermediate: Padded width between gate/up and down; for a linear, the logical output size.
        experts: Experts in the bank; 1 for a linear.
        bits: Sorted distinct (gate, up, down) bits present; for a linear, ``((K,),)``.
        codebooks: Sorted distinct codebooks present.
        activation: One of :data:`ACTIVATIONS`; ``"none"`` for a linear.
        dtype: Dtype of x, one of :data:`DTYPES`.
        device: ``"cpu"`` or ``"gpu"``.
        combine: Whether scores are given, so that the top-k sum happens inside.
        bias: Whether any projection has a bias.
    """

    kind: str
    rows: int
    top_k: int
    hidden: int
    intermediate: int
    experts: int
    bits: tuple[tuple[int, ...], ...]
    codebooks: tuple[str, ...]
    activation: str
    dtype: str
    device: str
    combine: bool = False
    bias: bool = False

    @property
    def widths(self) -> tuple[int, ...]:
        """Sorted distinct bit widths over all projections."""
        return tuple(sorted({b for group in self.bits for b in group}))

    @classmethod
    def of(cls, layer, rows: int, dtype, device: str, *, combine: bool = False) -> "Problem":
        """The problem that a layer (or weight, or bank) poses for a number of rows.

        Args:
            layer: Anything with a ``problem(rows, dtype, device, combine)`` method: TrellisLinear, TrellisSwitchGLU.
            rows: Tokens, before top-k.
            dtype: Dtype of x: an ``mx.Dtype`` or its name.
            device: ``"cpu"`` or ``"gpu"``.
        """
        return layer.problem(rows, dtype, device, combine=combine)


@dataclass(frozen=True)
class KernelConfig:
    """How a call runs.

    On the CPU, ``tile_size_m`` is the rows per decoded panel, ``tile_size_n`` the columns per task and
    ``simdgroups`` the worker threads; ``use_fp32_acc`` changes nothing, sums are always float32 there.

    Attributes:
        kernel_name: A name that :func:`parse_name` accepts.
        tile_size_m: Rows per tile.
        tile_size_n: Columns per threadgroup or task.
        simdgroups: Simdgroups per threadgroup.
        use_fp32_acc: False allows half-precision sums inside one 16-deep tile; sums across tiles are float32 always.
        kernel_variant: One of :data:`VARIANTS`.
    """

    kernel_name: str
    tile_size_m: int
    tile_size_n: int
    simdgroups: int
    use_fp32_acc: bool = False
    kernel_variant: str = "base"


@dataclass(frozen=True)
class KernelName:
    """A kernel name taken apart."""

    mixed: bool
    variant: str
    triple: tuple[int, int, int] | None
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
            "_decode, _prefill4, _large_batch or _decode_<gate>_<up>_<down>, then optionally _fp32acc"
        )
    triple = tuple(int(match[part]) for part in ("gate", "up", "down")) if match["gate"] else None
    return KernelName("mixed" in match["base"], match["variant"] or "base", triple, bool(match["fp32acc"]))


def make_name(variant: str, triple: tuple[int, int, int] | None = None, *, mixed: bool = False, fp32acc: bool = False) -> str:
    """The kernel name of a variant; the inverse of :func:`parse_name`."""
    parts = [_BASE_NAMES[mixed]]
    if variant != "base":
        parts.append(variant)
    if triple is not None:
        parts.extend(str(b) for b in triple)
    if fp32acc:
        parts.append("fp32acc")
    name = "_".join(parts)
    parse_name(name)
    return name


@lru_cache(maxsize=1)
def cpu_threads() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_variant(rows: int) -> str:
    """The variant for a number of rows: decode at 1, prefill4 to 16, base to 32, large_batch above."""
    if rows <= 1:
        return "decode"
    if rows <= 16:
        return "prefill4"
    return "base" if rows <= 32 else "large_batch"
