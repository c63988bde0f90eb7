"""The profiles that the layers of this process select from, and the look-up of a problem in them."""

from __future__ import annotations

import logging
import threading
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

from msgspec import structs

from .. import kernels
from ..device.fingerprint import device_family
from ..device.machine import device_name, is_present
from ..kernels import KernelConfig, Problem
from . import files
from .files import default_path, load
from .lookup import search_table, table_of
from .schema import AutotuneConfig, Entry, ProfileError
from .uncertainty import Uncertainty

_log = logging.getLogger("mlx_marlin")


class Tuned(NamedTuple):
    """A config from a profile, and where it comes from."""

    config: KernelConfig
    origin: str


class Predicted(NamedTuple):
    """A predicted config, and how far its time can be off; ``None``: by 25 % at most."""

    config: KernelConfig
    uncertainty: Uncertainty | None

    @property
    def first(self) -> tuple[KernelConfig, ...]:
        """What is worth measuring first: the config, then those that may be faster within the range."""
        return (self.config, *(self.uncertainty.contenders if self.uncertainty else ()))

    @property
    def open(self) -> float:
        """Part of the time that is saved at most by measuring which of them is the fastest."""
        return self.uncertainty.saved if self.uncertainty else 0.0


class _Active:
    """The profiles that layers of this process look into, per device; loaded when first asked for."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.chosen: dict[str, tuple[str, AutotuneConfig]] = {}
        self.found: dict[str, list[tuple[str, AutotuneConfig]]] = {}
        self.generation = 0

    def sources(self, device: str) -> list[tuple[str, AutotuneConfig]]:
        with self.lock:
            if device not in self.found:
                self.found[device] = self._load(device)
            return self.found[device]

    def _load(self, device: str) -> list[tuple[str, AutotuneConfig]]:
        sources = []
        # Elsewhere a problem of the GPU is only planned, never run.
        present = is_present(device)
        if device in self.chosen:
            sources.append(self.chosen[device])
        elif present and (found := tuned(device)) is not None:
            sources.append((f"tuned profile {default_path(device)}", found))
        if present and (shipped := predicted(device_name(device))) is not None:
            sources.append(shipped)
        return sources

    def reset(self) -> None:
        with self.lock:
            self.found.clear()
            self.generation += 1


_active = _Active()


def tuned(device: str) -> AutotuneConfig | None:
    """The tuned profile of this machine, if there is one that can be used.

    A bad file is ignored, with a warning: the defaults handle every problem.
    """
    path = default_path(device)
    try:
        if path.exists():
            found = load(path)
            files.check_native(found, device, path)
            return found
    except (ProfileError, OSError) as error:
        _log.warning("ignoring the tuned profile: %s", error)
    return None


@cache
def predicted(name: str) -> tuple[str, AutotuneConfig] | None:
    """The in-package profile of a device, else of its family."""
    for stem in (name.lower().replace(" ", "_"), device_family(name).lower()):
        path = Path(__file__).parent / "predicted" / f"{stem}.json"
        if path.exists():
            return f"predicted profile {path.name}", load(path)
    return None


def generation() -> int:
    """A number that changes whenever :func:`find` may answer differently."""
    return _active.generation


def refresh() -> None:
    """Forget the loaded profiles; the next look-up reads the files again."""
    _active.reset()


def use_profile(path: str | Path | None, allow_foreign: bool = False) -> None:
    """Let the layers of this process select from a profile instead of the one found automatically.

    Args:
        path: A profile, or ``None`` to go back to the one found automatically.
        allow_foreign: Whether a profile of another machine, of other kernels, or without a fingerprint may be used.
            Default: ``False``.

    Raises:
        ProfileError: If the file is malformed, or foreign and not allowed.
    """
    with _active.lock:
        if path is None:
            _active.chosen.clear()
        else:
            path = Path(path)
            profile = load(path)
            devices = [profile.fingerprint.device] if profile.fingerprint else list(kernels.DEVICES)
            for device in devices:
                if not allow_foreign:
                    files.check_native(profile, device, path)
                _active.chosen[device] = (f"profile {path}", profile)
        _active.reset()


def find(problem: Problem) -> Tuned | None:
    """The tuned config of a problem, with its origin; ``None`` if no profile knows one.

    In each profile (the tuned one, then the predicted one): the problem itself; the same with or without scores, or in
    another dtype; the nearest number of rows that has the same default variant, of the problem itself, then of those;
    ``lookup_table``, as far as it is about this kind of problem. Configs from elsewhere are fitted to the problem.
    """
    for origin, profile in _active.sources(problem.device):
        found = _entry_of(profile, problem)
        if found is not None:
            doubt = f"; {found.entry.uncertainty}" if found.entry.uncertainty else ""
            return Tuned(found.config, f"{_described(found.problem, problem)} in the {origin}{doubt}")
        config = _of_table(profile, problem)
        if config is not None:
            return Tuned(config, f"lookup_table in the {origin}")
    return None


def prediction(problem: Problem) -> Predicted | None:
    """What the predicted profile of this machine says of a problem, with contenders that can run it; ``None`` if there
    is none, or it does not know the problem.
    """
    shipped = predicted(device_name(problem.device)) if is_present(problem.device) else None
    found = None if shipped is None else _entry_of(shipped[1], problem)
    if found is None:
        return None
    doubt = found.entry.uncertainty
    if doubt is not None:
        runs = kernels.effective(problem, found.config)
        fitted = (c for c in (kernels.fitted(problem, c) for c in doubt.contenders) if c is not None)
        contenders = tuple(dict.fromkeys(c for c in fitted if kernels.effective(problem, c) != runs))
        doubt = structs.replace(doubt, contenders=contenders, saved=doubt.saved if contenders else 0.0)
    return Predicted(found.config, doubt)


class _Found(NamedTuple):
    """An entry that answers a problem, and its config as it fits there."""

    problem: Problem
    entry: Entry
    config: KernelConfig


def _entry_of(profile: AutotuneConfig, problem: Problem) -> _Found | None:
    alike = {p: e for p, e in profile.problems.items() if _alike(p, problem)}
    for candidates in ({p: e for p, e in alike.items() if p.rows == problem.rows}, alike):
        for p in sorted(candidates, key=lambda p: (*_unlikeness(p, problem), abs(p.rows - problem.rows), p.rows)):
            config = kernels.fitted(problem, candidates[p].config)
            if config is not None:
                return _Found(p, candidates[p], config)
    return None


def _of_table(profile: AutotuneConfig, problem: Problem) -> KernelConfig | None:
    variant = kernels.default_variant(problem.rows)
    table = {b: row for b, row in table_of(profile, problem.kind).items() if kernels.default_variant(b) == variant}
    # A config from elsewhere keeps its tiles verbatim in the file; here it must fit this problem.
    fits = {
        b: {h: {w: fit for w, c in cell.items() if (fit := _fit(problem, c))} for h, cell in row.items()}
        for b, row in table.items()
    }
    return search_table(fits, problem.rows, problem.hidden, problem.widths, lambda c: True)


def _fit(problem: Problem, config: KernelConfig) -> KernelConfig | None:
    """A config of a table as it fits a problem. Cells do not tell the accuracy: where halves are allowed, the best of
    the configs that do not round says nothing.
    """
    return None if problem.accuracy == "half" and config.use_fp32_acc else kernels.fitted(problem, config)


def _alike(a: Problem, b: Problem) -> bool:
    """Whether two problems differ in rows of one variant, dtype and combination at most: the products are the same.

    What is best for a few rows does without accelerators, so that it does not matter whether there are any.
    """
    variant = kernels.default_variant(b.rows)
    accelerators = b.accelerators if variant in ("decode", "prefill4") else a.accelerators
    like_b = replace(a, rows=b.rows, dtype=b.dtype, combine=b.combine, accelerators=accelerators)
    return kernels.default_variant(a.rows) == variant and like_b == b


def _unlikeness(a: Problem, b: Problem) -> tuple[bool, bool]:
    # The dtype bears on every load and sum, the combination on one small stage.
    return a.dtype != b.dtype, a.combine != b.combine


def _described(found: Problem, asked: Problem) -> str:
    """The entry that answers, and in what it differs from what was asked."""
    text = f"entry for {kernels.rows_label(found.rows)}"
    if found.dtype != asked.dtype:
        text += f" of {found.dtype}"
    if found.combine != asked.combine:
        text += " with scores" if found.combine else " without scores"
    return text if found.rows == asked.rows else f"{text}, the nearest to {asked.rows},"
