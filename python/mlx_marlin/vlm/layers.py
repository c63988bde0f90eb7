"""Layers as mlx-vlm calls them.

Its ``SwitchGLU`` also combines, where it is handed what to combine with. Some of its models ask a linear's weight for
its shape, or for the dtype that they run in.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx_vlm.models.switch_layers import SwitchGLU

from ..layers.experts import TrellisSwitchGLU
from ..layers.linear import TrellisLinear
from ..layers.partial import PartlyQuantizedSwitchGLU
from ..layers.sharded import AllToShardedTrellisLinear, LocalExperts, ShardedToAllTrellisLinear
from ..weights.trellis import TrellisWeight


class Described(NamedTuple):
    """What there is to ask of a weight that is not there."""

    shape: tuple[int, int]
    dtype: mx.Dtype


class DescribedLinear(TrellisLinear):
    """A drop-in for ``nn.Linear`` that says what its weight would be.

    Args:
        w: The weight.
    """

    def __init__(self, w: TrellisWeight):
        super().__init__(w)
        self.dtype = mx.float32

    @property
    def weight(self) -> Described:
        """Shape ``[out, in]``, and the dtype that its model runs in."""
        in_features, out_features = self._sizes
        return Described((out_features, in_features), self.dtype)


class AllToShardedDescribedLinear(AllToShardedTrellisLinear, DescribedLinear):
    """A described linear of whose outputs each rank has some."""


class ShardedToAllDescribedLinear(ShardedToAllTrellisLinear, DescribedLinear):
    """A described linear of whose inputs each rank has some."""


class _CalledAsSwitchGLU(nn.Module):
    """What mlx-vlm's ``SwitchGLU`` is called with. A subclass says what its experts give."""

    def __call__(
        self,
        x: mx.array,
        indices: mx.array,
        weights: mx.array | None = None,
        shared: mx.array | None = None,
        residual: tuple | None = None,
    ) -> mx.array:
        """The experts' outputs.

        Args:
            x: Shape ``[..., hidden]``.
            indices: Integers, shape ``[..., k]``.
            weights: Of the experts, shape ``[..., k]``: combine them. Default: ``None``.
            shared: What is added to that, ``[..., hidden]``. Default: ``None``.
            residual: What mlx-vlm's ``hc_expand`` puts that into. Default: ``None``.

        Returns:
            Shape ``[..., k, hidden]``, or ``[..., hidden]`` with weights; dtype of x.
        """
        return SwitchGLU._combine(self._routed(x, indices, weights), None, shared, residual)

    def _routed(self, x: mx.array, indices: mx.array, weights: mx.array | None) -> mx.array:
        """The outputs, combined where there are weights."""
        raise NotImplementedError


class FusedExperts(_CalledAsSwitchGLU):
    """A drop-in for mlx-vlm's ``SwitchGLU``.

    The fused layer is a child, so that mlx-vlm does not find projections and an activation to call one by one.

    Args:
        arguments: Those of :class:`~mlx_marlin.TrellisSwitchGLU`.
    """

    def __init__(self, *arguments: Any):
        super().__init__()
        self.experts = TrellisSwitchGLU(*arguments)

    def _routed(self, x: mx.array, indices: mx.array, weights: mx.array | None) -> mx.array:
        return self.experts(x, indices, weights)


class PartlyQuantizedExperts(_CalledAsSwitchGLU, PartlyQuantizedSwitchGLU):
    """A drop-in for mlx-vlm's ``SwitchGLU`` of which some experts were left unquantized."""

    def _routed(self, x: mx.array, indices: mx.array, weights: mx.array | None) -> mx.array:
        return SwitchGLU._combine(PartlyQuantizedSwitchGLU.__call__(self, x, indices), weights, None)


class LocalVlmExperts(_CalledAsSwitchGLU, LocalExperts):
    """A drop-in for mlx-vlm's ``SwitchGLU`` of whose experts each rank has some."""

    def _routed(self, x: mx.array, indices: mx.array, weights: mx.array | None) -> mx.array:
        # Combined before it is summed, which is less to send.
        return self._summed(SwitchGLU._combine(self._mine(x, indices), weights, None))
