"""Rows of a quantized token embedding."""

from __future__ import annotations

import mlx.core as mx

from .. import _ext
from .calls import check_ids
from .problems import DTYPE_NAMES, Indices, StreamOrDevice, device_of


def trellis_embedding(
    ids: Indices,
    trellis: mx.array,
    signs: mx.array,
    features: int,
    bits: int,
    *,
    dtype: mx.Dtype = mx.float16,
    stream: StreamOrDevice = None,
) -> mx.array:
    """Rows of a quantized token embedding, decoded; the table is never decoded as a whole.

    Args:
        ids: Integers of any shape: the rows.
        trellis: uint16, shape ``[rows, groups * (1 + 16 * bits)]``, contiguous.
        signs: float16, shape ``[groups, 256]``, contiguous.
        features: Elements of a row.
        bits: Bits per element, 1 to 8.
        dtype: Of the result: float32, float16 or bfloat16. Default: ``mx.float16``, which the format rounds to.
        stream: Stream or device. Default: ``None``, the default stream.

    Returns:
        Shape ``[..., features]``.

    Raises:
        ValueError: If ids are no integers, or one is out of range and already known. One that is only known later
            makes the evaluation fail on the CPU, and its row NaN on a GPU.
    """
    device_of(stream)  # raises unless it is one
    if dtype not in DTYPE_NAMES:
        raise ValueError(f"[trellis_embedding] dtype must be float32, float16 or bfloat16, got {dtype}")
    ids = check_ids("trellis_embedding", ids, trellis.shape[0], stream)
    return _ext.trellis_embedding(ids, trellis, signs, features, bits, dtype, stream)
