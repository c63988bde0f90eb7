"""What timings say about kernels: recent latencies, and a sequential test that allows few false switches.

A :class:`Ledger` keeps the latencies of the kernels that compete for one kind of call. It replaces the kernel
in charge only on significance. Its level is spent once over its whole life: a test is a pair of kernels and
five looks, the i-th test opened gets 1 / (i (i + 1)) of the level, and each look a fifth of that. However
often tests are opened again, after a switch or after five looks without one, the shares sum to at most the
level.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection, Hashable, Iterable, Sequence
from itertools import islice
from typing import Generic, TypeVar

from ..measure.stats import welch_p_value

# A test looks when the smaller of both counts reaches these; five equal shares of its level.
LOOKS = (5, 10, 20, 40, 80)
MIN_SAMPLES = LOOKS[0]
# Weight of the newest sample in the trend: half of the weight lies on the last 7 samples, about one look.
EMA_WEIGHT = 0.1
# Timings of a kernel scatter by 1 % at least; less in a few samples is luck.
_MIN_VARIANCE = 0.01**2

Kernel = TypeVar("Kernel", bound=Hashable)
"""What stands for a kernel: its name, or a config."""


class History:
    """The recent latencies of one kernel.

    Logarithms are kept: timing noise is multiplicative and skewed, and their means compare ratios of times.

    Args:
        length: Samples kept.
    """

    __slots__ = ("_total", "count", "ema_ms", "logs")

    def __init__(self, length: int):
        self.count = 0
        self.logs: deque[float] = deque(maxlen=length)
        self.ema_ms = 0.0
        self._total = 0.0

    def add(self, latency_ms: float) -> None:
        log = math.log(latency_ms)
        logs = self.logs
        if len(logs) == logs.maxlen:
            self._total -= logs[0]
        logs.append(log)
        self._total += log
        self.ema_ms += (EMA_WEIGHT if self.count else 1.0) * (latency_ms - self.ema_ms)
        self.count += 1

    @property
    def mean_log(self) -> float:
        return self._total / len(self.logs)

    def last(self, n: int) -> list[float]:
        """The newest n logarithms, or all that are kept if fewer."""
        return list(islice(self.logs, max(0, len(self.logs) - n), None))

    def summary(self) -> dict:
        """``samples``, geometric ``mean_ms`` of the samples kept, and ``ema_ms``."""
        return {"samples": len(self.logs), "mean_ms": math.exp(self.mean_log), "ema_ms": self.ema_ms}


class _PairTest:
    """One kernel in charge against one challenger: where its samples begin, and how many looks were taken."""

    __slots__ = ("bases", "level", "looks")

    def __init__(self, bases: tuple[int, int]):
        self.bases = bases
        self.looks = 0
        self.level = 0.0


class Ledger(Generic[Kernel]):
    """The evidence on kernels that compete for one kind of call.

    Args:
        history_len: Latencies kept per kernel.
        level: Probability that this ledger ever replaces a kernel by one that is not faster.
    """

    __slots__ = ("_history_len", "_leaders", "_level", "_opened", "_tests", "histories", "switches")

    def __init__(self, history_len: int, level: float):
        self.histories: dict[Kernel, History] = {}
        self.switches = 0
        self._history_len = history_len
        self._level = level
        self._leaders: dict[Kernel, Kernel] = {}
        self._tests: dict[tuple[Kernel, Kernel], _PairTest] = {}
        self._opened = 0

    def record(self, kernel: Kernel, latency_ms: float) -> None:
        history = self.histories.get(kernel)
        if history is None:
            history = self.histories[kernel] = History(self._history_len)
        history.add(latency_ms)

    def leader(self, incumbent: Kernel, candidates: Collection[Kernel]) -> Kernel:
        """The kernel in charge where the rules say ``incumbent``: itself, or a candidate that has proved
        faster.
        """
        current = self._leaders.get(incumbent, incumbent)
        if current not in candidates:
            current = incumbent
        if len(self.histories) < 2 or current not in self.histories:
            return current
        faster = [kernel for kernel in candidates if kernel != current and self._beats(kernel, current)]
        if not faster:
            return current
        winner = min(faster, key=lambda kernel: self.histories[kernel].mean_log)
        self._leaders[incumbent] = winner
        self._restart({current, winner})
        return winner

    def fastest(self, candidates: Iterable[Kernel]) -> Kernel | None:
        """The candidate with the lowest mean among those with at least 5 samples."""
        best, best_mean = None, math.inf
        for kernel in candidates:
            history = self.histories.get(kernel)
            if history is not None and len(history.logs) >= MIN_SAMPLES and history.mean_log < best_mean:
                best, best_mean = kernel, history.mean_log
        return best

    def _restart(self, kernels: set[Kernel]) -> None:
        self.switches += 1
        for kernel in kernels:
            del self.histories[kernel]
        self._tests = {pair: test for pair, test in self._tests.items() if kernels.isdisjoint(pair)}

    def _beats(self, challenger: Kernel, current: Kernel) -> bool:
        """Take a look if one is due; whether it shows that the challenger is faster."""
        ours, theirs = self.histories.get(challenger), self.histories[current]
        if ours is None:
            return False
        test = self._tests.get((current, challenger))
        if test is None:
            test = self._tests[current, challenger] = _PairTest((0, 0))
        counts = ours.count - test.bases[0], theirs.count - test.bases[1]
        if min(counts) < LOOKS[test.looks]:
            return False
        if not test.looks:
            self._opened += 1
            test.level = self._level / (self._opened * (self._opened + 1))
        while test.looks < len(LOOKS) and min(counts) >= LOOKS[test.looks]:
            test.looks += 1
        if test.looks == len(LOOKS):
            self._tests[current, challenger] = _PairTest((ours.count, theirs.count))
        mine, its = ours.last(counts[0]), theirs.last(counts[1])
        return _mean(mine) < _mean(its) and welch_p_value(mine, its, _MIN_VARIANCE) < test.level / len(LOOKS)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
