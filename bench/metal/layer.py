"""What the dispatches of a layer do at any number of rows, with every variant.

Put together from row tiles of one expert, counted with one row (or a matrix's unit of rows) and full, and from the
dispatches around the products, counted with few rows. Rows per expert are those of random routing. The grids, the
passes and what waits for what are those of the layer's own plan.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from typing import NamedTuple

import numpy as np

from bench.metal.model import Work
from bench.metal.work import Counted, count
from mlx_marlin import ops
from mlx_marlin.kernels import metal
from mlx_marlin.kernels.config import KernelConfig
from mlx_marlin.kernels.problem import Problem

PRODUCTS = ("gate_up", "linear")
ROUTE = "route"
# Buffers with as many rows as positions could be needed.
BY_POSITION = ("order", "rotated", "sums", "activated")
# Rows with which what is around the products is counted: the work grows with the rows.
FEW_ROWS = 2
# Columns of a linear that are counted: a threadgroup's work does not depend on how many others there are.
FEW_COLUMNS = 256
ANY_BITS, ANY_CODEBOOK = (4, 4, 4), ("mcg",)


class Routing(NamedTuple):
    """What random routing is expected to give.

    Attributes:
        experts: That have rows.
        tiles: Row tiles.
        units: Units of rows, into which tiles are divided.
    """

    experts: float
    tiles: float
    units: float


@cache
def routing(experts: int, top_k: int, rows: int, tile_rows: int, unit_rows: int) -> Routing:
    """Sums over the layer's experts, whose rows have a binomial distribution."""
    if experts == 1:
        return Routing(1, math.ceil(rows * top_k / tile_rows), math.ceil(rows * top_k / unit_rows))
    share, found = top_k / experts, [0.0, 0.0, 0.0]
    for n in range(1, rows + 1):
        ways = math.lgamma(rows + 1) - math.lgamma(n + 1) - math.lgamma(rows - n + 1)
        p = math.exp(ways + n * math.log(share) + (rows - n) * math.log1p(-share)) if share < 1 else float(n == rows)
        for i, parts in enumerate((1, math.ceil(n / tile_rows), math.ceil(n / unit_rows))):
            found[i] += experts * p * parts
    return Routing(*found)


def unit_rows(config: KernelConfig) -> int:
    """Rows that are multiplied together: a matrix's, or one."""
    if config.kernel_variant in metal.MATRIX_ROWS:
        return 16 if metal.accelerated(config) else 8
    return 1


def _stem(kernel: str) -> str:
    return kernel.removeprefix("trellis_").split("<")[0]


@cache
def products(problem: Problem, config: KernelConfig) -> tuple[Counted, ...]:
    """The products of a layer, counted."""
    counted = count(problem, config, lambda stem: stem in (ROUTE, *PRODUCTS))  # products ask which rows they have
    return tuple(c for c in counted if _stem(c.kernel) in PRODUCTS)


@cache
def _around(problem: Problem, config: KernelConfig, slots_per_expert: int) -> dict[str, Counted]:
    """The dispatches around the products by kernel, where an expert that has slots has so many."""
    routing = np.arange(problem.rows * problem.top_k) // slots_per_expert if problem.experts > 1 else None
    return {c.kernel: c for c in count(problem, config, lambda stem: stem not in (*PRODUCTS, ROUTE), routing)}


@cache
def _sorting(problem: Problem, config: KernelConfig) -> tuple[Counted, ...]:
    return tuple(count(problem, config, lambda stem: stem == ROUTE))


