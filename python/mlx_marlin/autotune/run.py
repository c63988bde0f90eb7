"""A tuning run over many problems: split over processes, saved after each problem, continued after an interruption."""

from __future__ import annotations

import hashlib
import math
import os
import platform
import tempfile
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx
import numpy as np
from filelock import FileLock, Timeout
from msgspec import structs

from .. import kernels, profile
from ..device.fingerprint import Fingerprint
from ..device.machine import fingerprint, hardware
from ..kernels import KernelConfig, Problem
from ..measure.race import Limits, RaceSettings
from ..profile import files as profile_files
from ..profile import json as profile_json
from ..profile.schema import Entry, merge, same_origin
from .labels import names
from .progress import ProgressBar
from .session import Session
from .trial import steps
from .tuner import MixedBPWAutoTuner


def at_rows(problems: Iterable[Problem], batch_sizes: Iterable[int]) -> list[Problem]:
    """Each problem at each number of rows, small numbers first: they are quick and matter most."""
    return [replace(p, rows=rows) for rows in sorted(batch_sizes) for p in problems]


def one_step(problem: Problem) -> list[KernelConfig]:
    """The candidates that differ from the default in one thing: rows (with the variant), columns, simdgroups, sums.
    Also the predicted config and those that may be faster: a tuned entry takes the place of the prediction.
    """
    near = [c for c in kernels.candidates_on(problem, hardware(problem.device)) if steps(problem, c) <= 1]
    expected = profile.prediction(problem)
    return list(dict.fromkeys([*near, *(expected.first if expected else ())]))


def left_open(problem: Problem) -> float:
    """Part of a call's time that measuring saves at most, by the range of the predictions; 0 where there are none."""
    expected = profile.prediction(problem)
    return expected.open if expected else 0.0


def clock_lock() -> FileLock:
    """The lock of this machine's clock: one process at a time may measure.

    Beside the profiles; where that folder cannot be written, in the folder for temporary files.
    """
    places = [profile_files.cache_dir(), Path(tempfile.gettempdir()) / f"mlx_marlin-{os.getuid()}"]
    for place in places[:-1]:
        lock = FileLock(place / "clock.lock")
        with suppress(OSError):
            place.mkdir(parents=True, exist_ok=True)
            with suppress(Timeout), lock.acquire(timeout=0):
                pass
            return lock
    places[-1].mkdir(parents=True, exist_ok=True)
    return FileLock(places[-1] / "clock.lock")


@dataclass(frozen=True)
class Outcome:
    """What a run has found.

    Attributes:
        entries: Of all processes.
        failed: Problems that could not be tuned, with the reasons.
        left: Problems that time did not reach.
    """

    entries: dict[Problem, Entry]
    failed: dict[Problem, str]
    left: int


