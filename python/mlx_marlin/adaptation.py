"""Latencies recorded at run time, and which candidate they speak for. Pure."""

from __future__ import annotations

import math
import statistics
import threading
from collections import deque
from collections.abc import Hashable, Mapping, Sequence

from .measure import holm, p_faster

# A candidate with fewer samples says nothing: mixed_bpw_autotuning calls 5 "high confidence".
MIN_SAMPLES = 5
ALPHA = 0.05

Key = tuple[int, "int | None", "tuple[int, ...] | None"]


class Recorder:
    """The newest latencies per candidate and key ``(batch size, hidden size, bit widths)``. Thread-safe."""

    def __init__(self):
        self._lock = threading.Lock()
        self._history: dict[tuple[Hashable, Key], deque[float]] = {}

    def record(self, candidate: Hashable, key: Key, latency_ms: float, limit: int) -> None:
        """Keep a sample, and of all samples of this candidate and key the newest ``limit``.

        Raises:
            ValueError: If the latency is not positive and finite.
        """
        if not 0 < latency_ms < math.inf:
            raise ValueError(f"latency_ms must be positive and finite, got {latency_ms!r}")
        with self._lock:
            samples = self._history.get((candidate, key))
            if samples is None or samples.maxlen != limit:
                samples = self._history[candidate, key] = deque(samples or (), maxlen=limit)
            samples.append(latency_ms)

    def samples(self, key: Key) -> dict[Hashable, list[float]]:
        """The samples that count for a key, by candidate: ``None`` in a recorded key stands for any value."""
        found: dict[Hashable, list[float]] = {}
        with self._lock:
            for (candidate, recorded), values in self._history.items():
                if recorded[0] == key[0] and all(r in (None, k) for r, k in zip(recorded[1:], key[1:])):
                    found.setdefault(candidate, []).extend(values)
        return found

    def clear(self) -> None:
        with self._lock:
            self._history.clear()

    @property
    def keys(self) -> int:
        """Distinct keys with samples."""
        return len({key for _, key in self._history})

    @property
    def count(self) -> int:
        """Samples kept."""
        return sum(len(values) for values in self._history.values())


def leader(samples: Mapping[Hashable, Sequence[float]], incumbent: Hashable, top_k: int):
    """The candidate that the samples speak for, or ``None`` if no candidate has 5.

    The incumbent stays unless one of the ``top_k`` lowest medians is significantly faster; with fewer than 5 samples of
    its own it yields to the candidate with most samples, the faster of equals.
    """
    medians = {c: statistics.median(s) for c, s in samples.items() if len(s) >= MIN_SAMPLES}
    if not medians:
        return None
    if incumbent not in medians:
        return min(medians, key=lambda c: (-len(samples[c]), medians[c]))
    others = sorted((c for c in medians if c != incumbent), key=medians.get)[:top_k]
    faster = holm({c: p_faster(samples[c], samples[incumbent]) for c in others}, ALPHA)
    return min(faster, key=medians.get) if faster else incumbent