def _pass_rows(problem: Problem, dispatches: list[dict]) -> list[int]:
    """Rows of each pass: those of x that its first dispatch with x reads."""
    row_bytes = problem.hidden * (4 if problem.dtype == "float32" else 2)
    read = [b["bytes"] for d in dispatches for b in d["buffers"] if b["name"] == "x"]
    return [size // row_bytes for size in read]


def _combined(x: float, a: Mapping[str, float], y: float, b: Mapping[str, float]) -> dict[str, float]:
    return {name: x * a.get(name, 0) + y * b.get(name, 0) for name in a.keys() | b.keys()}


def _groups(dispatch: dict) -> int:
    return int(np.prod(dispatch["grid"]))


def _simdgroups(dispatch: dict) -> int:
    return -(-int(np.prod(dispatch["threads"])) // 32)


def _product(dispatch: dict, one: Counted, full: Counted, problem: Problem, config: KernelConfig, rows: int) -> Work:
    """A product of the layer, from those of one expert with one unit of rows and with a full row tile."""
    tile, unit = config.tile_size_m, unit_rows(config)
    sorts = problem.experts > 1 and tile > 1
    routed = (
        routing(problem.experts, problem.top_k, rows, tile, unit)
        if sorts or problem.experts == 1
        else _unsorted(problem, rows)
    )
    # A tile decodes once, and multiplies for each of its units.
    y = (routed.units - routed.tiles) / (tile // unit - 1) if tile > unit else 0.0
    x = routed.tiles - y
    columns = dispatch["grid"][0] / full.dispatch["grid"][0]
    moved = {b["name"]: b["bytes"] for b in full.dispatch["buffers"]}
    codes = columns * sum(n for name, n in moved.items() if name.endswith(".codes"))
    by_slot = sum(n for name, n in moved.items() if not name.endswith(".codes")) / tile
    return Work(
        {k: columns * n for k, n in _combined(x, one.work.operations, y, full.work.operations).items()},
        codes * routed.experts + by_slot * rows * problem.top_k,
        round(routed.tiles * dispatch["grid"][0]),
        _simdgroups(dispatch),
        {k: columns * n for k, n in _combined(x, one.simd, y, full.simd).items()},
    )


def _unsorted(problem: Problem, rows: int) -> Routing:
    """Every slot by itself: an expert's codes are read once per slot that has it, at worst."""
    slots = rows * problem.top_k
    return Routing(routing(problem.experts, problem.top_k, rows, 1, 1).experts, slots, slots)


def _other(dispatch: dict, problem: Problem, config: KernelConfig, rows: int, columns: float) -> Work:
    """A dispatch beside the products. Fragments of x are made in whole units, counted with one row and full; all else
    takes as long for each slot. `columns`: how many times those that are counted.
    """
    name, slots = dispatch["kernel"], rows * problem.top_k
    unit = unit_rows(config) if dispatch["constants"].get("fragments") and _stem(name) == "rotate" else 1
    routed = routing(problem.experts, problem.top_k, rows, unit, unit)
    units = routed.units if unit > 1 else slots
    few = replace(problem, rows=1 if unit > 1 else min(FEW_ROWS, rows))
    one, y = _around(few, config, 1)[name], 0.0
    full = one
    if unit > 1:
        full, y = _around(replace(few, rows=unit), config, unit)[name], (slots - units) / (unit - 1)
    x, y = columns * (units - y) / (few.rows * problem.top_k), columns * y / problem.top_k
    return Work(
        _combined(x, one.work.operations, y, full.work.operations),
        _bytes_around(dispatch, routed.experts / problem.experts, unit * units),
        _groups(dispatch),
        _simdgroups(dispatch),
        _combined(x, one.simd, y, full.simd),
    )


def _bytes_around(dispatch: dict, used: float, rows: float) -> float:
    """Bytes that move: of what experts have those that are used, of positions as many as are rows."""
    moved = {b["name"]: b["bytes"] for b in dispatch["buffers"]}
    filled = rows / (moved["order"] / 4) if "order" in moved else 1.0
    share = {name: used if "." in name else filled if name in BY_POSITION else 1.0 for name in moved}
    return sum(share[name] * n for name, n in moved.items())


def _narrow(problem: Problem) -> tuple[Problem, float]:
    """A linear with as many columns as are counted, and how many times as many it has."""
    if problem.kind != "linear" or problem.intermediate <= FEW_COLUMNS:
        return problem, 1.0
    return replace(problem, intermediate=FEW_COLUMNS), problem.intermediate / FEW_COLUMNS


@cache
def work(problem: Problem, config: KernelConfig) -> tuple[Work, ...]:
    """What a layer's dispatches do. All experts have the same widths.

    Args:
        problem: The layer, with any number of rows.
        config: How it runs.
    """
    dispatches = ops.plan(problem, config)["dispatches"]
    passes = _pass_rows(problem, dispatches)
    narrow, columns = _narrow(problem)
    expert = replace(narrow, experts=1, top_k=1, combine=False)
    one, full = (products(replace(expert, rows=n), config) for n in (unit_rows(config), config.tile_size_m))
    # What is around the products does not decode: one width stands for all.
    around = replace(narrow, bits=(ANY_BITS[: len(problem.bits[0])],), codebooks=ANY_CODEBOOK)
    length, found = len(dispatches) // len(passes), []
    for p, rows in enumerate(passes):
        pairs = iter(zip(one, full, strict=True))
        for d in dispatches[p * length : (p + 1) * length]:
            stem = _stem(d["kernel"])
            if stem in PRODUCTS:
                made = _product(d, *next(pairs), problem, config, rows)
            elif stem == ROUTE:
                (sorting,) = _sorting(replace(around, rows=rows), config)
                made = sorting.work
            else:
                made = _other(d, around, config, rows, columns if stem == "combine" else 1.0)
            found.append(replace(made, after=tuple(d["after"])))
    return tuple(found)
