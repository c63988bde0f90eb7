"""Checkpoint directories: what kind they are, and single weights from them.

Every tensor is checked against the format when the directory is opened, from the headers alone. Unquantized tensors go
through ``mx.load``, which reads a tensor when it is evaluated.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Mapping
from pathlib import Path

import mlx.core as mx
import numpy as np

from ..storage.safetensors import TensorInfo, raw_header, read_header
from ..storage.untrusted import check_present, is_listed, parse_json, read_json
from ..weights.embedding import EmbeddingWeight
from ..weights.grid import GridWeight
from ..weights.trellis import TrellisWeight
from . import metal_marlin
from .embedding import QuantizedEmbedding, find_embeddings
from .exl3 import QUANTIZED_SUFFIXES, QuantizedLinear, check_markers
from .metal_marlin import GridEntry

INDEX_NAME = "model.safetensors.index.json"
"""The file that says which tensor is in which weight file."""

# One file, which has no index; mlx-lm and ExLlamaV3 look at no index at all.
_WHOLE = "model.safetensors"
# n-gram tables of ExLlamaV3 1.4.5 and later, which are in no index.
NGRAM_TABLES = "ngram_embedding.safetensors"
_SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.safetensors")
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
_QUANTIZED_NAME = re.compile(rb'\.(?:trellis|suh|svh|su|sv)"\s*:')


class Kind(enum.Enum):
    """What a directory holds."""

    EXL3 = "EXL3"
    METAL_MARLIN = "metal-marlin"
    PLAIN = "plain"
    """Neither: for mlx-lm to load, or nothing at all."""


def kind_of(directory: Path) -> Kind:
    """What a directory holds, damaged or not: by what config.json says, or by names that only EXL3's tensors have.

    What is wrong with an EXL3 directory is told by :class:`TrellisModelLoader`; no other loader must take it.
    """
    if (directory / metal_marlin.V3_INDEX).is_file() or any(directory.glob(metal_marlin.V2_INDEXES)):
        return Kind.METAL_MARLIN
    return Kind.EXL3 if _quantization(directory) or _names_trellis(directory) else Kind.PLAIN


def _quantization(directory: Path) -> dict:
    """The ``quantization_config`` of EXL3 in config.json; empty if that is missing, damaged or another's."""
    try:
        config = parse_json((directory / "config.json").read_bytes(), "config.json", finite=False)
    except (OSError, ValueError):
        return {}
    for part in (config, config.get("text_config")):
        quantization = part.get("quantization_config") if isinstance(part, dict) else None
        if isinstance(quantization, dict) and quantization.get("quant_method") == "exl3":
            return quantization
    return {}


def _version(directory: Path) -> str | None:
    version = _quantization(directory).get("version")
    return version if isinstance(version, str) else None


def _names_trellis(directory: Path) -> bool:
    index = directory / INDEX_NAME
    if index.is_file() and not _is_whole(directory) and _QUANTIZED_NAME.search(index.read_bytes()):
        return True
    return any(_QUANTIZED_NAME.search(raw_header(file)) for file in sorted(directory.glob("*.safetensors")))


def _is_whole(directory: Path) -> bool:
    """Whether one file holds the model, so that an index beside it can only be a stale one."""
    return [file.name for file in directory.glob("model*.safetensors")] == [_WHOLE]


def _weight_files(directory: Path) -> tuple[list[Path], dict[str, str] | None]:
    """The safetensors files of a directory and, where there is an index, its map from tensor to file name."""
    if not directory.is_dir():
        raise FileNotFoundError(
            f"{directory} is not a directory; give a directory with config.json and model*.safetensors"
        )
    index = directory / INDEX_NAME
    if _is_whole(directory) or not is_listed(index):
        files = sorted(directory.glob("model*.safetensors"))
        if not files:
            raise FileNotFoundError(f"{directory} holds no model*.safetensors")
        _check_shards(files)
        return files, None
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index} has no weight_map from tensor names to file names")
    first_tensor: dict[str, str] = {}
    for tensor, name in weight_map.items():
        if not isinstance(name, str):
            raise ValueError(
                f"{index}: tensor {tensor!r} is said to be in {name!r}, which is not a file of this directory"
            )
        first_tensor.setdefault(name, tensor)
    for name, tensor in first_tensor.items():
        if name != Path(name).name or "\0" in name or not name.endswith(".safetensors"):
            raise ValueError(
                f"{index}: tensor {tensor!r} is said to be in {name!r}, which is not a file of this directory"
            )
        try:
            check_present(directory / name)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{error}; {index.name} says that it holds {tensor!r}") from None
    return [directory / name for name in sorted(first_tensor)], weight_map


