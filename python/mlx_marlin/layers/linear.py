"""A drop-in for ``nn.Linear`` over a trellis weight.

Trellis words and scales are parameters, so that they survive save and load; they are frozen, and stay so when the
model is unfrozen.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from .. import codec, ops
from ..kernels import KernelConfig, Problem
from ..selection import choices
from ..selection.choices import Choice
from ..weights.experts import ExpertStack
from ..weights.grid import GridWeight
from ..weights.trellis import TrellisWeight
from .state import StackArrays, StackedModule


class TrellisLinear(StackedModule):
    """A linear layer over a trellis weight. A drop-in for ``nn.Linear``.

    Parameters: ``trellis`` (uint32 ``[k / 16, n / 16, 8 * K]``), ``suh``, ``svh`` and optionally ``bias``.

    Args:
        w: The weight. The layer over a :class:`GridWeight` is :class:`GridLinear`.

    Raises:
        ValueError: If w is no :class:`TrellisWeight`.
    """

    def __init__(self, w: TrellisWeight):
        super().__init__()
        if isinstance(w, GridWeight):
            raise ValueError("w is a GridWeight of the metal-marlin format, whose layer is GridLinear(w)")
        stack = ExpertStack.of("w", [w])
        self._sizes = (w.in_features, w.out_features)
        self._codebook = w.codebook
        k, n = w.padded_shape
        self.trellis = stack.codes.reshape(k // 16, n // 16, codec.words_per_tile(w.bits) // 2)
        self.suh = stack.suh.reshape(-1)
        self.svh = stack.svh.reshape(-1)
        if stack.bias is not None:
            self.bias = stack.bias.reshape(-1)
        mx.eval(self.parameters())
        self._derived.collected = self._parameters(), ops.prepare(stack)

    def _stack_arrays(self) -> StackArrays:
        trellis, bias = self.trellis, self.get("bias")
        if trellis.ndim != 3:
            raise ValueError(f"trellis must have shape [k/16, n/16, 8*K], got {list(trellis.shape)}")
        bias = None if bias is None else bias.astype(mx.float32)[None]
        return trellis.reshape(-1), self.suh[None], self.svh[None], bias

    def _formats(self) -> mx.array:
        return mx.array([codec.format_word(self._bits(), self._codebook)], mx.uint32)

    def _bits(self) -> int | float:
        """From the shape: 8 * K words of 32 bits per tile, that is 4 for each half bit."""
        return codec.bits_of_half(self.trellis.shape[-1] // 4)

    def problem(
        self, rows: int, dtype: mx.Dtype | str, device: str, *, combine: bool = False, top_k: int = 1
    ) -> Problem:
        """What a call with this many rows asks for; combine and top_k mean nothing to a linear."""
        return ops.linear_problem(self.stack.source, rows, dtype, device, self._accuracy)

    def __call__(self, x: mx.array) -> mx.array:
        """``[..., in_features]`` -> ``[..., out_features]``, dtype of x."""
        tap = self._derived.adaptation
        return self.run(x) if tap is None else tap(x)

    def run(self, x: mx.array, config: KernelConfig | None = None) -> mx.array:
        """The call with a given config, or with the one that is selected for it."""
        return self._derived.configs.run(ops.check_linear(x, self.stack, accuracy=self._accuracy), config)

    def explain(self, rows: int, dtype: mx.Dtype | None = None) -> Choice:
        """Which config a call with this many rows runs, and why.

        Args:
            rows: Tokens.
            dtype: Dtype of x. Default: ``None``, as in the latest new kind of call, or float32.

        Returns:
            A :class:`Choice`: ``problem``, ``config`` and ``reason``; printable.
        """
        dtype = self._derived.configs.dtype if dtype is None else dtype
        return choices.choose(self.problem(rows, dtype, ops.device_of(None)))

    def to_lora(self, r: int = 8, scale: float = 20.0, dropout: float = 0.0) -> nn.Module:
        """Wrap in mlx-lm's LoRA layer: the trellis stays frozen under it."""
        from mlx_lm.tuner.lora import LoRALinear

        lora = LoRALinear(*self._sizes, r=r, dropout=dropout, scale=scale)
        lora.update_modules({"linear": self})
        return lora

    def _extra_repr(self) -> str:
        return f"{self._sizes[0]} -> {self._sizes[1]}, bits={self._bits()}"
