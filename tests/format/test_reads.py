"""Many pieces of files, each read to its place."""

import os
from functools import partial

import mlx.core as mx
import numpy as np
import pytest

from mlx_marlin import ops
from mlx_marlin.storage import reads
from mlx_marlin.storage.reads import Read, read_all


@pytest.mark.parametrize("gap", [0, 7, 1 << 20])
@pytest.mark.parametrize("most", [1, 2, 512])
@pytest.mark.parametrize("piece", [1, 7, 64, 1 << 20])
def test_every_piece_lands_where_it_is_wanted(tmp_path, monkeypatch, piece, most, gap):
    for name, value in {"_PIECE": piece, "_MOST_READS": most, "_GAP": gap}.items():
        monkeypatch.setattr(reads, name, value)
    rng, wanted, given = np.random.default_rng(0), [], []
    for number in range(3):
        data, file = rng.bytes(200), tmp_path / f"{number}"
        file.write_bytes(data)
        for start, size in ((190, 10), (0, 3), (3, 60), (100, 0), (70, 64)):
            wanted.append(data[start : start + size])
            given.append(Read(file, start, np.empty((size // 2, 2) if size % 2 == 0 else size, np.uint8)))
    read_all(given[::-1])
    assert [read.into.tobytes() for read in given] == wanted


def test_a_thread_tells_of_a_file_that_ends_early_or_is_gone(tmp_path, monkeypatch):
    monkeypatch.setattr(reads, "_PIECE", 16)
    file = tmp_path / "short"
    file.write_bytes(bytes(100))
    with pytest.raises(ValueError, match="short ends early: 16 bytes wanted at 90, 10 there"):
        read_all([Read(file, 10, np.empty(64, np.uint8)), Read(file, 90, np.empty(16, np.uint8))])
    with pytest.raises(FileNotFoundError):
        read_all([Read(file, 0, np.empty(20, np.uint8)), Read(tmp_path / "gone", 0, np.empty(20, np.uint8))])


def test_neighbours_take_one_call_and_the_one_that_is_cut_is_told(tmp_path, monkeypatch):
    calls, preadv, file = [], os.preadv, tmp_path / "file"
    monkeypatch.setattr(os, "preadv", lambda fd, into, at: calls.append(len(into)) or preadv(fd, into, at))
    file.write_bytes(bytes(range(100)))
    given = [Read(file, start, np.empty(20, np.uint8)) for start in (0, 20, 44)]
    read_all(given)
    assert calls == [4]  # with what lies between
    assert [read.into.tolist() for read in given] == [[*range(s, s + 20)] for s in (0, 20, 44)]
    with pytest.raises(ValueError, match="file ends early: 20 bytes wanted at 90, 10 there"):
        read_all([Read(file, start, np.empty(20, np.uint8)) for start in (50, 70, 90)])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_halves_become_floats_on_the_way(tmp_path, monkeypatch, dtype):
    monkeypatch.setattr(reads, "_PIECE", 96)
    monkeypatch.setattr(reads, "_WIDENED", 14)
    words, file = np.random.default_rng(0).integers(0, 1 << 16, 301, np.uint16), tmp_path / "halves"
    file.write_bytes(bytes(3) + words.tobytes())
    floats = np.empty(301, np.float32)
    read_all([Read(file, 3, floats, partial(ops.widen, dtype))])
    wanted = words.view(np.float16) if dtype == "float16" else (words.astype(np.uint32) << 16).view(np.float32)
    np.testing.assert_array_equal(floats, wanted)


def test_memory_that_is_filled_is_an_array_of_mlx():
    before = mx.get_active_memory()
    array = ops.uninitialized((3, 1 << 20), mx.float16)
    values = np.array(array, copy=False)
    values[...] = np.arange(3, dtype=np.float16)[:, None]
    assert array.dtype == mx.float16 and mx.array_equal(array, mx.array(values)) and array[2, -1].item() == 2
    del array, values
    assert mx.get_active_memory() == before
    assert ops.uninitialized((0,), mx.uint32).size == 0
