"""Online adaptation: layers time a sampled fraction of their calls and switch to what is faster."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn

from .. import kernels, ops
from ..kernels import KernelConfig, Problem
from ..layers.experts import TrellisSwitch
from ..layers.linear import TrellisLinear
from ..selection import choices, selftest
from ..selection.evidence import MIN_SAMPLES, Ledger
from ..selection.selector import SWITCH_LEVEL

# Latencies kept per config and problem: the longest look needs 80.
_HISTORY_LEN = 100
# A config that is this much slower than the one in charge is hopeless, and sampled only now and then.
_HOPELESS = 1.25
_RETRY_EVERY = 16


class _Contest:
    """The configs that compete for one problem: the chosen one, and the default tiles of every variant.

    Args:
        problem: What is asked.
        warm: Configs that have run, with the problem but for its rows: those of all contests of an adaptation.
    """

    def __init__(self, problem: Problem, warm: set[tuple[KernelConfig, Problem]]):
        self.problem = problem
        self.base = selftest.select(problem, traced=False)[0].config
        names = [kernels.make_name(variant) for variant in kernels.VARIANTS]
        configs = [self.base, kernels.default(problem), *choices.by_name(problem, names).values()]
        distinct: dict[KernelConfig, KernelConfig] = {}
        for config in configs:
            if selftest.fault(problem, config) is None:
                distinct.setdefault(kernels.effective(problem, config), config)
        self.candidates = list(distinct.values())
        self.leader = self.base
        self.ledger: Ledger[KernelConfig] = Ledger(_HISTORY_LEN, SWITCH_LEVEL)
        self._warm = warm
        self._turn = 0

    def next(self, may_compile: bool) -> KernelConfig | None:
        """The config to time now: the one in charge every other time, else the next challenger in turn.

        Args:
            may_compile: Whether there is time for the first call of a challenger; ``None`` is given where there is
                not.
        """
        self._turn += 1
        # Until the config in charge has a mean nobody knows what a call should cost.
        if self._turn % 2 or len(self.candidates) == 1 or self.mean_ms() is None:
            return self.leader
        challengers = [c for c in self.candidates if c != self.leader]
        turn = self._turn // 2
        if turn % _RETRY_EVERY:
            challengers = [c for c in challengers if not self._hopeless(c)]
        chosen = challengers[turn % len(challengers)] if challengers else self.leader
        return chosen if may_compile or self.is_warm(chosen) else None

    def is_warm(self, config: KernelConfig) -> bool:
        """Whether a config has run before on such layers: its first call compiles, whatever the rows."""
        return (config, replace(self.problem, rows=0)) in self._warm

    def mean_ms(self) -> float | None:
        """What a call costs with the config in charge; ``None`` before it was timed."""
        history = self.ledger.histories.get(self.leader)
        return history.summary()["mean_ms"] if history else None

    def record(self, config: KernelConfig, latency_ms: float) -> bool:
        """Enter a latency; whether it switched. A config's first call says nothing about the others."""
        if not self.is_warm(config):
            self._warm.add((config, replace(self.problem, rows=0)))
            return False
        self.ledger.record(config, latency_ms)
        before, means = self.leader, {c: h.summary()["mean_ms"] for c, h in self.ledger.histories.items()}
        self.leader = self.ledger.leader(self.base, self.candidates)
        if self.leader == before:
            return False
        saved = 1.0 - means[self.leader] / means[before]
        of = choices.shown_name(self.problem, before)
        reason = f"measured in use: saved {saved:.0%} of the time of {of} when it took over"
        untaught = self.leader == choices.from_profile(self.problem).config
        choices.set_feedback(self.problem, None if untaught else self.leader, reason)
        return True

    def _hopeless(self, config: KernelConfig) -> bool:
        ours, theirs = self.ledger.histories.get(config), self.ledger.histories.get(self.leader)
        if ours is None or theirs is None or len(ours.logs) < MIN_SAMPLES:
            return False
        return ours.summary()["mean_ms"] > _HOPELESS * theirs.summary()["mean_ms"]


