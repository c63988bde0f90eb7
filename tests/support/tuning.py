"""What the tests of the tuner share: small layers, planted clocks, entries."""

import math
import random

import numpy as np

from mlx_marlin import kernels
from mlx_marlin.autotune import cli as tune_cli
from mlx_marlin.autotune.workload import ConfigClock
from mlx_marlin.kernels import KernelConfig
from mlx_marlin.layers.experts import TrellisSwitchGLU
from mlx_marlin.profile.active import AutotuneConfig
from mlx_marlin.profile.schema import Entry, Timing
from mlx_marlin.weights.synthetic import random_weight
from tests.support import cases

# Configs that every CPU has, one per variant.
DECODE = KernelConfig("moe_trellis_swiglu_decode", 2, 64, 1, True, "decode")
PREFILL = KernelConfig("moe_trellis_swiglu_prefill4", 4, 64, 1, True, "prefill4")
BASE = KernelConfig("moe_trellis_swiglu", 16, 64, 1, True, "base")
LARGE = KernelConfig("moe_trellis_swiglu_large_batch", 64, 128, 1, True, "large_batch")

# A run of mlx_marlin-tune that takes a second or two.
SMALL = ["--shape", "256,128,4,2", "--bits", "2,3", "--device", "cpu", "--iterations", "2", "--warmup", "1", "--quick"]

# A profile of the schema without a fingerprint: the example of mixed_bpw_autotuning, to the letter.
DOCUMENT = {
    "device_name": "M4 Max",
    "device_family": "M4",
    "tile_size_mapping": {"2": 128, "3": 96, "4": 64, "8": 64},
    "simdgroup_mapping": {"2": 16, "3": 12, "4": 8, "8": 4},
    "lookup_table": {
        "4": {
            "4096": {
                "(2, 4)": {
                    "kernel_name": "moe_trellis_mixed_swiglu_decode",
                    "tile_size_m": 64,
                    "tile_size_n": 64,
                    "simdgroups": 12,
                    "use_fp32_acc": False,
                    "kernel_variant": "decode",
                }
            }
        }
    },
    "adaptation_enabled": True,
    "adaptation_history_len": 100,
    "benchmark_count": 250,
}


def tune(*more):
    """The exit code of a small run."""
    return tune_cli.main([*SMALL, *more])


def linear(bits=3, out=256):
    """A weight of 256 rows."""
    return random_weight(np.random.default_rng(bits), 256, out, bits)


def mixed_experts(triples=((2, 3, 4), (3, 3, 3), (4, 2, 6))):
    """An expert per triple of widths."""
    rng = np.random.default_rng(7)
    formats = [[(b, "mul1") for b in triple] for triple in triples]
    return TrellisSwitchGLU(*cases.random_experts(rng, 256, 128, formats).values())


def table():
    """A lookup table with one width, two widths, and gaps."""
    return {
        1: {256: {(2, 4): DECODE, (3,): DECODE}},
        4: {256: {(2, 4): PREFILL}, 1024: {(2, 4): LARGE}},
        16: {256: {(2, 4): BASE}},
    }


def entry(config=DECODE, ms=1.0, default=BASE, baseline=2.0, stamp=1.0, **more):
    """What tuning might have found."""
    ratio = (ms / baseline, 0.4, 0.6)
    return Entry(
        config, Timing(20, ms, 0.02), default, Timing(20, baseline, 0.02), ratio, "faster", "correct", stamp, **more
    )


def cpu_profile(entries=None):
    """A profile of this machine's CPU."""
    made = AutotuneConfig.of_machine("cpu")
    for problem, found in (entries or {}).items():
        made.add(problem, found)
    return made


class PlantedClock(ConfigClock):
    """A clock that gives planted times instead of measured ones, after the real check."""

    mean: dict = {}
    rng = random.Random(0)
    bytes: dict = {}

    def warm_up(self, calls):
        if self._check is not None:
            self._check()
        self.weigh()

    def weigh(self):
        self.memory_bytes = self.bytes.get(self.config, 1 << 20)

    def __call__(self):
        return self.mean.get(self.config, 1.0) * math.exp(self.rng.gauss(0, 0.03))


def variants_of(configs):
    return {kernels.parse_name(c.kernel_name).variant for c in configs}
