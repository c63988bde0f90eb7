"""Apple GPUs as the cost model sees them. Every number is somebody's public measurement or specification;
none was measured here. ``SOURCES`` says where each kind comes from."""

from __future__ import annotations

from dataclasses import dataclass

SOURCES = {
    "cores, bandwidth": "Apple's specifications; measured read bandwidth where published (escha-mlx, "
    "omlx#2238, PonyExl3)",
    "ghz": "M1, M2: philipturner/metal-benchmarks. M4, M5: powermetrics, the base chip's for Pro and "
    "Max. M3: the middle "
    "of 1.4 to 1.6; M3 Ultra: 28.2 TFLOPS over 80 cores",
    "complex_cycles": "metal-benchmarks, measured on M1 and M2: 4 cycles per 32-lane integer multiply, "
    "shift or bit-extract",
    "issue": "1 instruction per clock and scheduler; M5: 1.7, measured for half arithmetic only and applied to all but "
    "shifts by a register amount. The weakest constant here",
    "stage_us": "a dependent tiny kernel inside MLX, M3 Ultra (mlx#4521)",
    "simd operations": "metal-benchmarks, measured on M1 and M2",
    "accelerators": "15.4 TFLOPS of halves on M5 (mlx#3925); by the same clocks 61.6 on M5 Max, where 52.7 to 59.6 "
    "were measured (mlx#3211)",
}

# Every change since the model was fixed against the peers' measurements: what, and why.
CHANGES: tuple[str, ...] = (
    "A shift by a register amount takes 14 clocks on M5 too: a kernel with one of them per 8 weights is 1.6 times as "
    "fast per core there as on M4, one with two only 1.3 times. K = 2 and 3 on M5 Pro move from 0.96 and 0.81 to "
    "1.08 and 1.00, measured over model.",
    "A random-index shuffle takes 30 clocks on M1 and M2, where that was measured; elsewhere 2, as other shuffles. "
    "Nobody has published its cost there. The one measurement that depends on it, PonyExl3 on M5 Max, moves from 1.70 "
    "to 1.00. It now goes by the formula of all kernels; its own, in which a shuffle waited for a shift, is gone: M1 "
    "Max moves from 0.97 to 0.82.",
    "The peers' loops are committed and recounted (peer_loops.metal). Those of several rows load four values of "
    "x per row, as published, instead of eight: 4 and 12 rows move from 0.90 to 1.09 and 1.25.",
    "Operations that had been free or too cheap: fma of halves, calls of the library, a shift of 16 bits by 8, joining "
    "two halves to a register (1), 64-bit additions (4, not 2), integer divisions (48, not 8). What the simulator "
    "passes through memory for simdgroup operations no longer counts as loads and stores, for ours as for the peers' "
    "kernels. Of the peers' times four move, by 1 to 2 %: 2, 4 and 12 rows from 1.09, 1.09 and 1.25 to 1.06, 1.07 and "
    "1.23, M1 Max from 0.82 to 0.83.",
)

SCHEDULERS = 4  # per core, 32 lanes each
COMPLEX_CYCLES = 4
SPECIAL_CYCLES = 8  # reciprocals, roots, exponentials
WIDE_SHIFT_INSTRUCTIONS = 3
SATURATING_SIMDGROUPS = 24  # per core, for the full arithmetic rate
STAGE_US = 2.75
ACCELERATOR_TFLOPS = 15.4  # of an M5, with halves; one accelerator per scheduler
# For a product of 16x16 and 16x32 halves.
ACCELERATOR_CYCLES = 2 * 16 * 32 * 16 * SCHEDULERS * 10 * 1.578e9 / (ACCELERATOR_TFLOPS * 1e12)
# A read bandwidth that nobody has published: the mean fraction of the specification that the measured chips
# reach.
READ_FRACTION = 0.88
SIMD_CYCLES = {"sum": 14.5, "max": 14.5, "min": 14.5, "matrix_multiply": 17.5}
OTHER_SIMD_CYCLES = 2
RANDOM_SHUFFLE_CYCLES = {"M1": 30, "M2": 30}  # else as the other shuffles: an assumption, see CHANGES


@dataclass(frozen=True)
class Chip:
    """A GPU.

    Attributes:
        name: As Metal reports the device, without "Apple".
        cores: GPU cores.
        ghz: Clock.
        read_gbps: Memory read bandwidth in GB/s.
        issue: Instructions per clock and scheduler.
        family: M1 to M5.
    """

    name: str
    cores: int
    ghz: float
    read_gbps: float
    issue: float = 1.0

    @property
    def family(self) -> str:
        return self.name.split()[0]


def _specified(gbps):
    return READ_FRACTION * gbps


CHIPS = {
    c.name: c
    for c in (
        Chip("M1", 8, 1.28, _specified(68)),
        Chip("M1 Pro", 16, 1.30, _specified(200)),
        Chip("M1 Max", 32, 1.30, _specified(400)),
        Chip("M1 Ultra", 64, 1.30, _specified(800)),
        Chip("M2", 10, 1.40, _specified(100)),
        Chip("M2 Pro", 19, 1.40, _specified(200)),
        Chip("M2 Max", 38, 1.40, _specified(400)),
        Chip("M2 Ultra", 76, 1.40, _specified(800)),
        Chip("M3", 10, 1.50, _specified(100)),
        Chip("M3 Pro", 18, 1.50, _specified(150)),
        Chip("M3 Max", 40, 1.50, _specified(400)),
        Chip("M3 Ultra", 80, 1.38, 692),
        Chip("M4", 10, 1.578, 102),
        Chip("M4 Pro", 20, 1.578, 243.7),
        Chip("M4 Max", 40, 1.578, 488),
        Chip("M5", 10, 1.578, 122, issue=1.7),
        Chip("M5 Pro", 16, 1.578, 278, issue=1.7),
        Chip("M5 Max", 40, 1.578, 540, issue=1.7),
    )
}


def label(config) -> str:
    """A KernelConfig of the GPU in a few words, as in the tables of predictions."""
    return f"{config.kernel_variant} {config.tile_size_m} x {config.tile_size_n}, {config.simdgroups} simdgroups"
