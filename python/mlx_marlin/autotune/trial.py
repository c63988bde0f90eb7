"""Tuning one problem: every config checked against the codec, the right ones raced, the outcome an entry."""

from __future__ import annotations

import logging
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from numbers import Real

from .. import kernels, measure
from ..kernels import KernelConfig, Problem
from ..measure.race import NO_LIMITS, Limits, OnRound, Race, RaceSettings, race
from ..measure.stats import compare, spread, without_drift
from ..profile import json as profile_json
from ..profile.schema import Entry, Measured, Rejected, Timing
from .workload import ConfigClock, Workload, problem_class

_log = logging.getLogger("mlx_marlin")

Verdicts = dict[tuple[Problem, KernelConfig], "float | str"]
"""Outcomes of checks, by problem class and config: the error, or the reason why the config must not run."""

_CONTROL = "control"


@dataclass(frozen=True)
class Objective:
    """What a faster config is worth: weights of a geometric mean.

    Throughput is bytes over latency, so for one problem it weighs like latency; memory is the footprint of a call.

    Attributes:
        latency, throughput, memory: Weights, at least 0; latency and throughput not both 0.
    """

    latency: float = 1.0
    throughput: float = 0.0
    memory: float = 0.0

    def __post_init__(self) -> None:
        weights = (self.latency, self.throughput, self.memory)
        legal = all(isinstance(w, Real) and 0 <= w < math.inf for w in weights)
        if not legal or self.latency + self.throughput == 0:
            raise ValueError(
                f"objective weights must be finite and at least 0, with latency or throughput above 0; got {weights}"
            )

    @classmethod
    def of(cls, weights: Objective | Mapping[str, float] | None) -> Objective:
        """The objective of a dictionary of weights; ``None`` is latency only.

        Raises:
            ValueError: If it has other names, or a weight is out of range.
        """
        if weights is None or isinstance(weights, Objective):
            return weights or cls()
        known = [f.name for f in fields(cls)]
        if not isinstance(weights, Mapping) or not set(weights) <= set(known):
            raise ValueError(f"objective must be a dictionary with weights for {', '.join(known)}; got {weights!r}")
        return cls(**weights)

    def cost(self, footprint: float, baseline: float) -> float:
        """Factor on a config's time for its footprint, relative to the default config's."""
        return (footprint / baseline) ** (self.memory / (self.latency + self.throughput))


def steps(problem: Problem, config: KernelConfig) -> int:
    """In how many things a feasible config's code differs from the default's: rows (with the variant), columns,
    simdgroups, sums.
    """
    a, b = kernels.effective(problem, config), kernels.effective(problem, kernels.default(problem))
    return sum(
        (
            (a.kernel_variant, a.tile_size_m) != (b.kernel_variant, b.tile_size_m),
            a.tile_size_n != b.tile_size_n,
            a.simdgroups != b.simdgroups,
            a.use_fp32_acc != b.use_fp32_acc,
        )
    )


