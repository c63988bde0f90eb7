"""A problem made runnable for the tuner: weights, inputs, the bytes that a call touches, and the codec's result."""

from __future__ import annotations

import math
from dataclasses import replace

import mlx.core as mx
import numpy as np

from . import codec, kernels, ops
from .device import last_level_cache
from .kernels import KernelConfig, Problem
from .layers import TrellisLinear, TrellisSwitchGLU
from .measure import Chain
from .ops import Stack
from .weights import ExpertBank, ExpertStack, TrellisWeight

# Largest relative error of an output row: float32 sums of a few thousand products; half an ulp of the 16-bit dtypes.
TOLERANCE = {"float32": 2e-5, "float16": 5e-4, "bfloat16": 4e-3}
# One row more than the widest CPU panel: a full panel and a ragged one.
CHECK_ROWS = 65
# Experts that a check decodes by the codec, which takes about 0.1 s each: enough for every slot and most mixes.
CHECK_EXPERTS = 16
ROUTINGS = 8
# Weights between two uses of the same bytes, over the last-level cache: beyond 1, nothing survives in an LRU cache.
CACHE_FACTOR = 1.25

Projections = tuple[Stack, ...]


class Workload:
    """One problem with everything that a timing needs.

    Args:
        problem: What is asked; at least 1 row.
        stacks: One stack for a linear; gate, up and down for a swiglu.
        activation: ``(name, alpha, limit)``.
        memory_limit: Bytes that weight copies may take. Default: ``None``, no copies beyond the cache's size.
        seed: Of inputs and routings. Default: ``0``.

    Raises:
        ValueError: If there are no rows.
        MemoryError: If the weights alone exceed the limit.
    """

    def __init__(
        self, problem: Problem, stacks: Projections, activation=("silu", 1.702, 7.0), memory_limit=None, seed=0
    ):
        if problem.rows < 1:
            raise ValueError(f"a timing needs at least 1 row, got {problem.rows}")
        self.problem, self.activation = problem, activation
        self._rng = np.random.default_rng(seed)
        self._stream = mx.Device(mx.gpu if problem.device == "gpu" else mx.cpu)
        self._dtype = getattr(mx, problem.dtype)
        self.x = self._rows(problem.rows)
        self._routings = [self._routing() for _ in range(ROUTINGS if problem.kind == "swiglu" else 1)]
        self.weight_bytes = sum(a.nbytes for stack in stacks for a in stack.arrays)
        self.bytes_touched = self._bytes_touched(stacks)
        self.sets = self._copies(stacks, memory_limit)
        self._references: dict[int, tuple] = {}

    @classmethod
    def of_layer(
        cls, layer, rows: int, *, top_k=8, dtype="float32", device="cpu", memory_limit=None, seed=0
    ) -> Workload:
        """The workload of a layer.

        Args:
            layer: TrellisLinear, TrellisSwitchGLU, TrellisWeight or ExpertBank.
            rows: Tokens.
            top_k: Experts per token, cut to the experts that there are. Default: ``8``.
            dtype: Of x. Default: ``"float32"``.
            device: ``"cpu"`` or ``"gpu"``. Default: ``"cpu"``.
            memory_limit, seed: As for the class.
        """
        if isinstance(layer, TrellisWeight):
            layer = TrellisLinear(layer)
        elif isinstance(layer, ExpertBank):
            layer = TrellisSwitchGLU(bank=layer)
        more = {"memory_limit": memory_limit, "seed": seed}
        if isinstance(layer, TrellisLinear):
            return cls(layer.problem(rows, getattr(mx, dtype), device), (layer.stack,), **more)
        if isinstance(layer, TrellisSwitchGLU):
            top_k = min(top_k, layer.gate_proj.num_experts)
            problem = layer.problem(rows, getattr(mx, dtype), device, top_k=top_k)
            return cls(problem, layer._stacks(), layer._activation, **more)
        raise ValueError(
            "a layer for the tuner is a TrellisLinear, a TrellisSwitchGLU, a TrellisWeight or an ExpertBank, "
            f"got {type(layer).__name__}"
        )

    @classmethod
    def synthetic(cls, problem: Problem, *, memory_limit=None, seed=0) -> Workload:
        """The workload of a problem on random weights: every bit pattern is a legal trellis."""
        rng = np.random.default_rng(seed)
        sizes = [(problem.hidden, problem.intermediate)]
        if problem.kind == "swiglu":
            sizes = [*sizes, *sizes, (problem.intermediate, problem.hidden)]
        stacks = tuple(_random_stack(rng, problem, part, *size) for part, size in enumerate(sizes))
        return cls(problem, stacks, (problem.activation, 1.702, 7.0), memory_limit, seed)

    def run(self, config: KernelConfig, x: mx.array, i: int) -> mx.array:
        """The i-th call, lazily: rotates over weight copies and routings."""
        return self._call(config, x, self._routings[i % len(self._routings)], self.sets[i % len(self.sets)])

    def check(self, config: KernelConfig) -> float:
        """Run a config on up to 65 rows and compare with the codec.

        Returns:
            The largest relative error of an output row.

        Raises:
            ValueError: If it exceeds the tolerance of the dtype, with both figures.
        """
        rows = min(self.problem.rows, CHECK_ROWS)
        if kernels.feasible(replace(self.problem, rows=rows), config) is not None:
            rows = self.problem.rows
        if rows not in self._references:
            self._references[rows] = self._reference(rows)
        x, routing, expected = self._references[rows]
        actual = np.array(self._call(config, x, routing, self.sets[0]).astype(mx.float32))
        error = _row_error(actual, expected)
        if error > TOLERANCE[self.problem.dtype]:
            raise ValueError(f"wrong result: a row is off by {error:.2g}, tolerance {TOLERANCE[self.problem.dtype]:g}")
        return error

    def _call(self, config, x, routing, stacks) -> mx.array:
        if self.problem.kind == "linear":
            return ops.linear(x, stacks[0], config=config, stream=self._stream)
        indices, scores = routing
        activation = ops.Activation(*self.activation)
        return ops.swiglu(x, indices, *stacks, scores=scores, activation=activation, config=config, stream=self._stream)

    def _rows(self, rows: int) -> mx.array:
        x = mx.array(self._rng.standard_normal((rows, self.problem.hidden), np.float32)).astype(self._dtype)
        mx.eval(x)
        return x

    def _routing(self, rows: int | None = None, experts: list[int] | None = None):
        """Distinct random experts per token; scores where the problem combines."""
        p = self.problem
        rows = p.rows if rows is None else rows
        pool = np.arange(p.experts) if experts is None else np.array(experts)
        chosen = self._rng.permuted(np.tile(pool, (rows, 1)), axis=1)[:, : p.top_k]
        scores = mx.array(self._rng.dirichlet(np.ones(p.top_k), rows).astype(np.float32)) if p.combine else None
        indices = mx.array(chosen.astype(np.uint32))
        mx.eval(indices, *([] if scores is None else [scores]))
        return indices, scores

    def _bytes_touched(self, stacks: Projections) -> float:
        """Bytes of weights, inputs and outputs that a call reads or writes, averaged over the routings."""
        p = self.problem
        outputs = p.rows * (p.intermediate if p.kind == "linear" else p.hidden * (1 if p.combine else p.top_k))
        activations = (self.x.size + outputs) * self._dtype.size
        per_expert = sum(np.array([_expert_bytes(stack.source, e) for e in range(p.experts)]) for stack in stacks)
        active = [np.unique(np.array(indices)) for indices, _ in self._routings]
        return activations + float(np.mean([per_expert[experts].sum() for experts in active]))

    def _copies(self, stacks: Projections, memory_limit) -> list[Projections]:
        """As many weight sets as make a cycle of calls larger than the last-level cache, within the limit."""
        if memory_limit is not None and self.weight_bytes > memory_limit:
            raise MemoryError(
                f"the weights take {self.weight_bytes / 1e6:.0f} MB, the memory limit is {memory_limit / 1e6:.0f} MB"
            )
        wanted = math.ceil(CACHE_FACTOR * last_level_cache() / max(self.bytes_touched, 1))
        # Routings of few rows touch different experts: one copy already is several sets.
        wanted = math.ceil(wanted / max(1.0, min(ROUTINGS, self.weight_bytes / self.bytes_touched)))
        if memory_limit is not None:
            wanted = min(wanted, int(memory_limit // self.weight_bytes))
        sets = [stacks]
        for _ in range(wanted - 1):
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

    def _reference(self, rows: int):
        x = self._rows(rows)
        x64 = np.array(x.astype(mx.float32)).astype(np.float64)
        gate = self.sets[0][0].source
        x64 = np.pad(x64, ((0, 0), (0, gate.padded_shape[0] - x64.shape[1])))
        if self.problem.kind == "linear":
            return x, None, _linear(x64, gate, 0)[:, : gate.out_features]
        indices, scores = self._routing(rows, self._check_experts())
        chosen = np.array(indices)
        gate, up, down = (stack.source for stack in self.sets[0])
        out = np.zeros((*chosen.shape, down.out_features))
        for e in np.unique(chosen):
            row, slot = np.nonzero(chosen == e)
            middle = _activation(_linear(x64[row], gate, e), _linear(x64[row], up, e), *self.activation)
            out[row, slot] = _linear(middle, down, e)[:, : down.out_features]
        if scores is not None:
            out = np.einsum("rs,rsh->rh", np.array(scores).astype(np.float64), out)
        return x, (indices, scores), out


class ConfigClock(Chain):
    """The clock of one config; its first call also gives the memory that a call takes.

    Attributes:
        config: The config.
        memory_bytes: MLX's peak memory over the memory that was active before, set by ``warm_up``.
    """

    def __init__(self, workload: Workload, config: KernelConfig, floor: float, memory_limit: int | None):
        super().__init__(lambda x, i: workload.run(config, x, i), workload.x, floor)
        self.config, self._limit = config, memory_limit
        self.memory_bytes = 0

    def warm_up(self, calls: int) -> None:
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        self._run(1)
        self.memory_bytes = max(0, mx.get_peak_memory() - before)
        if self._limit is not None and before + self.memory_bytes > self._limit:
            raise MemoryError(
                f"a call takes {self.memory_bytes / 1e6:.0f} MB on top of {before / 1e6:.0f} MB, "
                f"the memory limit is {self._limit / 1e6:.0f} MB"
            )
        super().warm_up(calls - 1)


def _padded(size: int) -> int:
    return -(-size // codec.HADAMARD_SIZE) * codec.HADAMARD_SIZE


def _random_stack(rng: np.random.Generator, problem: Problem, part: int, rows: int, columns: int) -> Stack:
    """Random weights of one projection; the experts go round the problem's bit widths and codebooks."""
    k, n, experts = _padded(rows), _padded(columns), problem.experts
    bits = [problem.bits[e % len(problem.bits)][part] for e in range(experts)]
    # Each codebook meets each mix of widths: the codebook steps once per round of the widths.
    ids = [
        codec.CODEBOOKS.index(problem.codebooks[e // len(problem.bits) % len(problem.codebooks)])
        for e in range(experts)
    ]
    words = sum(bits) * (k * n // 32)
    signs = [np.where(rng.random((experts, size)) < 0.5, -1.0, 1.0) for size in (k, n)]
    stack = ExpertStack(
        mx.array(rng.integers(0, 1 << 32, words, np.uint32)),
        mx.array(np.array([b | c << 8 for b, c in zip(bits, ids)], np.uint32)),
        mx.array(signs[0].astype(np.float16)),
        # Outputs of standard deviation 1 for such inputs.
        mx.array((signs[1] / math.sqrt(k)).astype(np.float16)),
        mx.array(rng.standard_normal((experts, n)).astype(np.float32)) if problem.bias else None,
        rows,
        columns,
    )
    return ops.prepare(stack)


def _expert_bytes(stack: ExpertStack, e: int) -> int:
    k, n = stack.padded_shape
    return k * n * stack.bits[e] // 8 + 2 * (k + n) + (4 * n if stack.bias is not None else 0)


def _linear(x: np.ndarray, stack: ExpertStack, e: int) -> np.ndarray:
    """One expert's product by the codec, float64, padded width."""
    k, n = stack.padded_shape
    start, size = int(stack.offsets[e].item()), k * n * stack.bits[e] // 32
    trellis = stack.codes[start : start + size].view(mx.int16).reshape(k // 16, n // 16, 16 * stack.bits[e])
    weight = TrellisWeight(trellis, stack.suh[e], stack.svh[e], stack.codebooks[e])
    suh, svh = (np.array(v).astype(np.float64) for v in (weight.suh, weight.svh))
    y = codec.hadamard(codec.hadamard(x * suh) @ codec.inner(weight).astype(np.float64)) * svh
    return y if stack.bias is None else y + np.array(stack.bias[e]).astype(np.float64)


def _activation(gate: np.ndarray, up: np.ndarray, name: str, alpha: float, limit: float) -> np.ndarray:
    if name == "gelu_tanh":
        return 0.5 * gate * (1 + np.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3))) * up
    if name == "swiglu_oai":
        gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit) + 1
        return gate / (1 + np.exp(-alpha * gate)) * up
    return gate / (1 + np.exp(-gate)) * up


def _row_error(actual: np.ndarray, expected: np.ndarray) -> float:
    if actual.shape != expected.shape:
        raise ValueError(f"wrong result: shape {list(actual.shape)}, expected {list(expected.shape)}")
    norm = np.linalg.norm(expected, axis=-1)
    error = np.linalg.norm(actual - expected, axis=-1) / np.where(norm > 0, norm, 1.0)
    return float(np.where(np.isfinite(error), error, np.inf).max())
