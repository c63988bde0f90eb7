"""The rules of the Metal kernels (see :class:`~.catalogue.KernelRules`). Pure.

The same limits as ``csrc/plan/tiling.cpp``, which throws where these functions give a reason.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import product

from .. import codec
from .config import VARIANTS, KernelConfig, Triple, make_name
from .problem import Problem
from .search_space import SIMDGROUPS as SIMDGROUPS_BY_WIDTH
from .search_space import TILE_SIZES, Hardware, Tiles, nearest_width

MATRIX_ROWS: dict[str, tuple[int, ...]] = {"base": (8, 16), "large_batch": (64,)}
"""Rows per row tile on simdgroup matrices, in units of 8."""

ACCELERATOR_ROWS: dict[str, int] = {"base": 32, "large_batch": 48}
"""Rows per row tile on neural accelerators, in units of 16: with two, decoding takes less time than multiplying;
a fourth would leave too few registers.
"""

TILE_ROWS: dict[str, tuple[int, ...]] = {
    "decode": (1, 2, 3),
    "prefill4": (4,),
    **{variant: (*rows, ACCELERATOR_ROWS[variant]) for variant, rows in MATRIX_ROWS.items()},
}
"""Rows per row tile: those of the accelerators last."""

TILE_COLUMNS: tuple[int, ...] = (16, 32, 48, 64, 96, 128, 160, 256)
"""Columns per threadgroup and projection. Whole Hadamard blocks fuse the output's transform into it."""

LARGE_BATCH_COLUMNS = codec.HADAMARD_SIZE
"""The only columns of large_batch: its gain is the fused transform."""

SIMDGROUPS = (4, 8, 12, 16)

MAX_EXPERTS = 2046
"""Slots are sorted in 32 KB of threadgroup memory: four words per expert."""

COMPILED_AT_RUN_TIME = True

# A 40-core GPU, the widest that is one die, should have a threadgroup per core.
_FEW_GROUPS = 40

# Rows from which tiles of 64 take less time than several of 16.
_BASE_ROWS = 32

# Sums of a lane: 4 per tile and 8 rows. With 32 of them and as many values of x a kernel stays near 96 registers, which
# 512 threads may have on an M1. On the accelerators two tiles are multiplied at a time, beside fewer values of x.
_MATRIX_SUMS = 32
_ACCELERATOR_SUMS = 64

# A quarter more than the cache: lines of codes that were used up make room for the next.
_CODE_SLACK = 1.25


def accelerated(config: KernelConfig) -> bool:
    """Whether a config's products run on neural accelerators."""
    return config.tile_size_m == ACCELERATOR_ROWS.get(config.kernel_variant)


def usual_variant(problem: Problem) -> str:
    """By rows per matrix: a tile of so many rows decodes a weight once for them.

    Decode is the only one that does not sort the slots by expert. large_batch has few, wide threadgroups: base where
    those would leave cores without one.
    """
    rows = problem.rows_per_matrix
    decode_rows = TILE_ROWS["decode"][-1] if problem.experts == 1 else 1
    if problem.experts > MAX_EXPERTS or problem.rows <= decode_rows:
        return "decode"
    if rows <= TILE_ROWS["prefill4"][-1]:
        return "prefill4"
    largest = _most_rows(problem, "large_batch")
    return "base" if rows <= _BASE_ROWS or _few_groups(problem, largest) else "large_batch"


def _most_rows(problem: Problem, variant: str) -> int:
    """The most rows of a tile, of the accelerators where there are any."""
    return ACCELERATOR_ROWS[variant] if problem.accelerators else MATRIX_ROWS[variant][-1]


def default_tiles(problem: Problem, variant: str) -> Tiles:
    """128 columns: whole Hadamard blocks. 16 simdgroups, whose ranges of k keep a narrow layer's few threadgroups busy;
    8 for 4 rows, and for 48 on accelerators, whose sums and x need more than the 96 registers that an M1 has for each
    of 512 threads. 32 columns where 128 would leave cores without a threadgroup, as a single weight and few rows do.
    """
    few, many = TILE_ROWS[variant][0], TILE_ROWS[variant][-1]
    rows = few
    # Accelerators from 9 rows of a linear on: with 8 others have measured a loss. Of experts that see 4 rows in the
    # mean many see more.
    several = problem.rows_per_matrix > few or (problem.accelerators and problem.experts > 1)
    if variant == "large_batch" or (variant == "base" and several):
        rows = _most_rows(problem, variant)
    if variant == "decode" and problem.experts == 1:
        rows = min(max(few, problem.rows * problem.top_k), many)
    if variant != "large_batch" and not problem.fused and _few_groups(problem, rows):
        return rows, 32, 8
    many_registers = variant == "prefill4" or (variant == "large_batch" and problem.accelerators)
    return rows, codec.HADAMARD_SIZE, 8 if many_registers and not _few_groups(problem, rows) else 16


