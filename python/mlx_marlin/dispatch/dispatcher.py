"""Dispatch of a MoE layer by what was really routed: active experts' bits, activation pattern, memory pressure."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from itertools import product

import mlx.core as mx
import numpy as np

from .. import codec, device, kernels
from ..kernels import KernelConfig, Problem, Triple
from ..layers.experts import TrellisSwitch, fused_experts
from ..ops import Indices
from ..selection import choices, selftest
from ..selection.selector import MixedKernelSelector
from ..weights.experts import ExpertBank
from .pattern import (
    analyze_expert_activation_pattern,
    count_rows,
    expert_id_array,
    get_expert_bits,
    rows_per_expert,
)

# Weight of the newest call in the predicted routing: text changes its experts slowly, so the last two calls
# weigh 3/4.
_NEWEST_CALL = 0.5


def estimate_gpu_memory_pressure() -> float:
    """Share of the usable memory that MLX holds, in [0, 1].

    MLX's active memory over the recommended working set of the GPU, or over the physical memory on the CPU.
    """
    return device.memory_pressure()


def get_available_kernels() -> set[str]:
    """The names of all kernels that ops accept on this machine."""
    return set(_all_names())


@lru_cache(maxsize=1)
def _all_names() -> frozenset[str]:
    kinds: list[tuple[str, Triple | None]] = [(variant, None) for variant in kernels.VARIANTS]
    kinds += [("decode", triple) for triple in product(codec.WIDTHS, codec.WIDTHS, codec.WIDTHS)]
    return frozenset(
        kernels.make_name(*kind, mixed=mixed, fp32acc=fp32acc)
        for kind in kinds
        for mixed in (False, True)
        for fp32acc in (False, True)
    )


class ActivationPredictor:
    """Predicts the next call's active experts from the last calls' routing.

    Keeps for each expert the moving average of the share of rows that had it; a call of n rows then activates
    it with probability ``1 - (1 - share) ** n``. As many experts are predicted as the probabilities sum to.

    Args:
        num_experts: Experts of the layer.
    """

    def __init__(self, num_experts: int):
        self._shares = np.zeros(num_experts)
        self._calls = 0
        self._top_k = 1
        self._active = self._hits = 0

    def predict(self, rows: int) -> list[int]:
        """The experts expected in a call of that many rows, ascending; empty before the first call."""
        if not self._calls:
            return []
        likely = 1.0 - (1.0 - self._shares) ** rows
        count = max(1, round(float(likely.sum())))
        return sorted(np.argsort(-likely, kind="stable")[:count].tolist())

    def pattern(self, rows: int) -> dict[str, float]:
        """The expected metrics of :func:`analyze_expert_activation_pattern` that selection reads."""
        active = len(self.predict(rows))
        return {
            "num_activated_experts": active,
            "tokens_per_expert_avg": rows * self._top_k / active if active else 0.0,
            "top_expert_share": float(self._shares.max()),
        }

    def observe(self, expert_ids: np.ndarray) -> None:
        """Compare the prediction with a call's routing, shape ``[..., k]``, and learn from it."""
        rows = count_rows(expert_ids)
        if not rows:
            return
        counts = rows_per_expert(expert_ids, len(self._shares))
        active = set(np.flatnonzero(counts).tolist())
        if self._calls:
            self._active += len(active)
            self._hits += len(active.intersection(self.predict(rows)))
        weight = _NEWEST_CALL if self._calls else 1.0
        self._shares += weight * (counts / rows - self._shares)
        self._top_k = expert_ids.shape[-1]
        self._calls += 1

    @property
    def hit_rate(self) -> float:
        """Share of the active experts that had been predicted; 0.0 before the second call."""
        return self._hits / self._active if self._active else 0.0


@lru_cache(maxsize=4096)
def _runnable(problem: Problem, triple: Triple | None, fp32acc: bool, generation: int) -> dict[str, KernelConfig]:
    """The kernels that may run a call whose active experts all have this triple (``None``: differing ones).

    generation: :func:`choices.generation`, so that a new profile is seen.
    """
    kinds: list[tuple[str, Triple | None]] = [(variant, None) for variant in kernels.VARIANTS]
    kinds += [("decode", triple)] if triple else []
    names = [kernels.make_name(*kind, mixed=mixed, fp32acc=fp32acc) for kind in kinds for mixed in (False, True)]
    exact = fp32acc or problem.accuracy == "float32"
    configs = {name: replace(config, use_fp32_acc=exact) for name, config in choices.by_name(problem, names).items()}
    return {name: config for name, config in configs.items() if selftest.fault(problem, config) is None}


def _only_triple(found: set[tuple[float, ...]]) -> Triple | None:
    """The (gate, up, down) bits that all experts have; kernels without a gate have no names by widths."""
    if len(found) != 1:
        return None
    *gate, up, down = next(iter(found))
    return (gate[0], up, down) if gate else None


