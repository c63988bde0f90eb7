"""Many pieces of files read to where they are wanted, by a few threads.

Read, not mapped: a file that becomes shorter is an error, where a map would end the process.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from io import FileIO
from pathlib import Path
from typing import NamedTuple

import numpy as np

# A system call's worth: Linux reads at most 2 GiB at once, and threads share what is larger than this.
_PIECE = 8 << 20
# What lies between two reads of one system call: a marker, or a vector of scales of something else. Copying so much
# takes less than another call.
_GAP = 4 << 10
# A system call takes 1024 pieces of memory at most (IOV_MAX of Linux and macOS), half of which may be gaps.
_MOST_READS = 512
# What a thread widens at once: it stays in the core's cache between the file and the memory.
_WIDENED = 512 << 10
# Copying out of the page cache is bound by memory, which this many cores use up.
_MAX_THREADS = 4


Widen = Callable[[np.ndarray, np.ndarray], None]
"""Fills the second array, float32, with what the words of the first stand for."""


class Read(NamedTuple):
    """Bytes of a file and where they go.

    Attributes:
        file: The file.
        start: First byte, from the beginning of the file.
        into: Contiguous memory that is filled.
        widen: Called with uint16 words of the file, and the float32 memory that they are to fill, where halves become
            float32 on the way. Default: ``None``, bytes as they are.
    """

    file: Path
    start: int
    into: np.ndarray
    widen: Widen | None = None


def read_all(reads: Iterable[Read]) -> None:
    """Do all reads; what they go into must not overlap.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file ends early.
        OSError: If one cannot be read.
    """
    batches = list(_batches(sorted((read for read in reads if read.into.nbytes), key=_place)))
    threads = min(_MAX_THREADS, os.cpu_count() or 1, len(batches))
    if threads <= 1:
        _read_batches(iter(batches))
        return
    shared = iter(batches)
    with ThreadPoolExecutor(threads - 1) as pool:  # this thread reads too
        others = [pool.submit(_read_batches, shared) for _ in range(threads - 1)]
        try:
            _read_batches(shared)
        finally:  # an interrupt: the others are to stop as well
            for _ in shared:
                pass
    for other in others:
        other.result()  # raises what the thread raised


def _place(read: Read) -> tuple[Path, int]:
    return read.file, read.start


def _pieces(read: Read) -> Iterable[Read]:
    """A read in pieces of at most :data:`_PIECE` bytes of the file."""
    if read.into.nbytes <= _PIECE:
        return (read,)
    flat = read.into.reshape(-1) if read.widen else read.into.reshape(-1).view(np.uint8)
    size = 2 if read.widen else 1  # of an element in the file
    step = max(1, _PIECE // size)
    return (
        read._replace(start=read.start + first * size, into=flat[first : first + step])
        for first in range(0, flat.size, step)
    )


def _batches(reads: Iterable[Read]) -> Iterator[list[Read]]:
    """Pieces of one file each, as many as make a few system calls' work."""
    batch: list[Read] = []
    size = 0
    for read in reads:
        for piece in _pieces(read):
            if batch and (piece.file != batch[0].file or size + piece.into.nbytes > _PIECE):
                yield batch
                batch, size = [], 0
            batch.append(piece)
            size += piece.into.nbytes
    if batch:
        yield batch


def _read_batches(batches: Iterator[list[Read]]) -> None:
    """Read what no other thread has taken of the batches."""
    for batch in batches:
        with open(batch[0].file, "rb", buffering=0) as stream:
            run: list[Read] = []
            end = 0
            for read in batch:
                if run and (read.widen or not 0 <= read.start - end <= _GAP or len(run) == _MOST_READS):
                    _fill_run(stream, run)
                    run = []
                if read.widen is not None:
                    _read_halves(stream, read.start, read.into.reshape(-1), read.widen)
                else:
                    run.append(read)
                    end = read.start + read.into.nbytes
            if run:
                _fill_run(stream, run)


def _fill_run(stream: FileIO, run: list[Read]) -> None:
    """Fill several pieces of memory by one system call, from places near to each other in the file."""
    gap, parts, end = bytearray(_GAP), [], run[0].start
    for read in run:
        if read.start > end:
            parts.append(memoryview(gap)[: read.start - end])
        parts.append(read.into.data)
        end = read.start + read.into.nbytes
    if os.preadv(stream.fileno(), parts, run[0].start) == end - run[0].start:
        return
    for read in run:  # an interrupt, or the end of the file, which is told of the read that it cuts
        _fill(stream, read.start, read.into.reshape(-1).view(np.uint8).data)


def read_at(descriptor: int, start: int, wanted: memoryview) -> int:
    """Fill memory from a place in an open file; the bytes that were there, fewer than wanted only where it ends."""
    there = 0
    while there < len(wanted):
        count = os.preadv(descriptor, [wanted[there:]], start + there)
        if not count:
            break
        there += count
    return there


def _fill(stream: FileIO, start: int, wanted: memoryview) -> None:
    there = read_at(stream.fileno(), start, wanted)
    if there < len(wanted):
        raise ValueError(f"{stream.name} ends early: {len(wanted)} bytes wanted at {start}, {there} there")


def _read_halves(stream: FileIO, start: int, into: np.ndarray, widen: Widen) -> None:
    """Read halves through a small buffer, out of which they go as float32."""
    buffer = np.empty(min(into.size, _WIDENED // 2), np.uint16)
    for first in range(0, into.size, buffer.size):
        halves = buffer[: into.size - first]
        _fill(stream, start + 2 * first, halves.view(np.uint8).data)
        widen(halves, into[first : first + halves.size])
