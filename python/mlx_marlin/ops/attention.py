"""Attention on the CPU, where MLX composes it of a product, a softmax and a product."""

from __future__ import annotations

import mlx.core as mx

from .. import _ext
from .problems import DTYPE_NAMES, StreamOrDevice, device_of


def attention_runs(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    mask: mx.array | str | None = None,
    sinks: mx.array | None = None,
    stream: StreamOrDevice = None,
) -> bool:
    """Whether :func:`attention` takes these arguments; what is wrong with others is for MLX to say."""
    arrays = (queries, keys, values)
    if device_of(stream) != "cpu" or not all(isinstance(a, mx.array) and a.ndim == 4 for a in arrays):
        return False
    batches, heads, count, size = queries.shape
    key_heads, key_count = keys.shape[1:3]
    scores = (batches, heads, count, key_count)
    return (
        queries.dtype == keys.dtype == values.dtype
        and queries.dtype in DTYPE_NAMES
        and keys.shape[0] == values.shape[0] == batches
        and keys.shape[3] == size
        and values.shape[1:3] == (key_heads, key_count)
        and key_heads > 0
        and heads % key_heads == 0
        and min(*scores, size, values.shape[3]) > 0
        and _is_mask(mask, scores, queries.dtype)
        and (sinks is None or _are_sinks(sinks, queries))
    )


def _are_sinks(sinks: mx.array, queries: mx.array) -> bool:
    return (
        isinstance(sinks, mx.array)
        and sinks.shape == (queries.shape[1],)
        and mx.issubdtype(sinks.dtype, mx.floating)
        and mx.result_type(sinks, queries) == queries.dtype
    )


def _is_mask(mask: mx.array | str | None, scores: tuple[int, ...], dtype: mx.Dtype) -> bool:
    if mask is None or isinstance(mask, str):
        return mask in (None, "causal")
    if not isinstance(mask, mx.array) or mask.dtype not in (mx.bool_, dtype) or mask.ndim > len(scores):
        return False
    return all(own in (1, wanted) for own, wanted in zip(reversed(mask.shape), reversed(scores)))


def attention(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    *,
    scale: float,
    mask: mx.array | str | None = None,
    sinks: mx.array | None = None,
    stream: StreamOrDevice = None,
) -> mx.array:
    """``softmax(scale * queries @ keys.T + mask) @ values`` on the CPU, on all threads.

    All is computed in float32; the scores are never held at once. Keys and values are read where they lie, whatever the
    strides. The same bits on any number of threads. Gradients are those of ``mx.fast.scaled_dot_product_attention``.

    Args:
        queries: Shape ``[B, N_q, T_q, D]``.
        keys: Shape ``[B, N_kv, T_kv, D]``, N_kv a divisor of N_q.
        values: Shape ``[B, N_kv, T_kv, D_v]``.
        scale: For the scores.
        mask: Boolean (true: look) or additive, broadcast to ``[B, N_q, T_q, T_kv]``; ``"causal"``: query i looks at
            keys up to ``i + T_kv - T_q``. Default: ``None``.
        sinks: Shape ``[N_q]``, of a floating dtype that the queries' can hold: a score for each head that has no value.
            Default: ``None``.
        stream: Stream or device of the CPU. Default: ``None``, the default stream.

    Returns:
        Shape ``[B, N_q, T_q, D_v]``, in the dtype of the queries.

    Raises:
        ValueError: If :func:`attention_runs` is false.
    """
    if not attention_runs(queries, keys, values, mask, sinks, stream):
        shapes = ", ".join(f"{a.dtype} {a.shape}" for a in (queries, keys, values))
        raise ValueError(
            "[attention] wants queries [B, N_q, T_q, D], keys and values of N_kv heads, one floating dtype, a mask of "
            f"that dtype or bool, and a CPU; got {shapes}; use mx.fast.scaled_dot_product_attention for the rest"
        )
    return run_attention(queries, keys, values, scale=scale, mask=mask, sinks=sinks, stream=stream)


def run_attention(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    *,
    scale: float,
    mask: mx.array | str | None,
    sinks: mx.array | None,
    stream: StreamOrDevice,
) -> mx.array:
    """:func:`attention` of arguments that :func:`attention_runs` is true of."""
    array = mask if isinstance(mask, mx.array) else None
    if array is not None and array.dtype != mx.bool_:
        array = array.astype(mx.float32, stream=stream)
    if sinks is not None:
        sinks = sinks.astype(mx.float32, stream=stream)
    return _ext.cpu_attention(
        queries, keys, values, array, sinks, scale, mask == "causal" if array is None else False, stream
    )
