"""Files that are never seen half-written. Pure."""

from __future__ import annotations

import os
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
    handle, beside = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(beside, 0o644)  # mkstemp's files are for their owner alone
        os.replace(beside, path)
    finally:
        Path(beside).unlink(missing_ok=True)