class MixedBpwMoEDispatcher:
    """Runs a layer's experts with the kernel that suits each call's routing, and learns from its latency.

    Args:
        layer_or_bank: A :class:`TrellisSwitchGLU`, a :class:`TrellisSwitchMLP` or an :class:`ExpertBank`.
        expert_bit_metadata: ``{expert: (gate, up, down)}`` bits, without a gate ``(up, down)``. Default: ``None``,
            those of the weights.
        use_fp32_acc: Take ``_fp32acc`` kernels. Default: ``False``.
        enable_ab_testing: Whether to explore. Default: ``True``.
        exploration_rate: Share of the calls that try another kernel. Default: ``0.05``.

    Raises:
        ValueError: If the metadata contradicts the weights, or the rate lies outside [0, 1].
    """

    def __init__(
        self,
        layer_or_bank: TrellisSwitch | ExpertBank,
        expert_bit_metadata: Mapping[int, tuple[float, ...]] | None = None,
        use_fp32_acc: bool = False,
        enable_ab_testing: bool = True,
        exploration_rate: float = 0.05,
    ):
        if isinstance(layer_or_bank, ExpertBank):
            layer_or_bank = fused_experts(layer_or_bank)
        if not isinstance(layer_or_bank, TrellisSwitch):
            raise ValueError(f"wanted a TrellisSwitchGLU or an ExpertBank, got {type(layer_or_bank).__name__}")
        self.layer = layer_or_bank
        self.use_fp32_acc = bool(use_fp32_acc)
        self._bits = dict(enumerate(self.layer.expert_bits))
        self._check_metadata(expert_bit_metadata or {})
        self.selector = MixedKernelSelector(exploration_rate=exploration_rate)
        if not enable_ab_testing:
            self.selector.set_exploration_rate(0.0)
        self._predictor = ActivationPredictor(len(self._bits))
        self._warm: set[tuple[Problem, KernelConfig]] = set()
        self._lock = threading.Lock()

    def _check_metadata(self, metadata: Mapping[int, tuple[float, ...]]) -> None:
        for expert, bits in metadata.items():
            if self._bits.get(expert) != tuple(bits):
                has = f"has {self._bits[expert]}" if expert in self._bits else "does not exist"
                raise ValueError(
                    f"expert_bit_metadata says {tuple(bits)} for expert {expert}, which {has} in the layer"
                )

    def dispatch(self, activations: mx.array, expert_ids: Indices, expert_probs: mx.array) -> tuple[mx.array, dict]:
        """Run the experts and combine their outputs. Waits for the routing and for the result.

        Args:
            activations: Shape ``[..., hidden]``.
            expert_ids: Integers, shape ``[..., k]``.
            expert_probs: Weights of the combination, shape ``[..., k]``.

        Returns:
            The output ``[..., hidden]``, and a dict with ``kernel_name``, ``latency_ms`` (of this call,
            synchronised), ``batch_size``, ``active_bits``, ``memory_pressure``, ``pattern_metrics`` and
            ``selection_metadata``.
        """
        ids = expert_id_array(expert_ids)
        pattern = analyze_expert_activation_pattern(ids, len(self._bits))
        active = np.unique(ids).tolist()
        rows = count_rows(ids)
        problem = self.layer.problem(
            rows,
            activations.dtype,
            device.default_device(),
            combine=True,
            top_k=ids.shape[-1] if ids.ndim else 1,
        )
        config, metadata, bits, pressure = self._select(max(1, rows), active, pattern, problem)
        name = config.kernel_name
        output, latency_ms = self._run(problem, config, activations, expert_ids, expert_probs)
        if rows:
            self.selector.record_latency(name, rows, latency_ms, problem)
        with self._lock:
            self._predictor.observe(ids)
        return output, {
            "kernel_name": name,
            "latency_ms": latency_ms,
            "batch_size": rows,
            "active_bits": bits,
            "memory_pressure": pressure,
            "pattern_metrics": pattern,
            "selection_metadata": metadata,
        }

    def select_ahead(self, batch_size: int, dtype: mx.Dtype, top_k: int) -> tuple[str, dict]:
        """The kernel for the next call while its routing is not yet known, from the predicted activation
        pattern.

        Args:
            batch_size: Rows of the next call, at least 1.
            dtype: Dtype of its activations.
            top_k: Experts per row.

        Returns:
            The kernel's name and the selector's metadata, with ``predicted_experts`` added.
        """
        problem = self.layer.problem(batch_size, dtype, device.default_device(), combine=True, top_k=top_k)
        with self._lock:
            active = self._predictor.predict(batch_size)
            pattern = self._predictor.pattern(batch_size) if active else None
        config, metadata, _, _ = self._select(batch_size, active, pattern, problem)
        return config.kernel_name, metadata | {"predicted_experts": active}

    def get_statistics(self) -> dict:
        """The selector's statistics, and ``prediction_hit_rate``: share of the active experts that were
        predicted.
        """
        return self.selector.get_statistics() | {"prediction_hit_rate": self._predictor.hit_rate}

    def _select(
        self, rows: int, active: list[int], pattern: dict | None, problem: Problem
    ) -> tuple[KernelConfig, dict, list[float], float]:
        bits = get_expert_bits(active, self._bits)
        triple = _only_triple({self._bits[expert] for expert in active})
        runnable = _runnable(problem, triple, self.use_fp32_acc, choices.generation())
        if triple is not None and not any(kernels.parse_name(name).triple for name in runnable):
            triple = None
        gate, up, down = triple or (None, None, None)
        pressure = estimate_gpu_memory_pressure()
        name, metadata = self.selector.select_kernel(
            rows, bits, pressure, gate, up, down, self.use_fp32_acc, set(runnable), pattern, problem
        )
        return runnable[name], metadata, bits, pressure

    def _run(
        self, problem: Problem, config: KernelConfig, x: mx.array, ids: Indices, scores: mx.array
    ) -> tuple[mx.array, float]:
        mx.eval([a for a in (x, ids, scores) if isinstance(a, mx.array)])
        if (problem, config) not in self._warm:
            # Compiling a kernel is no latency of the call: the first one runs twice.
            mx.eval(self.layer.run(x, ids, scores, config=config))
            self._warm.add((problem, config))
        start = time.perf_counter()
        output = self.layer.run(x, ids, scores, config=config)
        mx.eval(output)
        return output, (time.perf_counter() - start) * 1e3


MixedBpwMoEDispatcherExample = MixedBpwMoEDispatcher
"""The name in mixed_kernel_selection."""
