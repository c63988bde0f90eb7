"""MLX's affine layers by the same model: what others have measured of its kernels, on any chip.

Four bits in groups of 64 are 4.5 bits per weight. Of an expert's rows MLX makes tiles only where the slots are sorted,
which mlx-lm does from 64 of them on, and an expert has several; else each slot reads its expert's weights by itself.
"""

from __future__ import annotations

from bench.metal.chips import ACCELERATOR, ACCELERATOR_TFLOPS, CHIPS, SCHEDULERS, STAGE_US, WORK, Chip, End
from bench.metal.layer import routing
from mlx_marlin.kernels.problem import Problem
from mlx_marlin.profile.uncertainty import Range

BITS = 4.5
# Times the time of reading at the bandwidth of long reads: 91 to 97 % of it in a head of 540 MB (escha-mlx), four
# fifths in whole steps of M4 (the same), 387 of 692 GB/s by one row of gather_qmm on M3 Ultra (mlx#4509).
READ = Range(1.05, 1.25, 1.79)
# Of experts of 2048 x 1024 on M4 (escha-mlx, 174 us of an evaluation taken off): 1024 slots of 256 experts take 6.2 ms,
# at 128 lanes per core and clock 5.8 of a lane per weight and slot; 2048 slots, in tiles of 16 rows, 7.3 ms, 58 % of
# the floating-point peak, rows that fill tiles included.
VECTOR_OPERATIONS = 5.8
MATRIX_FRACTION = 0.58
# On an M5 gather_qmm reaches 78 to 87 % of the accelerators at 64 rows per expert (mlx#3925). Its tiles have 64 rows,
# or 32 where experts have fewer than 64.
ACCELERATOR_FRACTION = 0.82
SORTED_SLOTS = 64
ROWS_FOR_TILES = 4  # per expert
TILE_ROWS = 16
# gate and up side by side, the activation, down; sorted: two sorts, a division, the gathers of x and of y more.
STAGES, SORTED_STAGES = 3, 8


def lane_rate(chip: Chip) -> float:
    """Operations per microsecond of all lanes: twice that is the floating-point peak."""
    return SCHEDULERS * 32 * chip.cores * chip.ghz * 1e3


def accelerator_rate(chip: Chip) -> float:
    """Floating-point operations per microsecond of the accelerators, with halves."""
    m5 = CHIPS["M5"]
    return ACCELERATOR_TFLOPS * 1e6 * chip.cores * chip.ghz / (m5.cores * m5.ghz)


def matrix_us(weights: float, rows: float, chip: Chip, end: End) -> float:
    """Products of rows with a matrix of so many weights on the matrix units."""
    if chip.has_accelerators:
        rate = accelerator_rate(chip) * ACCELERATOR_FRACTION
        return 2 * weights * rows / rate * getattr(ACCELERATOR, end) / ACCELERATOR.likely
    return 2 * weights * rows / (2 * lane_rate(chip) * MATRIX_FRACTION) * getattr(WORK, end)


def reading_us(bytes_read: float, chip: Chip, end: End) -> float:
    """Reading so many bytes."""
    return bytes_read / (chip.read_gbps * 1e3) * getattr(READ, end)


def dense_us(weights: float, rows: int, chip: Chip, end: End, bits: float = BITS) -> float:
    """Products of rows with one matrix: by vectors at few rows."""
    read = reading_us(weights * bits / 8, chip, end)
    vectors = weights * rows * VECTOR_OPERATIONS / lane_rate(chip) * getattr(WORK, end)
    blocks = 64 if chip.has_accelerators else 32
    tiles = matrix_us(weights, -(-rows // blocks) * blocks, chip, end)
    return max(read, min(vectors, tiles))


def experts_us(problem: Problem, chip: Chip, end: End, bits: float = BITS) -> float:
    """The products of a layer of experts and what moves rows between them, without what stages cost."""
    weights = sum(k * n for k, n in problem.shapes)
    slots = problem.rows * problem.top_k
    experts = routing(problem.experts, problem.top_k, problem.rows, 1, 1).experts
    read = reading_us(experts * weights * bits / 8, chip, end)
    if slots < SORTED_SLOTS or slots < ROWS_FOR_TILES * experts:
        return max(read, slots * weights * VECTOR_OPERATIONS / lane_rate(chip) * getattr(WORK, end))
    block = (64 if slots >= 64 * experts else 32) if chip.has_accelerators else TILE_ROWS
    tiles = routing(problem.experts, problem.top_k, problem.rows, block, block).tiles
    # Rows gathered, activated and put back, each written and read, in halves.
    moved = 2 * slots * (4 * problem.hidden + 6 * problem.intermediate)
    return max(read, matrix_us(weights, tiles * block, chip, end)) + reading_us(moved, chip, end)


def stages(problem: Problem) -> int:
    """Dependent stages of a layer of experts."""
    return SORTED_STAGES if problem.rows * problem.top_k >= SORTED_SLOTS else STAGES


def experts_range(problem: Problem, chip: Chip) -> Range:
    """Predicted microseconds of a layer of experts with 4 bits."""
    count = stages(problem)
    return Range(*(experts_us(problem, chip, e) + count * getattr(STAGE_US, e) for e in Range.__struct_fields__))
