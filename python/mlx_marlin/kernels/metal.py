"""The rules of the Metal kernels (see :class:`~.catalogue.KernelRules`). Pure, but for the number of cores.

The same limits as ``csrc/plan/tiling.cpp``, which throws where these functions give a reason.
"""

from __future__ import annotations

import math
import platform
import re
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import lru_cache
from itertools import product
from operator import itemgetter

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

# Cores that are assumed where the system does not tell: those of most chips that are one die, within a factor of two.
_ASSUMED_CORES = 20

# Products of a 16 x 16 tile with a row, by the operations that the simulator counts (bench/metal/work.py): what
# decoding the tile takes as much as; per threadgroup a simdgroup's part in adding up the sums, and an input value's
# transform; a dispatch that waits for another one, for which figures lie between 2.75 and 13 us. Chosen so that on the
# grid of tests/selection/test_defaults.py the cost model finds the least to be gained.
_DECODE_ROWS, _SIMDGROUP_ROWS, _ROTATION_ROWS, _STAGE_ROWS = 7.0, 30.0, 0.1, 2500.0

# The transform of the matrix kernels' input, in stages: its few threadgroups have units of 8 rows each.
_MATRIX_TRANSFORM = 2.0

# On the accelerators of an M5, in the same unit, for float32: a row, decoding beside it, and a tile at least.
_ACCELERATED_ROW, _ACCELERATED_DECODE, _ACCELERATED_TILE = 0.7, 2.0, 11.5
# Rows of a linear with which others have measured a loss on them.
_ACCELERATOR_LOSS = 8

# Of the columns, those among which the others lie.
_USUAL_COLUMNS = (16, 32, 64, 128)

# A core with fewer simdgroups cannot hide latency, and waits in proportion (bench/metal/model.py).
_BUSY_SIMDGROUPS = 24

# csrc/plan/tiling.cpp: decode transforms its input itself where that leaves room in threadgroup memory.
_ROTATED_BYTES = 16 << 10

# Rows of an expert, in the mean, from which its last row tile may be taken for half full.
_MANY_ROWS = 32

# Sums of a lane: 4 per tile and 8 rows. With 32 of them and as many values of x a kernel stays near 96 registers, which
# 512 threads may have on an M1. On the accelerators two tiles are multiplied at a time, beside fewer values of x.
_MATRIX_SUMS = 32
_ACCELERATOR_SUMS = 64

# A quarter more than the cache: lines of codes that were used up make room for the next.
_CODE_SLACK = 1.25


def accelerated(config: KernelConfig) -> bool:
    """Whether a config's products run on neural accelerators."""
    return config.tile_size_m == ACCELERATOR_ROWS.get(config.kernel_variant)


@lru_cache(maxsize=1)
def gpu_cores() -> int:
    """Cores of this machine's GPU; 0 where the system does not tell."""
    if platform.system() != "Darwin":
        return 0
    run = subprocess.run(
        ["/usr/sbin/ioreg", "-rc", "AGXAccelerator", "-d1", "-k", "gpu-core-count"],
        capture_output=True,
        text=True,
        check=False,
    )
    match = re.search(r'"gpu-core-count"\s*=\s*(\d+)', run.stdout)
    return int(match[1]) if match else 0


def usual_variant(problem: Problem) -> str:
    """The variant for the fewest rows whose tiles cost as little as any; decode alone does not sort the slots."""
    legal = VARIANTS if problem.experts <= MAX_EXPERTS else VARIANTS[:1]
    return min(legal, key=lambda variant: _cheapest(problem, variant, _cores())[0])


def default_tiles(problem: Problem, variant: str) -> Tiles:
    """The widest tiles of those that cost least."""
    return _cheapest(problem, variant, _cores())[1]


def _cores() -> int:
    return gpu_cores() or _ASSUMED_CORES


@lru_cache(maxsize=4096)
def _cheapest(problem: Problem, variant: str, cores: int) -> tuple[float, Tiles]:
    """The least cost of a variant's usual tiles, and the first of them that have it.

    Kept, as the tuner asks for the default of a problem once for each of its candidates.
    """
    return min(((_cost(problem, variant, cores, *t), t) for t in _usual_tiles(problem, variant)), key=itemgetter(0))


def _usual_tiles(problem: Problem, variant: str) -> list[Tiles]:
    return _tiles_of_layer(replace(problem, rows=1), variant)


@lru_cache(maxsize=1024)
def _tiles_of_layer(problem: Problem, variant: str) -> list[Tiles]:
    """Tiles that a default may have, whatever the number of rows, widest first.

    With 16 simdgroups an M1 has 96 registers for each thread, and 4 rows take more, as 48 on the accelerators do.
    """
    columns = (LARGE_BATCH_COLUMNS,) if variant == "large_batch" else _USUAL_COLUMNS
    found: list[Tiles] = []
    for rows in TILE_ROWS[variant]:
        if ACCELERATOR_ROWS.get(variant) == rows:
            simdgroups: tuple[int, ...] = (8,) if variant == "large_batch" else (16,)
        elif problem.accelerators and rows == MATRIX_ROWS.get(variant, (0,))[-1]:
            continue  # its place
        else:
            simdgroups = (8, 12) if variant == "prefill4" else (8, 16)
        found += product((rows,), columns, simdgroups)
    name = make_name(variant)
    legal = [t for t in found if infeasible(problem, KernelConfig(name, *t, True, variant)) is None]
    return sorted(legal or found, key=lambda tiles: -tiles[1])


