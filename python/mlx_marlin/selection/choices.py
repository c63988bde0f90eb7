"""Which config a layer's call runs, and why: what feedback has shown, else the tuned profile, else the default.

One choice per problem for the whole process. A choice is made from shapes and dtypes only and never waits for an array.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass, replace

from .. import kernels, profile
from ..kernels import KernelConfig, Problem

# A server meets ever new row counts; one choice is a few hundred bytes.
_MAX_CHOICES = 65536

# Builds that fail for one problem before no more are tried: the config, its variant with other tiles, and prefill4.
# Where none of these can be built, what is wrong is not in their code, and there are hundreds more.
MOST_UNBUILT = 3

_WHAT_TO_DO = "Run the layer on the CPU (mx.set_default_device(mx.cpu)) and report this"


@dataclass(frozen=True)
class Choice:
    """The config that runs a problem, and the reason; tuned: whether it rests on a profile or on feedback."""

    problem: Problem
    config: KernelConfig
    reason: str
    tuned: bool = True

    def __str__(self) -> str:
        c = self.config
        workers = "threads" if self.problem.device == "cpu" else "simdgroups"
        variant = c.kernel_variant + (" on neural accelerators" if kernels.accelerated(self.problem, c) else "")
        return (
            f"{shown_name(self.problem, c)} (variant {variant}, tile {c.tile_size_m} x {c.tile_size_n}, "
            f"{workers} {c.simdgroups}, fp32 accumulation {'on' if c.use_fp32_acc else 'off'}): "
            f"{self.reason}"
        )


def shown_name(problem: Problem, config: KernelConfig) -> str:
    """What a config's kernel is called where it is shown: the names are those of SwiGLU kernels, which others do not
    run.
    """
    return config.kernel_name if problem.kind == "swiglu" else f"{problem.kind} {config.kernel_variant}"


@dataclass(frozen=True)
class Refusal:
    """Why a config is not chosen; built: whether its kernels could be built at all."""

    reason: str
    built: bool = True


class _Choices:
    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.table: dict[Problem, Choice] = {}
        self.feedback: dict[Problem, Choice] = {}
        self.refused: dict[Problem, dict[KernelConfig, Refusal]] = {}
        self.changes = 0
        self.profile_generation = profile.generation()

    def get(self, problem: Problem) -> Choice:
        choice = self.table.get(problem) if self.profile_generation == profile.generation() else None
        return choice or self.make(problem)

    def make(self, problem: Problem) -> Choice:
        with self.lock:
            current = profile.generation()
            if current != self.profile_generation or len(self.table) >= _MAX_CHOICES:
                self.table.clear()
            choice = self.allowed(self.feedback.get(problem) or from_profile(problem))
            self.table[problem] = choice
            self.profile_generation = current
            return choice

    def allowed(self, choice: Choice) -> Choice:
        """The choice itself, or where it was refused the next candidate that was not."""
        problem, refused = choice.problem, self.refused.get(choice.problem, {})
        if choice.config not in refused:
            return choice
        unbuilt = [refusal.reason for refusal in refused.values() if not refusal.built]
        if len(unbuilt) >= MOST_UNBUILT:
            raise RuntimeError(
                f"{len(unbuilt)} kernels for {problem} could not be built on this {problem.device}, and no more are "
                f"tried. The last: {unbuilt[-1]}. {_WHAT_TO_DO}"
            )
        following = _following(problem, choice.config, refused)
        if following is None:
            raise RuntimeError(
                f"every kernel for {problem} is refused on this {problem.device}, the last because: "
                f"{refused[choice.config].reason}. {_WHAT_TO_DO}"
            )
        reason = f"{shown_name(problem, choice.config)} is refused here: {refused[choice.config].reason}"
        return Choice(problem, following, reason, tuned=False)


def _following(problem: Problem, config: KernelConfig, refused: dict[KernelConfig, Refusal]) -> KernelConfig | None:
    """What is tried where a config was refused: its variant with other tiles, then prefill4, then what there is.

    prefill4 is next as it is the fastest for any number of rows that does without simdgroup matrices. A variant of
    which two configs could not be built comes after the others. Configs that sum as the refused one does come first.
    A compiler that is wrong about one config for neural accelerators is not asked for others: what is the default
    without them is next.
    """
    first = config.kernel_variant
    if any(kernels.accelerated(problem, other) for other in refused):
        problem = replace(problem, accelerators=False)
        first = kernels.default(problem).kernel_variant if kernels.accelerated(problem, config) else first
    unbuilt = [c.kernel_variant for c, refusal in refused.items() if not refusal.built]
    order = [first, "prefill4"]

    def rank(other: KernelConfig) -> tuple[bool, int]:
        at = order.index(other.kernel_variant) if other.kernel_variant in order else len(order)
        gone = unbuilt.count(other.kernel_variant) >= 2
        return other.use_fp32_acc != config.use_fp32_acc, len(order) + 1 if gone else at

    every = dict.fromkeys((kernels.default(problem), *kernels.candidates(problem)))
    return min((c for c in every if c not in refused), key=rank, default=None)


_choices = _Choices()


def from_profile(problem: Problem) -> Choice:
    """The choice without feedback: the tuned or predicted profile's, else the default."""
    found = profile.find(problem)
    # A layer that is no loaded model's and has not been called says 1: the reason shows what was assumed.
    top_k = f" and top-k {problem.top_k}" if problem.fused else ""
    asked = f"{kernels.rows_label(problem.rows)}{top_k}"
    if found is not None:
        return Choice(problem, found.config, f"for {asked}: {found.origin}")
    reason = f"the default for {asked}, because no profile knows this problem"
    return Choice(problem, kernels.default(problem), reason, tuned=False)


def choose(problem: Problem) -> Choice:
    """The config for a problem, and why; a dictionary look-up after the first time."""
    return _choices.get(problem)


def by_name(problem: Problem, names: Iterable[str]) -> dict[str, KernelConfig]:
    """The configs of those kernels that can run a problem: the chosen one's tiles where it has that name,
    else the default's.
    """
    chosen = choose(problem).config
    configs = {}
    for name in names:
        if _plain(name) == _plain(chosen.kernel_name):
            config = replace(chosen, kernel_name=name)
        else:
            try:
                config = kernels.config_for(problem, name)
            except ValueError:  # says why it cannot run
                continue
        configs[name] = config
    return configs


def _plain(name: str) -> str:
    return name.removesuffix("_fp32acc")


def generation() -> int:
    """A number that changes whenever :func:`choose` may answer differently."""
    return _choices.changes + profile.generation()


def set_feedback(problem: Problem, config: KernelConfig | None, reason: str = "") -> None:
    """Let a measured config run a problem from now on; ``None`` goes back to the profile or the default.

    Raises:
        ValueError: If the config cannot run the problem.
    """
    obstacle = None if config is None else kernels.feasible(problem, config)
    if obstacle is not None:
        raise ValueError(f"{config} cannot run {problem}: {obstacle}")
    with _choices.lock:
        if config is None:
            _choices.feedback.pop(problem, None)
        else:
            _choices.feedback[problem] = Choice(problem, config, reason)
        _choices.table.pop(problem, None)
        _choices.changes += 1


def refuse(problem: Problem, config: KernelConfig, reason: str, *, built: bool = True) -> None:
    """Never choose a config for a problem again in this process.

    built: Whether its kernels could be built.
    """
    with _choices.lock:
        _choices.refused.setdefault(problem, {})[config] = Refusal(reason, built)
        _choices.table.pop(problem, None)
        _choices.changes += 1
