"""A tuning run over many problems: split over processes, saved after each problem, continued after an interruption."""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx
import numpy as np
from filelock import FileLock

from . import kernels, measure, profile, profile_io
from .autotune import MixedBPWAutoTuner
from .device import fingerprint
from .kernels import KernelConfig, Problem
from .profile_data import AutotuneConfig, Entry, Timing, same_origin
from .progress import Progress
from .race import Rules
from .trial import steps
from .workload import ConfigClock, Workload

# An interquartile range is this many standard deviations of a normal distribution.
IQR_PER_SIGMA = 1.349
CHECK_ALPHA = 0.05


def at_rows(problems: Iterable[Problem], batch_sizes: Iterable[int]) -> list[Problem]:
    """Each problem at each number of rows, small numbers first: they are quick and matter most."""
    return [replace(p, rows=rows) for rows in sorted(batch_sizes) for p in problems]


def one_step(problem: Problem) -> list[KernelConfig]:
    """The candidates that differ from the default in one thing: rows (with the variant), columns, simdgroups, sums."""
    default = kernels.default(problem)
    return [c for c in kernels.candidates(problem) if steps(c, default) <= 1]


@dataclass(frozen=True)
class Finding:
    """A stored entry, measured again.

    Attributes:
        problem, config: Of the entry.
        stored_ms: Its stored median.
        now_ms, default_ms: Medians now, of the entry's config and of the default.
        regression: What has become slower, or ``""``.
    """

    problem: Problem
    config: KernelConfig
    stored_ms: float
    now_ms: float
    default_ms: float
    regression: str


class Run:
    """A tuning run.

    Args:
        path: The profile.
        device: ``"cpu"`` or ``"gpu"``.
        dtype: Of the activations, or ``None`` for the device's usual one.
        memory_limit: Bytes, or ``None``.
        rules: Rounds and significance.
        quick: Whether to time only candidates one step from the default.
    """

    def __init__(self, path: Path, device: str, dtype: str | None, memory_limit: int | None, rules: Rules, quick: bool):
        self.path, self.device, self.rules, self.quick = Path(path), device, rules, quick
        self.tuner = MixedBPWAutoTuner(
            config_path=self.path, device=device, dtype=dtype, memory_limit=memory_limit, rules=rules
        )
        if self.path.exists():
            profile_io.check_native(self.tuner.config, device, self.path)
        # One process at a time may measure on a machine.
        profile_io.cache_dir().mkdir(parents=True, exist_ok=True)
        self._turn = FileLock(profile_io.cache_dir() / "clock.lock")

    def tune(
        self, problems: list[Problem], group: mx.distributed.Group, deadline: float, bar: Progress
    ) -> tuple[dict[Problem, Entry], int]:
        """Tune the problems, or this process's part of them.

        Args:
            problems: All problems.
            group: The processes that share the work; only those on machines of one kind do.
            deadline: ``time.perf_counter()`` after which no further round begins.
            bar: Shows the progress.

        Returns:
            The entries of this run, of all processes, and how many problems of this process were not reached.
        """
        rank, size = _peers(group, self.tuner.config.fingerprint)
        session = _Session(self.path, self._plan(problems), rank)
        mine = problems[rank::size]
        todo = [p for p in mine if not session.has(self.tuner.config, p)]
        bar.total(len(mine), len(mine) - len(todo))
        reached = 0
        for i, problem in enumerate(todo):
            now = time.perf_counter()
            if now > deadline:
                break
            bar.begin(f"{problem.kind} {problem.hidden}x{problem.intermediate}, {problem.rows} rows")
            # Equal shares of the time that is left; what one problem does not use goes to the others.
            self._tune_one(problem, now + (deadline - now) / (len(todo) - i), bar)
            bar.end()
            # A share too short for one round leaves the problem for the next run.
            reached += session.has(self.tuner.config, problem)
        self._exchange(group)
        left = len(todo) - reached
        entries = {p: self.tuner.config.problems[p] for p in problems if session.has(self.tuner.config, p)}
        if not left:
            session.close()
        return entries, left

    def _tune_one(self, problem: Problem, deadline: float, bar: Progress) -> None:
        with self._turn:
            configs = one_step(problem) if self.quick else None
            self.tuner.benchmark_layer(
                problem,
                problem.rows,
                configs,
                self.rules.warmup,
                self.rules.rounds,
                deadline=deadline,
                on_round=bar.round,
            )
        self._save()

    def _save(self) -> None:
        self.tuner.config = profile_io.save(self.tuner.config, self.path)
        profile.refresh()

    def _plan(self, problems: list[Problem]) -> str:
        plan = repr((problems, self.rules, self.quick, fingerprint(self.device)))
        return hashlib.sha256(plan.encode()).hexdigest()

    def _exchange(self, group: mx.distributed.Group) -> None:
        """Give every process the entries of all others on machines of its kind."""
        if group.size() == 1:
            return
        for text in _gather(group, profile_io.encode(self.tuner.config)):
            theirs = profile_io.decode(text, "the profile of another process")
            if same_origin(self.tuner.config, theirs):
                self.tuner.config.problems.update(
                    {
                        p: e
                        for p, e in theirs.problems.items()
                        if p not in self.tuner.config.problems or e.timestamp > self.tuner.config.problems[p].timestamp
                    }
                )
        self._save()

    def check(self, tolerance: float, budget: float | None, bar: Progress) -> list[Finding]:
        """Measure every entry of the profile again, interleaved with the default.

        Args:
            tolerance: Slowdown against the stored time that is put down to the machine's state.
            budget: Seconds, or ``None``.
            bar: Shows the progress.
        """
        problems = self.tuner.config.problems
        deadline = time.perf_counter() + budget if budget else math.inf
        bar.total(len(problems), 0)
        measured = []
        for problem, entry in problems.items():
            if time.perf_counter() > deadline:
                break
            bar.begin(f"{problem.kind} {problem.hidden}x{problem.intermediate}, {problem.rows} rows")
            with self._turn:
                measured.append((problem, entry, *self._sample(problem, entry)))
            bar.end()
        p_values = {}
        for i, (_, entry, now, default) in enumerate(measured):
            p_values[i, "slower than it was"] = _p_slower(now, entry.samples, tolerance)
            if entry.config != entry.default:
                steady = measure.without_drift({"now": now, "default": default})
                p_values[i, "slower than the default"] = measure.p_faster(
                    steady["default"], steady["now"], self.rules.margin
                )
        significant = measure.holm(p_values, CHECK_ALPHA)
        return [
            Finding(
                problem,
                entry.config,
                entry.samples.median_ms,
                _median_ms(now),
                _median_ms(default),
                " and ".join(what for j, what in sorted(significant) if j == i),
            )
            for i, (problem, entry, now, default) in enumerate(measured)
        ]

    def _sample(self, problem: Problem, entry: Entry) -> tuple[list[float], list[float]]:
        """Times of the entry's config and of the default, in turns."""
        limit = self.tuner.memory_limit
        workload = Workload.synthetic(problem, memory_limit=limit, seed=self.rules.seed)
        floor = measure.launch_floor()
        default = kernels.default(problem)
        clocks = [ConfigClock(workload, config, floor, limit) for config in (entry.config, default)]
        for config, clock in zip((entry.config, default), clocks):
            workload.check(config)
            clock.warm_up(self.rules.warmup)
        rounds = [(clocks[0](), clocks[1]()) for _ in range(self.rules.rounds)]
        return [a for a, _ in rounds], [b for _, b in rounds]