def _cost(problem: Problem, variant: str, cores: int, rows: int, columns: int, simdgroups: int) -> float:
    """Products of a 16 x 16 tile with a row that a busy core does until the call is over.

    A row tile decodes each weight once for all of its rows, but the fewer threadgroups there are, the more cores wait.
    """
    row_tiles = _row_tiles(problem, rows)
    of_tile = _decoded_and_multiplied(problem, variant, rows, row_tiles)
    rotates = variant == "decode" and columns > codec.TILE and 4 * rows * codec.padded(problem.hidden) <= _ROTATED_BYTES
    transforms = 0.0 if rotates else _MATRIX_TRANSFORM if variant in MATRIX_ROWS else 1.0
    total = _STAGE_ROWS * (transforms + (problem.experts > 1 and rows > 1))  # of the input, and to sort
    for phase, (outputs, inputs) in enumerate(zip(problem.outputs, (problem.hidden, problem.intermediate))):
        weights = (problem.side_by_side if phase == 0 else 1) * columns * codec.padded(inputs) / codec.TILE**2
        groups = row_tiles * -(-outputs // columns)
        # Where it depends on the routing how many there are, a core that is done waits for half of one.
        known = problem.experts == 1 or rows == 1
        rounds = math.ceil(groups / cores) if known else max(1.0, groups / cores + 0.5)
        own = _SIMDGROUP_ROWS * simdgroups + (_ROTATION_ROWS * rows * inputs if rotates and phase == 0 else 0.0)
        total += max(rounds, _BUSY_SIMDGROUPS / simdgroups) * (weights * of_tile + own)
        # The output's transform: of experts the last stage does it in any case, and that of gate and up decode's down.
        if columns % codec.HADAMARD_SIZE and (not problem.fused or (phase == 0 and variant != "decode")):
            total += _STAGE_ROWS
    return total


def _row_tiles(problem: Problem, rows: int) -> float:
    """Row tiles of all experts together, if rows choose their experts evenly."""
    slots = max(1, problem.rows * problem.top_k)
    if problem.experts == 1 or rows == 1:
        return -(-slots // rows)
    chosen = min(problem.top_k, problem.experts) / problem.experts
    return problem.experts * _tiles_of_expert(max(1, problem.rows), chosen, rows)


@lru_cache(maxsize=4096)
def _tiles_of_expert(rows: int, chosen: float, tile_rows: int) -> float:
    """The mean of an expert's row tiles; ``chosen``: the probability that a row chooses it."""
    if rows * chosen > _MANY_ROWS:
        return rows * chosen / tile_rows + (1 - 1 / tile_rows) / 2  # the last one is half full
    if chosen == 1:
        return math.ceil(rows / tile_rows)
    probability, total = (1 - chosen) ** rows, 0.0
    for n in range(1, min(rows, 4 * _MANY_ROWS) + 1):
        probability *= (rows - n + 1) / n * chosen / (1 - chosen)
        total += probability * math.ceil(n / tile_rows)
    return total


def _decoded_and_multiplied(problem: Problem, variant: str, rows: int, row_tiles: float) -> float:
    """What a row tile does with a tile of weights."""
    slots = max(1, problem.rows * problem.top_k)
    if ACCELERATOR_ROWS.get(variant) != rows:
        return _DECODE_ROWS + (_multiplied(problem, rows, row_tiles, 8) if variant in MATRIX_ROWS else rows)
    if problem.experts == 1 and slots <= _ACCELERATOR_LOSS:
        return math.inf
    return max(_ACCELERATED_TILE, _ACCELERATED_ROW * _multiplied(problem, rows, row_tiles, 16) + _ACCELERATED_DECODE)


def _multiplied(problem: Problem, rows: int, row_tiles: float, unit: int) -> float:
    """Rows of a tile with those of incomplete units: units without any are left out."""
    slots = max(1, problem.rows * problem.top_k)
    if problem.experts == 1:
        return min(rows, -(-slots // unit) * unit / row_tiles)
    return min(rows, slots * (1 + (unit - 1) / 2 / problem.rows_per_matrix) / row_tiles)


def legal_tiles(variant: str) -> list[Tiles]:
    return list(product(TILE_ROWS[variant], TILE_COLUMNS, SIMDGROUPS))


def refuses_triple(problem: Problem, triple: Triple) -> bool:
    """A triple is compiled for just these widths."""
    return problem.fused and problem.bits != (triple,)


def infeasible(problem: Problem, config: KernelConfig) -> str | None:
    """``use_fp32_acc=False`` is legal with all tiles: activations become halves of a power of two per 128-block, with
    half the bytes. Without matrices sums inside one 16-deep tile are halves too, of which M5 adds more per clock. On
    neural accelerators an activation is one half instead of the two that stand for a float, which it is for bfloat16
    in any case.
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
