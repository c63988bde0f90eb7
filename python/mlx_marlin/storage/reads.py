"""Many pieces of files read to where they are wanted, by a few threads.

Read, not mapped: a file that becomes shorter is an error, where a map would end the process.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

# A system call's worth: Linux reads at most 2 GiB at once, and threads share what is larger than this.
_PIECE = 8 << 20
# Copying out of the page cache is bound by memory, which this many cores use up.
_MAX_THREADS = 4


class Read(NamedTuple):
    """Bytes of a file and where they go.

    Attributes:
        file: The file.
        start: First byte, from the beginning of the file.
        into: Contiguous memory that is filled.
    """

    file: Path
    start: int
    into: np.ndarray


def read_all(reads: Iterable[Read]) -> None:
    """Do all reads; what they go into must not overlap.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file ends early.
        OSError: If one cannot be read.
    """
    batches = list(_batches(sorted((read for read in reads if read.into.nbytes), key=_place)))
    if len(batches) <= 1:
        for batch in batches:
            _read_batch(batch)
        return
    with ThreadPoolExecutor(min(_MAX_THREADS, os.cpu_count() or 1, len(batches))) as pool:
        for _ in pool.map(_read_batch, batches):  # raises what a thread raised
            pass


def _place(read: Read) -> tuple[Path, int]:
    return read.file, read.start


_Piece = tuple[int, memoryview]


def _batches(reads: Iterable[Read]) -> Iterator[tuple[Path, list[_Piece]]]:
    """Pieces of one file each, as many as make a few system calls' work."""
    file: Path = Path()
    pieces: list[_Piece] = []
    size = 0
    for read in reads:
        whole = read.into.reshape(-1).view(np.uint8).data
        for first in range(0, len(whole), _PIECE):
            piece = whole[first : first + _PIECE]
            if pieces and (read.file != file or size + len(piece) > _PIECE):
                yield file, pieces
                pieces, size = [], 0
            file = read.file
            pieces.append((read.start + first, piece))
            size += len(piece)
    if pieces:
        yield file, pieces


def _read_batch(batch: tuple[Path, list[_Piece]]) -> None:
    file, pieces = batch
    with open(file, "rb", buffering=0) as stream:
        for start, piece in pieces:
            there = 0
            while there < len(piece):
                count = os.preadv(stream.fileno(), [piece[there:]], start + there)
                if not count:
                    raise ValueError(f"{file} ends early: {len(piece)} bytes wanted at {start}, {there} there")
                there += count
