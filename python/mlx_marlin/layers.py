"""Drop-ins for ``nn.Linear`` and mlx-lm's ``SwitchGLU`` over trellis weights.

Trellis words, formats and scales are parameters, so that they survive save and load; they are frozen, and stay so
when the model is unfrozen.
"""

from __future__ import annotations

from collections.abc import Iterable
from operator import is_
from typing import TYPE_CHECKING, overload

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from . import choices, codec, ops
from .choices import Choice
from .grid import GridLinear, GridWeight
from .kernels import KernelConfig, Problem
from .layer_state import Derived, Selection, StackedModule, TrellisModule
from .ops import Activation
from .weights import ExpertBank, ExpertStack, TrellisWeight, check_projections

if TYPE_CHECKING:
    from typing_extensions import Self


class TrellisExperts(StackedModule):
    """One projection of all experts, the child of a :class:`TrellisSwitchGLU`. A drop-in for mlx-lm's ``SwitchLinear``.

    Parameters: ``trellis`` (uint32, flat), ``formats`` (uint32 ``[experts]``, 2 * bits | codebook id << 8), ``suh``,
    ``svh`` and optionally ``bias``.

    Args:
        stack: The experts' weights.
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
        self._derived.collected = self._parameters(), ops.prepare(stack)

    def _stack_arrays(self, traced: bool) -> tuple[mx.array | None, ...]:
        bias = self.get("bias")
        bias = None if bias is None else bias.astype(mx.float32)
        return self.trellis, self.formats, self.suh, self.svh, bias

    @property
    def input_dims(self) -> int:
        return self._sizes[0]

    @property
    def output_dims(self) -> int:
        return self._sizes[1]

    @property
    def num_experts(self) -> int:
        return self.formats.size

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        """The projection of each row by each of its experts.

        Args:
            x: Shape ``[..., in]``; or, as ``SwitchGLU`` passes it, ``[..., 1, 1, in]`` or, with a row for each
                slot, ``[..., k, 1, in]``.
            indices: Integers, shape ``[..., k]``.
            sorted_indices: Taken for the sake of ``SwitchLinear``; the kernels group rows by expert themselves.

        Returns:
            Shape ``[..., k, out]``, or ``[..., k, 1, out]`` where x has the axis; dtype of x.
        """
        stack = self.stack
        select = self._selection.current(stack)
        if x.ndim != indices.ndim + 2:
            return ops.gather_linear(x, indices, stack, select=select)
        if x.shape[-2] != 1:
            raise ValueError(f"x must have shape [..., 1, {self.input_dims}], got {list(x.shape)}")
        rows = x.squeeze(-2)
        shared = rows.shape[-2] == 1 and rows.shape[:-1] != indices.shape
        y = ops.gather_linear(rows.squeeze(-2) if shared else rows, indices, stack, select=select)
        return mx.expand_dims(y, -2)

    def _extra_repr(self) -> str:
        bits = [codec.bits_of_half(halves) for halves in (np.array(self.formats) & 0xFF).tolist()]
        low, high = min(bits), max(bits)
        widths = low if low == high else f"{low}..{high}"
        return f"{self.num_experts} experts, {self._sizes[0]} -> {self._sizes[1]}, bits={widths}"


class TrellisSwitchGLU(TrellisModule):
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
        gate: Iterable[TrellisWeight] | None = None,
        up: Iterable[TrellisWeight] | None = None,
        down: Iterable[TrellisWeight] | None = None,
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
        self._activation = Activation.checked(activation, alpha, limit)
        bank = bank if bank is not None else ExpertBank(*lists)
        if not isinstance(bank, ExpertBank):
            raise ValueError(f"bank must be an ExpertBank, got {type(bank).__name__}")
        self.gate_proj = TrellisExperts(bank.gate)
        self.up_proj = TrellisExperts(bank.up)
        self.down_proj = TrellisExperts(bank.down)

    def _derive(self) -> None:
        self._derived = Derived(Selection("trellis_swiglu", self._problem))

    def _problem(self, sources, rows, dtype, device, combine, top_k) -> Problem:
        return ops.swiglu_problem(*sources, rows, top_k, self.get("_activation").name, dtype, device, combine)

    def _stacks(self) -> tuple[ops.Stack, ops.Stack, ops.Stack]:
        """Gate, up and down as the kernels take them; whether they fit together is checked when one changed."""
        gate, up, down = self.get("gate_proj").stack, self.get("up_proj").stack, self.get("down_proj").stack
        derived, sources = self._derived, (gate.source, up.source, down.source)
        if not all(map(is_, sources, derived.checked)):
            check_projections(*sources)
            derived.checked = sources
        return gate, up, down

    @property
    def expert_bits(self) -> tuple[tuple[float, float, float], ...]:
        """(gate, up, down) bits of each expert."""
        return tuple(zip(*(stack.source.bits for stack in self._stacks())))

    def problem(self, rows: int, dtype, device: str, *, combine: bool = False, top_k: int | None = None) -> Problem:
        """What a call with this many rows asks for. top_k: that of the latest new kind of call by default, or 1."""
        top_k = self._selection.top_k if top_k is None else top_k
        sources = (stack.source for stack in self._stacks())
        return self._problem(sources, rows, dtype, device, combine, top_k)

    def __call__(self, x: mx.array, indices: mx.array, scores: mx.array | None = None) -> mx.array:
        """The experts' outputs.

        Args:
            x: Shape ``[..., hidden]``.
            indices: Integers, shape ``[..., k]``. No gradient flows through them.
            scores: Optional, shape ``[..., k]``: combine inside, in slot order. Default: ``None``.

        Returns:
            Shape ``[..., k, hidden]``, or ``[..., hidden]`` with scores; dtype of x.

        Raises:
            ValueError: If an argument does not fit, or an index is out of range and already known.
        """
        tap = self._derived.adaptation
        return self.run(x, indices, scores) if tap is None else tap(x, indices, scores)

    def run(self, x: mx.array, indices, scores=None, config: KernelConfig | None = None) -> mx.array:
        """The call with a given config, or with the one that is selected for it."""
        stacks = self._stacks()
        select = self._derived.selection.current(*stacks) if config is None else None
        activation = self.get("_activation")
        return ops.swiglu(x, indices, *stacks, scores=scores, activation=activation, config=config, select=select)

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


class TrellisLinear(StackedModule):
    """A linear layer over a trellis weight. A drop-in for ``nn.Linear``.

    Parameters: ``trellis`` (uint32 ``[k / 16, n / 16, 8 * K]``), ``suh``, ``svh`` and optionally ``bias``.

    Args:
        w: The weight. ``TrellisLinear`` of a :class:`GridWeight` is a :class:`GridLinear`, as ``pathlib.Path`` of a
            string is a path of the system's kind.
    """

    @overload
    def __new__(cls, w: GridWeight) -> GridLinear: ...
    @overload
    def __new__(cls, w: TrellisWeight | None = None, *args, **keywords) -> Self: ...

    def __new__(cls, w=None, *args, **keywords):  # w is None where a copy is made; a subclass may take more
        return GridLinear(w) if cls is TrellisLinear and isinstance(w, GridWeight) else super().__new__(cls)

    def __init__(self, w: TrellisWeight | GridWeight):  # type checkers that look here only see both
        super().__init__()
        stack = ExpertStack.of("w", [w])
        self._sizes = (w.in_features, w.out_features)
        self._codebook = w.codebook
        k, n = w.padded_shape
        self.trellis = stack.codes.reshape(k // 16, n // 16, codec.words_per_tile(w.bits) // 2)
        self.suh = stack.suh.reshape(-1)
        self.svh = stack.svh.reshape(-1)
        if w.bias is not None:
            self.bias = stack.bias.reshape(-1)
        mx.eval(self.parameters())
        self._derived.collected = self._parameters(), ops.prepare(stack)

    def _stack_arrays(self, traced: bool) -> tuple[mx.array | None, ...]:
        trellis, bias = self.trellis, self.get("bias")
        if trellis.ndim != 3:
            raise ValueError(f"trellis must have shape [k/16, n/16, 8*K], got {list(trellis.shape)}")
        formats = None
        if not traced:  # the bits follow from the shape, which a trace holds fast
            formats = mx.array([codec.format_word(self._bits(), self._codebook)], mx.uint32)
        bias = None if bias is None else bias.astype(mx.float32)[None]
        return trellis.reshape(-1), formats, self.suh[None], self.svh[None], bias

    def _bits(self) -> int | float:
        """From the shape: 8 * K words of 32 bits per tile, that is 4 for each half bit."""
        return codec.bits_of_half(self.trellis.shape[-1] // 4)

    def problem(self, rows: int, dtype, device: str, *, combine: bool = False, top_k: int = 1) -> Problem:
        """What a call with this many rows asks for; combine and top_k mean nothing to a linear."""
        return ops.linear_problem(self.stack.source, rows, dtype, device)

    def __call__(self, x: mx.array) -> mx.array:
        """``[..., in_features]`` -> ``[..., out_features]``, dtype of x."""
        tap = self._derived.adaptation
        return self.run(x) if tap is None else tap(x)

    def run(self, x: mx.array, config: KernelConfig | None = None) -> mx.array:
        """The call with a given config, or with the one that is selected for it."""
        stack = self.stack
        select = self._derived.selection.current(stack) if config is None else None
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
        return f"{self._sizes[0]} -> {self._sizes[1]}, bits={self._bits()}"
