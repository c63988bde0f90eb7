"""A problem made runnable for the tuner: weights and inputs within a memory limit, the bytes that a call touches, and
the comparison with the codec.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import mlx.core as mx
import numpy as np

from .. import codec, kernels, ops
from ..device.machine import last_level_cache, mlx_device
from ..kernels import KernelConfig, Problem
from ..layers.experts import TrellisSwitch, fused_experts
from ..layers.linear import TrellisLinear
from ..measure.clock import Chain
from ..ops import Stack, reference
from ..weights import synthetic
from ..weights.experts import ExpertBank, ExpertStack
from ..weights.trellis import TrellisWeight

# Largest relative error of an output row: float32 sums of a few thousand products; half an ulp of the 16-bit dtypes.
TOLERANCE = {"float32": 2e-5, "float16": 5e-4, "bfloat16": 4e-3}
# The same with half operands and half sums inside a tile, whose roundings alone reach 1.5e-3.
_HALF_TOLERANCE = 2e-3
# Rows of a check, by the variant that is usual for them: what is right for these is right for the rows between. Full
# panels and tiles (65 is more than the widest); one row less, so that the last one is ragged; the fewest rows.
CHECK_ROWS = {"decode": (1,), "prefill4": (16, 15, 2), "base": (32, 31, 17), "large_batch": (65, 64, 33)}
# Experts that a check decodes by the codec, which takes about 0.1 s each: enough for every slot and most mixes.
CHECK_EXPERTS = 16
ROUTINGS = 8
# Weights between two uses of the same bytes, over the last-level cache: beyond 1, nothing survives in an LRU cache.
CACHE_FACTOR = 1.25

Projections = tuple[Stack, ...]

Layer = TrellisLinear | TrellisSwitch | TrellisWeight | ExpertBank
"""What can be timed, besides a problem."""

Routing = tuple[mx.array, mx.array | None]
"""Experts of each row, and scores where a problem combines."""


def problem_class(problem: Problem) -> Problem:
    """The problem whose check holds for all problems of this kind with the same usual variant."""
    return replace(problem, rows=CHECK_ROWS[kernels.default_variant(problem.rows)][0])


def tolerance(problem: Problem, config: KernelConfig) -> float:
    """The largest error of a row that a config may have."""
    halves = kernels.rules_of(problem).half_sums(problem, config)
    return max(TOLERANCE[problem.dtype], _HALF_TOLERANCE if halves else 0.0)


def as_layer(layer: Layer) -> TrellisLinear | TrellisSwitch:
    """The layer that the tuner times for what it was given.

    Raises:
        ValueError: If it is no layer, weight or bank.
    """
    if isinstance(layer, TrellisWeight):
        return TrellisLinear(layer)
    if isinstance(layer, ExpertBank):
        return fused_experts(layer)
    if isinstance(layer, (TrellisLinear, TrellisSwitch)):
        return layer
    raise ValueError(
        "a layer for the tuner is a TrellisLinear, a TrellisSwitchGLU or -MLP, a TrellisWeight or an ExpertBank, "
        f"got {type(layer).__name__}"
    )


def check_problem(problem: Problem) -> Problem:
    """A problem that can be timed: itself.

    Raises:
        ValueError: If it has no rows, or a token takes more experts than there are.
    """
    if problem.rows < 1:
        raise ValueError(f"a timing needs at least 1 row, got {problem.rows}")
    if problem.top_k > problem.experts:
        raise ValueError(f"top_k must be at most the number of experts {problem.experts}, got {problem.top_k}")
    return problem


def release() -> None:
    """Give the memory of workloads that are out of use back to the system.

    A stack and its prepared form refer to each other, so that they wait for the garbage collector; MLX keeps buffers
    for reuse, but the next workload's have other sizes.
    """
    gc.collect()
    mx.clear_cache()


class Workload:
    """One problem with everything that a timing needs.

    Args:
        problem: What is asked; at least 1 row.
        stacks: One stack for a linear; those of all projections for experts.
        activation: ``(name, alpha, limit)``.
        memory_limit: Bytes that weights, their copies, inputs and a call may take. Default: ``None``, any number.
        seed: Of inputs and routings. Default: ``0``.

    Raises:
        ValueError: If there are no rows.
        MemoryError: If the weights and one call exceed the limit.
    """

    def __init__(
        self,
        problem: Problem,
        stacks: Projections,
        activation: tuple[str, float, float] = ("silu", 1.702, 7.0),
        memory_limit: int | None = None,
        seed: int = 0,
    ):
        self.problem, self.activation = check_problem(problem), activation
        self.weight_bytes = sum(a.nbytes for stack in stacks for a in stack.arrays)
        room = _room(problem, self.weight_bytes, memory_limit)
        self._rng = np.random.default_rng(seed)
        self.stream = mlx_device(problem.device)
        self._dtype = getattr(mx, problem.dtype)
        self.x = self._rows(problem.rows)
        self._routings = [self._routing(problem.rows) for _ in range(ROUTINGS if problem.fused else 1)]
        self.bytes_touched = self._bytes_touched(stacks)
        self.sets = self._copies(stacks, room)
        self._reference: tuple[mx.array, Routing | None, np.ndarray] | None = None

    @classmethod
    def of_layer(
        cls,
        layer: Layer,
        rows: int,
        *,
        top_k: int = 8,
        dtype: str = "float32",
        device: str = "cpu",
        memory_limit: int | None = None,
        seed: int = 0,
    ) -> Workload:
        """The workload of a layer.

        Args:
            layer: TrellisLinear, TrellisSwitchGLU, TrellisSwitchMLP, TrellisWeight or ExpertBank.
            rows: Tokens.
            top_k: Experts per token, cut to the experts that there are. Default: ``8``.
            dtype: Of x. Default: ``"float32"``.
            device: ``"cpu"`` or ``"gpu"``. Default: ``"cpu"``.
            memory_limit, seed: As for the class.
        """
        layer = as_layer(layer)
        make = partial(cls, memory_limit=memory_limit, seed=seed)
        if isinstance(layer, TrellisLinear):
            return make(layer.problem(rows, getattr(mx, dtype), device), (layer.stack,))
        top_k = min(top_k, layer.num_experts)
        problem = layer.problem(rows, getattr(mx, dtype), device, top_k=top_k)
        return make(problem, layer.stacks, layer.activation)

    @classmethod
    def synthetic(cls, problem: Problem, *, memory_limit: int | None = None, seed: int = 0) -> Workload:
        """The workload of a problem on random weights: every bit pattern is a legal trellis."""
        check_problem(problem)
        parts = range(len(problem.shapes))
        # Before anything is allocated. Weights are made one by one and then stacked, one projection at a time.
        sizes = [_code_bytes_of(problem, part) for part in parts]
        _room(problem, sum(sizes), memory_limit, beside=max(sizes))
        rng = np.random.default_rng(seed)
        stacks = tuple(
            ops.prepare(ExpertStack.of("experts", synthetic.random_projection(rng, problem, part))) for part in parts
        )
        return cls(problem, stacks, (problem.activation, 1.702, 7.0), memory_limit, seed)

    @property
    def held_bytes(self) -> int:
        """Bytes that the workload holds between calls."""
        inputs = [self.x, *(a for routing in self._routings for a in routing or () if a is not None)]
        copies = (len(self.sets) - 1) * _code_bytes(self.sets[0])
        return self.weight_bytes + copies + sum(a.nbytes for a in inputs)

    def drop_copy(self) -> bool:
        """Give the memory of one weight copy back; whether there was one."""
        if len(self.sets) == 1:
            return False
        self.sets.pop()
        mx.clear_cache()
        return True

    def run(self, config: KernelConfig, x: mx.array, i: int) -> mx.array:
        """The i-th call, lazily: rotates over weight copies and routings."""
        return self._call(config, x, self._routings[i % len(self._routings)], self.sets[i % len(self.sets)])

    def check(self, config: KernelConfig) -> float:
        """Run a config at the row counts of :func:`problem_class` and compare with the codec.

        Returns:
            The largest relative error of an output row.

        Raises:
            ValueError: If it exceeds the tolerance of the dtype, with both figures.
        """
        counts = CHECK_ROWS[kernels.default_variant(self.problem.rows)]
        if self._reference is None:
            self._reference = self._expected(counts[0])
        x, routing, expected = self._reference
        worst = 0.0
        for rows in counts:
            part = None if routing is None else _first(routing, rows)
            actual = np.array(self._call(config, x[:rows], part, self.sets[0]).astype(mx.float32))
            error, limit = reference.row_error(actual, expected[:rows]), tolerance(self.problem, config)
            if error > limit:
                raise ValueError(f"wrong result: of {rows} rows one is off by {error:.2g}, tolerance {limit:g}")
            worst = max(worst, error)
        return worst

    def _call(self, config: KernelConfig, x: mx.array, routing: Routing | None, stacks: Projections) -> mx.array:
        accuracy = self.problem.accuracy
        if routing is None:
            call = ops.check_linear(x, stacks[0], stream=self.stream, accuracy=accuracy)
        else:
            indices, scores = routing
            activation = ops.Activation(*self.activation)
            call = ops.check_experts(x, indices, stacks, activation, scores, stream=self.stream, accuracy=accuracy)
        return ops.run(call, ops.resolve(call.op, call.problem(self.problem.device), config))

    def _rows(self, rows: int) -> mx.array:
        x = mx.array(self._rng.standard_normal((rows, self.problem.hidden), np.float32)).astype(self._dtype)
        mx.eval(x)
        return x

    def _routing(self, rows: int, experts: list[int] | None = None) -> Routing | None:
        """Distinct random experts per token; ``None`` for a linear."""
        p = self.problem
        if not p.fused:
            return None
        pool = np.arange(p.experts) if experts is None else np.array(experts)
        chosen = np.stack([self._rng.permutation(pool)[: p.top_k] for _ in range(rows)])
        scores = mx.array(self._rng.dirichlet(np.ones(p.top_k), rows).astype(np.float32)) if p.combine else None
        indices = mx.array(chosen.astype(np.uint32))
        mx.eval(indices, *([] if scores is None else [scores]))
        return indices, scores

    def _bytes_touched(self, stacks: Projections) -> float:
        """Bytes of weights, inputs and outputs that a call reads or writes, averaged over the routings."""
        p = self.problem
        outputs = p.rows * (p.intermediate if p.kind == "linear" else p.hidden * (1 if p.combine else p.top_k))
        activations = (self.x.size + outputs) * self._dtype.size
        per_expert = np.array([sum(_expert_bytes(stack.source, e) for stack in stacks) for e in range(p.experts)])
        active = [np.zeros(1, int) if r is None else np.unique(np.array(r[0])) for r in self._routings]
        return activations + float(np.mean([per_expert[experts].sum() for experts in active]))

    def _copies(self, stacks: Projections, room: float) -> list[Projections]:
        """As many weight sets as make a cycle of calls larger than the last-level cache, within the room."""
        wanted = math.ceil(CACHE_FACTOR * last_level_cache() / max(self.bytes_touched, 1))
        # Routings of few rows touch different experts: one copy already is several sets.
        wanted = math.ceil(wanted / max(1.0, min(ROUTINGS, self.weight_bytes / self.bytes_touched)))
        sets = [stacks]
        for _ in range(int(min(wanted - 1, room // _code_bytes(stacks)))):
            copy = tuple(Stack([stack.arrays[0] + 0, *stack.arrays[1:]], stack.info, stack.source) for stack in stacks)
            mx.eval([stack.arrays[0] for stack in copy])
            sets.append(copy)
        return sets

    def _check_experts(self) -> list[int]:
        """Experts that together have as many different formats as possible, at least top-k of them."""
        stacks = self.sets[0]
        formats = list(zip(*(zip(s.source.bits, s.source.codebooks) for s in stacks)))
        first = list({f: e for e, f in reversed(list(enumerate(formats)))}.values())[::-1][:CHECK_EXPERTS]
        rest = [e for e in range(len(formats)) if e not in first]
        return first + rest[: max(0, self.problem.top_k - len(first))]

    def _expected(self, rows: int) -> tuple[mx.array, Routing | None, np.ndarray]:
        """Inputs of a check and what they must give: each row by itself, so that fewer rows are a part of it."""
        x = self._rows(rows)
        x64 = np.array(x.astype(mx.float32)).astype(np.float64)
        sources = [stack.source for stack in self.sets[0]]
        routing = self._routing(rows, self._check_experts())
        if routing is None:
            return x, None, reference.linear(x64, sources[0][0])
        indices, scores = routing
        given = None if scores is None else np.array(scores)
        expected = reference.experts_output(x64, np.array(indices), sources, given, *self.activation)
        return x, routing, expected


def _first(routing: Routing, rows: int) -> Routing:
    indices, scores = routing
    return indices[:rows], None if scores is None else scores[:rows]


class ConfigClock(Chain):
    """The clock of one config; its first call also gives the memory that a call takes.

    Attributes:
        config: The config.
        memory_bytes: MLX's peak memory over the memory that was active before.

    Args:
        workload: What the config runs.
        config: The config.
        floor: See :func:`~.measure.launch_floor`.
        memory_limit: Bytes that the workload and a call may take, or ``None``.
        check: Called before the first call; raises if the config must not run.
    """

    def __init__(
        self,
        workload: Workload,
        config: KernelConfig,
        floor: float,
        memory_limit: int | None,
        check: Callable[[], None] | None = None,
    ):
        super().__init__(lambda x, i: workload.run(config, x, i), workload.x, floor)
        self.config = config
        self._workload, self._limit, self._check = workload, memory_limit, check
        self.memory_bytes = 0

    def warm_up(self, calls: int) -> None:
        if self._check is not None:
            self._check()
        self.weigh()
        super().warm_up(calls - 1)

    def weigh(self) -> None:
        """Measure the memory of one call.

        Raises:
            MemoryError: If it and the workload exceed the limit.
        """
        mx.clear_cache()  # buffers of other candidates that this one cannot use
        before, held = mx.get_active_memory(), self._workload.held_bytes
        mx.reset_peak_memory()
        self._run(1)
        self.memory_bytes = max(0, mx.get_peak_memory() - before)
        if self._limit is not None and held + self.memory_bytes > self._limit:
            raise MemoryError(
                f"a call takes {self.memory_bytes / 1e6:.1f} MB beside {held / 1e6:.1f} MB of weights and inputs, "
                f"the memory limit is {self._limit / 1e6:.1f} MB"
            )


def call_bytes(problem: Problem) -> int:
    """About what inputs, output and scratch of a call take."""
    slots, item = problem.rows * problem.top_k, 4 if problem.dtype == "float32" else 2
    outputs = problem.rows * problem.intermediate
    if problem.kind == "swiglu":
        outputs = (problem.rows if problem.combine else slots) * problem.hidden
    inputs = problem.rows * problem.hidden * item + ROUTINGS * slots * 8
    return inputs + outputs * item + ops.scratch_bytes(problem)


def _room(problem: Problem, weight_bytes: int, limit: int | None, beside: int = 0) -> float:
    """Bytes left for weight copies.

    Args:
        beside: Bytes that are needed while the weights are made.

    Raises:
        MemoryError: If the weights and one call exceed the limit.
    """
    if limit is None:
        return math.inf
    call = max(call_bytes(problem), beside)
    if weight_bytes + call > limit:
        raise MemoryError(
            f"the weights take {weight_bytes / 1e6:.1f} MB and a call about {call / 1e6:.1f} MB, "
            f"the memory limit is {limit / 1e6:.1f} MB"
        )
    return limit - weight_bytes - call


def _code_bytes(stacks: Projections) -> int:
    """Bytes of a weight copy: the codes; offsets and scales are shared."""
    return sum(stack.arrays[0].nbytes for stack in stacks)


def _code_bytes_of(problem: Problem, part: int) -> int:
    """Bytes of the codes of a synthetic projection."""
    k, n = map(codec.padded, problem.shapes[part])
    return int(sum(synthetic.widths_of(problem, part)) * k * n) // 8


def _expert_bytes(stack: ExpertStack, e: int) -> int:
    k, n = stack.padded_shape
    return int(k * n * stack.bits[e] / 8) + 2 * (k + n) + (4 * n if stack.bias is not None else 0)
