"""Files that are never seen half-written. Pure."""

from __future__ import annotations

import os
import secrets
import tempfile
from pathlib import Path


def check_writable(path: Path) -> None:
    """Make the folder of a file, and see that a file can be made there.

    Raises:
        OSError: If not.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=path.parent):
        pass


def replace(path: Path, data: bytes) -> None:
    """Write a file beside its place, then rename it: readers see the old one or the new one, whole.

    Raises:
        OSError: If the folder cannot be written; what was there stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Named before it exists: an interrupt may come at any moment, and nothing is to stay behind.
    beside = path.with_name(f"{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with open(beside, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
