"""Tuning one problem: every config checked against the codec, the right ones raced, the outcome an entry."""

from __future__ import annotations

import logging
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace

from . import kernels
from .kernels import KernelConfig
from .measure import launch_floor, spread
from .profile_data import Entry, Measured, Rejected, Timing
from .race import Race, Rules, race
from .workload import ConfigClock, Workload

_log = logging.getLogger("mlx_marlin")


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

    def __post_init__(self):
        weights = (self.latency, self.throughput, self.memory)
        if not all(0 <= w < math.inf for w in weights) or self.latency + self.throughput == 0:
            raise ValueError(
                f"objective weights must be finite and at least 0, with latency or throughput above 0; got {weights}"
            )

    def cost(self, footprint: float, baseline: float) -> float:
        """Factor on a config's time for its footprint, relative to the default config's."""
        return (footprint / baseline) ** (self.memory / (self.latency + self.throughput))


def steps(a: KernelConfig, b: KernelConfig) -> int:
    """In how many things two configs differ: rows (with the variant), columns, simdgroups, sums."""
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
        rules: When a challenger beats the default.
        objective: What a faster config is worth.
        memory_limit: Bytes that MLX may have in use during a call.
        checked: Verdicts of earlier checks, by problem class and config: the error, or the reason of the refusal.
    """

    def __init__(self, workload: Workload, rules: Rules, objective: Objective, memory_limit: int, checked: dict):
        self.workload, self.rules, self.objective = workload, rules, objective
        self.memory_limit, self.checked = memory_limit, checked

    def run(self, configs: Sequence[KernelConfig], deadline: float = math.inf, on_round=None) -> Entry | None:
        """Race configs against the default one.

        Args:
            configs: The challengers; the default config takes part in any case.
            deadline, on_round: See :func:`~.race.race`.

        Returns:
            The entry, or ``None`` if the deadline came before anything was measured.

        Raises:
            ValueError: If the default config gives a wrong result.
        """
        problem = self.workload.problem
        default = kernels.default(problem)
        # Of equals the first wins: the one nearest to the default, so that tuning twice gives the same.
        configs = [default, *sorted(set(configs) - {default}, key=lambda c: (steps(c, default), astuple(c)))]
        runnable, rejected = self._runnable(configs)
        floor = launch_floor()
        clocks = {c: ConfigClock(self.workload, c, floor, self.memory_limit) for c in runnable}

        def footprint(config: KernelConfig) -> int:
            return self.workload.weight_bytes + clocks[config].memory_bytes

        def cost(config: KernelConfig) -> float:
            return self.objective.cost(footprint(config), footprint(default))

        outcome = race(clocks, default, self.rules, cost=cost, deadline=deadline, on_round=on_round)
        if not outcome.samples.get(default):
            return None
        rejected += [Rejected(config, reason) for config, reason in outcome.failures.items()]
        for item in rejected:
            _log.info("rejected %s: %s", item.config, item.reason)
        timings = tuple(
            Measured(
                c, _timing(outcome.samples[c] + outcome.fresh.get(c, []), cost(c)), self._verdict(c), footprint(c) / 1e6
            )
            for c in runnable
            if c in outcome.samples
        )
        return _entry(outcome, default, timings, tuple(rejected), cost)

    def _runnable(self, configs: list[KernelConfig]) -> tuple[list[KernelConfig], list[Rejected]]:
        """The configs that are feasible and right, and the others with their reasons."""
        runnable, rejected = [], []
        for config in configs:
            reason = kernels.feasible(self.workload.problem, config)
            verdict = f"infeasible: {reason}" if reason is not None else self._verdict(config)
            if isinstance(verdict, float):
                runnable.append(config)
            elif config == configs[0]:
                raise ValueError(f"the default config fails, so nothing can be compared with it: {config}: {verdict}")
            else:
                rejected.append(Rejected(config, verdict))
        return runnable, rejected

    def _verdict(self, config: KernelConfig) -> float | str:
        """Error against the codec, or the reason why a config must not run; once per problem class and config."""
        problem = self.workload.problem
        key = replace(problem, rows=_row_class(problem.rows)), config
        if key not in self.checked:
            try:
                self.checked[key] = self.workload.check(config)
            # A config is code under trial: whatever it raises disqualifies it, with the reason on record.
            except Exception as error:
                self.checked[key] = f"{type(error).__name__}: {error}"
        return self.checked[key]


def _entry(outcome: Race, default: KernelConfig, timings, rejected, cost) -> Entry:
    def timing(config: KernelConfig) -> Timing:
        return _timing(outcome.fresh.get(config) or outcome.samples[config], cost(config))

    return Entry(
        config=outcome.winner,
        samples=timing(outcome.winner),
        default=default,
        baseline=timing(default),
        ratio=tuple(outcome.comparison[:3]),
        decision=outcome.decision,
        verdict="correct",
        timestamp=time.time(),
        timings=timings,
        rejected=rejected,
    )


def _timing(seconds: Sequence[float], cost: float) -> Timing:
    """Samples that carry the factor of an objective, as plain times."""
    return Timing(len(seconds), 1e3 * statistics.median(seconds) / cost, spread(seconds))


def _row_class(rows: int) -> int:
    """The rows that stand for all that a config is checked alike for: a check runs at most 65 rows."""
    return {"decode": 1, "prefill4": 16, "base": 32, "large_batch": 65}[kernels.default_variant(rows)]
