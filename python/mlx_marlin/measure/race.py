"""A race between clocks: which candidate replaces the incumbent. Knows callables, not kernels.

A challenger wins only on evidence: Welch's test with a margin on times freed of the machine's drift, Holm's correction
over all challengers, and the same test once more on fresh samples, because the winner was picked on lucky ones.
"""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Generic, Literal

from .stats import Comparison, Key, compare, holm, p_faster, without_drift

# Slower than the best median by these factors after 1, 2, and 3 or more rounds: hopeless. Noise averages out.
HOPELESS = (2.0, 1.5, 1.25)
# From this many rounds on a candidate that is significantly slower than the best leaves too.
ROUNDS_TO_TEST = 5
# Without two samples of each candidate nothing can be said: a race that has begun takes them whatever its share.
FEWEST_ROUNDS = 2
MAX_FINALISTS = 4

Decision = Literal["faster", "default", "undecided"]
"""What a race ends with, see :class:`Race`."""


@dataclass(frozen=True)
class RaceSettings:
    """When a challenger wins.

    Attributes:
        rounds: Samples per candidate, before and again after picking.
        warmup: Calls before the first sample.
        margin: Part of the incumbent's time by which a challenger must be faster.
        alpha: Probability, over all challengers of a race, that one that is not faster passes the first test.
        seed: Of the order within rounds.
    """

    rounds: int = 20
    warmup: int = 5
    margin: float = 0.02
    alpha: float = 0.05
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rounds < 2 or self.warmup < 0:
            raise ValueError(f"rounds must be at least 2 and warmup at least 0, got {self.rounds} and {self.warmup}")
        if not 0 <= self.margin < 1 or not 0 < self.alpha < 1:
            raise ValueError(f"margin must lie in [0, 1) and alpha in (0, 1), got {self.margin} and {self.alpha}")


@dataclass
class Race(Generic[Key]):
    """The outcome of a race.

    Attributes:
        winner: The incumbent, or the challenger that beat it.
        decision: ``"faster"``, ``"default"`` (no challenger is faster by the margin) or ``"undecided"`` (the noise does
            not tell); the latter two keep the incumbent.
        comparison: Times of the winner against the incumbent's, on the fresh samples, freed of drift.
        samples: Seconds per candidate, before picking.
        fresh: Seconds of the incumbent and the finalists, after picking; empty if there was nothing to confirm.
        control: Seconds of the control, interleaved with ``fresh``, or with ``samples`` where that is empty.
        failures: Reason per candidate that raised.
        complete: Whether all candidates entered, and two rounds were run to their end.
    """

    winner: Key
    decision: Decision = "default"
    comparison: Comparison = Comparison(1.0, 1.0, 1.0, 1.0)
    samples: dict[Key, list[float]] = field(default_factory=dict)
    fresh: dict[Key, list[float]] = field(default_factory=dict)
    control: list[float] = field(default_factory=list)
    failures: dict[Key, str] = field(default_factory=dict)
    complete: bool = False


@dataclass(frozen=True)
class Limits:
    """When a race ends early, in ``time.perf_counter()`` seconds.

    Attributes:
        share: After it no round begins but the first two, without which a race has no outcome.
        deadline: After it nothing begins: no check, no warm-up, no round.
    """

    share: float = math.inf
    deadline: float = math.inf


NO_LIMITS = Limits()

OnRound = Callable[[int, int], None]
"""Called with the candidates left and the rounds left."""


