"""Reading safetensors files that nobody vouches for: every number in a header is checked before it is used.

The format: eight bytes with the length of a JSON header, the header (``{name: {dtype, shape,
data_offsets}}``), then the data that the offsets point into. This module imports NumPy only.
"""

from __future__ import annotations

import json
import math
import mmap
import struct
from pathlib import Path
from typing import NamedTuple

import numpy as np

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
NUMPY_DTYPES = {"I16": "<i2", "U16": "<u2", "F16": "<f2", "BF16": "<u2", "I32": "<i4", "F32": "<f4"}


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

    def map(self) -> np.ndarray:
        """The tensor as a read-only view of the file. BF16 comes as its uint16 bit patterns.

        Each tensor has a map of its own, so that its pages are given back with it.
        """
        dtype = NUMPY_DTYPES[self.dtype]
        if not self.nbytes:
            return np.zeros(self.shape, dtype)
        before = self.start % mmap.ALLOCATIONGRANULARITY
        with open(self.file, "rb") as stream:
            size = before + self.nbytes
            pages = mmap.mmap(stream.fileno(), size, access=mmap.ACCESS_READ, offset=self.start - before)
        return np.frombuffer(pages, dtype, math.prod(self.shape), before).reshape(self.shape)


def _reject_constant(value: str):
    raise ValueError(f"{value} is not JSON")


def _reject_duplicates(pairs: list[tuple[str, object]]) -> dict:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} appears twice")
    return entries


def parse_json(data: bytes | str, source: str, *, finite: bool = True) -> dict:
    """A JSON object from bytes that nobody vouches for.

    Args:
        data: The text.
        source: What it is, for error messages.
        finite: Refuse NaN and Infinity, which JSON does not have but Python writes. Default: ``True``.

    Raises:
        ValueError: If it is not a JSON object, nests too deeply, or has a key twice.
    """
    try:
        parse_constant = _reject_constant if finite else None
        value = json.loads(data, parse_constant=parse_constant, object_pairs_hook=_reject_duplicates)
    except RecursionError:
        raise ValueError(f"{source} nests too deeply to be read as JSON") from None
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise ValueError(f"{source} cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{source} must be a JSON object, got {type(value).__name__}")
    return value


def _is_size(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _read_entry(file: Path, name: str, entry, data_start: int, data_bytes: int) -> TensorInfo:
    def wrong(what: str) -> ValueError:
        return ValueError(f"{file}: tensor {name!r} {what}")

    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise wrong("needs dtype, shape and data_offsets in the header")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise wrong(f"has dtype {dtype!r}; supported are {', '.join(ITEM_BYTES)}")
    if not isinstance(shape, list) or not all(_is_size(d) and d <= MAX_DIMENSION for d in shape):
        raise wrong(f"has shape {shape!r}; dimensions must be integers from 0 to {MAX_DIMENSION}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_size, offsets)):
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
    """The bytes of a file's header, as many as there are; nothing about them is checked."""
    with open(file, "rb") as stream:
        prefix = stream.read(8)
        length = int.from_bytes(prefix, "little")
        return stream.read(min(length, MAX_HEADER_BYTES))


def read_header(file: Path) -> dict[str, TensorInfo]:
    """The tensors of a safetensors file, by name.

    Args:
        file: The file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the header is not one that the format allows, or does not fit the size of the file.
    """
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
