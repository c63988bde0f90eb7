"""Which kernel runs a call: rules for the shapes, evidence from timings over the rules, and the reason.

Seven rules, the first that applies decides: availability (7), memory pressure (1), evidence from timings or
the tuned table (6), a lopsided activation pattern (5), a specialised decode kernel (4), the number of rows
(2). The mix of bit widths (3) names the family.
"""

from __future__ import annotations

import math
import random
import threading
from collections.abc import Iterable, Sequence
from numbers import Integral, Real

from .. import codec
from ..kernels import Problem, Triple
from . import rules
from .evidence import MIN_SAMPLES, Ledger

# Probability that the evidence on one problem, over all its buckets, ever replaces a kernel by one that is no
# faster.
SWITCH_LEVEL = 0.05
# Problems remembered. A problem contains its rows, so a server meets ever new ones; each holds a few kB.
_MAX_LEDGERS = 1024


class MixedKernelSelector:
    """Picks a kernel by rules and learns from the latencies it is told. Thread-safe.

    Args:
        history_len: Latencies kept per kernel, batch bucket and problem; at least 5. Default: ``100``.
        memory_pressure_threshold: Above this, the base kernel, which needs the least scratch. Default:
            ``0.9``.
        exploration_rate: Share of selections that try another kernel, in [0, 1]. Default: ``0.05``.
        seed: Makes the exploration repeatable. Default: ``None``.
    """

    def __init__(
        self,
        history_len: int = 100,
        memory_pressure_threshold: float = 0.9,
        exploration_rate: float = 0.05,
        seed: int | None = None,
    ):
        if not isinstance(history_len, int) or history_len < MIN_SAMPLES:
            raise ValueError(f"history_len must be an integer >= {MIN_SAMPLES}, got {history_len!r}")
        self._history_len = history_len
        self._threshold = rules.fraction("memory_pressure_threshold", memory_pressure_threshold)
        self._exploration_rate = rules.fraction("exploration_rate", exploration_rate)
        self._random = random.Random(seed)
        self._lock = threading.RLock()
        self.reset_history()

    @property
    def exploration_rate(self) -> float:
        """Share of selections that try another kernel."""
        return self._exploration_rate

    def set_exploration_rate(self, rate: float) -> None:
        """Set the share of selections that try another kernel.

        Raises:
            ValueError: If it lies outside [0, 1].
        """
        self._exploration_rate = rules.fraction("exploration rate", rate)

    def reset_history(self) -> None:
        """Forget all latencies, switches and counts."""
        with self._lock:
            self._ledgers: dict[tuple[Problem | None, str], Ledger[str]] = {}
            self._tracked: set[str] = set()
            self._selections = self._explorations = self._judged = self._accurate = 0

    def select_kernel(
        self,
        batch_size: int,
        active_expert_bits: Sequence[float],
        gpu_memory_pressure: float = 0.0,
        gate_bits: float | None = None,
        up_bits: float | None = None,
        down_bits: float | None = None,
        use_fp32_acc: bool = False,
        available_kernels: Iterable[str] | None = None,
        pattern: dict | None = None,
        problem: Problem | None = None,
    ) -> tuple[str, dict]:
        """Pick the kernel for a call.

        Args:
            batch_size: Rows, at least 1.
            active_expert_bits: One per distinct active expert: the bits of its up projection.
            gpu_memory_pressure: Share of the memory in use, in [0, 1]. Default: ``0.0``.
            gate_bits: With up_bits and down_bits: states that all active experts have these widths. Default:
                ``None``.
            up_bits, down_bits: See gate_bits.
            use_fp32_acc: Take the kernel's ``_fp32acc`` twin. Default: ``False``.
            available_kernels: Only these may be returned. Default: ``None``, all.
            pattern: What :func:`analyze_expert_activation_pattern` returns. Default: ``None``.
            problem: Whose timings and tuned entry count, and no others. Default: ``None``, a class of its own.

        Returns:
            The kernel's name, and a dict with ``kernel_name``, ``family``, ``reason``, ``explored``,
            ``batch_bucket`` and ``candidates``: for each kernel considered its evidence (``samples``, geometric
            ``mean_ms`` and the moving average ``ema_ms``).

        Raises:
            ValueError: If an argument is out of range or no kernel is available.
        """
        _check_rows(batch_size)
        family = rules.bit_family(_check_bits(active_expert_bits))
        pressure = rules.fraction("gpu_memory_pressure", gpu_memory_pressure)
        triple = _triple(gate_bits, up_bits, down_bits)
        available = _available(available_kernels)
        bucket = rules.batch_bucket(batch_size)
        with self._lock:
            ledger = self._ledgers.get((problem, bucket))
            candidates = rules.candidates(batch_size, triple, use_fp32_acc, ledger)
            candidates = [name for name in candidates if available is None or name in available]
            pressed = pressure > self._threshold
            if pressed:
                name, reason = self._pressed(pressure, use_fp32_acc)
            else:
                name, reason = rules.by_table(problem, use_fp32_acc) or rules.by_rules(
                    batch_size, triple, use_fp32_acc, pattern, problem
                )
            name, reason = _substituted(name, reason, triple, available)
            # Before the decision: a switch restarts the histories that led to it.
            evidence = _evidence(ledger, [name, *candidates])
            kept = name, reason, False
            name, reason, explored = kept if pressed else self._by_evidence(name, reason, candidates, ledger)
            self._selections += 1
        told = {"family": family, "reason": reason, "explored": explored, "batch_bucket": bucket}
        return name, {"kernel_name": name, **told, "candidates": evidence}

    def record_latency(
        self, kernel_name: str, batch_size: int, latency_ms: float, problem: Problem | None = None
    ) -> None:
        """Tell how long a kernel took.

        Args:
            kernel_name: The kernel that ran.
            batch_size: Rows, at least 1.
            latency_ms: Milliseconds, synchronised; more than 0.
            problem: What it ran. Default: ``None``, a class of its own.

        Raises:
            ValueError: If an argument is out of range or no kernel has this name.
        """
        rules.parse(kernel_name)
        _check_rows(batch_size)
        if not (type(latency_ms) is float or isinstance(latency_ms, Real)) or not 0.0 < latency_ms < math.inf:
            raise ValueError(f"latency_ms must be a finite number of milliseconds above 0, got {latency_ms!r}")
        key = problem, rules.batch_bucket(batch_size)
        with self._lock:
            ledger = self._ledgers.get(key)
            if ledger is None:
                if len(self._ledgers) >= _MAX_LEDGERS:
                    del self._ledgers[next(iter(self._ledgers))]
                ledger = self._ledgers[key] = Ledger(self._history_len, SWITCH_LEVEL / len(rules.BUCKETS))
            ledger.record(kernel_name, latency_ms)
            self._tracked.add(kernel_name)

    def get_statistics(self) -> dict:
        """What was selected and learned so far.

        Returns:
            ``selection_accuracy`` (share of the exploiting choices that were the fastest among the kernels
            with at least 5 samples; 0.0 without any), ``total_selections``, ``explorations``,
            ``exploration_rate``, ``switches`` (how often evidence replaced a kernel) and ``tracked_kernels``
            (how many had timings recorded).
        """
        with self._lock:
            return {
                "selection_accuracy": self._accurate / self._judged if self._judged else 0.0,
                "total_selections": self._selections,
                "explorations": self._explorations,
                "exploration_rate": self._exploration_rate,
                "switches": sum(ledger.switches for ledger in self._ledgers.values()),
                "tracked_kernels": len(self._tracked),
            }

    def _pressed(self, pressure: float, fp32acc: bool) -> tuple[str, str]:
        reason = f"memory_pressure: {pressure:.2f} exceeds {self._threshold:.2f}, base needs least scratch"
        return rules.make("base", fp32acc=fp32acc), reason

    def _by_evidence(
        self, name: str, reason: str, candidates: list[str], ledger: Ledger[str] | None
    ) -> tuple[str, str, bool]:
        """The kernel that the timings, or the wish to get timings, put in the place of the rules' choice."""
        chosen, fastest = name, None
        if ledger is not None:
            fastest = ledger.fastest(candidates)
            chosen = ledger.leader(name, candidates)
        others = [c for c in candidates if c != chosen]
        if others and self._exploration_rate and self._random.random() < self._exploration_rate:
            self._explorations += 1
            explored = others[int(self._random.random() * len(others))]
            return explored, f"exploration: trying {explored} instead of {chosen}", True
        if fastest is not None:
            self._judged += 1
            self._accurate += fastest == chosen
        if chosen != name:
            reason = f"evidence: {chosen} is significantly faster than {name}"
        return chosen, reason, False


