"""Layers of which each rank has a part."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
from mlx.nn.layers.distributed import sum_gradients

from ..weights.trellis import TrellisWeight
from .experts import TrellisSwitch
from .linear import TrellisLinear


class AllToShardedTrellisLinear(TrellisLinear):
    """Each rank computes some of the outputs.

    Args:
        w: The weight of this rank.
        group: The ranks.
    """

    def __init__(self, w: TrellisWeight, group: mx.distributed.Group):
        super().__init__(w)
        self._group = group

    def __call__(self, x: mx.array) -> mx.array:
        return super().__call__(sum_gradients(self._group)(x))


class ShardedToAllTrellisLinear(TrellisLinear):
    """Each rank has some of the inputs; the results are summed, and the bias is added once.

    Args:
        w: The weight of this rank, with the whole bias.
        group: The ranks.
    """

    def __init__(self, w: TrellisWeight, group: mx.distributed.Group):
        bias, w.bias = w.bias, None
        super().__init__(w)
        self._group = group
        if bias is not None:
            self.summed_bias = bias[: w.out_features]

    def __call__(self, x: mx.array) -> mx.array:
        y = mx.distributed.all_sum(super().__call__(x), group=self._group)
        return y + self.summed_bias.astype(y.dtype) if "summed_bias" in self else y


class LocalExperts(nn.Module):
    """Whole experts, of which each rank has some. A drop-in for mlx-lm's ``SwitchGLU``.

    Which experts are active is not looked at, which would cost a synchronisation. Of a slot of another rank's expert a
    fused layer computes nothing. Other layers compute it too, by an expert of this rank, and it is zero then.

    Args:
        experts: Those of this rank, called as ``SwitchGLU`` is. A fused layer becomes one of which some are absent.
        first: Number of the first one in the layer.
        count: How many there are. They follow each other.
        group: The ranks to sum over here. Default: ``None``, where the block around sums.
    """

    def __init__(self, experts: nn.Module, first: int, count: int, group: mx.distributed.Group | None = None):
        super().__init__()
        self.experts = experts
        self._first, self._count, self._group = first, count, group
        self._skips = False
        fused = getattr(experts, "experts", experts)  # mlx-vlm's has it as a child
        if isinstance(fused, TrellisSwitch):
            self._skips = fused.absent = True

    def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
        """``[..., hidden]`` and indices ``[..., k]`` of the layer -> ``[..., k, hidden]``, dtype of x."""
        return self._summed(self._mine(x, indices))

    def _mine(self, x: mx.array, indices: mx.array) -> mx.array:
        """What this rank's experts give, zeros elsewhere."""
        if self._group is not None:
            x = sum_gradients(self._group)(x)
        indices = mx.stop_gradient(indices)
        mine = (indices >= self._first) & (indices < self._first + self._count)
        if self._skips:
            return self.experts(x, mx.where(mine, indices - self._first, self._count))
        places = mx.where(mine, indices - self._first, 0)
        # By one that the token takes here anyway, if it takes any: no more weights are read.
        places = mx.where(mine, places, places.max(axis=-1, keepdims=True))
        return mx.where(mine[..., None], self.experts(x, places), 0)

    def _summed(self, y: mx.array) -> mx.array:
        return y if self._group is None else mx.distributed.all_sum(y, group=self._group)

    def _extra_repr(self) -> str:
        return f"experts {self._first} to {self._first + self._count - 1}"
