"""Calls of the process that runs threadgroups (server.py)."""

from __future__ import annotations

import atexit
import ctypes
import functools
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from .server import ADDRESS, SIZE, map_shared
from .toolchain import HERE, runtime

_PAGE = 4096
# Between any two pieces of memory: who runs off the end of one does not arrive in the next.
_GAP = 1 << 24


class Server:
    """The process and the memory that it shares with this one."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._file = os.memfd_create("metal_sim")
        self._next = ADDRESS
        os.ftruncate(self._file, SIZE)
        map_shared(self._file)
        command = [sys.executable, "-I", "-S", str(HERE / "server.py"), str(runtime()), str(self._file)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, pass_fds=[self._file]
        )
        atexit.register(self._process.communicate)

    @contextmanager
    def memory(self) -> Iterator[None]:
        """For one dispatch at a time; what is placed within is gone afterwards."""
        with self._lock:
            try:
                yield
            finally:
                os.ftruncate(self._file, 0)
                os.ftruncate(self._file, SIZE)
                self._next = ADDRESS

    def zeros(self, size: int) -> int:
        """The address of so many bytes."""
        address = self._next
        self._next += -(-size // _PAGE) * _PAGE + _GAP
        if self._next > ADDRESS + SIZE:
            raise MemoryError(f"the buffers of a dispatch take more than the simulator's {SIZE >> 30} GB")
        return address

    def place(self, values: np.ndarray | ctypes.Array | ctypes.Structure) -> int:
        """The address of a copy."""
        is_array = isinstance(values, np.ndarray)
        size = values.nbytes if is_array else ctypes.sizeof(values)
        address = self.zeros(size)
        mapped = values
        while isinstance(mapped, np.ndarray) and not isinstance(mapped, np.memmap):
            mapped = mapped.base
        if isinstance(mapped, np.memmap):
            _read(mapped, values, address)
        else:
            ctypes.memmove(address, values.ctypes.data if is_array else ctypes.addressof(values), size)
        return address

    def load(self, library: Path) -> None:
        """Load kernels.

        Raises:
            OSError: As the dynamic linker says.
        """
        if error := self._ask(str(library)):
            raise OSError(error)

    def run(self, library: Path, symbol: str, job: int) -> int:
        """Run a dispatch whose :class:`~metal_sim.server.Job` has this address. Returns the runtime's status."""
        return self._ask(str(library), symbol, job)

    def _ask(self, *what):
        with self._lock:
            print(json.dumps(what), file=self._process.stdin, flush=True)
            answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the simulator's process ended with status {self._process.wait()}")
        return json.loads(answer)


def _read(mapped: np.memmap, values: np.ndarray, address: int) -> None:
    """Copy a part of a mapped file where the file has data: of one of 16 GB that may be a few pages."""
    mapped.flush()
    start = mapped.offset + values.ctypes.data - mapped.ctypes.data
    with open(mapped.filename, "rb", buffering=0) as file:
        at, end = start, start + values.nbytes
        while at < end:
            try:
                at = os.lseek(file.fileno(), at, os.SEEK_DATA)
            except OSError:  # there is no more
                return
            hole = min(end, os.lseek(file.fileno(), at, os.SEEK_HOLE))
            if at < hole:
                piece = (ctypes.c_char * (hole - at)).from_address(address + at - start)
                file.seek(at)
                assert file.readinto(piece) == hole - at
            at = hole


@functools.cache
def server() -> Server:
    """Of this process."""
    return Server()