class _Session:
    """What a run has done so far: the entries that are newer than its start. Kept beside the profile until the end.

    Args:
        path: The profile.
        plan: Digest of all that the run is asked for; another plan starts afresh.
        rank: Of this process.
    """

    def __init__(self, path: Path, plan: str, rank: int):
        self._path = path.with_name(f"{path.name}.session{rank}")
        self._start = self._stored(plan)
        if self._start is None:
            self._start = time.time()
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = self._path.with_name(f"{self._path.name}.tmp")
            temporary.write_text(json.dumps({"plan": plan, "start": self._start}))
            os.replace(temporary, self._path)

    def _stored(self, plan: str) -> float | None:
        try:
            stored = json.loads(self._path.read_text())
        except (FileNotFoundError, ValueError):
            return None
        same = isinstance(stored, dict) and stored.get("plan") == plan
        return stored["start"] if same and isinstance(stored.get("start"), float) else None

    def has(self, config: AutotuneConfig, problem: Problem) -> bool:
        return problem in config.problems and config.problems[problem].timestamp >= self._start

    def close(self) -> None:
        self._path.unlink(missing_ok=True)


def _median_ms(seconds: list[float]) -> float:
    return 1e3 * float(np.median(seconds))


def _p_slower(now: list[float], stored: Timing, tolerance: float) -> float:
    """One-sided p-value of "not slower than a stored timing by more than the tolerance", Welch on logarithms."""
    logs = np.log(now) + math.log(1e3)
    sigma = stored.spread / IQR_PER_SIGMA
    # A median's variance is pi / 2 times a mean's.
    errors = logs.var(ddof=1) / len(logs), math.pi / 2 * sigma**2 / max(stored.n, 1)
    difference = logs.mean() - math.log(max(stored.median_ms, 1e-9)) - math.log1p(tolerance)
    if not sum(errors):
        return 0.0 if difference > 0 else 1.0
    freedom = sum(errors) ** 2 / sum(e**2 / max(n - 1, 1) for e, n in zip(errors, (len(logs), stored.n)))
    return measure.t_tail(difference / math.sqrt(sum(errors)), freedom)


def _peers(group: mx.distributed.Group, mine) -> tuple[int, int]:
    """Rank and size among the processes on machines of this kind: timings hold for one kind only."""
    if group.size() == 1:
        return 0, 1
    key = repr(replace(mine, os="", mlx_version="")).encode()
    kinds = _gather(group, key)
    alike = [rank for rank, kind in enumerate(kinds) if kind == key]
    return alike.index(group.rank()), len(alike)


def _gather(group: mx.distributed.Group, data: bytes) -> list[bytes]:
    """The data of every process, by rank."""
    with mx.stream(mx.cpu):
        sizes = np.array(mx.distributed.all_gather(mx.array([len(data)]), group=group))
        padded = np.zeros((1, int(sizes.max())), np.uint8)
        padded[0, : len(data)] = np.frombuffer(data, np.uint8)
        rows = np.array(mx.distributed.all_gather(mx.array(padded), group=group))
    return [rows[rank, :size].tobytes() for rank, size in enumerate(sizes)]
