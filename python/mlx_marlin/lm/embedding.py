"""Quantized token embeddings: where a host puts them, and the layers in the place of its ``nn.Embedding``.

What stands for one while it moves tensors about has one column, and row r of embedding number j holds
``1 << 62 | j << 32 | r``: that bit tells it from what stands for a linear.
"""

from __future__ import annotations

from collections.abc import Container

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..layers.embedding import TrellisEmbedding
from ..loader.directory import TrellisModelLoader
from ..loader.embedding import QuantizedEmbedding
from .host import Host

_MARK = 1 << 62


class EmbeddingWithHead(nn.Module):
    """Embeddings of a model that has no head of its own, with the one of the checkpoint.

    Args:
        embedding: The embeddings, an ``nn.Embedding`` or a :class:`TrellisEmbedding`.
        head: What :meth:`as_linear` applies instead of their transpose.
    """

    def __init__(self, embedding: nn.Module, head: nn.Module):
        super().__init__()
        self.embedding = embedding
        self.head = head

    @property
    def weight(self) -> mx.array:
        """The table of the embeddings."""
        return self.embedding.weight

    def __call__(self, x: mx.array) -> mx.array:
        return self.embedding(x)

    def as_linear(self, x: mx.array) -> mx.array:
        return self.head(x)


def make_placeholders(loader: TrellisModelLoader) -> dict[str, mx.array]:
    """What stands for the quantized embeddings of a checkpoint, by ``<name>.weight``."""
    weights = {}
    for number, embedding in enumerate(loader.embeddings.values()):
        rows = mx.arange(embedding.rows, dtype=mx.uint64)
        weights[f"{embedding.name}.weight"] = (rows + mx.array(_MARK | number << 32, mx.uint64))[:, None]
    return weights


def _is_placeholder(value: object) -> bool:
    if not isinstance(value, mx.array) or value.dtype != mx.uint64 or not value.size:
        return False
    return bool(np.array(value.reshape(-1)[:1])[0] & _MARK)


def take_embeddings(
    host: Host,
    loader: TrellisModelLoader,
    modules: dict[str, nn.Module],
    weights: dict[str, mx.array],
    parts: Container[str],
) -> dict[str, QuantizedEmbedding]:
    """Take the placeholders out of the weights and read them.

    Args:
        host: Whose model it is.
        loader: The checkpoint.
        modules: The model's modules, by path.
        weights: What the model's ``sanitize`` has left. Loses the placeholders.
        parts: Names of what the host's models may leave out.

    Returns:
        The embeddings that the model uses, by their paths in it.

    Raises:
        ValueError: If one ends where no quantized embedding can stand, or has another size there.
    """
    embeddings = list(loader.embeddings.values())
    used: dict[str, QuantizedEmbedding] = {}
    if not embeddings:
        return used
    for key in [key for key, value in weights.items() if _is_placeholder(value)]:
        codes = np.array(weights.pop(key)).reshape(-1) & (_MARK - 1)
        source = embeddings[int(codes[0] >> 32)]
        path, _, leaf = key.rpartition(".")
        module = modules.get(path)
        where = f"{loader.directory}: {source.name} is quantized, but {host.name} puts it at {key}"
        if module is None and source.name in parts:
            continue
        if leaf != "weight" or module is None:
            raise ValueError(
                f"{where}, which the model does not have; it seems to be a quantized embedding, which ExLlamaV3 writes "
                "since 1.6.0 (-eb)"
            )
        if type(module) is not nn.Embedding:
            raise ValueError(f"{where}, a {type(module).__name__} that needs a dense weight")
        if not np.array_equal(codes & 0xFFFFFFFF, np.arange(source.rows)):
            raise ValueError(f"{where} and changes its rows, which a quantized embedding does not allow")
        rows, features = module.weight.shape
        if source.rows != rows or not source.holds(features):
            raise ValueError(
                f"{loader.directory}: {source.name} has {source.rows} rows in {source.groups} groups of 256 elements, "
                f"but the model wants {rows} rows of {features} at {key}"
            )
        used[path] = source
    return used


def make_embedding(module: nn.Embedding, source: QuantizedEmbedding, dtype: mx.Dtype | None) -> TrellisEmbedding:
    """What stands for an ``nn.Embedding``.

    Args:
        module: The module whose place it takes.
        source: Its weight.
        dtype: Of the embeddings. ``None``: float16, which their format rounds to.
    """
    layer = TrellisEmbedding(source.load(module.weight.shape[1]))
    if dtype is not None:
        layer.set_dtype(dtype)
    return layer