class Trial:
    """The trial of configs on one workload.

    Args:
        workload: What they run.
        settings: When a challenger beats the default.
        objective: What a faster config is worth.
        memory_limit: Bytes that the workload and a call may take, or ``None``.
        checked: Verdicts of earlier checks; those of this trial are added.
        first: Configs that enter the race before the others, in this order.
    """

    def __init__(
        self,
        workload: Workload,
        settings: RaceSettings,
        objective: Objective,
        memory_limit: int | None,
        checked: Verdicts,
        first: Sequence[KernelConfig] = (),
    ):
        self.workload, self.settings, self.objective = workload, settings, objective
        self.memory_limit, self.checked, self.first = memory_limit, checked, tuple(first)

    def run(
        self, configs: Sequence[KernelConfig], limits: Limits = NO_LIMITS, on_round: OnRound | None = None
    ) -> Entry | None:
        """Race configs against the default one.

        Args:
            configs: The challengers; the default config takes part in any case.
            limits, on_round: See :func:`~.race.race`.

        Returns:
            The entry, or ``None`` if time ran out before two rounds of all.

        Raises:
            ValueError: If the default config gives a wrong result.
            MemoryError: If the default config does not fit the memory limit.
        """
        problem, default = self.workload.problem, kernels.default(self.workload.problem)
        reasons = {c: kernels.feasible(problem, c) for c in configs}
        rejected = {c: f"infeasible: {reason}" for c, reason in reasons.items() if reason is not None}
        near = sorted((c for c in reasons if c not in rejected and c != default), key=self._place)
        floor = measure.launch_floor()
        clocks = {c: self._clock(c, floor) for c in (default, *near)}
        self._fit(clocks[default])

        def cost(config: KernelConfig) -> float:
            return self.objective.cost(self._footprint(clocks[config]), self._footprint(clocks[default]))

        control = measure.control(self.workload.stream, floor)
        outcome = race(clocks, default, self.settings, cost=cost, control=control, limits=limits, on_round=on_round)
        if not outcome.complete:
            return None
        for config, failure in outcome.failures.items():
            verdict = self.checked.get(self._key(config))
            rejected[config] = verdict if isinstance(verdict, str) else failure
        timings = tuple(self._measured(outcome, clocks[c]) for c in clocks if c in outcome.samples)
        return _entry(outcome, default, timings, _refusals(rejected), self.objective)

    def _place(self, config: KernelConfig) -> tuple[int, int]:
        """Where a challenger enters. Of equals the first wins: the one that was to be first, or the nearest to the
        default, so that tuning twice gives the same.
        """
        ahead = self.first.index(config) if config in self.first else len(self.first)
        return ahead, steps(self.workload.problem, config)

    def _clock(self, config: KernelConfig, floor: float) -> ConfigClock:
        return ConfigClock(self.workload, config, floor, self.memory_limit, check=lambda: self._require(config))

    def _fit(self, default: ConfigClock) -> None:
        """Check the default config and weigh a call of it; weight copies go until it fits."""
        try:
            self._require(default.config)
        except ValueError as error:
            text = f"the default config fails, so nothing can be compared with it: {default.config}: {error}"
            raise ValueError(text) from None
        while True:
            try:
                return default.weigh()
            except MemoryError:
                if not self.workload.drop_copy():
                    raise

    def _footprint(self, clock: ConfigClock) -> int:
        return self.workload.weight_bytes + clock.memory_bytes

    def _measured(self, outcome: Race[KernelConfig], clock: ConfigClock) -> Measured:
        seconds = outcome.samples[clock.config] + outcome.fresh.get(clock.config, [])
        error = self.checked[self._key(clock.config)]
        assert not isinstance(error, str), error  # what must not run was not sampled
        return Measured(clock.config, _timing(seconds), error, self._footprint(clock) / 1e6)

    def _key(self, config: KernelConfig) -> tuple[Problem, KernelConfig]:
        return problem_class(self.workload.problem), config

    def _require(self, config: KernelConfig) -> None:
        """Check a config, once per problem class.

        Raises:
            ValueError: If it must not run, with the reason.
        """
        key = self._key(config)
        if key not in self.checked:
            try:
                self.checked[key] = self.workload.check(config)
            # A config is code under trial: whatever it raises disqualifies it, with the reason on record.
            except Exception as error:
                self.checked[key] = f"{type(error).__name__}: {error}"
        verdict = self.checked[key]
        if isinstance(verdict, str):
            raise ValueError(verdict)


def _refusals(reasons: Mapping[KernelConfig, str]) -> tuple[Rejected, ...]:
    """The rejected configs as a profile holds them; what it cannot hold is only logged."""
    # Shortened and printable: a reason may hold a compiler's log, or bytes that no stream can write.
    refusals = [Rejected.because(config, reason) for config, reason in reasons.items()]
    for refusal in refusals:
        _log.info("rejected %s: %s", refusal.config, refusal.reason)
    return tuple(r for r in refusals if profile_json.storable(r.config))


def _entry(
    outcome: Race[KernelConfig],
    default: KernelConfig,
    timings: tuple[Measured, ...],
    rejected: tuple[Rejected, ...],
    objective: Objective,
) -> Entry:
    times = outcome.fresh or outcome.samples
    return Entry(
        config=outcome.winner,
        samples=_timing(times[outcome.winner]),
        default=default,
        baseline=_timing(times[default]),
        ratio=outcome.comparison[:3],
        decision=outcome.decision,
        verdict="correct",
        timestamp=time.time(),
        timings=timings,
        rejected=rejected,
        objective=astuple(objective),
        over_control=over_control(times[outcome.winner], outcome.control),
    )


def over_control(seconds: Sequence[float], control: Sequence[float]) -> tuple[float, float, float] | None:
    """Time of a config over the control's, interleaved, with its 95 % interval; ``None`` for less than two rounds."""
    if min(len(seconds), len(control)) < 2:
        return None
    steady = without_drift({"config": seconds, _CONTROL: control})
    return compare(steady["config"], steady[_CONTROL])[:3]


def _timing(seconds: Sequence[float]) -> Timing:
    return Timing(len(seconds), 1e3 * statistics.median(seconds), spread(seconds))