def _few_groups(problem: Problem, rows: int) -> bool:
    """Whether tiles of whole Hadamard blocks are fewer than cores."""
    row_tiles = -(-problem.rows * problem.top_k // rows)
    return row_tiles * problem.intermediate < _FEW_GROUPS * codec.HADAMARD_SIZE


def legal_tiles(variant: str) -> list[Tiles]:
    return list(product(TILE_ROWS[variant], TILE_COLUMNS, SIMDGROUPS))


def refuses_triple(problem: Problem, triple: Triple) -> bool:
    """A triple is compiled for just these widths."""
    return problem.fused and problem.bits != (triple,)


def infeasible(problem: Problem, config: KernelConfig) -> str | None:
    """``use_fp32_acc=False`` is legal with all tiles: activations become halves of a power of two per 128-block, and
    sums inside one 16-deep tile are halves. Half the bytes of x, and on M5 more multiplications per clock. On neural
    accelerators all sums are floats; there an activation is one half instead of the two that stand for a float, which
    it is for bfloat16 in any case.
    """
    variant, rows, columns = config.kernel_variant, config.tile_size_m, config.tile_size_n
    if rows not in TILE_ROWS[variant]:
        return f"a {variant} tile on the GPU has {_either(TILE_ROWS[variant])} rows, got tile_size_m={rows}"
    if accelerated(config) and not problem.accelerators:
        return f"a {variant} tile of {rows} rows is for neural accelerators: an M5 or later, with macOS 26.2 or later"
    legal = (LARGE_BATCH_COLUMNS,) if variant == "large_batch" else TILE_COLUMNS
    if columns not in legal:
        return f"a {variant} tile on the GPU has {_either(legal)} columns, got tile_size_n={columns}"
    narrowest = min(problem.outputs)
    if columns > narrowest:
        return f"the narrowest output has {narrowest} columns, got tile_size_n={columns}"
    if config.simdgroups not in SIMDGROUPS:
        return f"a threadgroup has {_either(SIMDGROUPS)} simdgroups, got simdgroups={config.simdgroups}"
    if rows > 1 and problem.experts > MAX_EXPERTS:
        return (
            f"the slots of more than {MAX_EXPERTS} experts cannot be sorted and the layer has {problem.experts}; "
            "use tile_size_m=1"
        )
    return _matrix_infeasible(problem, config) if variant in ("base", "large_batch") else None


def _matrix_infeasible(problem: Problem, config: KernelConfig) -> str | None:
    """A simdgroup keeps its sums until the end, so every column tile needs a simdgroup with room."""
    tiles, units = config.tile_size_n // codec.TILE, config.tile_size_m // 8
    most = _ACCELERATOR_SUMS if accelerated(config) else _MATRIX_SUMS
    for shared in (2, 4) if accelerated(config) else (1, 2, 4):
        fits = 4 * shared * units <= most and problem.side_by_side * tiles // shared <= config.simdgroups
        if fits and tiles % shared == 0:
            return None
    if accelerated(config) and tiles % 2:
        return f"neural accelerators multiply 32 columns at a time, got tile_size_n={config.tile_size_n}"
    return (
        f"{config.simdgroups} simdgroups cannot hold the sums of {config.tile_size_m} rows and "
        f"{problem.side_by_side * config.tile_size_n} columns in registers; take more simdgroups or fewer columns"
    )


def effective(problem: Problem, config: KernelConfig) -> KernelConfig:
    """On neural accelerators a result of bfloat16, which keeps 8 bits, takes one half per activation in any case."""
    if accelerated(config) and problem.dtype == "bfloat16":
        return replace(config, use_fp32_acc=True)
    return config


def worth_timing(problem: Problem, hardware: Hardware | None) -> Iterator[KernelConfig]:
    """All legal tiles where nothing is known of the GPU. Some may not be feasible."""
    for variant in VARIANTS:
        for tiles in _tiles_worth_timing(problem, variant, hardware):
            for fp32 in (True, False) if problem.accuracy == "half" else (True,):
                yield KernelConfig(make_name(variant), *tiles, fp32, variant)


def _tiles_worth_timing(problem: Problem, variant: str, hardware: Hardware | None) -> list[Tiles]:
    every = legal_tiles(variant)
    if hardware is None:
        return every
    found = [tiles for tiles in every if _pays(problem, *tiles, hardware)]
    return list(dict.fromkeys([*always_timed(problem, variant), *found]))


def always_timed(problem: Problem, variant: str) -> tuple[Tiles, Tiles]:
    """Tiles that are candidates on every GPU: the default ones, and what the mappings by bit width give."""
    width = max(problem.widths)
    columns = LARGE_BATCH_COLUMNS if variant == "large_batch" else nearest_width(TILE_SIZES, width)
    mapped = TILE_ROWS[variant][0], columns, nearest_width(SIMDGROUPS_BY_WIDTH, width)
    return default_tiles(problem, variant), mapped


def _pays(problem: Problem, rows: int, columns: int, simdgroups: int, hardware: Hardware) -> bool:
    """Whether tiles can be the fastest on a GPU."""
    # Of a tile at least half of the rows should be real.
    if rows > 2 * max(1, problem.rows):
        return False
    # Every simdgroup may be at another 16-deep step of its range of k: that many bytes of codes are in use at a time,
    # and lines that leave the cache too early are read twice.
    codes = columns * max(problem.widths) * 2 * simdgroups
    if hardware.gpu_l1 and codes > _CODE_SLACK * hardware.gpu_l1:
        return False
    # csrc/plan/tiling.cpp: a simdgroup leaves the sums of at most 4 tiles of 16 columns, 8 rows at a time.
    sums = max(4 * simdgroups, problem.side_by_side * columns // codec.TILE) * codec.TILE * min(rows, 8) * 4
    if sums > hardware.threadgroup_bytes:
        return False
    # Every core should have a threadgroup; the narrowest tiles are the best that can be done.
    row_tiles = -(-max(1, problem.rows) * problem.top_k // rows)
    groups = row_tiles * min(-(-size // columns) for size in problem.outputs)
    return groups >= hardware.cores or columns == min(TILE_COLUMNS)


def half_sums(problem: Problem, config: KernelConfig) -> bool:
    return not config.use_fp32_acc


def _either(values: Iterable[int]) -> str:
    *most, last = map(str, values)
    return f"{', '.join(most)} or {last}" if most else last
