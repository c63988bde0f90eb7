"""N-gram tables of a checkpoint, known from the headers; rows are read from the files as they are asked for.

A table is larger than most machines' memory: that of Qwen3.8-Flash-Next has 320 million rows.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from .. import codec
from ..storage.reads import Read, read_all
from ..storage.safetensors import TensorInfo

_PART = re.compile(r"(?P<name>.+?)\.(?:shard_(?P<shard>\d{1,9})\.)?(?P<kind>trellis|weight)")
# What ExLlamaV3 calls the parameters of the hashes beside a quantized table, and the model does.
HASH_PARAMETERS = {
    "head_offsets": "ngram_heads_offsets",
    "head_vocab_sizes": "ngram_heads_vocab_sizes",
    "layer_multipliers": "layer_multipliers",
}
_KINDS = {"trellis": ("I16",), "weight": ("F16", "BF16")}


@dataclass(frozen=True)
class NgramTable:
    """One table.

    Attributes:
        name: Its name in the checkpoint.
        kind: ``"trellis"``, or ``"weight"`` if it is not quantized.
        shards: Its rows in turn.
        parts: The other tensors by suffix: head_bias, head_offsets, head_vocab_sizes, layer_multipliers.
    """

    name: str
    kind: str
    shards: tuple[TensorInfo, ...]
    parts: dict[str, TensorInfo]

    @property
    def rows(self) -> int:
        return sum(shard.shape[0] for shard in self.shards)

    def check(self) -> None:
        """Raise ValueError, naming file and tensor, unless the tensors are what the format says."""
        first = self.shards[0]
        for shard in self.shards:
            where = f"{shard.file}: {self.name}.{self.kind}"
            if shard.dtype not in _KINDS[self.kind] or len(shard.shape) != 2 or shard.shape[1] != first.shape[1]:
                raise ValueError(
                    f"{where} must be {' or '.join(_KINDS[self.kind])} of two dimensions, all of one width"
                )
        if self.kind == "weight":
            if first.shape[1] != codec.NGRAM_SIZE:
                raise ValueError(f"{first.file}: rows of {self.name} have {first.shape[1]} elements, not 160")
            return
        try:
            codec.ngram_bits(first.shape)
        except ValueError as error:
            raise ValueError(f"{first.file}: {self.name}: {error}") from None
        missing = {"head_bias", *HASH_PARAMETERS} - self.parts.keys()
        if missing:
            raise ValueError(f"{first.file}: {self.name}.{min(missing)} is missing")
        offsets, bias = self.parts["head_offsets"], self.parts["head_bias"]
        if len(offsets.shape) != 1 or not offsets.shape[0] or not offsets.dtype.startswith(("I", "U")):
            raise ValueError(f"{offsets.file}: {self.name}.head_offsets must be integers, one for each head")
        heads = offsets.shape[0]
        if bias.dtype != "F16" or bias.shape != (heads, codec.NGRAM_SIZE):
            raise ValueError(f"{bias.file}: {self.name}.head_bias must be F16 [{heads}, {codec.NGRAM_SIZE}]")

    @cached_property
    def _bias(self) -> np.ndarray:
        return self.parts["head_bias"].array()

    @cached_property
    def _offsets(self) -> np.ndarray:
        return self.parts["head_offsets"].array()

    def gather(self, ids: np.ndarray) -> np.ndarray:
        """Rows by number, ``[n]`` -> float32 ``[n, 160]``.

        Raises:
            ValueError: If there is no such row.
        """
        wrong = ids[(ids < 0) | (ids >= self.rows)]
        if len(wrong):
            raise ValueError(f"{self.name} has {self.rows} rows, and row {wrong[0]} was asked for")
        starts = np.cumsum([0, *(shard.shape[0] for shard in self.shards)])
        places = np.searchsorted(starts, ids, side="right") - 1
        stored = np.empty((len(ids), self.shards[0].shape[1]), np.uint16)
        reads = []
        for row, place, number in zip(stored, places.tolist(), (ids - starts[places]).tolist()):
            shard = self.shards[place]
            reads.append(Read(shard.file, shard.start + number * row.nbytes, row))
        read_all(reads)
        if self.kind == "weight":
            is_half = self.shards[0].dtype == "F16"
            return stored.view(np.float16).astype(np.float32) if is_half else _widened(stored)
        heads = np.clip(np.searchsorted(self._offsets, ids, side="right") - 1, 0, len(self._bias) - 1)
        return codec.decode_ngrams(stored, self._bias[heads]).astype(np.float32)


def _widened(halves: np.ndarray) -> np.ndarray:
    """float32 of bfloat16, which NumPy does not have."""
    return (halves.astype(np.uint32) << 16).view(np.float32)


def find_ngram_tables(tensors: dict[str, TensorInfo]) -> dict[str, NgramTable]:
    """The tables among the tensors of their file, checked.

    Raises:
        ValueError: If one is not what the format says; the message names file and tensor.
    """
    shards: dict[tuple[str, str], dict[int, TensorInfo]] = {}
    for name, info in tensors.items():
        match = _PART.fullmatch(name)
        if match:
            shards.setdefault((match["name"], match["kind"]), {})[int(match["shard"] or 0)] = info
    tables = {}
    for (name, kind), parts in shards.items():
        if max(parts) + 1 != len(parts):
            missing = next(i for i in range(len(parts)) if i not in parts)
            raise ValueError(f"{parts[max(parts)].file}: {name}.shard_{missing}.{kind} is missing")
        if name in tables:
            raise ValueError(f"{parts[0].file}: {name} has both .weight and .trellis")
        prefix = f"{name}."
        others = {key.removeprefix(prefix): info for key, info in tensors.items() if key.startswith(prefix)}
        tables[name] = NgramTable(name, kind, tuple(parts[i] for i in sorted(parts)), others)
        tables[name].check()
    return tables
