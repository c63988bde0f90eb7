"""Apple GPUs as the cost model sees them. Every number is somebody's public measurement or specification;
none was measured here. ``SOURCES`` says where each kind comes from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mlx_marlin.profile.uncertainty import Range

End = Literal["low", "likely", "high"]
"""Which end of all ranges: times are shortest at "low". Predictions are "likely" where nothing else is said."""

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
    "stage_us": "likely: a dependent tiny kernel inside MLX, M3 Ultra (mlx#4521). Low: a tiny dispatch of a serial "
    "encoder (infr#14). High: a third of what a peer's chain of three kernels takes on M2 Max and M5 Max besides "
    "its rows (sushi 1.2.1: 52 and 37 us). Between: 5.2 us on M2 Pro (ferrox#149), 10 queued on M1 Ultra (ds4#846)",
    "work": "the extremes of what is measured over model in the calibration, as times",
    "complex_slots": "issue slots that an operation of the complex pipe takes beside others: M1 2.2 (IMUL and 3 FMUL "
    "in 5.2 clocks) and 2.4 (IMAD and 3 IADD in 5.4), 1.6 at least, metal-benchmarks. One on M4 and M5, where the "
    "peers' loops leave no room for more; unknown on M3",
    "read": "a peer's short reads: 387 of 692 GB/s by one row of gather_qmm on M3 Ultra (mlx#4509); four fifths of the "
    "peak in whole steps of M4 (escha-mlx)",
    "matrix": "M5: 1.7 instructions per clock are known for halves only, so that a matrix product may take 1.7 times "
    "as long as by that",
    "accelerator": "MLX's grouped products reach 78 % of the rate on M5 (mlx#3925)",
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
    "Intercept and slope have ranges. On M1 and M2 an operation of the complex pipe takes 2 issue slots instead of 1: "
    "of the peers' rates M1 Max moves from 0.83 to 0.85.",
    "A layer is put together from one expert's row tiles for every variant and number of rows, in the passes of its "
    "plan, with the sorting of its slots. Before, 1024 and 2048 rows were predicted as one pass.",
)

SCHEDULERS = 4  # per core, 32 lanes each
COMPLEX_CYCLES = 4
SPECIAL_CYCLES = 8  # reciprocals, roots, exponentials
WIDE_SHIFT_INSTRUCTIONS = 3
SATURATING_SIMDGROUPS = 24  # per core, for the full arithmetic rate
STAGE_US = Range(1.3, 2.75, 13.0)
# Times the time of issuing, and of the complex pipe.
WORK = Range(0.83, 1.0, 1.23)
COMPLEX_SLOTS = {"M1": Range(1.6, 2.0, 2.4), "M2": Range(1.6, 2.0, 2.4), "M3": Range(1.0, 1.0, 2.4)}
NO_RANGE = Range(1.0, 1.0, 1.0)
# Times the time of reading at the bandwidth of long reads.
READ = Range(1.0, 1.0, 1.25)
READ_OF_MANY_CORES = Range(1.0, 1.0, 1.79)
MANY_CORES = 30
# Times the clocks of a product of simdgroup matrices.
MATRIX = {"M5": Range(1.0, 1.0, 1.7)}
ACCELERATOR = Range(1.0, 1.0, 1.28)
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

    @property
    def has_accelerators(self) -> bool:
        return self.family == "M5"

    def complex_slots(self, end: End) -> float:
        """Issue slots of an operation of the complex pipe."""
        return getattr(COMPLEX_SLOTS.get(self.family, NO_RANGE), end)

    def matrix(self, end: End) -> float:
        """Factor on the clocks of a product of simdgroup matrices."""
        return getattr(MATRIX.get(self.family, NO_RANGE), end)

    def read(self, end: End) -> float:
        """Factor on the time of reading."""
        return getattr(READ_OF_MANY_CORES if self.cores >= MANY_CORES else READ, end)


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
