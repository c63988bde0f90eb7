"""Stored results, measured again: what has become slower, wrong or impossible since it was tuned.

A machine is not as fast today as when it was tuned, so times are not compared with stored times but with what runs
beside them: with the default config, or where that is the config itself with a fixed product of MLX's own.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from filelock import FileLock

from .. import kernels, measure
from ..kernels import KernelConfig, Problem, rows_label
from ..measure.race import RaceSettings
from ..measure.stats import holm, p_faster, p_slower_than, without_drift
from ..profile.schema import AutotuneConfig, Entry
from .labels import names
from .progress import ProgressBar
from .trial import Objective
from .workload import ConfigClock, Workload, release

# Probability that a check in which nothing has changed takes anything for a regression, before it confirms it.
ALPHA = 0.05
SLOWER_THAN_IT_WAS, SLOWER_THAN_THE_DEFAULT = "slower than it was", "slower than the default"


@dataclass(frozen=True)
class Finding:
    """A stored entry, measured again.

    Attributes:
        problem, entry: What was stored.
        now_ms, default_ms: Medians now, of the entry's config and of the default; ``None`` where not measured.
        regression: What has become worse, or ``""``.
        note: Why something could not be judged, or ``""``.
    """

    problem: Problem
    entry: Entry
    now_ms: float | None = None
    default_ms: float | None = None
    regression: str = ""
    note: str = ""

    @property
    def measured(self) -> bool:
        """Whether the entry could be looked at."""
        return self.now_ms is not None or bool(self.regression)


@dataclass
class _Sampled:
    """An entry's times now, interleaved: of its config, of the default and of the control."""

    problem: Problem
    entry: Entry
    config: list[float]
    default: list[float]
    control: list[float]

    def p_values(self, tolerance: float, margin: float) -> dict[str, float]:
        """The tests that the entry allows."""
        steady = without_drift({"config": self.config, "default": self.default, "control": self.control})
        now, tests = steady["config"], {}
        if self.entry.config == self.entry.default:
            if self.entry.over_control is not None:
                tests[SLOWER_THAN_IT_WAS] = p_slower_than(now, steady["control"], self.entry.over_control, tolerance)
            return tests
        tests[SLOWER_THAN_IT_WAS] = p_slower_than(now, steady["default"], self.entry.ratio, tolerance)
        # By another objective than latency a slower config may be the better one.
        if not Objective(*self.entry.objective).memory:
            tests[SLOWER_THAN_THE_DEFAULT] = p_faster(steady["default"], now, margin)
        return tests

    def finding(self, regression: str) -> Finding:
        unjudged = self.entry.config == self.entry.default and self.entry.over_control is None
        note = "nothing was stored that it could be compared with" if unjudged else ""
        now, default = (1e3 * statistics.median(times) for times in (self.config, self.default))
        return Finding(self.problem, self.entry, now, default, regression, note)


class Check:
    """A check of stored entries.

    Args:
        settings: Samples per config, warm-up, margin, seed.
        memory_limit: Bytes that weights, inputs and a call may take.
        tolerance: Slowdown that is put down to the machine's state.
        turn: Held while something is measured.
    """

    def __init__(self, settings: RaceSettings, memory_limit: int, tolerance: float, turn: FileLock):
        self.settings, self.memory_limit, self.tolerance, self._turn = settings, memory_limit, tolerance, turn

    def run(
        self, profile: AutotuneConfig, wanted: Callable[[Problem], bool], deadline: float, bar: ProgressBar
    ) -> list[Finding]:
        """Measure entries again. What looks like a regression is measured once more, and reported only if it is still
        significant on those fresh samples.

        Args:
            profile: Of this machine.
            wanted: Which problems to check.
            deadline: ``time.perf_counter()`` after which no further entry is begun.
            bar: Shows the progress.

        Returns:
            One finding per entry that was reached.
        """
        entries = [item for item in profile.problems.items() if wanted(item[0])]
        known = names(profile.problems)
        bar.total(len(entries), 0)
        looked: list[_Sampled | Finding] = []
        for problem, entry in entries:
            if time.perf_counter() > deadline:
                break
            bar.begin(f"{known[problem]}, {rows_label(problem.rows)}")
            looked.append(self._look(problem, entry))
            bar.end()
        suspects = self._significant({i: s for i, s in enumerate(looked) if isinstance(s, _Sampled)}, None)
        again = {i: self._look(looked[i].problem, looked[i].entry) for i in sorted({i for i, _ in suspects})}
        confirmed = self._significant({i: s for i, s in again.items() if isinstance(s, _Sampled)}, suspects)
        return [
            s if isinstance(s, Finding) else s.finding(" and ".join(what for j, what in sorted(confirmed) if j == i))
            for i, s in enumerate({**dict(enumerate(looked)), **again}.values())
        ]

    def _significant(self, sampled: dict[int, _Sampled], among: set[tuple[int, str]] | None) -> set[tuple[int, str]]:
        """The tests that reject, of all or of some, over all entries."""
        p_values = {
            (i, what): p
            for i, s in sampled.items()
            for what, p in s.p_values(self.tolerance, self.settings.margin).items()
            if among is None or (i, what) in among
        }
        return holm(p_values, ALPHA)

    def _look(self, problem: Problem, entry: Entry) -> _Sampled | Finding:
        """Times of an entry, or what keeps it from running."""
        with self._turn:
            try:
                return self._tried(problem, entry)
            except (MemoryError, ValueError, RuntimeError) as error:  # the last is MLX, out of memory
                return Finding(problem, entry, note=f"not measured: {error}")
            finally:
                release()

    def _tried(self, problem: Problem, entry: Entry) -> _Sampled | Finding:
        workload = Workload.synthetic(problem, memory_limit=self.memory_limit, seed=self.settings.seed)
        for role, config in (("", entry.config), ("its default: ", entry.default)):
            fault = _fault(workload, config)
            if fault:
                return Finding(problem, entry, regression=role + fault)
        return self._sample(workload, entry)

    def _sample(self, workload: Workload, entry: Entry) -> _Sampled:
        floor = measure.launch_floor()
        clock = partial(ConfigClock, workload, floor=floor, memory_limit=self.memory_limit)
        clocks = {config: clock(config) for config in (entry.config, entry.default)}
        control = measure.control(workload.stream, floor)
        for c in (*clocks.values(), control):
            c.warm_up(self.settings.warmup)
        rounds = [({config: c() for config, c in clocks.items()}, control()) for _ in range(self.settings.rounds)]
        config, default = ([times[key] for times, _ in rounds] for key in (entry.config, entry.default))
        return _Sampled(workload.problem, entry, config, default, [seconds for _, seconds in rounds])


def _fault(workload: Workload, config: KernelConfig) -> str:
    """Why a config that was right when it was stored must not run any more, or ``""``."""
    reason = kernels.feasible(workload.problem, config)
    if reason is not None:
        return f"infeasible: {reason}"
    try:
        workload.check(config)
    # Code under trial: whatever it raises is a finding.
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""
