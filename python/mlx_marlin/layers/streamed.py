"""An embedding whose rows stay where they are until they are asked for."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
import numpy as np


class StreamedEmbedding(nn.Module):
    """Rows by number, from a table that need not fit into memory. A call waits for its indices.

    Args:
        gather: Gives rows by their distinct numbers, ascending: ``[n]`` -> float32 ``[n, features]``.
        dtype: Of the rows.
    """

    def __init__(self, gather: Callable[[np.ndarray], np.ndarray], dtype: mx.Dtype):
        super().__init__()
        self._gather, self._dtype = gather, dtype

    def __call__(self, indices: mx.array) -> mx.array:
        """Integers, any shape -> ``[..., features]``."""
        distinct, places = np.unique(np.array(indices).reshape(-1), return_inverse=True)
        rows = mx.array(self._gather(distinct)).astype(self._dtype)
        return rows[mx.array(places.reshape(-1))].reshape(*indices.shape, -1)
