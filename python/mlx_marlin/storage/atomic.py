"""Files that are never seen half-written. Pure."""

from __future__ import annotations

import os
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

_RANDOM_BYTES = 8  # of a name that no other process writes to
_LEFTOVER = f".{2 * _RANDOM_BYTES * '[0-9a-f]'}.tmp"


def check_writable(path: Path) -> None:
    """Make the folder of a file, and see that a file can be made there.

    Raises:
        OSError: If not.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=path.parent):
        pass


@contextmanager
def writing(path: Path) -> Iterator[BinaryIO]:
    """A file that takes its name when the block ends, whole and on the disk: readers see the old one or the new one.

    Args:
        path: The file. Its folder is made if need be.

    Raises:
        OSError: If it cannot be written. As after any exception of the block, what was there stays, and nothing else.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Named before it exists: an interrupt may come at any moment, and nothing is to stay behind.
    beside = path.with_name(f"{path.name}.{secrets.token_hex(_RANDOM_BYTES)}.tmp")
    try:
        with open(beside, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes) -> None:
    """Write a whole file; see :func:`writing`."""
    with writing(path) as file:
        file.write(data)


def write_text(path: Path, text: str) -> None:
    """Write a whole file in UTF-8; see :func:`writing`."""
    write_bytes(path, text.encode())


def remove_leftovers(directory: Path, name: str = "*") -> None:
    """Remove what killed processes left of unfinished files that no other process writes to.

    Args:
        directory: Where they lie.
        name: Of the files that they were to become. Default: any.
    """
    for path in directory.glob(f"{name}{_LEFTOVER}"):
        path.unlink(missing_ok=True)
