"""Cases of attention, and what must come out, in float64."""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx
import numpy as np

MASKS = (None, "causal", "bool", "additive")


class Shape(NamedTuple):
    """Sizes of queries, keys and values, in their order in ``[B, N, T, D]``."""

    batches: int
    heads: int
    key_heads: int
    queries: int
    keys: int
    key_size: int
    value_size: int


# One query and many, ragged sizes, fewer keys than queries, more keys than one task takes, other sizes of values, rows
# that fill no vector and rows of several tasks.
SHAPES = (
    Shape(1, 1, 1, 1, 1, 1, 1),
    Shape(1, 8, 2, 5, 7, 16, 16),
    Shape(2, 4, 4, 1, 600, 80, 80),
    Shape(1, 32, 4, 1, 1200, 128, 128),
    Shape(1, 6, 2, 70, 70, 64, 48),
    Shape(2, 3, 1, 130, 190, 33, 21),
    Shape(1, 4, 2, 9, 3, 16, 16),
    Shape(1, 16, 1, 3, 1500, 96, 64),
)


class Case(NamedTuple):
    """Arguments of ``ops.attention``; mask and sinks as it takes them."""

    queries: mx.array
    keys: mx.array
    values: mx.array
    scale: float
    mask: mx.array | str | None
    sinks: mx.array | None


def random_case(rng: np.random.Generator, shape: Shape, dtype: mx.Dtype, mask: str | None, sinks: bool) -> Case:
    """Normal values; queries are a view as models make it, keys the front of a longer cache."""

    def normal(*sizes: int) -> mx.array:
        return mx.array(rng.standard_normal(sizes, np.float32)).astype(dtype)

    b, heads, key_heads, queries, keys, key_size, value_size = shape
    array: mx.array | str | None = mask
    if mask == "bool":
        array = mx.array(rng.random((b, 1, queries, keys)) < 0.6)
    elif mask == "additive":
        array = normal(heads, queries, keys)
    return Case(
        normal(b, queries, heads, key_size).transpose(0, 2, 1, 3),
        normal(b, key_heads, keys + 9, key_size)[:, :, :keys],
        normal(b, key_heads, keys, value_size),
        float(key_size) ** -0.5,
        array,
        normal(heads) if sinks else None,
    )


def exact(x: mx.array) -> np.ndarray:
    """As float64."""
    return np.array(x.astype(mx.float32)).astype(np.float64)


def reference(case: Case) -> np.ndarray:
    """float64. A query that may look at no key looks at all of them alike, as in MLX."""
    q, k, v = exact(case.queries), exact(case.keys), exact(case.values)
    repeats = q.shape[1] // k.shape[1]
    k, v = np.repeat(k, repeats, 1), np.repeat(v, repeats, 1)
    scores = q @ k.swapaxes(2, 3) * case.scale
    queries, keys = scores.shape[2:]
    if isinstance(case.mask, str):
        allowed = np.arange(keys)[None] <= np.arange(queries)[:, None] + keys - queries
        scores = np.where(allowed, scores, np.finfo(np.float32).min)
    elif case.mask is not None and case.mask.dtype == mx.bool_:
        scores = np.where(np.array(case.mask), scores, np.finfo(np.float32).min)
    elif case.mask is not None:
        scores = scores + exact(case.mask)
    if case.sinks is not None:
        sinks = np.broadcast_to(exact(case.sinks)[:, None, None], (*scores.shape[:3], 1))
        scores = np.concatenate([scores, sinks], -1)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return weights[..., :keys] @ v
