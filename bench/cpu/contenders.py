"""What layer.py measures: ours, and how any layer becomes a series of timed calls."""

from __future__ import annotations

import math
import statistics
import time
from functools import partial

import mlx.core as mx
import numpy as np

from bench.cpu.shape import Shape
from mlx_marlin import ExpertBank, TrellisSwitchGLU, _ext, codec, device
from mlx_marlin.measure import stats
from mlx_marlin.weights.synthetic import random_weight

# The mix: bits of gate, up and down, expert by expert, 3 on average.
MIXED = ((2, 3, 4), (3, 4, 2), (4, 2, 3))
# A first call longer than this needs no warm-up: it is a sample.
SLOW_SECONDS = 1.0
# Weights in memory, in units of the last-level cache.
CACHE_FACTOR = 1.25
# A call had its cores if it used this part of their time.
OWN_CORES = 0.93
# Calls that a GPU does one after the other before anybody waits: waiting costs 0.12 to 0.19 ms, a call of one row less.
GPU_CHAIN = 32


def run_chain(layer, x: mx.array, indices: list[mx.array], first: int) -> None:
    """Evaluate a chain of calls, each of which needs the one before it."""
    for i in range(GPU_CHAIN):
        y = layer(x, indices[(first + i) % len(indices)])
        x = x + 1e-3 * y[:, 0]
    mx.eval(x)


class MarlinContender:
    """TrellisSwitchGLU over random trellis words, with the config that a layer selects.

    Args:
        shape: Of the layer.
        bits: A width, or "mixed".
        codebook: Of all weights.
        instruction_set: Of the CPU; None: the GPU, with float16 activations.
        rng: Source of the words.
        threads: Of the CPU.
        accuracy: One of kernels.ACCURACIES.
    """

    peer = False

    def __init__(
        self, shape: Shape, bits: str, codebook: str, instruction_set: str | None, rng, threads: int, accuracy: str
    ):
        self.gpu = instruction_set is None
        self.name = f"mlx_marlin {codebook} {instruction_set or 'gpu'} {accuracy}"
        self.codebook, self.instruction_set, self.accuracy = codebook, instruction_set, accuracy
        self.cores = 0 if self.gpu else threads
        triples = MIXED if bits == "mixed" else ((codec.as_width(float(bits)),) * 3,)
        sizes = ((shape.hidden, shape.intermediate),) * 2 + ((shape.intermediate, shape.hidden),)
        experts = [
            [random_weight(rng, *size, triples[e % len(triples)][p], codebook) for e in range(shape.experts)]
            for p, size in enumerate(sizes)
        ]
        self.bits = sum(w.bits for weights in experts for w in weights) / (3 * shape.experts)
        self.layer = TrellisSwitchGLU(bank=ExpertBank(*experts))
        self.layer.accuracy = accuracy
        mx.eval(self.layer.parameters())

    def prepare(self, x: np.ndarray, routings: list[np.ndarray]) -> list:
        """One callable per routing; on a GPU each is a chain that begins with its routing."""
        x = mx.array(x).astype(mx.float16 if self.gpu else mx.float32)
        indices = [mx.array(routing) for routing in routings]
        mx.eval(x, indices)
        if self.gpu:
            return [partial(run_chain, self.layer, x, indices, i) for i in range(len(indices))]
        return [partial(self._run, x, i) for i in indices]

    def _run(self, x: mx.array, indices: mx.array) -> None:
        if _ext.instruction_set() != self.instruction_set:
            _ext.set_instruction_set(self.instruction_set)
        mx.eval(self.layer(x, indices))


class Contender:
    """A layer, as often as it takes to exceed the cache, and its timed calls."""

    def __init__(self, make, shape: Shape, cpu_time: bool = False):
        self._cpu_time = cpu_time
        first = make()
        layer_bytes = first.bits / 8 * shape.experts * shape.weights_per_expert
        copies = math.ceil(CACHE_FACTOR * device.last_level_cache() / layer_bytes)
        self.layers = [first] + [make() for _ in range(copies - 1)]
        self.first, self.name, self.bits = first, first.name, first.bits
        self._per_call = GPU_CHAIN if first.gpu else 1
        self.calls, self.samples, self._next = [], [], 0

    def prepare(self, x: np.ndarray, routings: list[np.ndarray]) -> None:
        """Forget the samples and get ready for other rows; routing i goes to copy i modulo copies."""
        mx.set_default_device(mx.gpu if self.first.gpu else mx.cpu)
        prepared = [layer.prepare(x, routings) for layer in self.layers]
        self.calls = [prepared[i % len(prepared)][i % len(routings)] for i in range(len(routings) * len(prepared))]
        self.samples, self._next = [], 0
        self.call()
        if self.samples[0][0] < SLOW_SECONDS:
            self.call()
            self.estimate = self.samples[-1][0]
            self.samples = []
        else:
            self.estimate = self.samples[0][0]

    def call(self, count: int = 1) -> None:
        """Time single calls; the CPU time of the group, whose clock is coarse, tells how many cores they had.

        With ``cpu_time`` the sample is the group's CPU time by call.
        """
        mx.set_default_device(mx.gpu if self.first.gpu else mx.cpu)
        seconds, cpu = [], time.process_time()
        for _ in range(count):
            work = self.calls[self._next % len(self.calls)]
            self._next += 1
            start = time.perf_counter()
            work()
            seconds.append((time.perf_counter() - start) / self._per_call)
        cpu = time.process_time() - cpu
        if self._cpu_time:
            self.samples.append((cpu / count, self.first.cores))
        else:
            self.samples += [(s, cpu / (sum(seconds) * self._per_call)) for s in seconds]

    def summary(self) -> dict:
        """Median, spread and cores of the calls that had their cores, or of all where none had."""
        own = [s for s in self.samples if s[1] >= OWN_CORES * self.first.cores]
        seconds = [s for s, _ in own or self.samples]
        return {
            "median_s": statistics.median(seconds),
            "spread": stats.spread(seconds),
            "calls": len(seconds),
            "cores": statistics.median(c for _, c in own or self.samples),
            "disturbed_calls": len(self.samples) - len(own),
            "samples": [[round(s, 7), round(c, 3)] for s, c in self.samples],
        }