def race(
    candidates: Mapping[Key, Callable[[], float]],
    incumbent: Key,
    settings: RaceSettings = RaceSettings(),
    *,
    cost: Callable[[Key], float] = lambda key: 1.0,
    control: Callable[[], float] | None = None,
    limits: Limits = NO_LIMITS,
    on_round: OnRound | None = None,
) -> Race[Key]:
    """Whether a challenger beats the incumbent.

    Candidates enter one after the other, the incumbent first; then all are sampled once per round, in an order that
    changes. Those that cannot win leave early. A challenger that passes Welch's test with Holm's correction is sampled
    afresh, again interleaved, and must pass again. Of several that pass and that the samples cannot tell apart, the
    first in the order of ``candidates`` wins.

    Args:
        candidates: Clocks: each call gives one time in seconds. A ``warm_up(calls)`` method is called once if there is
            one, when the candidate enters. Whatever a clock raises is recorded as its failure; only the incumbent's
            is raised.
        incumbent: The key that stays unless it is beaten.
        settings: Rounds, margin and significance.
        cost: Factor on the times of a candidate, for objectives other than latency.
        control: A clock that is sampled in each round and takes no part: it tells later how fast the machine was.
        limits: When to end early.
        on_round: Called with the candidates left and the rounds left.

    Raises:
        ValueError: If the incumbent is not a candidate.
    """
    if incumbent not in candidates:
        raise ValueError(f"the incumbent {incumbent!r} is not among the candidates")
    entrants = _Entrants(candidates, incumbent, settings, cost, control, limits, on_round)
    result = Race(incumbent, failures=entrants.failures)
    if not entrants.enter():
        result.decision = "undecided"
        return result
    result.samples, result.control = entrants.run(list(entrants.clocks), settings.rounds, eliminate=True)
    result.complete = entrants.rounds >= FEWEST_ROUNDS
    steady = without_drift(result.samples)
    passed = entrants.significant(steady, tests=len(candidates) - 1)
    if passed:
        finalists = [incumbent, *entrants.finalists(passed, steady)]
        fresh_times, fresh_control = entrants.run(finalists, settings.rounds, eliminate=False)
        fresh = without_drift(fresh_times)
        confirmed = entrants.significant(fresh, tests=len(finalists) - 1)
        if incumbent in fresh_times:
            result.fresh, result.control = fresh_times, fresh_control
        if confirmed:
            result.winner, result.decision = entrants.first_of_best(confirmed, fresh), "faster"
            result.comparison = compare(fresh[result.winner], fresh[incumbent], settings.margin)
    if result.winner == incumbent and entrants.possibly_faster(steady):
        result.decision = "undecided"
    return result


