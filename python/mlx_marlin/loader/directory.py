"""Checkpoint directories: what kind they are, and single weights from them.

Every tensor is checked against the format when the directory is opened, from the headers alone. Unquantized tensors go
through ``mx.load``, which reads a tensor when it is evaluated.
"""

from __future__ import annotations

import re
from pathlib import Path

import mlx.core as mx
import numpy as np

from ..storage.safetensors import TensorInfo, parse_json, raw_header, read_header
from ..weights.grid import GridWeight
from ..weights.trellis import TrellisWeight
from . import metal_marlin
from .exl3 import QUANTIZED_SUFFIXES, QuantizedLinear
from .metal_marlin import GridEntry

INDEX_NAME = "model.safetensors.index.json"
"""The file that says which tensor is in which weight file."""

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
_QUANTIZED_NAME = re.compile(rb'\.(?:trellis|suh|svh|su|sv)"\s*:')


def names_trellis(directory: Path) -> bool:
    """Whether the index or a weight file of a directory names a tensor that only EXL3 has.

    Looks for names in the raw bytes, however damaged the rest is: what is wrong with an EXL3 directory is told by
    :class:`TrellisModelLoader`, and no other loader must take it.
    """
    index = directory / INDEX_NAME
    if index.is_file() and _QUANTIZED_NAME.search(index.read_bytes()):
        return True
    return any(_QUANTIZED_NAME.search(raw_header(file)) for file in sorted(directory.glob("*.safetensors")))


def _weight_files(directory: Path) -> tuple[list[Path], dict[str, str] | None]:
    """The safetensors files of a directory and, where there is an index, its map from tensor to file name."""
    if not directory.is_dir():
        raise FileNotFoundError(
            f"{directory} is not a directory; give a directory with config.json and model*.safetensors"
        )
    index = directory / INDEX_NAME
    if not index.exists():
        files = sorted(directory.glob("model*.safetensors"))
        if not files:
            raise FileNotFoundError(f"{directory} holds no model*.safetensors")
        return files, None
    weight_map = parse_json(index.read_bytes(), str(index)).get("weight_map")
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
        if not (directory / name).is_file():
            raise FileNotFoundError(f"{directory / name} is missing; {index.name} says that it holds {tensor!r}")
    return [directory / name for name in sorted(first_tensor)], weight_map


def _read_tensors(directory: Path) -> dict[str, TensorInfo]:
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
        quantized: The :class:`QuantizedLinear` (or :class:`GridEntry`) of each quantized linear, by name.
        unquantized: Names of all other tensors.
    """

    def __init__(self, model_dir: str | Path):
        self.directory = Path(model_dir)
        self.quantized: dict[str, QuantizedLinear | GridEntry] = {}
        self.unquantized: dict[str, TensorInfo] = {}
        if metal_marlin.is_grid_directory(self.directory):
            entries = metal_marlin.read_directory(self.directory)
            self.quantized = {name: entries[name] for name in sorted(entries, key=_natural_key)}
            return
        tensors = _read_tensors(self.directory)
        names = {name.rpartition(".")[0] for name in tensors if name.rpartition(".")[2] in QUANTIZED_SUFFIXES}
        used: set[str] = set()
        for name in sorted(names, key=_natural_key):
            suffixes = (*QUANTIZED_SUFFIXES, "bias", "scale")
            linear = QuantizedLinear(name, {s: tensors[f"{name}.{s}"] for s in suffixes if f"{name}.{s}" in tensors})
            linear.check()
            if f"{name}.weight" in tensors:
                raise ValueError(f"{tensors[name + '.weight'].file}: {name} has both .weight and .trellis")
            used.update(f"{name}.{suffix}" for suffix in linear.parts)
            self.quantized[name] = linear
        self.unquantized = {name: info for name, info in tensors.items() if name not in used}

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
    ) -> TrellisWeight | GridWeight:
        """One weight.

        Args:
            name: Its name; a leading ``"model."`` may be left out.
            in_features: Logical number of inputs, which the files do not record. Default: the padded one.
            out_features: Logical number of outputs. Default: the padded one.

        Raises:
            KeyError: If no quantized linear has this name.
        """
        name = str(name).removesuffix(".weight")
        linear = self.quantized.get(name) or self.quantized.get(f"model.{name}")
        if linear is None:
            raise KeyError(f"{self.directory} has no quantized linear {name!r}; see .names for those that it has")
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
        arrays: dict[str, mx.array] = {}
        for file in sorted({info.file for info in self.unquantized.values()}):
            loaded = mx.load(str(file), format="safetensors")
            assert isinstance(loaded, dict)  # as of every file of this format
            arrays.update({name: loaded[name] for name, info in self.unquantized.items() if info.file == file})
        return arrays


def _natural_key(name: str) -> list:
    """Sort key that puts layer 10 after layer 9."""
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in name.split(".")]
