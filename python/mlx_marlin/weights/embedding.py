"""ExLlamaV3's quantized token embedding, validated."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from .. import codec
from .trellis import Array, as_array


class EmbeddingWeight:
    """A quantized token embedding: each row by itself, in groups of 256 elements. The codebook is mul1.

    Args:
        trellis: int16, shape ``[rows, groups * (1 + 16 * K)]`` with ``groups =
            ceil(features / 256)`` and a whole K from 1 to 8. NumPy or MLX.
        signs: float16, shape ``[groups, 256]``, of +1 and -1.
        features: Elements of a row, which the file does not record. Default: ``None``, whole groups.

    Attributes:
        bits: K.
        rows: The vocabulary.
        features: Elements of a row.

    Raises:
        ValueError: If a shape, a dtype or a sign is not one that the format allows.
    """

    def __init__(self, trellis: Array, signs: Array, features: int | None = None):
        self.trellis, self.signs = as_array("trellis", trellis), as_array("signs", signs)
        if self.trellis.dtype not in (mx.int16, mx.uint16):
            raise ValueError(f"the trellis of an embedding is int16, got {self.trellis.dtype}")
        if self.signs.dtype != mx.float16 or self.signs.ndim != 2 or self.signs.shape[1] != codec.TILE_SIZE:
            raise ValueError(
                f"the signs of an embedding are float16 [groups, {codec.TILE_SIZE}], "
                f"got {self.signs.dtype} {list(self.signs.shape)}"
            )
        groups = self.signs.shape[0]
        most = groups * codec.TILE_SIZE
        features = most if features is None else features
        if not isinstance(features, (int, np.integer)) or not most - codec.TILE_SIZE < features <= most:
            raise ValueError(
                f"features must lie in ({most - codec.TILE_SIZE}, {most}], for {groups} groups of {codec.TILE_SIZE}; "
                f"got {features!r}"
            )
        self.bits = codec.embedding_bits(self.trellis.shape, groups)
        self.rows, self.features = self.trellis.shape[0], int(features)
        if self.rows < 1:
            raise ValueError("the trellis of an embedding needs at least one row")
        mx.eval(self.trellis, self.signs)
        if not mx.all(mx.abs(self.signs) == 1).item():
            raise ValueError("the signs of an embedding are +1 and -1")

    def __repr__(self) -> str:
        return f"EmbeddingWeight(rows={self.rows}, features={self.features}, bits={self.bits})"
