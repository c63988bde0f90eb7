"""A drop-in for ``nn.Embedding`` over ExLlamaV3's quantized token embedding."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from .. import codec, ops
from ..weights.embedding import EmbeddingWeight

# Rows that as_linear decodes at a time: 32 MB of half precision at 4096 features, a few times a GPU's caches, so that
# launching costs nothing beside decoding.
_BLOCK_ROWS = 4096


class TrellisEmbedding(nn.Module):
    """A token embedding over a quantized table. A drop-in for ``nn.Embedding``.

    Parameters: ``trellis`` (uint16 ``[rows, groups * (1 + 16 * K)]``) and ``signs`` (``[groups, 256]``, +1 and -1,
    whose dtype is that of the embeddings, as ``nn.Embedding``'s weight's is). Never trainable.

    Args:
        w: The weight.

    Raises:
        ValueError: If w is no :class:`EmbeddingWeight`.
    """

    def __init__(self, w: EmbeddingWeight):
        super().__init__()
        if not isinstance(w, EmbeddingWeight):
            raise ValueError(f"w must be an EmbeddingWeight, got {type(w).__name__}")
        self._features = w.features
        self.trellis = mx.contiguous(w.trellis.view(mx.uint16))
        self.signs = w.signs
        mx.eval(self.parameters())
        self.freeze()

    @property
    def bits(self) -> int:
        """Bits per element, from the shapes."""
        return codec.embedding_bits(self.trellis.shape, self.signs.shape[0])

    @property
    def weight_count(self) -> int:
        """Elements of the table."""
        return self.trellis.shape[0] * self._features

    @property
    def weight(self) -> mx.array:
        """The whole table, decoded at each look, for model code that multiplies with it: ``[rows, features]``."""
        return self(mx.arange(self.trellis.shape[0]))

    def __call__(self, x: mx.array) -> mx.array:
        """Token ids ``[...]`` -> ``[..., features]``, in the dtype of ``signs``; values are those of half precision."""
        signs = self.signs
        return ops.trellis_embedding(
            x, self.trellis, signs.astype(mx.float16), self._features, self.bits, dtype=signs.dtype
        )

    def as_linear(self, x: mx.array) -> mx.array:
        """``x @ table.T``: ``[..., features]`` -> ``[..., rows]``, a block of rows of the table at a time."""
        rows = self.trellis.shape[0]
        blocks = [mx.arange(first, min(first + _BLOCK_ROWS, rows)) for first in range(0, rows, _BLOCK_ROWS)]
        return mx.concatenate([x @ self(block).astype(x.dtype).T for block in blocks], axis=-1)

    def _extra_repr(self) -> str:
        return f"{self.trellis.shape[0]}, {self._features}, bits={self.bits}"
