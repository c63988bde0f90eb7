"""EXL3 checkpoint directories: which linears they hold, and single weights from them.

Quantized tensors are copied out of a memory map, so that taking a slice reads only its bytes. The
unquantized ones go through ``mx.load``, which reads a tensor when it is evaluated. Every tensor is checked
against the format when the directory is opened, from the headers alone.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from . import codec, metal_marlin
from .grid import GridWeight
from .safetensors import TensorInfo, parse_json, raw_header, read_header
from .weights import TrellisWeight

INDEX_NAME = "model.safetensors.index.json"
# Suffixes that only a quantized linear has. A bias belongs to it too, but other modules also have one.
_QUANTIZED_SUFFIXES = ("trellis", "suh", "svh", "su", "sv", "mcg", "mul1")
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


@dataclass(frozen=True)
class QuantizedLinear:
    """One EXL3 linear of a checkpoint, known from the headers.

    Attributes:
        name: Its name in the checkpoint.
        parts: Its tensors by suffix: trellis, suh or su, svh or sv, and maybe mcg, mul1, bias.
    """

    name: str
    parts: dict[str, TensorInfo]

    @property
    def bits(self) -> int:
        return self.parts["trellis"].shape[2] // codec.TILE

    @property
    def codebook(self) -> str:
        """Told by which marker is present; its value is not looked at, as in ExLlamaV3."""
        return next((marker for marker in ("mcg", "mul1") if marker in self.parts), "3inst")

    @property
    def padded_shape(self) -> tuple[int, int]:
        """``(k, n)`` as stored: multiples of 128."""
        k_tiles, n_tiles, _ = self.parts["trellis"].shape
        return codec.TILE * k_tiles, codec.TILE * n_tiles

    def check(self) -> None:
        """Raise ValueError, naming file and tensor, unless the tensors are what the format says."""
        trellis = self.parts.get("trellis")
        if trellis is None:
            suffix, info = next(iter(self.parts.items()))
            raise ValueError(f"{info.file}: {self.name}.{suffix} is there, but {self.name}.trellis is missing")
        where = f"{trellis.file}: {self.name}"
        if "scale" in self.parts:
            raise ValueError(
                f"{where}.scale belongs to an early form of EXL3 that is not supported; convert the model again"
            )
        if "mcg" in self.parts and "mul1" in self.parts:
            raise ValueError(f"{where} has both .mcg and .mul1; a linear has one codebook")
        if trellis.dtype != "I16":
            raise ValueError(f"{where}.trellis must be I16, got {trellis.dtype}")
        try:
            codec.trellis_bits(trellis.shape)
        except ValueError as error:
            raise ValueError(f"{where}.trellis: {error}") from None
        k, n = self.padded_shape
        if not k or not n or k % codec.HADAMARD_SIZE or n % codec.HADAMARD_SIZE:
            raise ValueError(
                f"{where}.trellis {list(trellis.shape)} stands for a [{k}, {n}] matrix; both sizes must be positive "
                f"multiples of {codec.HADAMARD_SIZE}"
            )
        self._check_scales(where, ("suh", "su"), k)
        self._check_scales(where, ("svh", "sv"), n)
        for suffix in ("mcg", "mul1"):
            if suffix in self.parts and (self.parts[suffix].dtype, self.parts[suffix].shape) != ("I32", ()):
                part = self.parts[suffix]
                raise ValueError(
                    f"{where}.{suffix} must be I32 without dimensions, got {part.dtype} {list(part.shape)}"
                )
        bias = self.parts.get("bias")
        if bias is not None and (bias.dtype not in ("F16", "BF16", "F32") or bias.shape != (n,)):
            raise ValueError(f"{where}.bias must be floating point of shape [{n}], got {bias.dtype} {list(bias.shape)}")

    def _check_scales(self, where: str, suffixes: tuple[str, str], size: int) -> None:
        full, packed = suffixes
        wanted = {full: ("F16", (size,)), packed: ("I16", (size // 16,))}
        present = [suffix for suffix in suffixes if suffix in self.parts]
        if len(present) != 1:
            raise ValueError(f"{where} needs either .{full} or .{packed}, got {' and '.join(present) or 'neither'}")
        part = self.parts[present[0]]
        dtype, shape = wanted[present[0]]
        if (part.dtype, part.shape) != (dtype, shape):
            raise ValueError(f"{where}.{present[0]} must be {dtype} {list(shape)}, got {part.dtype} {list(part.shape)}")

    def load(
        self,
        rows: Sequence[int] | None = None,
        columns: Sequence[int] | None = None,
        in_features: int | None = None,
        out_features: int | None = None,
    ) -> TrellisWeight:
        """Read the weight, or some of its 128-blocks.

        Args:
            rows: Blocks of 128 inputs to keep, in this order. Default: all.
            columns: Blocks of 128 outputs to keep, in this order. Default: all.
            in_features: Logical number of inputs of the result. Default: the padded one.
            out_features: Logical number of outputs of the result. Default: the padded one.
        """
        trellis = self.parts["trellis"].map()
        tiles = codec.HADAMARD_SIZE // codec.TILE
        if rows is not None or columns is not None:
            blocks = trellis.reshape(trellis.shape[0] // tiles, tiles, trellis.shape[1] // tiles, tiles, -1)
            blocks = blocks if rows is None else blocks[list(rows)]
            blocks = blocks if columns is None else blocks[:, :, list(columns)]
            trellis = blocks.reshape(blocks.shape[0] * tiles, blocks.shape[2] * tiles, -1)
        k, n = self.padded_shape
        return TrellisWeight(
            mx.array(np.ascontiguousarray(trellis)),
            _take_blocks(self._scales("suh", "su"), k, rows),
            _take_blocks(self._scales("svh", "sv"), n, columns),
            self.codebook,
            bias=self.load_bias(columns),
            in_features=in_features,
            out_features=out_features,
        )

    def load_bias(self, columns: Sequence[int] | None = None) -> mx.array | None:
        """The bias, padded as stored, or blocks of 128 of it."""
        if "bias" not in self.parts:
            return None
        return _take_blocks(_read_floats(self.parts["bias"]), self.padded_shape[1], columns)

    def _scales(self, full: str, packed: str) -> mx.array:
        if full in self.parts:
            return _read_floats(self.parts[full])
        return mx.array(codec.unpack_signs(self.parts[packed].map()))


def _read_floats(info: TensorInfo) -> mx.array:
    values = mx.array(info.map())
    return values.view(mx.bfloat16) if info.dtype == "BF16" else values


def _take_blocks(values: mx.array, size: int, blocks: Sequence[int] | None) -> mx.array:
    if blocks is None:
        return values
    grouped = values.reshape(size // codec.HADAMARD_SIZE, codec.HADAMARD_SIZE)
    return grouped[mx.array(list(blocks))].reshape(-1)


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

    def __init__(self, model_dir):
        self.directory = Path(model_dir)
        if metal_marlin.is_grid_directory(self.directory):
            entries = metal_marlin.read_directory(self.directory)
            self.quantized = {name: entries[name] for name in sorted(entries, key=_natural_key)}
            self.unquantized = {}
            return
        tensors = _read_tensors(self.directory)
        names = {name.rpartition(".")[0] for name in tensors if name.rpartition(".")[2] in _QUANTIZED_SUFFIXES}
        self.quantized = {}
        used = set()
        for name in sorted(names, key=_natural_key):
            suffixes = (*_QUANTIZED_SUFFIXES, "bias", "scale")
            linear = QuantizedLinear(name, {s: tensors[f"{name}.{s}"] for s in suffixes if f"{name}.{s}" in tensors})
            linear.check()
            if f"{name}.weight" in tensors:
                raise ValueError(f"{tensors[name + '.weight'].file}: {name} has both .weight and .trellis")
            used.update(f"{name}.{suffix}" for suffix in linear.parts)
            self.quantized[name] = linear
        self.unquantized = {name: info for name, info in tensors.items() if name not in used}

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
        layer = {}
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
        arrays = {}
        for file in sorted({info.file for info in self.unquantized.values()}):
            loaded = mx.load(str(file), format="safetensors")
            arrays.update({name: loaded[name] for name, info in self.unquantized.items() if info.file == file})
        return arrays


def _natural_key(name: str) -> list:
    """Sort key that puts layer 10 after layer 9."""
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in name.split(".")]