def _check_shards(files: list[Path]) -> None:
    """See that numbered files without an index are all there."""
    present = {file.name for file in files}
    for file in files:
        match = _SHARD.fullmatch(file.name)
        if match is None:
            continue
        for number in range(1, int(match[3]) + 1):
            name = f"{match[1]}-{number:05}-of-{match[3]}.safetensors"
            if name not in present:
                raise FileNotFoundError(f"{file.parent / name} is missing; {file.name} is one of {int(match[3])} files")


def read_tensors(directory: Path) -> dict[str, TensorInfo]:
    """Where each tensor of a directory lies: in the files that its index names, or in all of ``model*.safetensors``.

    Raises:
        FileNotFoundError: If the directory or one of its files is missing.
        ValueError: If a file is not what the format allows, two hold the same tensor, or the index is wrong.
    """
    files, weight_map = _weight_files(directory)
    tensors: dict[str, TensorInfo] = {}
    for file in files:
        for name, info in read_header(file).items():
            if name in tensors:
                raise ValueError(f"tensor {name!r} is both in {tensors[name].file} and in {file}")
            tensors[name] = info
    for name, file_name in (weight_map or {}).items():
        if name not in tensors or tensors[name].file.name != file_name:
            raise ValueError(f"{directory / file_name} does not hold tensor {name!r}, which {INDEX_NAME} says it does")
    return tensors


def lazy_arrays(tensors: Mapping[str, TensorInfo]) -> dict[str, mx.array]:
    """Tensors by name, each read when it is first evaluated."""
    arrays: dict[str, mx.array] = {}
    for file in sorted({info.file for info in tensors.values()}):
        loaded = mx.load(str(file), format="safetensors")
        assert isinstance(loaded, dict)  # as of every file of this format
        arrays.update({name: loaded[name] for name, info in tensors.items() if info.file == file})
    return arrays


