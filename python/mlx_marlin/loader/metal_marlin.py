"""Directories of the older "metal-marlin" format: v2 layer folders and v3 shards."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..storage.safetensors import NUMPY_DTYPES, TensorInfo, read_header
from ..storage.untrusted import read_json
from ..weights.grid import GridWeight

_PARTS = ("indices", "scales", "su", "sv")
V3_INDEX, V2_INDEXES = "quantization_index.json", "layer_*/index.json"
_WEIGHT = ".weight"


@dataclass(frozen=True)
class GridEntry:
    """Where one weight's tensors lie.

    Attributes:
        name: Its name, without ``.weight``.
        bits: As the index says.
        shape: ``(out_features, in_features)``.
        parts: indices, scales, su and sv.
    """

    name: str
    bits: int
    shape: tuple[int, int]
    parts: dict[str, TensorInfo]

    def load(self, *, in_features: int | None = None, out_features: int | None = None) -> GridWeight:
        """The weight.

        Args:
            in_features: Checked against the index, which records the logical sizes. Default: ``None``.
            out_features: The same.

        Raises:
            ValueError: If its tensors contradict each other or the index.
        """
        for what, given, stored in (("out", out_features, self.shape[0]), ("in", in_features, self.shape[1])):
            if given not in (None, stored):
                raise ValueError(f"{self.name}: {what}_features is {stored}, not {given}")
        try:
            arrays = {part: _read(info) for part, info in self.parts.items()}
            weight = GridWeight(**arrays, shape=self.shape)
        except ValueError as error:
            raise ValueError(f"{self.parts['indices'].file}: {self.name}: {error}") from None
        if weight.bits != self.bits:
            raise ValueError(f"{self.name}: the index says {self.bits} bits, the tensor's header byte {weight.bits}")
        return weight


def _read(info: TensorInfo) -> np.ndarray:
    if info.dtype not in ("U8", "F32"):
        raise ValueError(f"a tensor is {info.dtype}; U8 indices and F32 scales are wanted")
    return np.frombuffer(info.read(), NUMPY_DTYPES[info.dtype]).reshape(info.shape)


def read_directory(directory: Path) -> dict[str, GridEntry]:
    """The weights of a directory, by name.

    Args:
        directory: With ``layer_0000/index.json`` and ``tensor_*`` or ``batch_*.safetensors`` (v2), or with
            ``quantization_index.json`` and shards (v3).

    Raises:
        FileNotFoundError: If a layer has no tensor files.
        ValueError: If an index or a file is damaged, or a tensor is missing.
    """
    if (directory / V3_INDEX).is_file():
        return _entries(directory / V3_INDEX, "layers", sorted(directory.glob("*.safetensors")))
    entries: dict[str, GridEntry] = {}
    for index in sorted(directory.glob(V2_INDEXES)):
        files = sorted(index.parent.glob("tensor_*.safetensors")) or sorted(index.parent.glob("batch_*.safetensors"))
        if not files:
            raise FileNotFoundError(f"{index.parent} holds neither tensor_*.safetensors nor batch_*.safetensors")
        entries.update(_entries(index, "tensors", files))
    return entries


def _entries(index: Path, key: str, files: list[Path]) -> dict[str, GridEntry]:
    listed = read_json(index, finite=False).get(key)
    if not isinstance(listed, list):
        raise ValueError(f"{index} has no list {key!r}")
    tensors: dict[str, TensorInfo] = {}
    for file in files:
        tensors.update(read_header(file))
    entries = {}
    for item in listed:
        entry = _entry(index, item, tensors)
        entries[entry.name] = entry
    return entries


def _entry(index: Path, item: object, tensors: dict[str, TensorInfo]) -> GridEntry:
    if not isinstance(item, dict) or not {"name", "bits", "shape"} <= item.keys():
        raise ValueError(f"{index}: every entry needs name, bits and shape, got {item!r}")
    name, bits, shape = item["name"], item["bits"], item["shape"]
    sizes = isinstance(shape, list) and len(shape) == 2 and all(type(n) is int and n > 0 for n in shape)
    if not isinstance(name, str) or type(bits) is not int or not sizes:
        raise ValueError(f"{index}: entry {name!r} has bits {bits!r} and shape {shape!r}; [out, in] is wanted")
    parts = {}
    for part in _PARTS:
        # The code writes the first spelling, the format's document the second.
        spellings = (f"{name.replace('.', '__')}__{part}", f"{name}.{part}")
        found = [tensors[s] for s in spellings if s in tensors]
        if not found:
            raise ValueError(f"{index} lists {name!r}, but no file holds {spellings[0]!r}")
        parts[part] = found[0]
    return GridEntry(name.removesuffix(_WEIGHT), bits, tuple(shape), parts)