class Run:
    """A tuning run.

    Args:
        path: The profile.
        device: ``"cpu"`` or ``"gpu"``.
        dtype: Of the activations, or ``None`` for the device's usual one.
        memory_limit: Bytes, or ``None``.
        settings: Rounds and significance.
        quick: Whether to time only candidates one step from the default.

    Raises:
        ProfileError: If the file there is malformed, or the profile of another machine or of other kernels.
    """

    def __init__(
        self, path: Path, device: str, dtype: str | None, memory_limit: int | None, settings: RaceSettings, quick: bool
    ):
        self.path, self.device, self.settings, self.quick = Path(path), device, settings, quick
        self.tuner = MixedBPWAutoTuner(
            config_path=self.path, device=device, dtype=dtype, memory_limit=memory_limit, race=settings
        )
        profile_files.check_native(self.tuner.config, device, self.path)
        self._turn = clock_lock()

    def tune(self, problems: list[Problem], group: mx.distributed.Group, deadline: float, bar: ProgressBar) -> Outcome:
        """Tune the problems, or this process's part of them.

        Args:
            problems: All problems.
            group: The processes that share the work; only those on machines of one kind do.
            deadline: ``time.perf_counter()`` after which nothing begins.
            bar: Shows the progress.
        """
        peers = _Peers(group, fingerprint(self.device))
        session = Session(self.path, self._plan(problems))
        # All processes must agree on what is left before they split it.
        self._exchange(peers, session)
        self.tuner.checked.update(session.verdicts)
        # What failed is tried again, after all else: there may be more memory by now. First is what the predictions
        # leave open: should time run out, they are right about the others.
        tuned = self._tuned(session)
        waiting = sorted((p for p in problems if p not in tuned), key=lambda p: (p in session.failed, -left_open(p)))
        mine = waiting[peers.rank :: peers.size]
        before = (len(problems) - len(waiting)) // peers.size
        if tuned or session.failed or session.verdicts:
            done = len(problems) - len(waiting)
            bar.say(f"mlx_marlin-tune: continues an earlier run: {done} of {len(problems)} problems were done")
        known = names(problems)
        if undecided := sum(left_open(p) > 0 for p in waiting):
            bar.say(f"mlx_marlin-tune: first the {undecided} of them whose fastest config the predictions leave open")
        bar.total(before + len(mine), before)
        for i, problem in enumerate(mine):
            if time.perf_counter() > deadline:
                break
            bar.begin(f"{known[problem]}, {kernels.rows_label(problem.rows)}{_expected_time(problem)}")
            self._tune_one(problem, session, deadline, (len(mine) - i) * peers.neighbours, bar)
            bar.end()
        self._exchange(peers, session)
        tuned, failed = self._tuned(session), session.failed
        left = sum(p not in tuned and p not in failed for p in problems)
        if not left:
            session.close()
        entries = {p: self.tuner.config.problems[p] for p in problems if p in tuned}
        return Outcome(entries, {p: failed[p] for p in problems if p in failed}, left)

    def _tune_one(self, problem: Problem, session: Session, deadline: float, left: int, bar: ProgressBar) -> None:
        """Tune a problem and keep what came out: an entry, the reason of a failure, or the verdicts so far.

        Args:
            left: Problems that the time is for; what one does not use goes to the others.
        """
        try:
            with self._turn.acquire(timeout=-1 if math.isinf(deadline) else max(0.0, deadline - time.perf_counter())):
                now = time.perf_counter()
                limits = Limits(now + (deadline - now) / left, deadline)
                configs = one_step(problem) if self.quick else None
                warmup, rounds = self.settings.warmup, self.settings.rounds
                found = self.tuner.benchmark_layer(
                    problem, problem.rows, configs, warmup, rounds, limits=limits, on_round=bar.round
                )
        except Timeout:
            return
        # One problem that cannot be tuned must not keep the others from it. RuntimeError: MLX, out of memory.
        except (MemoryError, ValueError, RuntimeError) as error:
            session.add(failed={problem: f"{type(error).__name__}: {error}"})
        else:
            if found:
                self._save()
                session.add(done=[problem])
        finally:
            session.add(verdicts=self.tuner.checked)

    def _save(self) -> None:
        self.tuner.config = profile_files.save(self.tuner.config, self.path)
        profile.refresh()

    def _plan(self, problems: list[Problem]) -> str:
        plan = repr((problems, self.settings, self.quick, fingerprint(self.device), self.tuner.objective))
        return hashlib.sha256(plan.encode()).hexdigest()

    def _tuned(self, session: Session) -> set[Problem]:
        """The problems that the session has tuned."""
        return session.done & set(self.tuner.config.problems)

    def _exchange(self, peers: _Peers, session: Session) -> None:
        """Give every process what all others on machines of its kind have."""
        if peers.size == 1:
            return
        for text in peers.gather(profile_json.encode(self.tuner.config)):
            theirs = profile_json.decode(text, "the profile of another process")
            if same_origin(self.tuner.config, theirs):
                self.tuner.config = merge(theirs, self.tuner.config)
        self._save()
        for text in peers.gather(session.encode()):
            session.absorb(text)


def _expected_time(problem: Problem) -> str:
    """The range of a problem's prediction, for the line of progress; empty where it has none."""
    expected = profile.prediction(problem)
    if expected is None or expected.uncertainty is None:
        return ""
    total = expected.uncertainty.total_us
    saved = f", up to {100 * expected.open:.0f} % open" if expected.open else ""
    return f", predicted {total.low:.3g} to {total.high:.3g} us{saved}"


class _Peers:
    """The processes of a group on machines of this kind: timings hold for one kind only.

    Attributes:
        rank, size: Of this process among them.
        neighbours: How many of them are on this very machine and take turns at its clock, this one included.
    """

    def __init__(self, group: mx.distributed.Group, mine: Fingerprint):
        self._group = group
        self._alike, self.rank, self.size, self.neighbours = [0], 0, 1, 1
        if group.size() > 1:
            kind = repr(structs.replace(mine, os="", mlx_version=""))
            told = [text.decode().split("\0") for text in _gather(group, f"{kind}\0{platform.node()}".encode())]
            self._alike = [rank for rank, (other, _) in enumerate(told) if other == kind]
            self.rank, self.size = self._alike.index(group.rank()), len(self._alike)
            self.neighbours = sum(told[rank][1] == platform.node() for rank in self._alike)

    def gather(self, data: bytes) -> list[bytes]:
        """The data of each of them."""
        if self._group.size() == 1:
            return [data]
        every = _gather(self._group, data)
        return [every[rank] for rank in self._alike]


def _gather(group: mx.distributed.Group, data: bytes) -> list[bytes]:
    """The data of every process, by rank."""
    with mx.stream(mx.cpu):
        sizes = np.array(mx.distributed.all_gather(mx.array([len(data)]), group=group))
        padded = np.zeros((1, int(sizes.max())), np.uint8)
        padded[0, : len(data)] = np.frombuffer(data, np.uint8)
        rows = np.array(mx.distributed.all_gather(mx.array(padded), group=group))
    return [rows[rank, :size].tobytes() for rank, size in enumerate(sizes)]