def _check_rows(batch_size: int) -> None:
    if not (type(batch_size) is int or isinstance(batch_size, Integral)) or batch_size < 1:
        raise ValueError(f"batch_size must be an integer >= 1, got {batch_size!r}")


def _check_bits(active_expert_bits: Sequence[float]) -> list[float]:
    # Arrays of MLX and NumPy: their elements are no integers, those of their lists are.
    bits = active_expert_bits.tolist() if hasattr(active_expert_bits, "tolist") else active_expert_bits
    if isinstance(bits, str) or not isinstance(bits, Iterable):
        bits = [bits]
    return [codec.as_width(width, "each of active_expert_bits") for width in bits]


def _triple(gate: float | None, up: float | None, down: float | None) -> Triple | None:
    if gate is None or up is None or down is None:
        return None
    return codec.as_width(gate, "gate_bits"), codec.as_width(up, "up_bits"), codec.as_width(down, "down_bits")


def _available(names: Iterable[str] | None) -> frozenset[str] | set[str] | None:
    if names is None:
        return None
    if isinstance(names, str):
        raise ValueError(f"available_kernels must be a set of kernel names, got the single string {names!r}")
    names = names if isinstance(names, (set, frozenset)) else set(names)
    if not names:
        raise ValueError("available_kernels is empty: no kernel may run; pass None to allow all of them")
    return names


def _substituted(
    name: str, reason: str, triple: Triple | None, available: frozenset[str] | set[str] | None
) -> tuple[str, str]:
    """A kernel that is available: the one asked for, or the one most like it."""
    if available is None or name in available:
        return name, reason
    substitute = rules.nearest(name, triple, available)
    return substitute, f"fallback_availability: Selected kernel {name} not available, using {substitute} instead"


def _evidence(ledger: Ledger[str] | None, names: list[str]) -> dict[str, dict]:
    """What is known of each kernel."""
    histories = {} if ledger is None else ledger.histories
    return {n: histories[n].summary() if n in histories else {"samples": 0} for n in dict.fromkeys(names)}


# Of the instance that the process shares.
_shared = MixedKernelSelector()
get_mixed_kernel = _shared.select_kernel
record_kernel_latency = _shared.record_latency
get_statistics = _shared.get_statistics
reset_history = _shared.reset_history
set_exploration_rate = _shared.set_exploration_rate
