"""Which configs are legal for a problem, which run the same code, which are worth timing, and the default."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

from . import cpu, metal, search_space
from .config import VARIANTS, KernelConfig, make_name, parse_name
from .cpu import PANEL_ROWS as CPU_PANEL_ROWS
from .cpu import TASK_COLUMNS as CPU_TASK_COLUMNS
from .cpu import cpu_threads
from .problem import Problem
from .search_space import Hardware

# Tile sizes that profiles have on every machine: what a tile is made of here is clamped to (see fitted).
_PORTABLE_TILES = (32, 48, 64, 96, 128, 160)


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
    if problem.device == "gpu" and problem.experts > metal.MAX_EXPERTS:
        variant = "decode"
    return _default_tiles(problem, variant, make_name(variant), use_fp32_acc=True)


def _default_tiles(problem: Problem, variant: str, name: str, use_fp32_acc: bool) -> KernelConfig:
    if problem.device == "gpu":
        return KernelConfig(name, *metal.default_tiles(problem, variant), use_fp32_acc, variant)
    return KernelConfig(name, *cpu.default_tiles(variant), cpu_threads(), use_fp32_acc, variant)


def feasible(problem: Problem, config: KernelConfig) -> str | None:
    """Whether a config may run a problem.

    Returns:
        ``None``, or the reason why not.
    """
    for what in ("tile_size_m", "tile_size_n", "simdgroups"):
        if type(getattr(config, what)) is not int:
            return f"{what} must be an integer, got {getattr(config, what)!r}"
    return _unfit_kernel(problem, config) or (
        metal.infeasible(problem, config) if problem.device == "gpu" else cpu.infeasible(config, cpu_threads())
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
        return metal.tiles(variant)
    return list(product(CPU_PANEL_ROWS[variant], CPU_TASK_COLUMNS, range(1, cpu_threads() + 1)))


def effective(problem: Problem, config: KernelConfig) -> KernelConfig:
    """The smallest config that runs the very code that a feasible config runs: configs that share it are one."""
    if problem.device == "gpu":
        return config
    tiles = cpu.same_code(problem, config.tile_size_m, config.tile_size_n, config.simdgroups)
    variant = cpu.variant_of(tiles[0])
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
        variant = cpu.variant_of(rows)
        yield KernelConfig(make_name(variant), rows, columns, min(workers, cpu_threads()), True, variant)
