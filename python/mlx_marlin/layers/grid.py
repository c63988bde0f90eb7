"""The layer over a weight of the older "metal-marlin" format. The grid is affine: the product is MLX's own."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..weights.grid import GRID_SCALE, MLX_GROUPS, GridWeight


class GridLinear(nn.Module):
    """A linear layer over a :class:`GridWeight`; what :class:`TrellisLinear` gives for one.

    Args:
        w: The weight. Its group size must be 32, 64 or 128 and divide the inputs, as MLX's kernels need.

    Raises:
        ValueError: If the group size is none of these.
    """

    def __init__(self, w: GridWeight):
        super().__init__()
        if w.group_size not in MLX_GROUPS or w.in_features % w.group_size:
            raise ValueError(
                f"{w} has groups that MLX's quantized matmul does not take: {', '.join(map(str, MLX_GROUPS))} are "
                "possible, and must divide the inputs"
            )
        self._width, self._group = w.bits, w.group_size
        fields = np.unpackbits(w.codes[..., None], axis=-1, bitorder="little")[..., : w.bits]
        rows = np.packbits(fields.reshape(w.out_features, -1), axis=1, bitorder="little")
        self.codes = mx.array(rows.view(np.uint32))
        scales = w.scales.T * w.sv[:, None] * np.float32(GRID_SCALE)
        self.scales = mx.array(scales)
        self.offsets = mx.array(scales * np.float32(-(2**w.bits - 1) / 2))
        self.su = mx.array(w.su)
        self.freeze()

    def __call__(self, x: mx.array) -> mx.array:
        """``[..., in_features]`` -> ``[..., out_features]``, dtype of x."""
        y = mx.quantized_matmul(
            x.astype(mx.float32) * self.su,
            self.codes,
            self.scales,
            self.offsets,
            transpose=True,
            group_size=self._group,
            bits=self._width,
        )
        return y.astype(x.dtype)

    def _extra_repr(self) -> str:
        return f"{self.su.size} -> {self.codes.shape[0]}, bits={self._width}, group_size={self._group}"
