"""The Hadamard transforms of a matrix, by products of matrices."""

from __future__ import annotations

from functools import cache

import numpy as np

from .. import codec


@cache
def _matrix(dtype: np.dtype) -> np.ndarray:
    matrix = codec.hadamard(np.eye(codec.HADAMARD_SIZE, dtype=np.float64)).astype(dtype)
    matrix.flags.writeable = False
    return matrix


def both_sides(x: np.ndarray) -> np.ndarray:
    """:func:`codec.hadamard` along both axes, but for rounding, and four times as fast.

    Args:
        x: float32 or float64 ``[rows, columns]``, multiples of 128.

    Returns:
        Same shape and dtype.
    """
    rows, columns = x.shape
    matrix = _matrix(x.dtype)
    turned = np.matmul(matrix, x.reshape(-1, codec.HADAMARD_SIZE, columns))
    return (turned.reshape(-1, codec.HADAMARD_SIZE) @ matrix).reshape(rows, columns)
