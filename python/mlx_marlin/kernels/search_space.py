"""Which of the legal tiles are worth timing on a machine: derived from its cores and caches. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from . import cpu, metal

Tiles = tuple[int, int, int]
"""(tile_size_m, tile_size_n, simdgroups)."""

# csrc/cpu/tier/gemm.h: a sweep of 16 tiles is 16 KB of decoded weights, and 1 KB of x per row.
_SWEEP_BYTES, _SWEEP_ROW_BYTES = 16 << 10, 1 << 10
# A quarter more than the cache: lines of codes that were used up make room for the next.
_CODE_SLACK = 1.25

TILE_SIZES = {2: 128, 3: 96, 4: 64, 8: 64}
SIMDGROUPS = {2: 16, 3: 12, 4: 8, 8: 4}
"""Columns and simdgroups by bit width: fewer bits unpack into more weights per byte, so that more columns and more
simdgroups work on as many bytes. The defaults of a profile, and always among a GPU's candidates."""


@dataclass(frozen=True)
class Hardware:
    """What a device has, as far as tiles depend on it. The defaults are what is assumed where nothing tells.

    Attributes:
        cores: Cores of the CPU that this process may use, or of the GPU; 0 where not known.
        fast_cores: Of a CPU's cores those of the fastest kind.
        l1d: Bytes of a CPU core's first-level data cache. Default: 32 KB, the least among current ones.
        l2_per_core: Bytes of second-level cache per core. Default: 256 KB, the least among current ones.
        threadgroup_bytes: Memory of a threadgroup. Default: 32 KB, Metal's limit on every Apple GPU.
        gpu_l1: Bytes of a GPU core's first-level cache; 0 where not known, which limits nothing.
    """

    cores: int = 0
    fast_cores: int = 0
    l1d: int = 32 << 10
    l2_per_core: int = 256 << 10
    threadgroup_bytes: int = 32 << 10
    gpu_l1: int = 0


def cpu_tiles(problem, hardware: Hardware) -> Iterator[Tiles]:
    """Tiles for the CPU, those that its caches favour first; some may run the same code."""
    panels = [rows for of_variant in cpu.PANEL_ROWS.values() for rows in of_variant]
    favoured = {_largest(panels, lambda p: _SWEEP_BYTES + p * _SWEEP_ROW_BYTES <= hardware.l1d)}
    # The x of a panel is read again for each 16 columns, beside the sums of gate and up: half of the cache for them,
    # the other half for the codes that stream through.
    row_bytes = 4 * cpu.padded(problem.hidden) + 2 * 4 * cpu.DEFAULT_COLUMNS
    favoured.add(_largest(panels, lambda p: p * row_bytes <= hardware.l2_per_core // 2))
    cores = max(1, hardware.cores)
    # One thread has no hand-over; the fast cores do not wait for slow ones; half of the cores leave a sibling thread
    # or a neighbour its share.
    threads = sorted({1, min(cores, hardware.fast_cores or cores), max(1, cores // 2), cores}, reverse=True)
    for rows in sorted(panels, key=lambda p: (p not in favoured, -p)):
        for columns in reversed(cpu.TASK_COLUMNS):
            for workers in threads:
                yield rows, columns, workers


def _largest(values: list[int], fits) -> int:
    return max((v for v in values if fits(v)), default=values[0])


def gpu_tiles(problem, variant: str, hardware: Hardware | None) -> list[Tiles]:
    """Tiles of a variant for a GPU; all legal ones where nothing is known of it. Some may not be feasible."""
    every = metal.tiles(variant)
    if hardware is None:
        return every
    always = [metal.default_tiles(problem, variant), _mapped(problem, variant)]
    found = [tiles for tiles in every if _worth_timing(problem, *tiles, hardware)]
    return list(dict.fromkeys([*always, *found]))


def _mapped(problem, variant: str) -> Tiles:
    """The tiles that the mappings by bit width give."""
    width = min(TILE_SIZES, key=lambda bits: (abs(bits - max(problem.widths)), bits))
    columns = 128 if variant == "large_batch" else TILE_SIZES[width]
    return metal.TILE_ROWS[variant][0], columns, SIMDGROUPS[width]


def _worth_timing(problem, rows: int, columns: int, simdgroups: int, hardware: Hardware) -> bool:
    # Of a tile at least half of the rows should be real.
    if rows > 2 * max(1, problem.rows):
        return False
    # Every simdgroup may be at another 16-deep step of its range of k: that many bytes of codes are in use at a time,
    # and lines that leave the cache too early are read twice.
    codes = columns * max(problem.widths) * 2 * simdgroups
    if hardware.gpu_l1 and codes > _CODE_SLACK * hardware.gpu_l1:
        return False
    # csrc/plan/tiling.cpp: a simdgroup leaves the sums of at most 4 tiles of 16 columns, 8 rows at a time.
    projections = 2 if problem.kind == "swiglu" else 1
    sums = max(4 * simdgroups, projections * columns // 16) * 16 * min(rows, 8) * 4
    if sums > hardware.threadgroup_bytes:
        return False
    # Every core should have a threadgroup; the narrowest tiles are the best that can be done.
    outputs = (problem.intermediate, problem.hidden) if problem.kind == "swiglu" else (problem.intermediate,)
    row_tiles = -(-max(1, problem.rows) * problem.top_k // rows)
    groups = row_tiles * min(-(-size // columns) for size in outputs)
    return groups >= hardware.cores or columns == min(metal.TILE_COLUMNS)
