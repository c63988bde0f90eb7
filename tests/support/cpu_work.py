"""What a call costs on the CPU, counted: every tile decoded and multiplied, by task, on the thread that takes it.

Times of single threads (2 to 4 bits, 2048 x 2048) put decoding a tile at what 8 to 16 of its products with a row take
with AVX-512, 10 to 16 with AVX2, 23 without either: the tiers.
"""

from __future__ import annotations

import heapq

import numpy as np

from mlx_marlin import codec
from mlx_marlin.kernels import KernelConfig, Problem

DECODE_ROWS = {"avx512": 12, "avx2": 16, "portable": 23}
"""Products of a tile with a row that take as long as decoding it."""

# csrc/cpu/segments.cpp: the largest panel stands for segments of up to this many rows.
_LARGEST_PANEL, _LARGEST_SEGMENT = 64, 128
# Tasks of 128 columns took at least this much longer than half as many of 256 (bench/NOTES.md).
_NARROW_COST = 1.03


def rows_of_matrices(problem: Problem, seed: int = 0) -> np.ndarray:
    """How many rows each weight has, those that have any: experts are drawn evenly, distinct ones for a row."""
    if problem.experts == 1:
        return np.array([problem.rows * problem.top_k])
    draws = np.random.default_rng(seed).random((problem.rows, problem.experts))
    chosen = np.argpartition(draws, problem.top_k - 1, axis=1)[:, : problem.top_k]
    counts = np.bincount(chosen.reshape(-1), minlength=problem.experts)
    return counts[counts > 0]


def makespan(rows: list[int], widths: list[int], threads: int, decode_rows: int) -> float:
    """When the last thread ends, if idle ones take the next task: a segment's rows, a block's columns."""
    total = sum(widths) * sum(decode_rows + n for n in rows)
    if len(rows) * len(widths) > 20 * threads:  # who ends last matters by a twentieth then
        return total / threads
    ends = [0.0] * threads
    for n in rows:
        for width in widths:
            heapq.heapreplace(ends, ends[0] + width * (decode_rows + n))
    return max(ends)


def work(problem: Problem, config: KernelConfig, counts: np.ndarray, tier: str) -> float:
    """Products of a tile with a row, on the busiest thread, of all phases that decode.

    Args:
        problem: What is asked.
        config: How it runs.
        counts: Rows of each weight.
        tier: One of :data:`DECODE_ROWS`.
    """
    panel = config.tile_size_m
    segment_rows = _LARGEST_SEGMENT if panel == _LARGEST_PANEL else panel
    segments = [min(segment_rows, n - at) for n in counts.tolist() for at in range(0, n, segment_rows)]
    block = max(codec.HADAMARD_SIZE, config.tile_size_n // codec.HADAMARD_SIZE * codec.HADAMARD_SIZE)
    total, inputs = 0.0, (problem.hidden, problem.intermediate)
    for phase, outputs in enumerate(problem.outputs):
        widths = [min(block, outputs - at) for at in range(0, outputs, block)]
        depth = (problem.side_by_side if phase == 0 else 1) * codec.padded(inputs[phase]) / codec.TILE**2
        total += depth * makespan(segments, widths, config.simdgroups, DECODE_ROWS[tier])
    return total * (_NARROW_COST if block == codec.HADAMARD_SIZE else 1.0)
