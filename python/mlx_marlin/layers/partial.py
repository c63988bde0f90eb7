"""Experts of which some were left unquantized."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn


class PartlyQuantizedSwitchGLU(nn.Module):
    """A drop-in for mlx-lm's ``SwitchGLU`` or ``SwitchMLP`` over two banks of experts. Each slot is computed by both
    and taken from its own, which costs no synchronisation: which experts are active is not looked at.

    Args:
        quantized: The quantized experts, called as those are.
        dense: The others, the same.
        is_dense: Whether each expert of the layer is one of the others; both banks are in the layer's order.
    """

    def __init__(self, quantized: nn.Module, dense: nn.Module, is_dense: Sequence[bool]):
        super().__init__()
        self.quantized, self.dense = quantized, dense
        places, counts = [], [0, 0]
        for kind in is_dense:
            places.append(counts[kind])
            counts[kind] += 1
        # Names with an underscore are no parameters.
        self._is_dense, self._places = mx.array(list(is_dense)), mx.array(places, mx.uint32)

    def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
        """``[..., hidden]`` and indices ``[..., k]`` -> ``[..., k, hidden]``, dtype of x."""
        indices = mx.stop_gradient(indices)
        is_dense, places = self._is_dense[indices], self._places[indices]
        quantized = self.quantized(x, mx.where(is_dense, 0, places))
        dense = self.dense(x, mx.where(is_dense, places, 0))
        return mx.where(is_dense[..., None], dense.astype(x.dtype), quantized)
