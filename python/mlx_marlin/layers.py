"""Drop-ins for ``nn.Linear`` and mlx-lm's ``SwitchGLU`` over trellis weights.

Trellis words, formats and scales are parameters, so that they survive save and load; they are frozen, and stay so
when the model is unfrozen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import is_

import mlx.core as mx
import mlx.nn as nn

from . import choices, kernels, ops, selftest
from .choices import Choice
from .grid import GridLinear, GridWeight
from .kernels import KernelConfig, Problem
from .weights import ExpertBank, ExpertStack, TrellisWeight


class _Frozen(nn.Module):
    """A module whose own parameters are never trainable.

    ``unfreeze`` of a module above clears ``_no_grad`` of every module below it, without asking them; here it clears
    a copy.
    """

    @property
    def _no_grad(self) -> set[str]:
        return set(self)

    @_no_grad.setter
    def _no_grad(self, keys: set[str]) -> None:
        pass


class TrellisExperts(_Frozen):
    """One projection of all experts: the child of a :class:`TrellisSwitchGLU`.

    Parameters: ``trellis`` (uint32, flat), ``formats`` (uint32 ``[experts]``, bits | codebook id << 8), ``suh``,
    ``svh`` and optionally ``bias``.
    """

    def __init__(self, stack: ExpertStack):
        super().__init__()
        self._sizes = (stack.in_features, stack.out_features)
        self.trellis = stack.codes
        self.formats = stack.formats
        self.suh = stack.suh
        self.svh = stack.svh
        if stack.bias is not None:
            self.bias = stack.bias
        self._stack = ops.prepare(stack)

    @property
    def stack(self) -> ops.Stack:
        """The parameters as the kernels take them; checked again when a parameter was replaced."""
        source = self._stack.source
        get = self.get  # attribute access to a parameter costs a microsecond each
        same = get("trellis") is source.codes and get("formats") is source.formats and get("suh") is source.suh
        if not (same and get("svh") is source.svh and get("bias") is source.bias):
            if ops.is_traced(get("trellis")):
                return ops.with_parameters(self._stack, get("trellis"), get("suh"), get("svh"), get("bias"))
            parameters = (get(name) for name in ("trellis", "formats", "suh", "svh", "bias"))
            self._stack = ops.prepare(ExpertStack(*parameters, *self._sizes))
        return self._stack

    @property
    def input_dims(self) -> int:
        return self._sizes[0]

    @property
    def output_dims(self) -> int:
        return self._sizes[1]

    @property
    def num_experts(self) -> int:
        return self.formats.size

    def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
        """``[..., in]`` and ``[..., k]`` -> ``[..., k, out]``."""
        return ops.gather_linear(x, indices, self.stack)

    def _extra_repr(self) -> str:
        bits = self.stack.source.bits
        low, high = min(bits), max(bits)
        widths = low if low == high else f"{low}..{high}"
        return f"{self.num_experts} experts, {self._sizes[0]} -> {self._sizes[1]}, bits={widths}"


class _Selection:
    """What runs each kind of call of one layer, keyed by what the calls differ in.

    Args:
        op: For error messages.
        problem: The layer's ``problem`` method.
    """

    __slots__ = ("_generation", "_op", "_problem", "_stacks", "_table", "combine", "dtype", "top_k")

    def __init__(self, op: str, problem: Callable[..., Problem]):
        self._op = op
        self._problem = problem
        self._generation = -1
        self._stacks: tuple[ops.Stack, ...] = ()
        self._table: dict[tuple, object] = {}
        # Of the latest new kind of call: what explain() assumes where it is not told.
        self.top_k, self.combine, self.dtype = 1, False, mx.float32

    def current(self, *stacks: ops.Stack) -> _Selection:
        """Itself; forgets everything first if the weights, the profile or the feedback changed."""
        generation = choices.generation()
        if generation != self._generation or not all(map(is_, stacks, self._stacks)):
            self._table = {}
            self._generation, self._stacks = generation, stacks
        return self

    def __call__(self, x: mx.array, rows: int, top_k: int, combine: bool):
        """The resolved config: a dictionary look-up after the first call of a kind."""
        dtype = x.dtype
        key = rows, top_k, dtype, combine, mx.default_device().type
        native = self._table.get(key)
        if native is None:
            self.top_k, self.combine, self.dtype = top_k, combine, dtype
            problem = self._problem(rows, dtype, ops.device_of(None), combine=combine, top_k=top_k)
            choice, final = selftest.select(problem, ops.is_traced(x))
            native = ops.resolve(self._op, problem, choice.config)
            if final:
                self._table[key] = native
        return native


class TrellisSwitchGLU(nn.Module):
    """The experts of a mixture-of-experts layer, fused. A drop-in for mlx-lm's ``SwitchGLU``.

    Args:
        gate: One :class:`TrellisWeight` per expert.
        up: The same.
        down: The same.
        activation: ``"silu"``, ``"gelu_tanh"`` or ``"swiglu_oai"``. Default: ``"silu"``.
        alpha: For ``"swiglu_oai"``. Default: ``1.702``.
        limit: For ``"swiglu_oai"``. Default: ``7.0``.
        bank: Instead of gate, up and down: an :class:`ExpertBank`.
    """

    def __init__(
        self,
        gate: Sequence[TrellisWeight] | None = None,
        up: Sequence[TrellisWeight] | None = None,
        down: Sequence[TrellisWeight] | None = None,
        activation: str = "silu",
        alpha: float = 1.702,
        limit: float = 7.0,
        *,
        bank: ExpertBank | None = None,
    ):
        super().__init__()
        lists = (gate, up, down)
        if (bank is None) == all(weights is None for weights in lists) or (bank is None and None in lists):
            raise ValueError("pass either gate, up and down (a list of TrellisWeight each) or bank")
        if activation not in kernels.ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(kernels.ACTIVATIONS)}, got {activation!r}")
        bank = bank if bank is not None else ExpertBank(*lists)
        self.gate_proj = TrellisExperts(bank.gate)
        self.up_proj = TrellisExperts(bank.up)
        self.down_proj = TrellisExperts(bank.down)
        self._activation = (activation, float(alpha), float(limit))
        self._selection = _Selection("trellis_swiglu", self.problem)
        self._adaptation = None

    def _stacks(self) -> tuple[ops.Stack, ops.Stack, ops.Stack]:
        return self.get("gate_proj").stack, self.get("up_proj").stack, self.get("down_proj").stack

    @property
    def expert_bits(self) -> tuple[tuple[int, int, int], ...]:
        """(gate, up, down) bits of each expert."""
        return tuple(zip(*(stack.source.bits for stack in self._stacks())))

    def problem(self, rows: int, dtype, device: str, *, combine: bool = False, top_k: int | None = None) -> Problem:
        """What a call with this many rows asks for. top_k: that of the latest new kind of call by default, or 1."""
        gate, up, down = (stack.source for stack in self._stacks())
        top_k = self._selection.top_k if top_k is None else top_k
        return ops.swiglu_problem(gate, up, down, rows, top_k, self._activation[0], dtype, device, combine)

    def __call__(self, x: mx.array, indices: mx.array, scores: mx.array | None = None) -> mx.array:
        """The experts' outputs.

        Args:
            x: Shape ``[..., hidden]``.
            indices: Integers, shape ``[..., k]``.
            scores: Optional, shape ``[..., k]``: combine inside, in slot order. Default: ``None``.

        Returns:
            Shape ``[..., k, hidden]``, or ``[..., hidden]`` with scores; dtype of x.
        """
        indices = mx.stop_gradient(indices) if isinstance(indices, mx.array) else indices
        if self._adaptation is not None:
            return self._adaptation(x, indices, scores)
        return self.run(x, indices, scores)

    def run(self, x: mx.array, indices, scores=None, config: KernelConfig | None = None) -> mx.array:
        """The call with a given config, or with the one that is selected for it."""
        gate, up, down = self._stacks()
        name, alpha, limit = self._activation
        select = self._selection.current(gate, up, down) if config is None else None
        return ops.swiglu(
            x,
            indices,
            gate,
            up,
            down,
            scores=scores,
            activation=name,
            alpha=alpha,
            limit=limit,
            config=config,
            select=select,
        )

    def explain(
        self, rows: int, dtype: mx.Dtype | None = None, *, top_k: int | None = None, combine: bool | None = None
    ) -> Choice:
        """Which config a call runs, and why.

        Args:
            rows: Tokens, before top-k.
            dtype: Dtype of x. Default: ``None``, as in the latest new kind of call, or float32.
            top_k: Experts per token. Default: ``None``, as in the latest new kind of call, or 1.
            combine: Whether scores are given. Default: ``None``, as in the latest new kind of call, or ``False``.

        Returns:
            A :class:`Choice`: ``problem``, ``config`` and ``reason``; printable.
        """
        latest = self._selection
        dtype = latest.dtype if dtype is None else dtype
        combine = latest.combine if combine is None else combine
        return choices.choose(self.problem(rows, dtype, ops.device_of(None), combine=combine, top_k=top_k))


class TrellisLinear(_Frozen):
    """A linear layer over a trellis weight. A drop-in for ``nn.Linear``.

    Parameters: ``trellis`` (uint32 ``[k / 16, n / 16, 8 * K]``), ``suh``, ``svh`` and optionally ``bias``.

    Args:
        w: The weight. A :class:`GridWeight` gives a :class:`GridLinear` instead.
    """

    def __new__(cls, w: TrellisWeight | GridWeight, *args):  # args: a subclass may take more
        return GridLinear(w) if isinstance(w, GridWeight) else super().__new__(cls)

    def __init__(self, w: TrellisWeight):
        super().__init__()
        stack = ExpertStack.of("w", [w])
        self._sizes = (w.in_features, w.out_features)
        self._formats = stack.formats
        k, n = w.padded_shape
        self.trellis = stack.codes.reshape(k // 16, n // 16, 8 * w.bits)
        self.suh = w.suh
        self.svh = w.svh
        if w.bias is not None:
            self.bias = stack.bias.reshape(-1)
        self._stacked = ()
        self._selection = _Selection("trellis_linear", self.problem)
        self._adaptation = None
        self._collect()

    @property
    def stack(self) -> ops.Stack:
        """The parameters as the kernels take them; collected again when a parameter was replaced."""
        return self._collect()

    def _collect(self) -> ops.Stack:
        get = self.get  # attribute access to a parameter costs a microsecond each
        current = (get("trellis"), get("suh"), get("svh"), get("bias"))
        if len(self._stacked) != len(current) or any(a is not b for a, b in zip(current, self._stacked)):
            bias = None if current[3] is None else current[3].astype(mx.float32).reshape(1, -1)
            codes, suh, svh = self.trellis.reshape(-1), self.suh[None], self.svh[None]
            if ops.is_traced(self.trellis):
                return ops.with_parameters(self._stack, codes, suh, svh, bias)
            source = ExpertStack(codes, self._formats, suh, svh, bias, *self._sizes)
            self._stack, self._stacked = ops.prepare(source), current
        return self._stack

    def problem(self, rows: int, dtype, device: str, *, combine: bool = False, top_k: int = 1) -> Problem:
        """What a call with this many rows asks for; combine and top_k mean nothing to a linear."""
        return ops.linear_problem(self.stack.source, rows, dtype, device)

    def __call__(self, x: mx.array) -> mx.array:
        """``[..., in_features]`` -> ``[..., out_features]``, dtype of x."""
        return self.run(x) if self._adaptation is None else self._adaptation(x)

    def run(self, x: mx.array, config: KernelConfig | None = None) -> mx.array:
        """The call with a given config, or with the one that is selected for it."""
        stack = self.stack
        select = self._selection.current(stack) if config is None else None
        return ops.linear(x, stack, config=config, select=select)

    def explain(self, rows: int, dtype: mx.Dtype | None = None) -> Choice:
        """Which config a call with this many rows runs, and why.

        Args:
            rows: Tokens.
            dtype: Dtype of x. Default: ``None``, as in the latest new kind of call, or float32.

        Returns:
            A :class:`Choice`: ``problem``, ``config`` and ``reason``; printable.
        """
        dtype = self._selection.dtype if dtype is None else dtype
        return choices.choose(self.problem(rows, dtype, ops.device_of(None)))

    def to_lora(self, r: int = 8, scale: float = 20.0, dropout: float = 0.0) -> nn.Module:
        """Wrap in mlx-lm's LoRA layer: the trellis stays frozen under it."""
        from mlx_lm.tuner.lora import LoRALinear

        lora = LoRALinear(*self._sizes, r=r, dropout=dropout, scale=scale)
        lora.linear = self
        return lora

    def _extra_repr(self) -> str:
        return f"{self._sizes[0]} -> {self._sizes[1]}, bits={self.trellis.shape[2] // 8}"
