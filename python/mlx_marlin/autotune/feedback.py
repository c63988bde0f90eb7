"""Latencies recorded at run time, and which candidate they speak for. Pure."""

from __future__ import annotations

import math
import statistics
import threading
from collections import deque
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

from ..selection.evidence import MIN_SAMPLES, Ledger

# Probability that the evidence on one key ever replaces its incumbent by a candidate that is not faster.
ALPHA = 0.05
# Keys that have been asked for are remembered with their tests; each holds a few kB.
_MAX_LEDGERS = 1024

Key = tuple[int, "int | None", "tuple[float, ...] | None"]

Recorded = TypeVar("Recorded", bound=Hashable)
"""What a latency was recorded for."""
Candidate = TypeVar("Candidate", bound=Hashable)
"""What it stands for."""


class _Samples:
    """The newest latencies of a candidate under a key, and how many there ever were."""

    __slots__ = ("count", "kept")

    def __init__(self, limit: int):
        self.kept: deque[float] = deque(maxlen=limit)
        self.count = 0


class Recorder(Generic[Recorded, Candidate]):
    """The newest latencies per candidate and key ``(batch size, hidden size, bit widths)``. Thread-safe.

    :meth:`leader` may be asked after every sample: its tests look at fixed numbers of samples and share one level
    (see :class:`~.evidence.Ledger`), so that asking often does not find differences that are not there.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.clear()

    def record(self, candidate: Recorded, key: Key, latency_ms: float, limit: int) -> None:
        """Keep a sample, and of all samples of this candidate and key the newest ``limit``.

        Raises:
            ValueError: If the latency is not positive and finite.
        """
        if not 0 < latency_ms < math.inf:
            raise ValueError(f"latency_ms must be positive and finite, got {latency_ms!r}")
        with self._lock:
            samples = self._history.setdefault((candidate, key), _Samples(limit))
            if samples.kept.maxlen != limit:
                samples.kept = deque(samples.kept, maxlen=limit)
            samples.kept.append(latency_ms)
            samples.count += 1

    def leader(
        self, key: Key, incumbent: Candidate, top_k: int, name: Callable[[Recorded], Candidate], limit: int
    ) -> Candidate | None:
        """The candidate that the samples of a key speak for, or ``None`` if no candidate has 5.

        The incumbent stays unless one of the ``top_k`` lowest medians is significantly faster; with fewer than 5
        samples of its own it yields to the candidate with most samples, the faster of equals.

        Args:
            key: Samples whose key has ``None`` in a place count for any value there.
            incumbent: Runs unless it is beaten.
            top_k: Candidates that are compared with it.
            name: The candidate that a recorded one stands for.
            limit: Samples that a test can look at.
        """
        with self._lock:
            samples = self._matching(key, name)
            ledger = self._feed(key, name, limit)
            medians = {c: statistics.median(s) for c, s in samples.items() if len(s) >= MIN_SAMPLES}
            if not medians:
                return None
            if incumbent not in medians:
                return min(medians, key=lambda c: (-len(samples[c]), medians[c]))
            lowest = sorted((c for c in medians if c != incumbent), key=medians.__getitem__)[:top_k]
            return ledger.leader(incumbent, [incumbent, *lowest])

    def clear(self) -> None:
        """Forget all samples and tests."""
        with self._lock:
            self._history: dict[tuple[Recorded, Key], _Samples] = {}
            self._ledgers: dict[Key, tuple[Ledger[Candidate], dict[tuple[Recorded, Key], int]]] = {}

    @property
    def keys(self) -> int:
        """Distinct keys with samples."""
        return len({key for _, key in self._history})

    @property
    def count(self) -> int:
        """Samples kept."""
        return sum(len(samples.kept) for samples in self._history.values())

    def _matching(self, key: Key, name: Callable[[Recorded], Candidate]) -> dict[Candidate, list[float]]:
        """The samples that count for a key, by candidate."""
        found: dict[Candidate, list[float]] = {}
        for (candidate, recorded), samples in self._history.items():
            if _counts_for(recorded, key):
                found.setdefault(name(candidate), []).extend(samples.kept)
        return found

    def _feed(self, key: Key, name: Callable[[Recorded], Candidate], limit: int) -> Ledger[Candidate]:
        """The tests of a key, with what was recorded since they were last asked for."""
        if key not in self._ledgers and len(self._ledgers) >= _MAX_LEDGERS:
            del self._ledgers[next(iter(self._ledgers))]
        ledger, seen = self._ledgers.setdefault(key, (Ledger(max(limit, MIN_SAMPLES), ALPHA), {}))
        for source, samples in self._history.items():
            if _counts_for(source[1], key):
                new = min(samples.count - seen.get(source, 0), len(samples.kept))
                for latency_ms in list(samples.kept)[len(samples.kept) - new :]:
                    ledger.record(name(source[0]), latency_ms)
                seen[source] = samples.count
        return ledger


def _counts_for(recorded: Key, key: Key) -> bool:
    return recorded[0] == key[0] and all(r in (None, k) for r, k in zip(recorded[1:], key[1:]))