class _Entrants(Generic[Key]):
    """The clocks of a race and the tests on their samples."""

    def __init__(
        self,
        candidates: Mapping[Key, Callable[[], float]],
        incumbent: Key,
        settings: RaceSettings,
        cost: Callable[[Key], float],
        control: Callable[[], float] | None,
        limits: Limits,
        on_round: OnRound | None,
    ):
        self.clocks = dict(candidates)
        self.incumbent, self.settings, self.cost, self.control = incumbent, settings, cost, control
        self.limits, self.on_round = limits, on_round
        self.failures: dict[Key, str] = {}
        self.rounds = 0  # of the first phase
        self.order = {key: i for i, key in enumerate(candidates)}
        self.random = random.Random(settings.seed)

    def enter(self) -> bool:
        """Warm all candidates up, the incumbent first; whether there was time for all."""
        for key in sorted(self.clocks, key=lambda key: key != self.incumbent):
            if time.perf_counter() > self.limits.deadline:
                return False
            warm = getattr(self.clocks[key], "warm_up", None)
            if warm is not None:
                self._guarded(key, partial(warm, self.settings.warmup))
        warm = getattr(self.control, "warm_up", None)
        if warm is not None:
            warm(self.settings.warmup)
        return True

    def run(self, keys: list[Key], rounds: int, eliminate: bool) -> tuple[dict[Key, list[float]], list[float]]:
        """Sample in rounds; the times of every candidate that has any, and those of the control."""
        times: dict[Key, list[float]] = {key: [] for key in keys if key in self.clocks}
        active = list(times)
        control: list[float] = []
        for done in range(rounds):
            alone = eliminate and len(active) < 2 and done >= ROUNDS_TO_TEST
            if alone or self._late(done, eliminate):
                break
            self.random.shuffle(active)
            for key in list(active):
                if time.perf_counter() > self.limits.deadline:
                    return _sampled(times), control
                sample = self._guarded(key, self.clocks[key])
                if sample is None:
                    active.remove(key)
                    del times[key]
                else:
                    times[key].append(sample)
            if self.control is not None:
                control.append(self.control())
            if eliminate:
                self.rounds = done + 1
                active = self._survivors(active, times, done + 1)
            if self.on_round is not None:
                self.on_round(len(active), rounds - done - 1)
        return _sampled(times), control

    def _late(self, done: int, first: bool) -> bool:
        now = time.perf_counter()
        owed = first and done < FEWEST_ROUNDS
        return now > self.limits.deadline or (now > self.limits.share and not owed)

    def _guarded(self, key: Key, call: Callable[[], float | None]) -> float | None:
        """The value of a call, or ``None`` if a challenger raised, which then leaves the race."""
        if key == self.incumbent:
            return call()
        try:
            value = call()
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"the clock gave {value!r} seconds")
            return value
        # A challenger is code under trial: whatever it raises disqualifies it, with the reason on record.
        except Exception as error:
            self.failures[key] = f"{type(error).__name__}: {error}"
            self.clocks.pop(key, None)
            return None

    def _survivors(self, active: list[Key], times: Mapping[Key, Sequence[float]], rounds: int) -> list[Key]:
        limit = HOPELESS[min(rounds, len(HOPELESS)) - 1]
        times = self._weighted(without_drift(times))
        medians = {key: statistics.median(times[key]) for key in active}
        best = min(medians, key=medians.__getitem__)

        def stays(key: Key) -> bool:
            if key in (self.incumbent, best):
                return True
            if medians[key] > limit * medians[best]:
                return False
            # 1 % : over 20 looks the truly best leaves rarely, and then a near equal is left.
            return rounds < ROUNDS_TO_TEST or p_faster(times[best], times[key]) > 0.01

        return [key for key in active if stays(key)]

    def _weighted(self, times: Mapping[Key, Sequence[float]]) -> dict[Key, list[float]]:
        """What the times are worth by the objective."""
        return {key: [sample * self.cost(key) for sample in samples] for key, samples in times.items()}

    def _challengers(self, times: Mapping[Key, Sequence[float]]) -> list[Key]:
        if len(times.get(self.incumbent, ())) < 2:
            return []
        return [key for key, samples in times.items() if key != self.incumbent and len(samples) > 1]

    def significant(self, times: Mapping[Key, Sequence[float]], tests: int) -> set[Key]:
        times = self._weighted(times)
        base, margin = times.get(self.incumbent, []), self.settings.margin  # without a base there are no challengers
        p_values = {key: p_faster(times[key], base, margin) for key in self._challengers(times)}
        return holm(p_values, self.settings.alpha, tests)

    def possibly_faster(self, times: Mapping[Key, Sequence[float]]) -> bool:
        """Whether some challenger looks faster by the margin, or nothing can be said."""
        if len(times.get(self.incumbent, ())) < 2:
            return True
        times = self._weighted(times)
        limit = (1 - self.settings.margin) * statistics.geometric_mean(times[self.incumbent])
        return any(statistics.geometric_mean(times[key]) < limit for key in self._challengers(times))

    def _tied(self, keys: Collection[Key], times: Mapping[Key, Sequence[float]]) -> list[Key]:
        """The candidates that are not significantly slower than the best of them, in the caller's order."""
        best = self._fastest(keys, times)
        # 0.025 on one side: the 95 % interval of the ratio contains 1.
        tied = [key for key in keys if key == best or p_faster(times[best], times[key]) > 0.025]
        return sorted(tied, key=self.order.__getitem__)

    def _fastest(self, keys: Collection[Key], times: Mapping[Key, Sequence[float]]) -> Key:
        return min(keys, key=lambda key: statistics.geometric_mean(times[key]))

    def finalists(self, passed: set[Key], times: Mapping[Key, Sequence[float]]) -> list[Key]:
        """The fastest that passed, and the first of those that the samples cannot tell from it."""
        times = self._weighted(times)
        best = self._fastest(passed, times)
        others = [key for key in self._challengers(times) if len(times[key]) >= ROUNDS_TO_TEST]
        first = [key for key in self._tied({best, *others}, times) if key != best]
        return [best, *first[: MAX_FINALISTS - 1]]

    def first_of_best(self, confirmed: set[Key], times: Mapping[Key, Sequence[float]]) -> Key:
        return self._tied(confirmed, self._weighted(times))[0]


def _sampled(times: dict[Key, list[float]]) -> dict[Key, list[float]]:
    return {key: samples for key, samples in times.items() if samples}
