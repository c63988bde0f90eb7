"""What a conversion keeps on the disk rather than in memory: arrays in unnamed files, and tensors where they lie."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import overload

import numpy as np

from ..storage.reads import read_at
from ..storage.safetensors import NUMPY_DTYPES, Tensor, widened

States = Sequence[np.ndarray]
"""Hidden states, an array for each batch."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor that is read when it is wanted; see :class:`Tensor`.

    Attributes:
        dtype: The format's name of the dtype.
        shape: Dimensions.
        read: Returns its bytes.
    """

    dtype: str
    shape: tuple[int, ...]
    read: Callable[[], bytes]

    @property
    def data(self) -> bytes:
        return self.read()

    def floats(self) -> np.ndarray:
        """The values: float32 for BF16, the stored dtype otherwise."""
        return widened(np.frombuffer(self.read(), NUMPY_DTYPES[self.dtype]).reshape(self.shape), self.dtype)


class Spill:
    """A file without a name, which is gone with the last thing that refers to it, or with the process.

    Args:
        directory: On which disk. Default: that of temporary files.
    """

    def __init__(self, directory: Path | None = None):
        self._file = tempfile.TemporaryFile(dir=directory, buffering=0)
        self._lock = Lock()
        self._end = 0

    def add(self, data: bytes | memoryview) -> int:
        """Write bytes, or a contiguous array's, behind what is there; returns where they begin."""
        view = memoryview(data).cast("B")
        with self._lock:
            start = self._end
            self._end += len(view)
        written = 0
        while written < len(view):
            written += os.pwrite(self._file.fileno(), view[written:], start + written)
        return start

    def read_into(self, values: np.ndarray, start: int) -> None:
        """Fill a contiguous array with the bytes from ``start`` on."""
        view = memoryview(values.data).cast("B")
        if read_at(self._file.fileno(), start, view) < len(view):
            raise OSError(f"a file of {self._end} bytes for what does not fit into memory ends early")

    def tensor(self, tensor: Tensor) -> StoredTensor:
        """Write a tensor."""
        start, size = self.add(tensor.data), len(tensor.data)

        def read() -> bytes:
            values = np.empty(size, np.uint8)
            self.read_into(values, start)
            return values.tobytes()

        return StoredTensor(tensor.dtype, tensor.shape, read)


class StoredArrays(Sequence[np.ndarray]):
    """Arrays each of which is read when it is looked at.

    Args:
        readers: Returns one each.
    """

    def __init__(self, readers: Iterable[Callable[[], np.ndarray]] = ()):
        self._readers = list(readers)

    def __len__(self) -> int:
        return len(self._readers)

    @overload
    def __getitem__(self, index: int) -> np.ndarray: ...

    @overload
    def __getitem__(self, index: slice) -> StoredArrays: ...

    def __getitem__(self, index: int | slice) -> np.ndarray | StoredArrays:
        return StoredArrays(self._readers[index]) if isinstance(index, slice) else self._readers[index]()


class SpilledArrays(StoredArrays):
    """Arrays in an unnamed file.

    Args:
        directory: On which disk.
    """

    def __init__(self, directory: Path | None = None):
        super().__init__()
        self._spill = Spill(directory)

    def append(self, array: np.ndarray) -> None:
        """Write one more."""
        start, dtype, shape = self._spill.add(np.ascontiguousarray(array).data), array.dtype, array.shape

        def read() -> np.ndarray:
            values = np.empty(shape, dtype)
            self._spill.read_into(values, start)
            return values

        self._readers.append(read)


class SpilledRows:
    """The rows of a float32 matrix in an unnamed file.

    Args:
        directory: On which disk.
    """

    def __init__(self, directory: Path | None = None):
        self._spill = Spill(directory)
        self._width = self._count = 0

    def __len__(self) -> int:
        return self._count

    def append(self, rows: np.ndarray) -> None:
        """Write more, float32 ``[rows, width]``."""
        self._spill.add(np.ascontiguousarray(rows, np.float32).data)
        self._width = rows.shape[1]
        self._count += len(rows)

    def all(self) -> np.ndarray:
        """float32 ``[count, width]``."""
        values = np.empty((self._count, self._width), np.float32)
        self._spill.read_into(values, 0)
        return values

    def some(self, which: np.ndarray) -> np.ndarray:
        """Those of some indices, float32 ``[len(which), width]``."""
        values = np.empty((len(which), self._width), np.float32)
        for row, index in zip(values, which):
            self._spill.read_into(row, int(index) * values.strides[0])
        return values
