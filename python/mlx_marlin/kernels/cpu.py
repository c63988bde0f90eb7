"""The rules of the CPU kernels (see :class:`~.catalogue.KernelRules`). Pure.

The same rules as ``csrc/cpu/segments.cpp``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import lru_cache
from itertools import product

from .. import codec
from .config import KernelConfig, Triple, make_name
from .problem import Problem
from .search_space import Hardware, Tiles

TILE_ROWS: dict[str, tuple[int, ...]] = {"decode": (1, 2), "prefill4": (4,), "base": (8, 16), "large_batch": (32, 64)}
"""Rows per decoded panel that make a variant, largest number of rows last."""

TILE_COLUMNS: tuple[int, ...] = (16, 32, 64, 128, 256)
"""Columns per task."""

COMPILED_AT_RUN_TIME = False

# 256 columns took 3 to 10 % less time than 128 at 1 to 256 rows (bench/NOTES.md): narrower tasks have to gain more.
_DEFAULT_COLUMNS, _NARROW_COLUMNS, _NARROW_COST = 256, codec.HADAMARD_SIZE, 1.05
# The largest panel stands for segments of up to this many rows.
_LARGEST_SEGMENT = 128
# csrc/cpu/tier/gemm.h: a sweep of 16 tiles is 16 KB of decoded weights, and 1 KB of x per row.
_SWEEP_BYTES, _SWEEP_ROW_BYTES = 16 << 10, 1 << 10

# A tile is decoded in the time in which it is multiplied with this many rows (bench/NOTES.md, "Defaults").
_DECODE_ROWS = 16

_PANELS = [rows for of_variant in TILE_ROWS.values() for rows in of_variant]


@lru_cache(maxsize=1)
def cpu_threads() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def usual_variant(problem: Problem) -> str:
    """The variant for the fewest rows whose panels decode as little, and occupy as many threads, as any.

    Two rows of x may meet in an expert, and seldom more than four of a few: fewer variants are looked at there.
    """
    shared = problem.experts > 1 and problem.rows > 1
    return min(list(TILE_ROWS)[shared:], key=lambda variant: min(_cost(problem, *t) for t in _usual_tiles(variant)))


def default_tiles(problem: Problem, variant: str) -> Tiles:
    """The largest panel and the widest task of those that cost least."""
    rows, columns = min(_usual_tiles(variant), key=lambda tiles: _cost(problem, *tiles))
    return rows, columns, cpu_threads()


def _usual_tiles(variant: str) -> list[tuple[int, int]]:
    return list(product(reversed(TILE_ROWS[variant]), (_DEFAULT_COLUMNS, _NARROW_COLUMNS)))


def _cost(problem: Problem, panel: int, columns: int) -> float:
    """Products of a 16x16 tile with a row that the busiest thread does, a decoded tile counted as so many.

    A panel decodes each tile once for all of its rows, so that a matrix is decoded the fewest times by the largest; but
    its rows are one task, and a thread without a task waits.
    """
    slots, rows = max(1, problem.rows * problem.top_k), problem.rows_per_matrix
    segment = _LARGEST_SEGMENT if panel == _PANELS[-1] else panel
    # Of an expert's rows the last segment is half full on average.
    segments = max(1.0, rows / segment + (1 - 1 / segment) / 2) if segment < problem.rows else 1.0
    total = 0.0
    for outputs, inputs in zip(problem.outputs, (problem.hidden, problem.intermediate)):
        width = min(columns, outputs)
        blocks, weights = -(-outputs // width), width * codec.padded(inputs)
        if problem.experts == 1:
            total += weights * _busiest(blocks, *divmod(slots, segment), segment)
        else:
            # Routing is not known: a thread that takes its last task while others are at theirs waits for half of one.
            rounds = segments * slots / rows * blocks / cpu_threads() + (1 - 1 / cpu_threads()) / 2
            total += weights * max(1.0, rounds) * (_DECODE_ROWS + rows / segments)
    return total * (_NARROW_COST if columns < _DEFAULT_COLUMNS else 1.0)


def _busiest(blocks: int, full: int, rest: int, segment: int) -> float:
    """When the last thread ends that takes the blocks of full segments and then those of the rest of the rows."""
    threads, cost, last_cost = cpu_threads(), _DECODE_ROWS + segment, _DECODE_ROWS + rest
    rounds, busy = divmod(full * blocks, threads)
    last = blocks if rest else 0
    if busy:
        rounds += 1
        last = max(0, last - (threads - busy) * (cost // last_cost))
    return rounds * cost + -(-last // threads) * last_cost


def legal_tiles(variant: str) -> list[Tiles]:
    return list(product(TILE_ROWS[variant], TILE_COLUMNS, range(1, cpu_threads() + 1)))


def refuses_triple(problem: Problem, triple: Triple) -> bool:
    """A triple names the same code as plain decode, which reads each expert's own widths."""
    return False


