"""Memory that a model of mlx-lm needs, from the headers of its checkpoint and the shapes of its caches."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import cache as mlx_lm_cache

from ..loader.exl3 import PlainLinear
from .experts import unquantized_experts
from .host import MODEL_ERRORS
from .mapping import WeightMap
from .model import cast_dense, running_dtype
from .placeholders import LinearSource


def _source_bytes(source: LinearSource, shape: tuple[int, ...], dense: mx.Dtype | None) -> int:
    """Bytes of a weight in memory.

    Args:
        source: The weight.
        shape: ``[out, in]`` in the model.
        dense: Dtype that it is decoded to, or ``None`` where it stays quantized.
    """
    if dense is not None:
        return shape[-2] * shape[-1] * dense.size
    stored = sum(info.nbytes for info in source.linear.parts.values())
    return stored if source.blocks is None else stored * 128 * len(source.blocks) // source.linear.padded_shape[1]


def weight_bytes(model: nn.Module, mapping: WeightMap, dtype: mx.Dtype | None = None) -> int:
    """Bytes of a model's parameters once it is loaded. While it loads, one layer more.

    Args:
        model: The model that ``mapping`` was made for.
        mapping: Where its weights come from; nothing of them is read.
        dtype: As for :func:`~mlx_marlin.load`. Default: ``None``.
    """
    modules = dict(model.named_modules())
    running = running_dtype(mapping.dense, dtype) or mx.float16
    total = sum(value.nbytes for value in cast_dense(model, mapping.dense, dtype).values())
    for embedding in mapping.embeddings.values():
        signs = embedding.parts["signs"].nbytes
        total += embedding.nbytes - signs + signs // mx.float16.size * running.size
    for path, source in (*mapping.linears.items(), *mapping.heads.items()):
        dense = running if isinstance(source.linear, PlainLinear) else None
        total += _source_bytes(source, modules[path].weight.shape, dense)
    for path, parts in mapping.joined.items():
        in_features = modules[path].weight.shape[1]
        total += sum(_source_bytes(source, (rows, in_features), None) for source, rows in parts)
    for sources in mapping.grouped.values():
        total += sum(_source_bytes(source, (), None) for source in sources)
    for path, projections in mapping.experts.items():
        kinds = unquantized_experts(projections)
        for projection, sources in projections.items():
            shape = modules[f"{path}.{projection}"].weight.shape
            for source, is_dense in zip(sources, kinds):
                decoded = mx.float32 if not isinstance(source.linear, PlainLinear) else running
                total += _source_bytes(source, shape, decoded if is_dense else None)
    return total


class UnknownCache(ValueError):
    """A cache whose size is not known beforehand; the message says why."""


def _rounded(tokens: int, step: int) -> int:
    return -(-tokens // step) * step


def _cache_bytes(cache: Any, context: int) -> int:
    """Bytes of a cache that has seen a token, once it has seen ``context`` tokens."""
    kind = type(cache)
    if kind is mlx_lm_cache.CacheList:
        return sum(_cache_bytes(part, context) for part in cache.caches)
    if kind is mlx_lm_cache.ArraysCache:
        return sum(array.nbytes for array in cache.cache if array is not None)
    if kind not in (mlx_lm_cache.KVCache, mlx_lm_cache.RotatingKVCache, mlx_lm_cache.ChunkedKVCache):
        raise UnknownCache(f"mlx-lm keeps it in a {kind.__name__}, whose growth is not known here")
    if cache.keys is None:
        return 0  # a layer that shares another's
    tokens = _rounded(context, kind.step)
    if kind is mlx_lm_cache.RotatingKVCache:
        tokens = min(tokens, cache.max_size)
    elif kind is mlx_lm_cache.ChunkedKVCache:
        tokens = min(tokens, _rounded(cache.chunk_size, kind.step) + kind.step)
    return tokens * ((cache.keys.nbytes + cache.values.nbytes) // cache.keys.shape[2])


def cache_bytes(model: nn.Module, context: int, dtype: mx.Dtype) -> int:
    """Bytes of mlx-lm's caches for one sequence.

    The model is traced with one token, so that its own code makes the caches and gives them their shapes; nothing is
    computed.

    Args:
        model: The model of mlx-lm, its parameters not evaluated. Its dtype changes.
        context: Tokens, at least 1.
        dtype: Of the activations.

    Raises:
        UnknownCache: If the model cannot be traced, or has a cache of its own.
    """
    model.set_dtype(dtype)
    try:
        caches = mlx_lm_cache.make_prompt_cache(model)

        def forward(tokens: mx.array) -> mx.array:
            model(tokens, cache=caches)
            return tokens

        # Parameters as inputs: what a model would evaluate on its way raises, rather than read or compute anything.
        mx.compile(forward, inputs=[model.state])(mx.zeros((1, 1), mx.int32))
        return sum(_cache_bytes(cache, context) for cache in caches)
    except UnknownCache:
        raise
    except MODEL_ERRORS as error:
        raise UnknownCache(f"mlx-lm's model cannot be traced: {type(error).__name__}: {error}") from error
