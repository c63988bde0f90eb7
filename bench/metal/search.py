"""Predicted: the encoder's search on Apple GPUs, in weights per second, and the hours that it takes for a model.

Operations are counted in the simulator. What the model of the products leaves out counts here, because the forward
kernel has one threadgroup per core, all of which waits at its barriers: threadgroup memory, barriers, and the values
that do not fit into registers. The two kernels of a pass follow each other; tiles are taken to fill the cores evenly.
"""

from __future__ import annotations

from functools import cache

from bench.metal.chips import CHIPS, SATURATING_SIMDGROUPS, SCHEDULERS, Chip, End
from bench.metal.model import scheduler_cycles
from mlx_marlin import codec
from mlx_marlin.profile.uncertainty import Range
from tests.support import metal_counts
from tests.support.metal_executor import viterbi_plan

SHOWN = ("M1", "M2 Max", "M4", "M4 Max", "M5", "M5 Max")
WIDTHS = (2, 2.5, 3, 4)
# Of Qwen3-30B-A3B, with its head.
MODEL_WEIGHTS = 30.5e9
_THREADS = 512
_STEPS = codec.TILE_SIZE
# Simdgroups of the forward kernel on a core, over those that reach the full rate with one sum each. A thread has eight
# independent ones, which may be enough to hide all of what is lacking: at best they do, at worst not at all.
_LACKING = SATURATING_SIMDGROUPS * 32 / _THREADS
SATURATION = Range(1.0, (1 + _LACKING) / 2, _LACKING)
# Clocks per byte of threadgroup memory, of one core: half of them hidden behind arithmetic, as L1's 64 bytes per clock,
# or half that rate (M1, openmm#3911).
THREADGROUP_CLOCKS = Range(1 / 128, 1 / 64, 1 / 32)
# Of a threadgroup: the latency of threadgroup memory on M1, 48 clocks (openmm#3911), once, twice and four times. Nobody
# has published what a barrier of 16 simdgroups takes.
BARRIER_CLOCKS = Range(48, 96, 192)
L2_BYTES_PER_CLOCK = 32  # of one core, M1 and M2 (metal-benchmarks); beside arithmetic


@cache
def counted(bits: float, codebook: str) -> list[tuple[dict, object]]:
    """The dispatches of one tile's search, and what they did."""
    return metal_counts.viterbi(bits, codebook)


def moved_bytes(bits: float) -> tuple[float, float]:
    """Bytes that a step of a tile moves through threadgroup memory, and reads of the table of values, on average."""
    half = codec.half_bits(bits)
    even, odd = half // 2, (half + 1) // 2
    low = min(odd, 3)
    high = 7 - low
    written = [4 * 65536 / 2**out for out in (even, odd)]
    read = [4 * _THREADS * 2 ** (high + max(0, low - fresh)) for fresh in (even, odd)]
    held = 40 if half <= 3 else 96 if half <= 5 else 128  # of the thread's 128 states, as viterbi.metal has it
    return sum(written + read) / 2, 2 * _THREADS * (128 - held)


def core_clocks(bits: float, codebook: str, chip: Chip, end: End) -> float:
    """Clocks that a core takes for one tile."""
    total = 0.0
    shared, table = moved_bytes(bits)
    for dispatch, result in counted(bits, codebook):
        simd = {name: n for name, n in result.stats["simd"].items() if name != "barrier"}
        issue, complex_pipe = scheduler_cycles(dict(result.operations.counts), simd, chip, end)
        clocks = max(issue, complex_pipe) / SCHEDULERS
        if "viterbi" in dispatch["kernel"]:
            clocks = max(clocks * getattr(SATURATION, end), _STEPS * table / L2_BYTES_PER_CLOCK)
            clocks += _STEPS * shared * getattr(THREADGROUP_CLOCKS, end)
            clocks += result.stats["barriers"] * getattr(BARRIER_CLOCKS, end)
        total += clocks
    return total


def history_bytes(bits: float, codebook: str) -> float:
    """Bytes of kept minima that a tile writes and reads: the first pass half of them, the second all."""
    (kept,) = viterbi_plan(1, bits, codebook)["scratch"].values()
    return 2 * 1.5 * kept


def weights_per_second(bits: float, codebook: str, chip: Chip) -> list[float]:
    """Predicted, at each end of all ranges: the first is the fastest."""
    found = []
    for end in Range.__struct_fields__:
        seconds = core_clocks(bits, codebook, chip, end) / (chip.ghz * 1e9 * chip.cores)
        seconds = max(seconds, chip.read(end) * history_bytes(bits, codebook) / (chip.read_gbps * 1e9))
        found.append(codec.TILE_SIZE / seconds)
    return found


def predict(chips: tuple[str, ...] = SHOWN, widths: tuple[float, ...] = WIDTHS) -> list[dict]:
    """A row for each chip and width."""
    rows = []
    for name in chips:
        for bits in widths:
            rates = weights_per_second(bits, "mul1", CHIPS[name])
            hours = [round(MODEL_WEIGHTS / r / 3600, 2) for r in rates]
            rows.append({"chip": name, "bits": bits, "weights/s": [round(r) for r in rates], "hours of 30.5e9": hours})
    return rows


def show(rows: list[dict]) -> None:
    """Print the table."""
    print("PREDICTED, not measured: the encoder's search, low / likely / high by time")
    for row in rows:
        rates = " / ".join(f"{r / 1e6:.1f}" for r in row["weights/s"])
        hours = " / ".join(f"{h:.2f}" for h in row["hours of 30.5e9"])
        print(f"{row['chip']:7s} {row['bits']:4} bits  {rates} million weights/s, a 30B model {hours} h")
