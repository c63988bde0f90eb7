"""Safetensors files: untrusted ones read, whole ones written.

The format: eight bytes with the length of a JSON header, the header (``{name: {dtype, shape,
data_offsets}}``), then the data that the offsets point into. Every number of a header is checked before it is used.
This module imports NumPy only.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from . import atomic
from .reads import Read, Widen, read_all
from .untrusted import check_genuine, parse_json

# The header limit of the reference implementation (safetensors/src/tensor.rs, MAX_HEADER_SIZE).
MAX_HEADER_BYTES = 100_000_000
# MLX keeps dimensions as int32.
MAX_DIMENSION = 2**31 - 1

# Item size in bytes of the dtypes that both MLX and this package read. Unsigned 64-bit is left out on
# purpose: no checkpoint uses it, and the placeholders of quantized weights are made of it.
ITEM_BYTES = {
    "BOOL": 1, "I8": 1, "U8": 1, "F8_E4M3": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4, "I64": 8,
}  # fmt: skip
# What their values are in NumPy. It has neither bfloat16 nor float8: those come as their bit patterns.
NUMPY_DTYPES = {
    "BOOL": "?", "I8": "i1", "U8": "u1", "F8_E4M3": "u1", "I16": "<i2", "U16": "<u2", "F16": "<f2", "BF16": "<u2",
    "I32": "<i4", "U32": "<u4", "F32": "<f4", "I64": "<i8",
}  # fmt: skip
FLOATS = ("F16", "BF16", "F32")
"""The dtypes whose numbers are a tensor's values: those of 8 bits are codes, which scales multiply."""
DTYPE_NAMES = {np.dtype(dtype): name for name, dtype in NUMPY_DTYPES.items() if name not in ("BF16", "F8_E4M3")}
"""The format's names of NumPy's dtypes."""


class TensorInfo(NamedTuple):
    """Where a tensor lies.

    Attributes:
        file: The safetensors file.
        dtype: The format's name of the dtype, a key of :data:`ITEM_BYTES`.
        shape: Dimensions.
        start: First byte, from the beginning of the file.
        nbytes: Size in bytes.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int

    def array(self) -> np.ndarray:
        """The tensor in the dtype of :data:`NUMPY_DTYPES`; see :meth:`rows`."""
        values = np.empty(self.shape, NUMPY_DTYPES[self.dtype])
        read_all([Read(self.file, self.start, values)])
        return values

    def into(self, values: np.ndarray, widen: Widen | None = None) -> Read:
        """What reads the tensor into an array of its size.

        Args:
            values: The array, contiguous.
            widen: Of a tensor of halves into float32: what makes the one of the other. Default: ``None``, nothing.

        Raises:
            ValueError: If the array has another size.
        """
        nbytes = values.nbytes if widen is None else values.nbytes // 2
        if nbytes != self.nbytes:
            raise ValueError(f"{self.file}: {self.nbytes} bytes of a tensor do not fit into {values.nbytes}")
        return Read(self.file, self.start, values, widen)

    def rows(self, first: int, stop: int) -> np.ndarray:
        """A range along the first axis, of which alone the bytes are read.

        Raises:
            ValueError: If the file ends early.
            OSError: If it cannot be read.
        """
        values = np.empty((stop - first, *self.shape[1:]), NUMPY_DTYPES[self.dtype])
        read_all([Read(self.file, self.start + first * (self.nbytes // max(1, self.shape[0])), values)])
        return values

    def read(self) -> bytes:
        """The tensor's bytes.

        Raises:
            ValueError: If the file ends early.
            OSError: If it cannot be read.
        """
        with open(self.file, "rb") as stream:
            stream.seek(self.start)
            data = stream.read(self.nbytes)
        if len(data) != self.nbytes:
            raise ValueError(f"{self.file} ends early: {self.nbytes} bytes wanted at {self.start}, {len(data)} there")
        return data

    def floats(self) -> np.ndarray:
        """The values of a floating-point tensor: float32 for BF16, the stored dtype otherwise.

        Raises:
            ValueError: If the tensor is not F16, BF16 or F32, or the file ends early.
        """
        if self.dtype not in FLOATS:
            raise ValueError(f"{self.file}: a tensor is {self.dtype}; F16, BF16 or F32 is wanted")
        return widened(self.array(), self.dtype)


def widened(values: np.ndarray, dtype: str) -> np.ndarray:
    """Values as NumPy has them: those of BF16, stored as words, become float32; others stay."""
    return (values.astype(np.uint32) << 16).view(np.float32) if dtype == "BF16" else values


@dataclass(frozen=True)
class Tensor:
    """A tensor to be written: dtype as safetensors names it, and its little-endian bytes."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes

    @classmethod
    def of(cls, array: np.ndarray) -> Tensor:
        """From an array of any dtype of :data:`NUMPY_DTYPES`."""
        return cls(DTYPE_NAMES[array.dtype], array.shape, array.tobytes())


# Headers of models have a hundred thousand entries: the checks of each are plain loops.


def _are_sizes(values: object, limit: float = math.inf) -> bool:
    return isinstance(values, list) and not [v for v in values if type(v) is not int or not 0 <= v <= limit]


