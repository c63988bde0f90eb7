"""Which configs the Metal kernels have, and the defaults. The GPU half of :mod:`mlx_marlin.kernels`; pure.

The same limits as ``csrc/plan/tiling.cpp``, which throws where these functions give a reason.
"""

from __future__ import annotations

TILE_ROWS = {"decode": (1, 2, 3), "prefill4": (4,), "base": (8, 16), "large_batch": (64,)}
"""Rows per row tile. base and large_batch compute units of 8 rows on simdgroup matrices."""

TILE_COLUMNS = (16, 32, 48, 64, 96, 128, 160, 256)
"""Columns per threadgroup and projection. Multiples of 128 fuse the output's Hadamard transform into it."""

SIMDGROUPS = (4, 8, 12, 16)

MAX_EXPERTS = 2046
"""Slots are sorted in 32 KB of threadgroup memory: four words per expert."""

# A 40-core GPU, the widest that is one die, should have a threadgroup per core.
_FEW_GROUPS = 40

# Sums of a lane: 4 per tile and 8 rows. With 32 of them and as many values of x a kernel stays near 96 registers, which
# 512 threads may have on an M1.
_MATRIX_SUMS = 32


def _padded(size: int) -> int:
    return -(-size // 128) * 128


def infeasible(problem, config) -> str | None:
    """Why the Metal kernels cannot run a config, or ``None``.

    ``use_fp32_acc=False`` is always legal: activations become halves of a power of two per 128-block, and the sums
    inside one 16-deep tile are halves. Half the bytes of x, and on M5 more multiplications per clock.
    """
    variant, rows, columns = config.kernel_variant, config.tile_size_m, config.tile_size_n
    if rows not in TILE_ROWS[variant]:
        return f"a {variant} tile on the GPU has {_either(TILE_ROWS[variant])} rows, got tile_size_m={rows}"
    legal = (128,) if variant == "large_batch" else TILE_COLUMNS
    if columns not in legal:
        return f"a {variant} tile on the GPU has {_either(legal)} columns, got tile_size_n={columns}"
    if columns > _narrowest(problem):
        return f"the narrowest output has {_narrowest(problem)} columns, got tile_size_n={columns}"
    if config.simdgroups not in SIMDGROUPS:
        return f"a threadgroup has {_either(SIMDGROUPS)} simdgroups, got simdgroups={config.simdgroups}"
    if rows > 1 and problem.experts > MAX_EXPERTS:
        return (
            f"the slots of more than {MAX_EXPERTS} experts cannot be sorted and the layer has {problem.experts}; "
            "use tile_size_m=1"
        )
    if variant in ("base", "large_batch"):
        return _matrix_infeasible(config, 2 if problem.kind == "swiglu" else 1)
    return None


def _narrowest(problem) -> int:
    outputs = (problem.intermediate, problem.hidden) if problem.kind == "swiglu" else (problem.intermediate,)
    return min(_padded(size) for size in outputs)


def _matrix_infeasible(config, projections: int) -> str | None:
    """A simdgroup keeps its sums until the end, so every column tile needs a simdgroup with room."""
    tiles, units = config.tile_size_n // 16, config.tile_size_m // 8
    for shared in (1, 2, 4):
        fits = 4 * shared * units <= _MATRIX_SUMS and projections * tiles // shared <= config.simdgroups
        if fits and tiles % shared == 0:
            return None
    return (
        f"{config.simdgroups} simdgroups cannot hold the sums of {config.tile_size_m} rows and "
        f"{projections * config.tile_size_n} columns in registers; take more simdgroups or fewer columns"
    )


def default_tiles(problem, variant: str) -> tuple[int, int, int]:
    """(tile_size_m, tile_size_n, simdgroups) that are legal for every problem.

    128 columns: whole Hadamard blocks. 16 simdgroups, whose ranges of k keep a narrow layer's few threadgroups busy; 8
    for 4 rows, whose sums and x need more than the 96 registers that an M1 has for each of 512 threads. 32 columns
    where 128 would leave cores without a threadgroup, as a single weight and few rows do.
    """
    rows = TILE_ROWS[variant][0]
    simdgroups = 8 if variant == "prefill4" else 16
    row_tiles = -(-problem.rows * problem.top_k // rows)
    if variant in ("decode", "prefill4") and row_tiles * problem.intermediate < _FEW_GROUPS * 128:
        return rows, 32, 8
    return rows, 128, simdgroups


def tiles(variant: str) -> list[tuple[int, int, int]]:
    """All (tile_size_m, tile_size_n, simdgroups) of a variant, legal or not for a given problem."""
    return [(m, n, s) for m in TILE_ROWS[variant] for n in TILE_COLUMNS for s in SIMDGROUPS]


def _either(values) -> str:
    *most, last = map(str, values)
    return f"{', '.join(most)} or {last}" if most else last
