"""Which configs are legal for a problem, which run the same code, which are worth timing, and the default.

What differs between CPU and GPU stands in :mod:`~.cpu` and :mod:`~.metal`, behind one interface.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Protocol

from . import cpu, metal
from .config import VARIANTS, KernelConfig, Triple, make_name, parse_name
from .problem import Problem
from .search_space import Hardware, Tiles

# Tile sizes that profiles have on every machine: what a tile is made of here is clamped to (see fitted).
_PORTABLE_TILES = (32, 48, 64, 96, 128, 160)


class KernelRules(Protocol):
    """What the kernels of a device can do, and what they do best.

    Attributes:
        TILE_ROWS: The tile_size_m that each variant has.
        TILE_COLUMNS: The tile_size_n that there are.
        COMPILED_AT_RUN_TIME: Whether the kernels are compiled on the user's machine, by a compiler that nobody tested.
    """

    TILE_ROWS: dict[str, tuple[int, ...]]
    TILE_COLUMNS: tuple[int, ...]
    COMPILED_AT_RUN_TIME: bool

    def usual_variant(self, problem: Problem) -> str:
        """The variant that runs a problem where nothing is known."""

    def default_tiles(self, problem: Problem, variant: str) -> Tiles:
        """Tiles of a variant that are legal for the problem, as for every other."""

    def legal_tiles(self, variant: str) -> list[Tiles]:
        """All tiles of a variant; :meth:`infeasible` may refuse some of them for a problem."""

    def refuses_triple(self, problem: Problem, triple: Triple) -> bool:
        """Whether the decode kernel of (gate, up, down) bits cannot run a problem."""

    def infeasible(self, problem: Problem, config: KernelConfig) -> str | None:
        """Why tiles of integers cannot run a problem, or ``None``."""

    def effective(self, problem: Problem, config: KernelConfig) -> KernelConfig:
        """The smallest config that runs the very code that a feasible config runs."""

    def worth_timing(self, problem: Problem, hardware: Hardware | None) -> Iterator[KernelConfig]:
        """Configs that may be the fastest on a machine; some may be infeasible, or run the same code."""

    def accelerated(self, config: KernelConfig) -> bool:
        """Whether a config's products run on neural accelerators."""

    def half_sums(self, problem: Problem, config: KernelConfig) -> bool:
        """Whether a config rounds operands, or sums inside a tile, to about half precision."""


_RULES: dict[str, KernelRules] = {"cpu": cpu, "gpu": metal}


def rules_of(problem: Problem) -> KernelRules:
    """The rules of the device that runs a problem."""
    return _RULES[problem.device]


def config_for(problem: Problem, kernel_name: str) -> KernelConfig:
    """The default tiles for a kernel that is asked for by name.

    Raises:
        ValueError: If no kernel has this name, or it cannot run this problem.
    """
    config = _default_config(problem, parse_name(kernel_name).variant, kernel_name)
    reason = feasible(problem, config)
    if reason is not None:
        raise ValueError(f"{kernel_name} cannot run this problem: {reason}. Problem: {problem}")
    return config


def default(problem: Problem) -> KernelConfig:
    """The config that runs where nothing is known: legal for every problem."""
    variant = rules_of(problem).usual_variant(problem)
    return _default_config(problem, variant, make_name(variant))


def _default_config(problem: Problem, variant: str, name: str) -> KernelConfig:
    tiles = rules_of(problem).default_tiles(problem, variant)
    return KernelConfig(name, *tiles, problem.accuracy == "float32", variant)


def feasible(problem: Problem, config: KernelConfig) -> str | None:
    """Whether a config may run a problem.

    Returns:
        ``None``, or the reason why not.
    """
    for what in ("tile_size_m", "tile_size_n", "simdgroups"):
        if type(getattr(config, what)) is not int:
            return f"{what} must be an integer, got {getattr(config, what)!r}"
    if not config.use_fp32_acc and problem.accuracy == "float32":
        return 'use_fp32_acc=False is for accuracy "half" only, and the accuracy is "float32"'
    return _unfit_kernel(problem, config) or rules_of(problem).infeasible(problem, config)


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
    if name.triple is not None and rules_of(problem).refuses_triple(problem, name.triple):
        return f"{config.kernel_name} needs all experts at {name.triple}, but the layer has {list(problem.bits)}"
    return None


def accelerated(problem: Problem, config: KernelConfig) -> bool:
    """Whether a config's products run on neural accelerators."""
    return rules_of(problem).accelerated(config)


def fitted(problem: Problem, config: KernelConfig) -> KernelConfig | None:
    """A config from another machine as it runs here: its sizes clamped to the nearest that its variant has.

    Tile sizes that every machine's profiles have (32 to 160) are clamped; so are simdgroups, of which machines have
    different numbers. A tile_size_m that the variant does not have becomes the variant's own. Where the accuracy is
    float32, so are the sums.

    Returns:
        The config itself where it is feasible, a feasible one of the same kernel, or ``None``.
    """
    if problem.accuracy == "float32" and not config.use_fp32_acc:
        config = replace(config, use_fp32_acc=True)
    if feasible(problem, config) is None:
        return config
    sizes = (config.tile_size_m, config.tile_size_n, config.simdgroups)
    if any(type(size) is not int for size in sizes) or config.simdgroups < 1 or _unfit_kernel(problem, config):
        return None
    legal = rules_of(problem).legal_tiles(config.kernel_variant)
    for position in (0, 1):
        size = sizes[position]
        if size not in _PORTABLE_TILES and size not in {tiles[position] for tiles in legal}:
            return None
    rows = rules_of(problem).default_tiles(problem, config.kernel_variant)[0]
    rows = config.tile_size_m if any(tiles[0] == config.tile_size_m for tiles in legal) else rows
    wanted = (rows, *sizes[1:])
    near = sorted(legal, key=lambda tiles: (*(abs(a - b) for a, b in zip(tiles, wanted)), tiles))
    configs = (_with_tiles(config, tiles) for tiles in near)
    return next((c for c in configs if feasible(problem, c) is None), None)


def _with_tiles(config: KernelConfig, tiles: Tiles) -> KernelConfig:
    return replace(config, tile_size_m=tiles[0], tile_size_n=tiles[1], simdgroups=tiles[2])


def effective(problem: Problem, config: KernelConfig) -> KernelConfig:
    """The smallest config that runs the very code that a feasible config runs: configs that share it are one."""
    return rules_of(problem).effective(problem, config)


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
    found = rules_of(problem).worth_timing(problem, hardware)
    first = default(problem)
    distinct = dict.fromkeys(effective(problem, config) for config in found if feasible(problem, config) is None)
    distinct.pop(effective(problem, first), None)
    return [first, *distinct]
