"""Drop-ins for mlx-lm's ``SwitchGLU`` and ``SwitchMLP`` over trellis weights.

Trellis words, formats and scales are parameters, so that they survive save and load; they are frozen, and stay so
when the model is unfrozen.
"""

from __future__ import annotations

from operator import is_
from typing import ClassVar

import mlx.core as mx
import numpy as np

from .. import codec, ops
from ..kernels import KernelConfig, Problem
from ..ops import Activation
from ..selection import choices
from ..selection.choices import Choice
from ..weights.experts import ExpertBank, Experts, ExpertStack, check_projections
from .state import StackArrays, StackedModule, TrellisModule


class TrellisExperts(StackedModule):
    """One projection of all experts, the child of a :class:`TrellisSwitch`. A drop-in for mlx-lm's ``SwitchLinear``.

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

    def _stack_arrays(self) -> StackArrays:
        bias = self.get("bias")
        return self.trellis, self.suh, self.svh, None if bias is None else bias.astype(mx.float32)

    def _formats(self) -> mx.array:
        return self.formats

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
        if x.ndim != indices.ndim + 2:
            return self.run(x, indices)
        if x.shape[-2] != 1:
            raise ValueError(f"x must have shape [..., 1, {self.input_dims}], got {list(x.shape)}")
        rows = x.squeeze(-2)
        shared = rows.shape[-2] == 1 and rows.shape[:-1] != indices.shape
        return mx.expand_dims(self.run(rows.squeeze(-2) if shared else rows, indices), -2)

    def run(self, x: mx.array, indices: mx.array) -> mx.array:
        """The projection of rows ``[..., in]`` or ``[..., k, in]``: ``[..., k, out]``."""
        return self._derived.configs.run(ops.check_gathered(x, indices, self.stack, accuracy=self._accuracy))

    def _extra_repr(self) -> str:
        bits = [codec.bits_of_half(halves) for halves in (np.array(self.formats) & 0xFF).tolist()]
        low, high = min(bits), max(bits)
        widths = low if low == high else f"{low}..{high}"
        return f"{self.num_experts} experts, {self._sizes[0]} -> {self._sizes[1]}, bits={widths}"


class TrellisSwitch(TrellisModule):
    """The experts of a mixture-of-experts layer, fused.

    Args:
        bank: Their weights, one stack for each of ``PROJECTIONS``.
        activation: What stands before down.

    Attributes:
        PROJECTIONS: Names of the children, those that read x first.
        absent: Whether an index of ``num_experts``, one too large, stands for an expert that is not here: nothing is
            computed of its slot, which is zero. Such a layer does not combine. Default: ``False``.
    """

    PROJECTIONS: ClassVar[tuple[str, ...]]

    def __init__(self, bank: ExpertBank, activation: Activation):
        super().__init__()
        if not isinstance(bank, ExpertBank):
            raise ValueError(f"bank must be an ExpertBank, got {type(bank).__name__}")
        if len(bank.stacks) != len(self.PROJECTIONS):
            other, has = ("TrellisSwitchMLP", "no gate") if bank.gate is None else ("TrellisSwitchGLU", "a gate")
            raise ValueError(f"the experts of the bank have {has}; use {other}")
        self._activation = activation
        self._top_k: int | None = None
        self.absent = False
        for name, stack in zip(self.PROJECTIONS, bank.stacks):
            self[name] = TrellisExperts(stack)

    @property
    def stacks(self) -> tuple[ops.Stack, ...]:
        """The projections as the kernels take them; whether they fit together is checked when one changed."""
        stacks = tuple([self[name].stack for name in self.PROJECTIONS])
        derived, sources = self._derived, tuple([stack.source for stack in stacks])
        if not all(map(is_, sources, derived.checked)):
            check_projections(*sources)
            derived.checked = sources
        return stacks

    @property
    def activation(self) -> Activation:
        """What stands before down."""
        return self["_activation"]

    @property
    def num_experts(self) -> int:
        return self[self.PROJECTIONS[0]].num_experts

    @property
    def top_k(self) -> int | None:
        """Experts per token of the model around the layer, ``None`` where unknown: what :meth:`explain` assumes
        before the first call. Calls take the k of their indices.
        """
        return self._top_k

    @top_k.setter
    def top_k(self, top_k: int | None) -> None:
        experts = self.num_experts
        if top_k is not None and not 1 <= top_k <= experts:
            raise ValueError(f"top_k must be in [1, {experts}], the number of experts, or None; got {top_k}")
        self._top_k = top_k

    @property
    def expert_bits(self) -> tuple[tuple[float, ...], ...]:
        """(gate, up, down) bits of each expert; (up, down) where there is no gate."""
        return tuple(zip(*(stack.source.bits for stack in self.stacks)))

    def problem(
        self, rows: int, dtype: mx.Dtype | str, device: str, *, combine: bool = False, top_k: int | None = None
    ) -> Problem:
        """What a call with this many rows asks for. top_k: by default as in the latest new kind of call, else the
        model's, else 1.
        """
        top_k = (self._derived.configs.top_k or self._top_k or 1) if top_k is None else top_k
        sources = [stack.source for stack in self.stacks]
        return ops.experts_problem(sources, rows, top_k, self.activation.name, dtype, device, combine, self._accuracy)

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

    def run(
        self,
        x: mx.array,
        indices: ops.Indices,
        scores: mx.array | None = None,
        config: KernelConfig | None = None,
    ) -> mx.array:
        """The call with a given config, or with the one that is selected for it."""
        accuracy, absent = self._accuracy, self.absent
        call = ops.check_experts(x, indices, self.stacks, self.activation, scores, accuracy=accuracy, absent=absent)
        return self._derived.configs.run(call, config)

    def explain(
        self, rows: int, dtype: mx.Dtype | None = None, *, top_k: int | None = None, combine: bool | None = None
    ) -> Choice:
        """Which config a call runs, and why.

        Args:
            rows: Tokens, before top-k.
            dtype: Dtype of x. Default: ``None``, as in the latest new kind of call, or float32.
            top_k: Experts per token. Default: ``None``, as in the latest new kind of call, else as the model that
                :func:`load` made says, else 1.
            combine: Whether scores are given. Default: ``None``, as in the latest new kind of call, or ``False``.

        Returns:
            A :class:`Choice`: ``problem``, ``config`` and ``reason``; printable.
        """
        latest = self._derived.configs
        dtype = latest.dtype if dtype is None else dtype
        combine = latest.combine if combine is None else combine
        return choices.choose(self.problem(rows, dtype, ops.device_of(None), combine=combine, top_k=top_k))


class TrellisSwitchGLU(TrellisSwitch):
    """The experts of a mixture-of-experts layer, fused. A drop-in for mlx-lm's ``SwitchGLU``, called as
    :class:`TrellisSwitch` says.

    Args:
        gate: One :class:`TrellisWeight` per expert; or an :class:`ExpertStack` of all.
        up: The same.
        down: The same.
        activation: One of those of :func:`~mlx_marlin.trellis_swiglu`. Default: ``"silu"``.
        alpha: As there. Default: ``1.702``.
        limit: As there. Default: ``7.0``.
        bank: Instead of gate, up and down: an :class:`ExpertBank`.
    """

    PROJECTIONS = ("gate_proj", "up_proj", "down_proj")

    def __init__(
        self,
        gate: Experts | None = None,
        up: Experts | None = None,
        down: Experts | None = None,
        activation: str = "silu",
        alpha: float = 1.702,
        limit: float = 7.0,
        *,
        bank: ExpertBank | None = None,
    ):
        if bank is None and gate is not None and up is not None and down is not None:
            bank = ExpertBank(gate, up, down)
        elif bank is None or not gate is up is down is None:
            raise ValueError("pass either gate, up and down (a list of TrellisWeight each) or bank")
        super().__init__(bank, Activation.checked(activation, alpha, limit))


class TrellisSwitchMLP(TrellisSwitch):
    """The experts of a mixture-of-experts layer without a gate, fused. A drop-in for mlx-lm's ``SwitchMLP``,
    called as :class:`TrellisSwitch` says.

    Args:
        fc1: Up: one :class:`TrellisWeight` per expert; or an :class:`ExpertStack` of all.
        fc2: Down, the same.
        activation: ``"gelu_tanh"``, ``"relu_squared"`` or ``"silu"``. Default: ``"gelu_tanh"``, that of ``SwitchMLP``.
        bank: Instead of fc1 and fc2: an :class:`ExpertBank` made with ``gate=None``.
    """

    PROJECTIONS = ("fc1", "fc2")

    def __init__(
        self,
        fc1: Experts | None = None,
        fc2: Experts | None = None,
        activation: str = "gelu_tanh",
        *,
        bank: ExpertBank | None = None,
    ):
        if bank is None and fc1 is not None and fc2 is not None:
            bank = ExpertBank(None, fc1, fc2)
        elif bank is None or not fc1 is fc2 is None:
            raise ValueError("pass either fc1 and fc2 (a list of TrellisWeight each) or bank")
        super().__init__(bank, Activation.checked(activation, gated=False))


def fused_experts(bank: ExpertBank) -> TrellisSwitch:
    """The layer that runs a bank, with that layer's usual activation."""
    return TrellisSwitchMLP(bank=bank) if bank.gate is None else TrellisSwitchGLU(bank=bank)
