"""What is asked (:class:`Problem`), how it runs (:class:`KernelConfig`), and which configs are legal, the same code, or
worth timing. No MLX.

The default config handles every legal problem; tuning only adds speed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product

from . import cpu_rules, metal_rules, search_space
from .cpu_rules import PANEL_ROWS as CPU_PANEL_ROWS
from .cpu_rules import TASK_COLUMNS as CPU_TASK_COLUMNS
from .search_space import Hardware

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

# Tile sizes that profiles have on every machine: what a tile is made of here is clamped to (see fitted).
_PORTABLE_TILES = (32, 48, 64, 96, 128, 160)


@dataclass(frozen=True)
class Problem:
    """One call, described by shapes and dtypes only.

    Attributes:
        kind: ``"linear"`` or ``"swiglu"``.
        rows: Tokens, before top-k. May be 0.
        top_k: Experts per token; 1 for a linear.
        hidden: Logical input size.
        intermediate: Padded width between gate/up and down; for a linear, the logical output size.
        experts: Experts in the bank; 1 for a linear, more for one projection of experts, whose rows are slots.
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
            A config written by hand leaves it off; :func:`default` turns it on.
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
    return KernelConfig(name, *cpu_rules.default_tiles(variant), cpu_threads(), use_fp32_acc, variant)


def feasible(problem: Problem, config: KernelConfig) -> str | None:
    """Whether a config may run a problem.

    Returns:
        ``None``, or the reason why not.
    """
    for what in ("tile_size_m", "tile_size_n", "simdgroups"):
        if type(getattr(config, what)) is not int:
            return f"{what} must be an integer, got {getattr(config, what)!r}"
    return _unfit_kernel(problem, config) or (
        metal_rules.infeasible(problem, config)
        if problem.device == "gpu"
        else cpu_rules.infeasible(config, cpu_threads())
    )


def _unfit_kernel(problem: Problem, config: KernelConfig) -> str | None:
    """Why no tiles make a config's kernel run a problem, or ``None``."""
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
    return None


def fitted(problem: Problem, config: KernelConfig) -> KernelConfig | None:
    """A config from another machine as it runs here: its sizes clamped to the nearest that its variant has.

    Tile sizes that every machine's profiles have (32 to 160) are clamped; so are simdgroups, of which machines have
    different numbers. A tile_size_m that the variant does not have becomes the variant's own.

    Returns:
        The config itself where it is feasible, a feasible one of the same kernel, or ``None``.
    """
    if feasible(problem, config) is None:
        return config
    sizes = (config.tile_size_m, config.tile_size_n, config.simdgroups)
    if any(type(size) is not int for size in sizes) or config.simdgroups < 1 or _unfit_kernel(problem, config):
        return None
    legal = _legal_tiles(problem, config.kernel_variant)
    for position in (0, 1):
        size = sizes[position]
        if size not in _PORTABLE_TILES and size not in {tiles[position] for tiles in legal}:
            return None
    rows = _default_tiles(problem, config.kernel_variant, config.kernel_name, True).tile_size_m
    rows = config.tile_size_m if any(tiles[0] == config.tile_size_m for tiles in legal) else rows
    wanted = (rows, *sizes[1:])
    near = sorted(legal, key=lambda tiles: (*(abs(a - b) for a, b in zip(tiles, wanted)), tiles))
    configs = (_with_tiles(config, tiles) for tiles in near)
    return next((c for c in configs if feasible(problem, c) is None), None)


def _with_tiles(config: KernelConfig, tiles: search_space.Tiles) -> KernelConfig:
    return replace(config, tile_size_m=tiles[0], tile_size_n=tiles[1], simdgroups=tiles[2])


def _legal_tiles(problem: Problem, variant: str) -> list[search_space.Tiles]:
    """The tiles that a variant has on a device."""
    if problem.device == "gpu":
        return metal_rules.tiles(variant)
    return list(product(CPU_PANEL_ROWS[variant], CPU_TASK_COLUMNS, range(1, cpu_threads() + 1)))


def effective(problem: Problem, config: KernelConfig) -> KernelConfig:
    """The smallest config that runs the very code that a feasible config runs: configs that share it are one."""
    if problem.device == "gpu":
        return config
    tiles = cpu_rules.same_code(problem, config.tile_size_m, config.tile_size_n, config.simdgroups)
    variant = cpu_rules.variant_of(tiles[0])
    return KernelConfig(make_name(variant), *tiles, True, variant)


def candidates(problem: Problem) -> list[KernelConfig]:
    """Configs worth timing for a problem, the default first. All are feasible, and no two run the same code.

    Nothing is assumed of the machine but the cores of this process: on a GPU, every legal config.
    """
    return candidates_on(problem, None)


def candidates_on(problem: Problem, hardware: Hardware | None) -> list[KernelConfig]:
    """The :func:`candidates` for a machine, without the tiles that cannot pay there.

    Args:
        problem: What is asked.
        hardware: See ``device.hardware``; ``None`` where nothing is known of it.
    """
    found = _gpu_candidates(problem, hardware) if problem.device == "gpu" else _cpu_candidates(problem, hardware)
    first = default(problem)
    distinct = dict.fromkeys(effective(problem, config) for config in found if feasible(problem, config) is None)
    distinct.pop(effective(problem, first), None)
    return [first, *distinct]


def _gpu_candidates(problem: Problem, hardware: Hardware | None) -> Iterator[KernelConfig]:
    for variant in VARIANTS:
        for tiles in search_space.gpu_tiles(problem, variant, hardware):
            for fp32 in (True, False):
                yield KernelConfig(make_name(variant), *tiles, fp32, variant)


def _cpu_candidates(problem: Problem, hardware: Hardware | None) -> Iterator[KernelConfig]:
    for rows, columns, workers in search_space.cpu_tiles(problem, hardware or Hardware(cores=cpu_threads())):
        variant = cpu_rules.variant_of(rows)
        yield KernelConfig(make_name(variant), rows, columns, min(workers, cpu_threads()), True, variant)
