"""The clock. Knows callables, not kernels."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable

import mlx.core as mx

# A chain lasts at least this long: 2 ms is 10^4 ticks of a 200 ns timer and above one scheduler interrupt.
MIN_CHAIN_SECONDS = 2e-3
# Above this many launch floors the floor is less than 1 %, half of the default margin: one call is timed by itself.
FLOORS_TO_IGNORE = 100
MAX_CHAIN = 64
# A sample of a short call is the median of several, 25 ms in all but at most 9: an interrupt of some milliseconds then
# spoils one of them, not the sample.
SAMPLE_SECONDS, MAX_REPEATS = 0.025, 9
# Warm-up ends early after this time: page faults and clock ramps of one call are over by then.
WARMUP_SECONDS = 0.05
# The control's product: 4 MB of weights, beyond the nearest caches as a layer's are, and about a millisecond of work.
# It is averaged over all rounds, so that a fifth of a candidate's time is enough for each of its samples.
CONTROL_ROWS, CONTROL_SIZE, CONTROL_SECONDS = 16, 1024, 0.005


def launch_floor(samples: int = 21) -> float:
    """Median seconds that MLX takes to evaluate next to nothing on the default device."""
    x = mx.zeros((1,))
    mx.eval(x)
    return statistics.median(_timed(lambda: x + 1) for _ in range(samples))


def _timed(make: Callable[[], mx.array]) -> float:
    start = time.perf_counter()
    mx.eval(make())
    return time.perf_counter() - start


class Chain:
    """A clock for one way to compute something: each call gives the seconds of one evaluation.

    Calls are chained, so that each waits for the one before. Short ones are timed at two lengths, and the slope cancels
    what it costs to launch an evaluation at all.

    Args:
        step: ``step(x, i) -> y``, the i-th evaluation; i counts up, so that the step can rotate over weight sets.
        x: Its input, which must not depend on ``i``.
        floor: See :func:`launch_floor`.
        sample_seconds: What a sample of a short call takes in all. Default: ``SAMPLE_SECONDS``.
    """

    def __init__(
        self,
        step: Callable[[mx.array, int], mx.array],
        x: mx.array,
        floor: float,
        sample_seconds: float = SAMPLE_SECONDS,
    ):
        self._step, self._x, self._floor, self._sample_seconds = step, x, floor, sample_seconds
        self._count = 0
        self._length, self._repeats = 1, 1

    def warm_up(self, calls: int) -> None:
        """Evaluate at least twice, up to ``calls`` times or 50 ms, and set the chain's length from the fastest."""
        best, start = math.inf, time.perf_counter()
        for i in range(max(2, calls)):
            best = min(best, self._run(1))
            if i and time.perf_counter() - start > WARMUP_SECONDS:
                break
        if best > FLOORS_TO_IGNORE * self._floor:
            self._length = 1
        else:
            self._length = min(MAX_CHAIN, 1 + max(4, math.ceil(MIN_CHAIN_SECONDS / best)))
        self._repeats = max(1, min(MAX_REPEATS, int(self._sample_seconds / (self._length * best))))

    def __call__(self) -> float:
        return statistics.median(self._once() for _ in range(self._repeats))

    def _once(self) -> float:
        if self._length == 1:
            return self._run(1)
        while True:
            short, long = self._run(1), self._run(self._length)
            if long > short:
                return (long - short) / (self._length - 1)

    def _run(self, length: int) -> float:
        start = time.perf_counter()
        x = self._x
        for _ in range(length):
            y = self._step(x, self._count)
            self._count += 1
            x = mx.depends([self._x], [y])[0]
        mx.eval(y)
        return time.perf_counter() - start


def control(stream: mx.Device, floor: float) -> Chain:
    """The clock of a fixed product of MLX's own: how fast the machine is while other things are timed.

    Args:
        stream: Where it runs.
        floor: See :func:`launch_floor`.
    """
    x, w = mx.ones((CONTROL_ROWS, CONTROL_SIZE)), mx.ones((CONTROL_SIZE, CONTROL_SIZE))
    mx.eval(x, w)
    return Chain(lambda x, i: mx.matmul(x, w, stream=stream), x, floor, CONTROL_SECONDS)
