"""Untrusted files: JSON, and what is in the place of the file that was meant. Pure."""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn, TypeGuard

# As many bytes of a file tell whether it is what its name says.
_START_BYTES = 512
# Levels of JSON. Files of checkpoints have less than ten; Python's json, copies and printing recurse for each.
MAX_DEPTH = 64
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_HTML = (b"<!doctype html", b"<html")
_UTF8_MARK, _UTF16_MARKS = b"\xef\xbb\xbf", (b"\xff\xfe", b"\xfe\xff")


def is_listed(path: Path) -> bool:
    """Whether a directory has an entry of this name, be it a link that leads nowhere."""
    return path.exists() or path.is_symlink()


def check_present(path: Path) -> None:
    """See that a path leads to a file.

    Raises:
        FileNotFoundError: If nothing is there; of a link that leads nowhere it is said where it leads.
        ValueError: If it is not a regular file, or a link in a circle.
    """
    if path.is_symlink() and not path.exists():
        try:
            path.stat()
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise ValueError(f"{path} is a link that leads in a circle") from None
        raise FileNotFoundError(
            f"{path} is a link to {path.readlink()}, which is not there: its download was not finished, or the cache "
            "was cleaned; download the model again"
        )
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing")
    if not path.is_file():
        raise ValueError(f"{path} is not a file")


def check_genuine(path: Path) -> None:
    """See that a file is not a placeholder that downloads leave in the place of others.

    Raises:
        FileNotFoundError: If it is not there.
        ValueError: If it is a pointer of git-lfs or an HTML page.
    """
    check_present(path)
    with open(path, "rb") as stream:
        start = stream.read(_START_BYTES)
    if start.startswith(_LFS_POINTER):
        raise ValueError(
            f"{path} is a git-lfs pointer, not the file itself; run 'git lfs pull' in its repository, or download the "
            "model with 'hf download'"
        )
    if start.removeprefix(_UTF8_MARK).lstrip().lower().startswith(_HTML):
        raise ValueError(
            f"{path} is an HTML page, probably what a server answered in place of the file; download it again with "
            "'hf download'"
        )


def _stamp(file: Path) -> tuple[int, ...] | None:
    """What changes when a file is replaced or written to; ``None`` where it cannot be reached."""
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


@contextmanager
def unchanged(directory: Path) -> Iterator[None]:
    """Weight files of a directory that are read in a ``with`` block must be the same at its end.

    Raises:
        ValueError: If one was replaced, written to or removed; whatever the block raised for that is its cause.
    """
    before = {file: _stamp(file) for file in directory.glob("*.safetensors")}

    def check(cause: Exception | None = None) -> None:
        for file, was in before.items():
            if _stamp(file) != was:
                raise ValueError(f"{file} changed while it was read; load the model again") from cause

    try:
        yield
    except (FileNotFoundError, RuntimeError) as error:  # MLX's reader raises the latter
        check(error)
        raise
    check()


def is_whole(value: object) -> TypeGuard[int]:
    """Whether a JSON value is a whole number: true and false are none, which Python counts among them."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_text_or_null(value: object) -> bool:
    """Whether a JSON value is a string or null."""
    return value is None or isinstance(value, str)


def is_flag_or_null(value: object) -> bool:
    """Whether a JSON value is true, false or null."""
    return value is None or isinstance(value, bool)


def _check_depth(value: object, source: str) -> None:
    """See that nothing that walks this value, one call a level, comes near the interpreter's limit."""
    level = [value] if isinstance(value, (dict, list)) else []
    for _ in range(MAX_DEPTH):
        inner = (v.values() if type(v) is dict else v for v in level)
        level = [v for values in inner for v in values if type(v) is dict or type(v) is list]
        if not level:
            return
    raise ValueError(f"{source} nests too deeply: more than {MAX_DEPTH} levels")


def _reject_constant(value: str) -> NoReturn:
    raise ValueError(f"{value} is not JSON")


def _reject_duplicates(pairs: list[tuple[str, object]]) -> dict:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} appears twice")
    return entries


def parse_json(data: bytes, source: str, *, finite: bool = True) -> dict:
    """A JSON object from untrusted bytes.

    Args:
        data: The text, in UTF-8.
        source: What it is, for error messages.
        finite: Refuse NaN and Infinity, which JSON does not have but Python writes. Default: ``True``.

    Raises:
        ValueError: If it is not a JSON object, nests too deeply, or has a key twice.
    """
    try:
        text = data.decode("utf-8")  # json.loads would also guess UTF-16 and UTF-32, which no other reader does
        parse_constant = _reject_constant if finite else None
        value = json.loads(text, parse_constant=parse_constant, object_pairs_hook=_reject_duplicates)
    except RecursionError:
        raise ValueError(f"{source} nests too deeply to be read as JSON") from None
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise ValueError(f"{source} cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{source} must be a JSON object, got {type(value).__name__}")
    _check_depth(value, source)
    return value


def read_json(path: Path, *, finite: bool = True) -> dict:
    """A JSON object from an untrusted file; see :func:`parse_json`.

    Raises:
        FileNotFoundError: If the file is not there.
        ValueError: If it is something else, or begins with a byte order mark, which neither mlx-lm nor ExLlamaV3 reads.
    """
    check_genuine(path)
    data = path.read_bytes()
    if data.startswith((_UTF8_MARK, *_UTF16_MARKS)):
        encoding = "UTF-8" if data.startswith(_UTF8_MARK) else "UTF-16"
        raise ValueError(
            f"{path} begins with a byte order mark ({encoding}), which JSON does not have; save it as UTF-8 without one"
        )
    return parse_json(data, str(path), finite=finite)
