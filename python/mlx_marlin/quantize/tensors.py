"""Writing safetensors files: one tensor at a time, beside the target and then renamed."""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..storage.safetensors import ITEM_BYTES, NUMPY_DTYPES, TensorInfo

_NAMES = {np.dtype(np.float16): "F16", np.dtype(np.int16): "I16", np.dtype(np.int32): "I32"}


@dataclass(frozen=True)
class Tensor:
    """A tensor to be written: dtype as safetensors names it, and its little-endian bytes."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes

    @classmethod
    def of(cls, array: np.ndarray) -> Tensor:
        return cls(_NAMES[array.dtype], array.shape, array.tobytes())


def read_bytes(info: TensorInfo) -> bytes:
    """A stored tensor's bytes.

    Raises:
        ValueError: If the file ends early.
        OSError: If it cannot be read.
    """
    with open(info.file, "rb") as f:
        f.seek(info.start)
        data = f.read(info.nbytes)
    if len(data) != info.nbytes:
        raise ValueError(f"{info.file} ends early: {info.nbytes} bytes wanted at {info.start}, {len(data)} there")
    return data


def read_values(name: str, info: TensorInfo) -> np.ndarray:
    """A stored tensor's values: float32 for BF16, the stored dtype otherwise."""
    if info.dtype not in ("F16", "BF16", "F32"):
        raise ValueError(f"{info.file}: {name} is {info.dtype}; fp16, bf16 or fp32 is wanted")
    values = np.frombuffer(read_bytes(info), NUMPY_DTYPES[info.dtype]).reshape(info.shape)
    return (values.astype(np.uint32) << 16).view(np.float32) if info.dtype == "BF16" else values


def write_file(path: Path, entries: Iterable[tuple[str, str, tuple[int, ...]]], data: Iterator) -> None:
    """Write tensors in the given order, beside the target and then renamed.

    Args:
        path: The file.
        entries: ``(name, dtype, shape)`` of each tensor.
        data: Their bytes, in the same order; taken one at a time.
    """
    header: dict = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, dtype, shape in entries:
        size = math.prod(shape) * ITEM_BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with beside(path) as f:
        f.write(struct.pack("<Q", len(text)))
        f.write(text)
        for part in data:
            f.write(part)
        if f.tell() != 8 + len(text) + offset:
            raise ValueError(f"{path}: the data do not have the sizes of the header")


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write tensors by ascending name, beside and renamed."""
    names = sorted(tensors)
    write_file(path, [(n, tensors[n].dtype, tensors[n].shape) for n in names], (tensors[n].data for n in names))


class beside:
    """Context manager: a file that takes its name only when it is whole and on the disk."""

    def __init__(self, path: Path):
        self.path, self.partial = path, path.with_name(path.name + ".partial")

    def __enter__(self):
        self.file = open(self.partial, "wb")
        return self.file

    def __exit__(self, kind, value, traceback):
        try:
            if kind is None:
                self.file.flush()
                os.fsync(self.file.fileno())
                self.file.close()
                os.replace(self.partial, self.path)
        finally:
            try:
                self.file.close()  # on a full disk this fails once more
            finally:
                self.partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write text, beside and renamed."""
    with beside(path) as f:
        f.write(text.encode())


def write_array(path: Path, arrays: list[np.ndarray]) -> None:
    """Write arrays to an ``.npz``, beside and renamed."""
    with beside(path) as f:
        np.savez(f, *arrays)
