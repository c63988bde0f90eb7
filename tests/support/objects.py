"""Compiled objects that are kept between runs."""

from __future__ import annotations

import functools
import hashlib
import os
import subprocess
from pathlib import Path


@functools.cache
def _version(compiler: tuple[str, ...]) -> bytes:
    return subprocess.run([*compiler, "--version"], check=True, capture_output=True).stdout


def compiled(compiler: list[str], flags: list[str], source: Path, folder: Path) -> Path:
    """The object of a source: compiled, unless what the preprocessor makes of it, flags and compiler are as they were.

    Args:
        compiler: The compiler's command.
        flags: All of its flags.
        source: The source.
        folder: Where objects are kept; made if it is not there.
    """
    command = [*compiler, *flags]
    text = subprocess.run([*command, "-E", str(source)], check=True, capture_output=True).stdout
    key = hashlib.sha256(b"\0".join([text, _version(tuple(compiler)), *map(str.encode, command)])).hexdigest()[:24]
    made = folder / f"{source.stem}_{key}.o"
    if not made.exists():
        folder.mkdir(parents=True, exist_ok=True)
        beside = made.with_suffix(f".{os.getpid()}")
        subprocess.run([*command, "-c", str(source), "-o", str(beside)], check=True)
        beside.replace(made)
    return made
