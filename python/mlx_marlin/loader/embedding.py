"""Quantized token embeddings of a checkpoint, known from the headers, and read from the files."""

from __future__ import annotations

import re
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from .. import codec, ops
from ..storage.reads import read_all
from ..storage.safetensors import TensorInfo
from ..weights.embedding import EmbeddingWeight

_SHARD = re.compile(r"(.+)\.shard_(\d{1,9})\.trellis")


@dataclass(frozen=True)
class QuantizedEmbedding:
    """One quantized token embedding of a checkpoint, known from the headers.

    Attributes:
        name: Its name in the checkpoint.
        parts: Its tensors by suffix: signs, and trellis or shard_0.trellis, shard_1.trellis, ...: its rows in turn.
    """

    name: str
    parts: dict[str, TensorInfo]

    @property
    def tables(self) -> list[TensorInfo]:
        """The trellis tensors, in the order of their rows."""
        if "trellis" in self.parts:
            return [self.parts["trellis"]]
        return [self.parts[f"shard_{i}.trellis"] for i in range(len(self.parts) - 1)]

    @property
    def rows(self) -> int:
        """The vocabulary."""
        return sum(table.shape[0] for table in self.tables)

    @property
    def groups(self) -> int:
        """Groups of 256 elements in a row."""
        return self.parts["signs"].shape[0]

    @property
    def bits(self) -> int:
        """Bits per element, scales not counted."""
        return codec.embedding_bits(self.tables[0].shape, self.groups)

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(info.nbytes for info in self.parts.values())

    def holds(self, features: int) -> bool:
        """Whether rows of this many elements are stored in groups as these are."""
        return -(-features // codec.TILE_SIZE) == self.groups

    def check(self) -> None:
        """Raise ValueError, naming file and tensor, unless the tensors are what the format says."""
        some = next(iter(self.parts.values()))
        if "signs" not in self.parts:
            suffix = next(iter(self.parts))
            raise ValueError(
                f"{some.file}: {self.name}.{suffix} has two dimensions, as a quantized embedding's, which ExLlamaV3 "
                f"writes since 1.6.0 (-eb), but {self.name}.signs is missing"
            )
        if len(self.parts) == 1:
            raise ValueError(f"{some.file}: {self.name}.signs is there, but {self.name}.trellis is missing")
        self._check_shards()
        signs = self.parts["signs"]
        if signs.dtype != "F16" or len(signs.shape) != 2 or not signs.shape[0] or signs.shape[1] != codec.TILE_SIZE:
            raise ValueError(
                f"{signs.file}: {self.name}.signs must be F16 [groups, {codec.TILE_SIZE}], "
                f"got {signs.dtype} {list(signs.shape)}"
            )
        for suffix, table in self.parts.items():
            where = f"{table.file}: {self.name}.{suffix}"
            if suffix == "signs":
                continue
            if table.dtype != "I16":
                raise ValueError(f"{where} must be I16, got {table.dtype}")
            try:
                bits = codec.embedding_bits(table.shape, self.groups)
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from None
            if not table.shape[0] or bits != self.bits:
                raise ValueError(
                    f"{where} has {table.shape[0]} rows of {bits} bits; every part of an embedding has at least one "
                    f"row, and the first has {self.bits} bits"
                )

    def _check_shards(self) -> None:
        where = f"{self.parts['signs'].file}: {self.name}"
        count = len(self.parts) - 1
        if "trellis" in self.parts:
            if count > 1:
                raise ValueError(f"{where} has both .trellis and .shard_{{i}}.trellis; an embedding is whole or split")
            return
        missing = [i for i in range(count) if f"shard_{i}.trellis" not in self.parts]
        if missing:
            raise ValueError(
                f"{where}.shard_{missing[0]}.trellis is missing, but other parts of the embedding are there"
            )

    def load(self, features: int | None = None) -> EmbeddingWeight:
        """Read it.

        Args:
            features: Elements of a row, which the files do not record. Default: ``None``, whole groups of 256.

        Raises:
            ValueError: If the file has other values than +1 and -1 for signs, or a row cannot have so many elements.
        """
        trellis = ops.uninitialized((self.rows, self.tables[0].shape[1]), mx.int16)
        values = np.array(trellis, copy=False)
        ends = np.cumsum([table.shape[0] for table in self.tables])
        read_all([t.into(values[end - t.shape[0] : end]) for t, end in zip(self.tables, ends)])
        try:
            return EmbeddingWeight(trellis, mx.array(self.parts["signs"].array()), features)
        except ValueError as error:
            raise ValueError(f"{self.parts['signs'].file}: {self.name}: {error}") from None


def find_embeddings(tensors: dict[str, TensorInfo]) -> dict[str, QuantizedEmbedding]:
    """The quantized embeddings among the tensors of a checkpoint, checked.

    Those are told from linears by their two dimensions. An n-gram table, which has no signs, is in a file of its own.

    Args:
        tensors: All tensors, by name.

    Raises:
        ValueError: If one is not what the format says; the message names file and tensor.
    """
    parts: dict[str, dict[str, TensorInfo]] = {}
    for name, info in tensors.items():
        stem, _, suffix = name.rpartition(".")
        shard = _SHARD.fullmatch(name)
        key = shard[1] if shard else stem
        # Beside .suh it is a damaged linear, of which the linear's own check tells more.
        if suffix == "trellis" and len(info.shape) == 2 and not {f"{key}.suh", f"{key}.su"} & tensors.keys():
            parts.setdefault(key, {})[name.removeprefix(f"{key}.")] = info
        elif suffix == "signs":
            parts.setdefault(stem, {})["signs"] = info
    found = {name: QuantizedEmbedding(name, suffixes) for name, suffixes in parts.items()}
    for name, embedding in found.items():
        embedding.check()
        if f"{name}.weight" in tensors:
            raise ValueError(f"{tensors[name + '.weight'].file}: {name} has both .weight and .trellis")
    return found
