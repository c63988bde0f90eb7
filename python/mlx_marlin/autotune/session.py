"""What a tuning run has done so far, beside the profile until all is done: an interrupted run is continued."""

from __future__ import annotations

import glob
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

import msgspec

from ..kernels import KernelConfig, Problem
from ..storage import atomic
from .trial import Verdicts

# A run that nobody has continued for a month: nobody will.
_FORGOTTEN_SECONDS = 30 * 24 * 3600


class _Failure(msgspec.Struct):
    problem: Problem
    reason: str


class _Verdict(msgspec.Struct):
    problem: Problem
    config: KernelConfig
    verdict: float | str


class _State(msgspec.Struct):
    plan: str
    done: list[Problem] = []
    failed: list[_Failure] = []
    verdicts: list[_Verdict] = []


def _failures(state: _State) -> dict[Problem, str]:
    return {failure.problem: failure.reason for failure in state.failed}


def _verdicts(state: _State) -> Verdicts:
    return {(v.problem, v.config): v.verdict for v in state.verdicts}


class Session:
    """The progress of one plan; the processes of a machine that work on it share the file.

    Args:
        profile: The profile's path.
        plan: Digest of all that the run is asked for; another plan has another session.
    """

    def __init__(self, profile: Path, plan: str):
        self.path = profile.with_name(f"{profile.name}.session-{plan[:8]}")
        self._plan = plan
        self._lock_path = Path(f"{profile}.lock")
        self._state = self._stored()
        self._clean()

    @property
    def done(self) -> set[Problem]:
        """Problems whose entries this session has written."""
        return set(self._state.done)

    @property
    def failed(self) -> dict[Problem, str]:
        """Problems that cannot be tuned, with the reasons."""
        return _failures(self._state)

    @property
    def verdicts(self) -> Verdicts:
        """Outcomes of checks."""
        return _verdicts(self._state)

    def add(
        self,
        done: Iterable[Problem] = (),
        failed: Mapping[Problem, str] | None = None,
        verdicts: Verdicts | None = None,
    ) -> None:
        """Add to what is known, and to the file."""
        from filelock import FileLock

        self._lock_path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(self._lock_path):
            stored = self._stored()
            # Not the file alone: another process may have finished the plan and removed it.
            all_done = dict.fromkeys([*stored.done, *self._state.done, *done])
            all_failed = _failures(stored) | self.failed | dict(failed or {})
            all_verdicts = _verdicts(stored) | self.verdicts | (verdicts or {})
            self._state = _State(
                self._plan,
                list(all_done),
                [_Failure(*item) for item in all_failed.items() if item[0] not in all_done],
                [_Verdict(*key, verdict) for key, verdict in all_verdicts.items()],
            )
            atomic.write_bytes(self.path, msgspec.json.encode(self._state))

    def encode(self) -> bytes:
        """What is done and what failed, for the other processes."""
        return msgspec.json.encode(_State(self._plan, self._state.done, self._state.failed))

    def absorb(self, text: bytes) -> None:
        """Add what another process has done."""
        theirs = msgspec.json.decode(text, type=_State)
        self.add(theirs.done, _failures(theirs))

    def close(self) -> None:
        """All is done: whoever notices removes the file."""
        self.path.unlink(missing_ok=True)
        atomic.remove_leftovers(self.path.parent, glob.escape(self.path.name))

    def _clean(self) -> None:
        """Remove what runs left behind that were never continued."""
        with suppress(OSError):
            for path in self.path.parent.glob(f"*.session-{8 * '[0-9a-f]'}"):
                if path != self.path and time.time() - path.stat().st_mtime > _FORGOTTEN_SECONDS:
                    path.unlink(missing_ok=True)

    def _stored(self) -> _State:
        """What the file holds; a damaged one, or another plan's, starts afresh."""
        try:
            state = msgspec.json.decode(self.path.read_bytes(), type=_State)
        except (FileNotFoundError, msgspec.DecodeError, UnicodeDecodeError):
            return _State(self._plan)
        return state if state.plan == self._plan else _State(self._plan)
