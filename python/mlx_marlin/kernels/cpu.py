"""Which configs the CPU kernels have, and which of them run the same code. The CPU half of
:mod:`mlx_marlin.kernels`; pure.

The same rules as ``csrc/cpu/segments.cpp``.
"""

from __future__ import annotations

import os
from functools import lru_cache

PANEL_ROWS = {"decode": (1, 2), "prefill4": (4,), "base": (8, 16), "large_batch": (32, 64)}
"""Rows per decoded panel that make a variant, largest number of rows last."""

TASK_COLUMNS = (16, 32, 64, 128, 256)
"""Columns per task."""

# 256 columns took 3 to 10 % less time than 128 at 1 to 256 rows (bench/NOTES.md).
DEFAULT_COLUMNS = 256

# A task has whole blocks of the Hadamard transform.
_BLOCK = 128
# The largest panel stands for segments of up to this many rows.
_LARGEST_SEGMENT = 128


@lru_cache(maxsize=1)
def cpu_threads() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def padded(size: int) -> int:
    """A size rounded up to whole Hadamard blocks, as files pad it."""
    return -(-size // _BLOCK) * _BLOCK


def default_tiles(variant: str) -> tuple[int, int]:
    """(tile_size_m, tile_size_n) of a variant."""
    return PANEL_ROWS[variant][-1], DEFAULT_COLUMNS


def variant_of(panel_rows: int) -> str:
    """The variant that has panels of this many rows."""
    return next(variant for variant, rows in PANEL_ROWS.items() if panel_rows in rows)


def infeasible(config, threads: int) -> str | None:
    """Why the CPU kernels cannot run a config on that many cores, or ``None``."""
    rows = PANEL_ROWS[config.kernel_variant]
    if config.tile_size_m not in rows:
        legal = " or ".join(map(str, rows))
        return f"a {config.kernel_variant} panel on the CPU has {legal} rows, got tile_size_m={config.tile_size_m}"
    if config.tile_size_n not in TASK_COLUMNS:
        *most, last = map(str, TASK_COLUMNS)
        return f"a task on the CPU has {', '.join(most)} or {last} columns, got tile_size_n={config.tile_size_n}"
    if not 1 <= config.simdgroups <= threads:
        return f"simdgroups is the number of worker threads here, 1 to {threads}, got {config.simdgroups}"
    return None


def widest_output(problem) -> int:
    """Padded columns of the widest product of a problem."""
    outputs = (problem.intermediate, problem.hidden) if problem.kind == "swiglu" else (problem.intermediate,)
    return max(padded(size) for size in outputs)


def same_code(problem, rows: int, columns: int, threads: int) -> tuple[int, int, int]:
    """The smallest (tile_size_m, tile_size_n, simdgroups) that runs the very code that these do.

    Columns are whole Hadamard blocks and end with the output; a panel of more rows than the problem has holds just
    those; threads beyond the tasks stay idle.
    """
    panels = [panel for of_variant in PANEL_ROWS.values() for panel in of_variant]
    rows = next((panel for panel in panels if min(rows, problem.rows) <= panel), panels[-1])
    columns = min(max(_BLOCK, columns // _BLOCK * _BLOCK), widest_output(problem))
    return rows, columns, min(threads, tasks(problem, rows, columns))


def tasks(problem, rows: int, columns: int) -> int:
    """The most tasks that a phase of a call can have, over all routings."""
    slots = max(1, problem.rows * problem.top_k)
    segment = _LARGEST_SEGMENT if rows == PANEL_ROWS["large_batch"][-1] else rows
    # An expert's last segment may be incomplete.
    segments = min(slots, problem.experts + slots // segment) if problem.kind == "swiglu" else -(-slots // segment)
    return max(slots, segments * -(-widest_output(problem) // columns))
