"""What an interrupted conversion is continued from: the files of a job, each with digests of its content and sources.

A part ends with a seal: its name, digests of what it was made from, the digest of the hidden states behind it, and a
digest of everything before. What is damaged, or was made from something else, is told and made again; everything is
deterministic, so that the result is the same. The parts of a pass form a chain: each names the states that it was made
from, which are those behind the part before.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ..storage import atomic, safetensors
from ..storage.safetensors import Tensor, read_header
from .spill import States, StoredArrays, StoredTensor

_MAGIC = b"mlx_marlin job 1"
# Behind the seal: its length, the digest of everything before the digest, and the mark.
_LENGTH, _TAIL = struct.Struct("<Q"), struct.Struct(f"<{hashlib.sha256().digest_size}s{len(_MAGIC)}s")
_CHUNK_BYTES = 1 << 24
LOCK = "lock"
JOB = "job.json"


def digest_of(value: object) -> str:
    """SHA-256 of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def states_digest(states: States) -> str:
    """SHA-256 of hidden states."""
    digest = hashlib.sha256()
    for array in states:
        digest.update(f"{array.dtype} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def hash_bytes(file: BinaryIO, size: int, digest: Any) -> bool:
    """Let a digest take the next bytes of a file, a few at a time; whether there were so many."""
    while size:
        data = file.read(min(size, _CHUNK_BYTES))
        if not data:
            return False
        digest.update(data)
        size -= len(data)
    return True


@contextmanager
def locked(directory: Path, shown: Path) -> Iterator[None]:
    """Keep other conversions out of a directory; a killed process lets go of it.

    Args:
        directory: The directory.
        shown: What the error calls it.

    Raises:
        ValueError: If another conversion is at work there.
    """
    with open(directory / LOCK, "wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"another conversion is writing to {shown}; wait until it ends, or choose another directory"
            ) from None
        yield


@dataclass(frozen=True)
class Seal:
    """What a part says of itself.

    Attributes:
        part: Its name.
        made_from: Digests of what it was made from, by what that is.
        after: Digest of the hidden states behind it, or ``""``.
        size: Bytes of its content.
    """

    part: str
    made_from: dict[str, str]
    after: str
    size: int


class _Damaged(Exception):
    """A part that cannot be used; says why."""


class _Hashing:
    """A file that notes the digest of what is written."""

    def __init__(self, file: BinaryIO):
        self.file, self.digest = file, hashlib.sha256()

    def write(self, data: bytes) -> None:
        self.digest.update(data)
        self.file.write(data)


def _read_seal(path: Path) -> Seal:
    """The seal of a file, everything before it checked."""
    with open(path, "rb") as file:
        covered = os.fstat(file.fileno()).st_size - _TAIL.size
        if covered < _LENGTH.size:
            raise _Damaged("is truncated")
        file.seek(covered)
        expected, magic = _TAIL.unpack(file.read(_TAIL.size))
        if magic != _MAGIC:
            raise _Damaged("is truncated, or no file of a conversion")
        file.seek(0)
        digest = hashlib.sha256()
        if not hash_bytes(file, covered, digest):
            raise _Damaged("became shorter while it was read")
        if digest.digest() != expected:
            raise _Damaged("was changed")
        file.seek(covered - _LENGTH.size)
        (length,) = _LENGTH.unpack(file.read(_LENGTH.size))
        start = covered - _LENGTH.size - length
        file.seek(start)
        said = json.loads(file.read(length))
    return Seal(said["part"], said["made_from"], said["after"], start)


def told_job(directory: Path) -> Any:
    """What the job of a directory was made from, as it was written; ``None`` where that is missing or damaged."""
    path = directory / JOB
    try:
        if not path.is_file():
            return None
        seal = _read_seal(path)
        with open(path, "rb") as file:
            return json.loads(file.read(seal.size)) if seal.part == JOB else None
    except (_Damaged, OSError):
        return None


class JobState:
    """The work directory of one conversion.

    Args:
        directory: Where the parts lie.
        job: Digest of everything that the result depends on.
        tell: Called with what is found damaged or foreign.
    """

    def __init__(self, directory: Path, job: str, tell: Callable[[str], None]):
        self.directory, self.job, self.tell = directory, job, tell
        self._useless: set[str] = set()  # parts of which it was told

    def seal(self, name: str, made_from: Mapping[str, str] | None = None) -> Seal | None:
        """The seal of a part, or ``None`` where it is missing, damaged or foreign; the last two are told, once.

        Args:
            name: The part.
            made_from: What it must have been made from, beside the job. Default: whatever it says.
        """
        path = self.directory / name
        if name in self._useless or not (path.exists() or path.is_symlink()):
            return None
        try:
            if not path.is_file():
                raise _Damaged("is not a file")
            seal = _read_seal(path)
            if seal.part != name:
                raise _Damaged(f"is a copy of {seal.part}")
            if seal.made_from.get("job") != self.job:
                raise _Damaged("belongs to another conversion")
            changed = [key for key, value in (made_from or {}).items() if seal.made_from.get(key) != value]
            if changed:
                raise _Damaged(f"was made from something else ({', '.join(changed)})")
        except (_Damaged, OSError) as error:
            reason = f"cannot be read: {error.strerror}" if isinstance(error, OSError) else str(error)
            self.refuse(name, reason)
            return None
        return seal

    def refuse(self, name: str, reason: str) -> None:
        """Tell that a part is of no use, and why."""
        self._useless.add(name)
        self.tell(f"{self.directory / name} {reason}; that part is made again")

    @contextmanager
    def _writing(self, name: str, made_from: Mapping[str, str], after: str) -> Iterator[_Hashing]:
        said = {"part": name, "made_from": {**made_from, "job": self.job}, "after": after}
        seal = json.dumps(said, sort_keys=True).encode()
        with atomic.writing(self.directory / name) as file:
            hashing = _Hashing(file)
            yield hashing
            hashing.write(seal)
            hashing.write(_LENGTH.pack(len(seal)))
            file.write(_TAIL.pack(hashing.digest.digest(), _MAGIC))
        self._useless.discard(name)

    def write_json(self, name: str, value: object, made_from: Mapping[str, str] | None = None, after: str = "") -> None:
        """Write a part; see :class:`Seal`."""
        with self._writing(name, made_from or {}, after) as file:
            file.write(json.dumps(value).encode())

    def read_json(self, name: str, made_from: Mapping[str, str] | None = None) -> Any:
        """What :meth:`write_json` wrote, or ``None`` where :meth:`seal` gives that."""
        seal = self.seal(name, made_from)
        if seal is None:
            return None
        with open(self.directory / name, "rb") as file:
            return json.loads(file.read(seal.size))

    def write_tensors(
        self,
        name: str,
        tensors: Mapping[str, Tensor | StoredTensor],
        made_from: Mapping[str, str] | None = None,
        after: str = "",
    ) -> None:
        """Write a part in the safetensors format, by ascending name; see :class:`Seal`."""
        names = sorted(tensors)
        with self._writing(name, made_from or {}, after) as file:
            entries = [(n, tensors[n].dtype, tensors[n].shape) for n in names]
            safetensors.write_into(file, self.directory / name, entries, (tensors[n].data for n in names))

    def write_states(self, name: str, states: States) -> str:
        """Write hidden states; returns their digest."""
        after = states_digest(states)
        with self._writing(name, {}, after) as file:
            entries = [(f"{i:06}", safetensors.DTYPE_NAMES[a.dtype], a.shape) for i, a in enumerate(states)]
            safetensors.write_into(file, self.directory / name, entries, (a.tobytes() for a in states))
        return after

    def read_states(self, name: str, after: str) -> States | None:
        """The hidden states of this digest; ``None`` where the part is missing, damaged or holds others."""
        seal = self.seal(name)
        if seal is None or seal.after != after:
            return None
        return StoredArrays(info.array for _, info in sorted(read_header(self.directory / name).items()))


@dataclass(frozen=True)
class Pass:
    """One pass over the layers, which leaves a part for each.

    Attributes:
        name: Of its parts: ``<name>-0000.<suffix>``.
        suffix: ``"json"`` or ``"safetensors"``.
        count: Number of layers.
        start: Gives the hidden states before the first layer.
        step: Called with a layer, the hidden states before it, and whether its part is there already. Returns the
            states behind it, and what the part is to hold (of no concern if it is there).
        made_from: Gives what a layer's part is made from, beside the states and the job.
        finished: Called with the first and the last (exclusive) of layers that are done, and whether they were made.
    """

    name: str
    suffix: str
    count: int
    start: Callable[[], States]
    step: Callable[[int, States, bool], tuple[States, Any]]
    made_from: Callable[[int], dict[str, str]]
    finished: Callable[[int, int, bool], None]

    def part(self, index: int) -> str:
        """Name of a layer's part."""
        return f"{self.name}-{index:04}.{self.suffix}"

    def states(self, index: int) -> str:
        """Name of the states behind a layer."""
        return f"{self.name}-state-{index:04}.safetensors"


def follow(job: JobState, work: Pass) -> tuple[States, str]:
    """Run a pass: make the parts that are missing or of no use, run again over others only where states are lost.

    The states behind a layer are written before its part; only the newest two are kept.

    Returns:
        The hidden states behind the last layer, and their digest.
    """
    parts = [job.seal(work.part(i), work.made_from(i)) for i in range(work.count)]
    states, index = work.start(), 0
    at = states_digest(states)
    while index < work.count:
        chain = _chain(parts, index, at)
        reached = _last_states(job, work, chain, index)
        if reached is not None:
            work.finished(index, reached[0], False)
            index, states, at = reached
            continue
        after, content = work.step(index, states, bool(chain))
        digest = job.write_states(work.states(index), after)
        if chain and chain[0].after != digest:
            job.refuse(work.part(index), "does not give the states that it says")
            parts[index] = None
            continue
        if not chain:
            if parts[index] is not None:
                job.refuse(work.part(index), "was made from something else (hidden states)")
            write = job.write_json if work.suffix == "json" else job.write_tensors
            write(work.part(index), content, {**work.made_from(index), "before": at}, digest)
        if index >= 2:
            (job.directory / work.states(index - 2)).unlink(missing_ok=True)
        states, at = after, digest
        index += 1
        work.finished(index - 1, index, not chain)
    return states, at


def _chain(parts: Sequence[Seal | None], index: int, before: str) -> list[Seal]:
    """The parts from a layer on, as far as each was made from the states behind the one before."""
    chain: list[Seal] = []
    for seal in parts[index:]:
        if seal is None or seal.made_from.get("before") != before:
            break
        chain.append(seal)
        before = seal.after
    return chain


def _last_states(job: JobState, work: Pass, chain: list[Seal], index: int) -> tuple[int, States, str] | None:
    """The furthest states along a chain that are there: the layer that they are before, they, and their digest."""
    for offset in reversed(range(len(chain))):
        states = job.read_states(work.states(index + offset), chain[offset].after)
        if states is not None:
            return index + offset + 1, states, chain[offset].after
    return None
