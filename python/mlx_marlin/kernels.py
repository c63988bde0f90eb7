"""What is asked (:class:`Problem`), how it runs (:class:`KernelConfig`), and which configs are legal. No MLX.

The default config handles every legal problem; tuning only adds speed.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from functools import lru_cache

from . import metal_rules

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
# 256 columns took 3 to 10 % less time than 128 at 1 to 256 rows (bench/NOTES.md).
CPU_DEFAULT_COLUMNS = 256


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
    def of(cls, layer, rows: int, dtype, device: str, *, combine: bool = False) -> Problem:
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


def make_name(
    variant: str, triple: tuple[int, int, int] | None = None, *, mixed: bool = False, fp32acc: bool = False
) -> str:
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


def config_for(problem: Problem, kernel_name: str) -> KernelConfig:
    """The default tiles for a kernel that is asked for by name.

    Raises:
        ValueError: If no kernel has this name, or it cannot run this problem.
    """
    name = parse_name(kernel_name)
    config = _default_tiles(problem, name.variant, kernel_name, use_fp32_acc=True)
    reason = feasible(problem, config)
    if reason is not None:
        raise ValueError(f"{kernel_name} cannot run this problem: {reason}. Problem: {problem}")
    return config


def default(problem: Problem) -> KernelConfig:
    """The config that runs where nothing is known: legal for every problem."""
    variant = default_variant(problem.rows)
    if problem.device == "gpu" and problem.experts > metal_rules.MAX_EXPERTS:
        variant = "decode"
    return _default_tiles(problem, variant, make_name(variant), use_fp32_acc=True)


def _default_tiles(problem: Problem, variant: str, name: str, use_fp32_acc: bool) -> KernelConfig:
    if problem.device == "gpu":
        return KernelConfig(name, *metal_rules.default_tiles(problem, variant), use_fp32_acc, variant)
    return KernelConfig(name, CPU_PANEL_ROWS[variant][-1], CPU_DEFAULT_COLUMNS, cpu_threads(), use_fp32_acc, variant)


def feasible(problem: Problem, config: KernelConfig) -> str | None:
    """Whether a config may run a problem.

    Returns:
        ``None``, or the reason why not.
    """
    try:
        name = parse_name(config.kernel_name)
    except ValueError as error:
        return str(error)
    if config.kernel_variant not in VARIANTS:
        return f"kernel_variant must be one of {', '.join(VARIANTS)}, got {config.kernel_variant!r}"
    if name.variant != config.kernel_variant:
        return f"{config.kernel_name} is a {name.variant} kernel, but kernel_variant is {config.kernel_variant!r}"
    # On the CPU a triple names the same code as plain decode, which reads each expert's own widths.
    if (
        name.triple is not None
        and problem.device == "gpu"
        and problem.kind == "swiglu"
        and problem.bits != (name.triple,)
    ):
        return f"{config.kernel_name} needs all experts at {name.triple}, but the layer has {list(problem.bits)}"
    return metal_rules.infeasible(problem, config) if problem.device == "gpu" else _cpu_infeasible(config)


def _cpu_infeasible(config: KernelConfig) -> str | None:
    rows = CPU_PANEL_ROWS[config.kernel_variant]
    if config.tile_size_m not in rows:
        return (
            f"a {config.kernel_variant} panel on the CPU has {_either(rows)} rows, got tile_size_m={config.tile_size_m}"
        )
    if config.tile_size_n not in CPU_TASK_COLUMNS:
        return f"a task on the CPU has {_either(CPU_TASK_COLUMNS)} columns, got tile_size_n={config.tile_size_n}"
    if not 1 <= config.simdgroups <= cpu_threads():
        return f"simdgroups is the number of worker threads here, 1 to {cpu_threads()}, got {config.simdgroups}"
    return None


def _either(values) -> str:
    *most, last = map(str, values)
    return f"{', '.join(most)} or {last}" if most else last


def candidates(problem: Problem) -> list[KernelConfig]:
    """Every config worth timing for a problem, the default first. All are feasible."""
    if problem.device == "gpu":
        found = _gpu_candidates(problem)
    else:
        found = _cpu_candidates()
    first = default(problem)
    return [first] + [config for config in found if config != first]


def _gpu_candidates(problem: Problem) -> list[KernelConfig]:
    found = [
        KernelConfig(make_name(variant), *tiles, True, variant)
        for variant in VARIANTS
        for tiles in metal_rules.tiles(variant)
    ]
    return [config for config in found if feasible(problem, config) is None]


def _cpu_candidates() -> list[KernelConfig]:
    threads = sorted({1, max(1, cpu_threads() // 2), cpu_threads()}, reverse=True)
    return [
        KernelConfig(make_name(variant), rows, columns, workers, True, variant)
        for variant in VARIANTS
        for rows in CPU_PANEL_ROWS[variant]
        for columns in CPU_TASK_COLUMNS
        for workers in threads
    ]
