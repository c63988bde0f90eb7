"""Linears that a checkpoint quantizes separately and a model has as one layer."""

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


class GroupedTrellisLinear(nn.Module):
    """A linear for each group of inputs. A drop-in for mlx-vlm's ``MultiLinear``.

    Args:
        groups: One for each group.
    """

    def __init__(self, groups: Sequence[TrellisLinear]):
        super().__init__()
        self.groups = list(groups)

    def __call__(self, x: mx.array) -> mx.array:
        """``[..., groups, rows, in]`` -> ``[..., groups, rows, out]``, dtype of x."""
        if x.ndim < 3 or x.shape[-3] != len(self.groups):
            raise ValueError(f"x must have shape [..., {len(self.groups)}, rows, in], got {list(x.shape)}")
        return mx.stack([linear(x[..., i, :, :]) for i, linear in enumerate(self.groups)], axis=-3)