def infeasible(problem: Problem, config: KernelConfig) -> str | None:
    rows, threads = TILE_ROWS[config.kernel_variant], cpu_threads()
    if config.tile_size_m not in rows:
        legal = " or ".join(map(str, rows))
        return f"a {config.kernel_variant} panel on the CPU has {legal} rows, got tile_size_m={config.tile_size_m}"
    if config.tile_size_n not in TILE_COLUMNS:
        *most, last = map(str, TILE_COLUMNS)
        return f"a task on the CPU has {', '.join(most)} or {last} columns, got tile_size_n={config.tile_size_n}"
    if not 1 <= config.simdgroups <= threads:
        return f"simdgroups is the number of worker threads here, 1 to {threads}, got {config.simdgroups}"
    return None


def effective(problem: Problem, config: KernelConfig) -> KernelConfig:
    """Columns are whole Hadamard blocks and end with the output; a panel of more rows than the problem has holds just
    those; threads beyond the tasks stay idle; other codebooks than mul1 are always multiplied as floats.
    """
    block = codec.HADAMARD_SIZE
    rows = next((panel for panel in _PANELS if min(config.tile_size_m, problem.rows) <= panel), _PANELS[-1])
    columns = min(max(block, config.tile_size_n // block * block), max(problem.outputs))
    threads = min(config.simdgroups, _tasks(problem, rows, columns))
    variant = _variant_of(rows)
    exact = config.use_fp32_acc or not half_sums(problem, config)
    return KernelConfig(make_name(variant), rows, columns, threads, exact, variant)


def _variant_of(panel_rows: int) -> str:
    return next(variant for variant, rows in TILE_ROWS.items() if panel_rows in rows)


def _tasks(problem: Problem, rows: int, columns: int) -> int:
    """The most tasks that a phase of a call can have, over all routings."""
    slots = max(1, problem.rows * problem.top_k)
    segment = _LARGEST_SEGMENT if rows == TILE_ROWS["large_batch"][-1] else rows
    # An expert's last segment may be incomplete.
    segments = min(slots, problem.experts + slots // segment) if problem.fused else -(-slots // segment)
    return max(slots, segments * -(-max(problem.outputs) // columns))


def worth_timing(problem: Problem, hardware: Hardware | None) -> Iterator[KernelConfig]:
    """The panels that the caches favour come first; some configs may run the same code."""
    hardware = hardware or Hardware(cores=cpu_threads())
    favoured = {_largest_panel(lambda p: _SWEEP_BYTES + p * _SWEEP_ROW_BYTES <= hardware.l1d)}
    # The x of a panel is read again for each 16 columns, beside the sums of gate and up: half of the cache for them,
    # the other half for the codes that stream through.
    row_bytes = 4 * codec.padded(problem.hidden) + 2 * 4 * _DEFAULT_COLUMNS
    favoured.add(_largest_panel(lambda p: p * row_bytes <= hardware.l2_per_core // 2))
    cores = max(1, hardware.cores)
    # One thread has no hand-over; the fast cores do not wait for slow ones; half of the cores leave a sibling thread
    # or a neighbour its share.
    threads = sorted({1, min(cores, hardware.fast_cores or cores), max(1, cores // 2), cores}, reverse=True)
    panels = sorted(_PANELS, key=lambda p: (p not in favoured, -p))
    for rows, columns, workers in product(panels, reversed(TILE_COLUMNS), threads):
        variant = _variant_of(rows)
        for exact in (False, True) if problem.accuracy == "half" else (True,):
            # Integers are faster up to 64 rows (bench/NOTES.md): floats compete with the usual columns only.
            if not exact or problem.accuracy == "float32" or (columns, workers) == (_DEFAULT_COLUMNS, cores):
                yield KernelConfig(make_name(variant), rows, columns, min(workers, cpu_threads()), exact, variant)


def _largest_panel(fits: Callable[[int], bool]) -> int:
    return max((p for p in _PANELS if fits(p)), default=_PANELS[0])


def accelerated(config: KernelConfig) -> bool:
    """Nothing on a CPU is."""
    return False


def half_sums(problem: Problem, config: KernelConfig) -> bool:
    """Sums of integers; only mul1 has them."""
    return not config.use_fp32_acc and "mul1" in problem.codebooks