def _read_entry(file: Path, name: str, entry: object, data_start: int, data_bytes: int) -> TensorInfo:
    def wrong(what: str) -> ValueError:
        return ValueError(f"{file}: tensor {name!r} {what}")

    if not name.isascii() and any("\ud800" <= letter <= "\udfff" for letter in name):
        raise wrong("has half of a surrogate pair in its name, which UTF-8 cannot hold")
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise wrong("needs dtype, shape and data_offsets in the header")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise wrong(f"has dtype {dtype!r}; supported are {', '.join(ITEM_BYTES)}")
    if not _are_sizes(shape, MAX_DIMENSION):
        raise wrong(f"has shape {shape!r}; dimensions must be integers from 0 to {MAX_DIMENSION}")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise wrong(f"has data_offsets {offsets!r}; wanted are two integers from 0 up")
    begin, end = offsets
    nbytes = math.prod(shape) * ITEM_BYTES[dtype]
    if end - begin != nbytes:
        raise wrong(f"is {dtype} {shape}, which is {nbytes} bytes, but its data_offsets span {end - begin}")
    if end > data_bytes:
        raise wrong(f"ends at byte {end} of the data, but the file holds {data_bytes} bytes of data: it is truncated")
    return TensorInfo(file, dtype, tuple(shape), data_start + begin, nbytes)


def _check_overlap(file: Path, tensors: dict[str, TensorInfo]) -> None:
    occupied = sorted((t.start, t.start + t.nbytes, name) for name, t in tensors.items() if t.nbytes)
    for (_, end, name), (start, _, other) in zip(occupied, occupied[1:]):
        if start < end:
            raise ValueError(f"{file}: tensors {name!r} and {other!r} overlap in the file")


def raw_header(file: Path) -> bytes:
    """The bytes of a file's header, as many as there are and can be read; nothing about them is checked."""
    try:
        with open(file, "rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            return stream.read(min(length, MAX_HEADER_BYTES))
    except OSError:
        return b""


def read_header(file: Path) -> dict[str, TensorInfo]:
    """The tensors of a safetensors file, by name.

    Args:
        file: The file.

    Raises:
        FileNotFoundError: If there is no such file, or it is a link that leads nowhere.
        ValueError: If the file is something else, or the header is not one that the format allows, or does not fit
            the size of the file.
    """
    check_genuine(file)
    size = file.stat().st_size
    with open(file, "rb") as stream:
        prefix = stream.read(8)
        if len(prefix) < 8:
            raise ValueError(f"{file} has {size} bytes; a safetensors file begins with 8 bytes of header length")
        (length,) = struct.unpack("<Q", prefix)
        if length > MAX_HEADER_BYTES:
            raise ValueError(f"{file} announces a header of {length} bytes; the limit is {MAX_HEADER_BYTES}")
        if length > size - 8:
            raise ValueError(f"{file} announces a header of {length} bytes but holds {size - 8}: it is truncated")
        header = parse_json(stream.read(length), f"the header of {file}")
    metadata = header.pop("__metadata__", None)
    if metadata is not None and not (isinstance(metadata, dict) and all(isinstance(v, str) for v in metadata.values())):
        raise ValueError(f"{file}: __metadata__ must map names to strings")
    tensors = {name: _read_entry(file, name, entry, 8 + length, size - 8 - length) for name, entry in header.items()}
    _check_overlap(file, tensors)
    return tensors


class Writer(Protocol):
    """What is written to: a binary file, or what stands in front of one."""

    def write(self, data: bytes, /) -> object:
        """Write all of it."""


def write_into(
    file: Writer, path: Path, entries: Iterable[tuple[str, str, tuple[int, ...]]], data: Iterable[bytes]
) -> None:
    """Write tensors in the given order.

    Args:
        file: Where to.
        path: Its name, for error messages.
        entries: ``(name, dtype, shape)`` of each tensor.
        data: Their bytes, in the same order; taken one at a time.

    Raises:
        ValueError: If the bytes of a tensor are not as many as its entry says.
        OSError: If the file cannot be written.
    """
    entries = list(entries)
    header: dict = {"__metadata__": {"format": "pt"}}  # as mlx-lm's and transformers' loaders expect
    offset = 0
    for name, dtype, shape in entries:
        size = math.prod(shape) * ITEM_BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    file.write(struct.pack("<Q", len(text)))
    file.write(text)
    for (name, _, _), part in zip(entries, data, strict=True):
        begin, end = header[name]["data_offsets"]
        if len(part) != end - begin:
            raise ValueError(f"{path}: {name} is {end - begin} bytes by its entry, {len(part)} bytes were given")
        file.write(part)


def write(path: Path, entries: Iterable[tuple[str, str, tuple[int, ...]]], data: Iterable[bytes]) -> None:
    """Write a file whole or not at all; see :func:`write_into`."""
    with atomic.writing(path) as file:
        write_into(file, path, entries, data)


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write tensors by ascending name; see :func:`write`."""
    names = sorted(tensors)
    write(path, [(n, tensors[n].dtype, tensors[n].shape) for n in names], (tensors[n].data for n in names))