class _Price:
    """What a kind of call costs with the config in charge, and how many calls came before that was known."""

    __slots__ = ("mean_ms", "unpriced")

    def __init__(self) -> None:
        self.mean_ms: float | None = None
        self.unpriced = 0


class _Tap:
    """Stands in a layer's calls while it is adapted."""

    def __init__(self, adaptation: Adaptation, layer: TrellisLinear | TrellisSwitch):
        self._adaptation = adaptation
        self._problem_of = layer.problem
        self._run: Callable[..., mx.array] = layer.run
        self._prices: dict[tuple, _Price] = {}

    def __call__(self, x: mx.array, indices: mx.array | None = None, scores: mx.array | None = None) -> mx.array:
        inputs = (x,) if indices is None else (x, indices, scores)
        key = (x.size, x.dtype) if indices is None else (x.size, x.dtype, indices.shape[-1], scores is None)
        price = self._prices.get(key)
        if price is None:
            price = self._prices[key] = _Price()
        if self._adaptation._draw(price):
            return self._timed(price, inputs)
        return self._run(*inputs)

    def _timed(self, price: _Price, inputs: tuple) -> mx.array:
        try:
            mx.eval([a for a in inputs if isinstance(a, mx.array)])
        except ValueError as error:
            # Under mx.compile and mx.vmap there is nothing to time: the config is fixed at trace time.
            if "function transformations" not in str(error):
                raise
            return self._run(*inputs)
        begin = time.perf_counter()
        adaptation = self._adaptation
        contest = adaptation._contest(self._problem(*inputs))
        with adaptation._lock:
            config = contest.next(adaptation._affords_first_call())
        if config is None:
            return self._run(*inputs)
        first = not contest.is_warm(config)
        start = time.perf_counter()
        y = self._run(*inputs, config=config)
        mx.eval(y)
        latency_ms = (time.perf_counter() - start) * 1e3
        with adaptation._lock:
            switched = contest.record(config, latency_ms)
            adaptation._account((time.perf_counter() - begin) * 1e3, contest.mean_ms(), first, switched, price)
        return y

    def _problem(self, x: mx.array, indices: mx.array | None = None, scores: mx.array | None = None) -> Problem:
        rows, device = x.size // x.shape[-1], ops.device_of(None)
        if indices is None:
            return self._problem_of(rows, x.dtype, device)
        return self._problem_of(rows, x.dtype, device, combine=scores is not None, top_k=indices.shape[-1])