class TrellisModelLoader:
    """Single weights of an EXL3 checkpoint, or of an older metal-marlin directory, without a model.

    Args:
        model_dir: Directory with ``model*.safetensors`` and, where there are several, their index; or of the
            metal-marlin format (v2 or v3), whose weights are :class:`GridWeight`.

    Raises:
        FileNotFoundError: If the directory or one of its files is missing.
        ValueError: If a file or a quantized tensor is not what the format allows; the message names both.

    Attributes:
        directory: The directory.
        kind: What it holds.
        version: Of the ExLlamaV3 that wrote it, as config.json says, or ``None``.
        quantized: The :class:`QuantizedLinear` (or :class:`GridEntry`) of each quantized linear, by name.
        embeddings: The :class:`QuantizedEmbedding` of each quantized token embedding, by name.
        unquantized: Where all other tensors lie, by name.
        tables: Where the tensors of n-gram tables lie, by name.
    """

    def __init__(self, model_dir: str | Path):
        self.directory = Path(model_dir)
        self.kind, self.version = kind_of(self.directory), _version(self.directory)
        self.quantized: dict[str, QuantizedLinear | GridEntry] = {}
        self.unquantized: dict[str, TensorInfo] = {}
        self.embeddings: dict[str, QuantizedEmbedding] = {}
        self.tables: dict[str, TensorInfo] = {}
        if self.kind is Kind.METAL_MARLIN:
            entries = metal_marlin.read_directory(self.directory)
            self.quantized = {name: entries[name] for name in sorted(entries, key=_natural_key)}
            return
        tensors = read_tensors(self.directory)
        self.embeddings = find_embeddings(tensors)
        used = {f"{e.name}.{suffix}" for e in self.embeddings.values() for suffix in e.parts}
        suffixes = (*QUANTIZED_SUFFIXES, "bias", "scale")
        parts: dict[str, dict[str, TensorInfo]] = {}
        names = set()
        for name, info in tensors.items():
            stem, _, suffix = name.rpartition(".")
            if suffix in suffixes:
                parts.setdefault(stem, {})[suffix] = info
                if suffix in QUANTIZED_SUFFIXES and name not in used:
                    names.add(stem)
        for name in sorted(names, key=_natural_key):
            found = parts[name]
            linear = QuantizedLinear(name, {suffix: found[suffix] for suffix in suffixes if suffix in found})
            linear.check()
            if f"{name}.weight" in tensors:
                raise ValueError(f"{tensors[name + '.weight'].file}: {name} has both .weight and .trellis")
            used.update(f"{name}.{suffix}" for suffix in linear.parts)
            self.quantized[name] = linear
        self.unquantized = {name: info for name, info in tensors.items() if name not in used}
        check_markers(self.linears.values())
        if is_listed(self.directory / NGRAM_TABLES):
            self.tables = read_header(self.directory / NGRAM_TABLES)

    @property
    def linears(self) -> dict[str, QuantizedLinear]:
        """The EXL3 linears by name: all that are quantized, or none in a metal-marlin directory."""
        return {name: entry for name, entry in self.quantized.items() if isinstance(entry, QuantizedLinear)}

    @property
    def names(self) -> list[str]:
        """Names of the quantized linears, layers and experts in numerical order."""
        return list(self.quantized)

    def load_weight(
        self, name: str, *, in_features: int | None = None, out_features: int | None = None
    ) -> TrellisWeight | GridWeight | EmbeddingWeight:
        """One weight: of a linear, or a token embedding.

        Args:
            name: Its name; a leading ``"model."`` may be left out.
            in_features: Logical number of inputs, which the files do not record. Default: the padded one. Of an
                embedding, its rows.
            out_features: Logical number of outputs. Default: the padded one. Of an embedding, the elements of a row.

        Raises:
            KeyError: If no quantized linear or embedding has this name.
            ValueError: If its sizes cannot be these.
        """
        name = str(name).removesuffix(".weight")
        embedding = self.embeddings.get(name) or self.embeddings.get(f"model.{name}")
        if embedding is not None:
            if in_features not in (None, embedding.rows):
                raise ValueError(f"{embedding.name}: in_features, its rows, is {embedding.rows}, not {in_features}")
            return embedding.load(out_features)
        linear = self.quantized.get(name) or self.quantized.get(f"model.{name}")
        if linear is None:
            raise KeyError(
                f"{self.directory} has no quantized linear {name!r}; see .names and .embeddings for what it has"
            )
        return linear.load(in_features=in_features, out_features=out_features)

    def load_layer(self, i: int) -> dict[str, TrellisWeight | GridWeight]:
        """The weights of one layer, by their names inside the layer, such as ``"self_attn.q_proj"``.

        Raises:
            KeyError: If the layer has no quantized linear.
            ValueError: If i is not an integer.
        """
        if not isinstance(i, (int, np.integer)):
            raise ValueError(f"layers are counted with integers, got {i!r}")
        layer: dict[str, TrellisWeight | GridWeight] = {}
        for name, linear in self.quantized.items():
            match = _LAYER.search(name)
            if match and int(match[1]) == i:
                inner = name[match.end() :]
                layer[name if inner in layer else inner] = linear.load()  # two towers may share layer numbers
        if not layer:
            raise KeyError(f"{self.directory} has no quantized linear in layer {i}")
        return layer

    def load_unquantized(self) -> dict[str, mx.array]:
        """All other tensors, lazily: each is read when it is first evaluated."""
        return lazy_arrays(self.unquantized)


def _natural_key(name: str) -> list:
    """Sort key that puts layer 10 after layer 9."""
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in name.split(".")]
