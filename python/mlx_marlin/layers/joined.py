"""Linears that a checkpoint quantizes separately and a model has as one."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn

from .linear import TrellisLinear


class JoinedTrellisLinear(nn.Module):
    """The outputs of several linears behind each other, of the same inputs.

    Args:
        parts: In the order of the outputs. Their widths may differ.
    """

    def __init__(self, parts: Sequence[TrellisLinear]):
        super().__init__()
        self.parts = list(parts)

    def __call__(self, x: mx.array) -> mx.array:
        """``[..., in]`` -> ``[..., out]``, the parts' outputs together; dtype of x."""
        return mx.concatenate([part(x) for part in self.parts], axis=-1)