class Adaptation:
    """A running adaptation, as :func:`adapt` returns it. Also a context manager that stops at its end."""

    def __init__(self, model: nn.Module, exploration: float, max_overhead: float, seed: int | None):
        for what, value in (("exploration", exploration), ("max_overhead", max_overhead)):
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 <= value <= 1.0:
                raise ValueError(f"{what} must be a number in [0, 1], got {value!r}")
        self._layers = [m for m in model.modules() if isinstance(m, (TrellisLinear, TrellisSwitch))]
        if not self._layers:
            raise ValueError("the model has no TrellisLinear or TrellisSwitchGLU to adapt")
        if any(layer._adaptation is not None for layer in self._layers):
            raise ValueError("the model is being adapted already; stop() that adaptation first")
        self._exploration, self._max_overhead = exploration, max_overhead
        self._random = random.Random(seed)
        self._lock = threading.RLock()
        self._contests: dict[Problem, _Contest] = {}
        self._warm: set[tuple[KernelConfig, Problem]] = set()
        self._calls = self._timed = self._switches = 0
        self._overhead_ms = self._layer_ms = 0.0
        self._dearest_first_ms = 0.0
        for layer in self._layers:
            layer._adaptation = _Tap(self, layer)

    def report(self) -> dict:
        """What it cost and what it found.

        Returns:
            ``calls`` and ``timed_calls`` of the layers; ``layer_ms``, what all calls would have cost with the
            configs in charge (from their mean latencies); ``overhead_ms``, what the timed calls cost beyond
            that: slower candidates, bookkeeping and all of a config's first call, which may compile, but not the
            overlap of calls that waiting prevents; ``overhead``, their ratio;
            ``problems`` seen, ``switches`` made, and ``changed``: problem to reason where measurements
            changed the config.
        """
        with self._lock:
            changed = {p: str(choices.choose(p)) for p, c in self._contests.items() if c.leader != c.base}
            return {
                "calls": self._calls,
                "timed_calls": self._timed,
                "layer_ms": self._layer_ms,
                "overhead_ms": self._overhead_ms,
                "overhead": self._overhead_ms / self._layer_ms if self._layer_ms else 0.0,
                "problems": len(self._contests),
                "switches": self._switches,
                "changed": changed,
            }

    def stop(self, forget: bool = False) -> dict:
        """End the timing and return the last report.

        Args:
            forget: Also go back to the configs of the profile. Default: ``False``.
        """
        for layer in self._layers:
            layer._adaptation = None
        report = self.report()
        if forget:
            for problem in self._contests:
                choices.set_feedback(problem, None)
        return report

    def __enter__(self) -> Adaptation:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _draw(self, price: _Price) -> bool:
        """Count a call; whether to time it: sampled, and the overhead so far within its bound."""
        with self._lock:
            self._calls += 1
            if price.mean_ms is None:
                price.unpriced += 1
            else:
                self._layer_ms += price.mean_ms
        if self._random.random() >= self._exploration:
            return False
        # The first latencies are what the bound is reckoned from.
        return price.mean_ms is None or self._overhead_ms <= self._max_overhead * self._layer_ms

    def _affords_first_call(self) -> bool:
        """Whether a first call as dear as the dearest so far would keep the overhead within its bound."""
        return self._overhead_ms + self._dearest_first_ms <= self._max_overhead * self._layer_ms

    def _contest(self, problem: Problem) -> _Contest:
        with self._lock:
            contest = self._contests.get(problem)
            if contest is None:
                contest = self._contests[problem] = _Contest(problem, self._warm)
            return contest

    def _account(self, spent_ms: float, mean_ms: float | None, first: bool, switched: bool, price: _Price) -> None:
        self._timed += 1
        self._switches += switched
        if first:
            self._dearest_first_ms = max(self._dearest_first_ms, spent_ms)
        beyond = spent_ms if first or mean_ms is None else spent_ms - mean_ms
        # Noise goes both ways and averages out; what a faster challenger saves is not put aside to be spent later.
        self._overhead_ms = max(0.0, self._overhead_ms + beyond)
        if mean_ms is not None:
            price.mean_ms = mean_ms
            self._layer_ms += mean_ms * price.unpriced
            price.unpriced = 0


def adapt(
    model: nn.Module, exploration: float = 0.05, *, max_overhead: float = 0.02, seed: int | None = None
) -> Adaptation:
    """Let a model's trellis layers learn from their own latencies while they run. Off unless this is called.

    A sampled fraction of the layers' calls is timed, half of them with other configs than the one in charge.
    A config that is significantly faster (see :class:`MixedKernelSelector`) takes over for its problem, in
    every layer that has it. Timed calls wait for their inputs and their result. No call is timed while the
    overhead is above its bound, and no config is tried for the first time, which may compile it, while that could
    take the overhead above it; only the very first calls go unbounded, from which the bound is reckoned.

    Args:
        model: Any module; its :class:`TrellisLinear`, :class:`TrellisSwitchGLU` and :class:`TrellisSwitchMLP` layers
            are adapted.
        exploration: Fraction of the calls to time, in [0, 1]. Default: ``0.05``.
        max_overhead: Bound of the time spent beyond what the calls would cost, as a share of that. Default:
            ``0.02``.
        seed: Makes the sampling repeatable. Default: ``None``.

    Returns:
        An :class:`Adaptation`: ``report()`` and ``stop()``.

    Raises:
        ValueError: If the model has no such layer or is adapted already, or a share lies outside [0, 1].
    """
    return Adaptation(model, exploration, max_overhead, seed)
