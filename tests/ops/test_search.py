"""The encoder's search on the GPU: the states of the CPU's search, one by one.

Its kernels run in the simulator here, and on the GPU of a Mac; tests/quantize/test_viterbi.py proves the CPU's search.
"""

import re
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import mlx.core as mx
import numpy as np
import pytest

from mlx_marlin import _ext, codec, ops
from mlx_marlin.ops import search, shaders
from mlx_marlin.ops.gathering import Gathering
from tests import metal_sim
from tests.support import metal_executor
from tests.support.gpu_search import gpu_search  # noqa: F401
from tests.support.paths import VECTORS

needs_simulator = pytest.mark.skipif(bool(metal_sim.unavailable()), reason=str(metal_sim.unavailable()))
needs_gpu = pytest.mark.skipif(not mx.is_available(mx.Device(mx.gpu)), reason="no GPU that MLX can use here")
# Two passes over a threadgroup's memory and a half rate; the default; lanes that share nodes.
QUICK = [(2.5, "mul1"), (3, "mcg"), (6, "3inst")]
FORMATS = [pytest.param(*f, id=f"{f[0]}-{f[1]}", marks=[] if f in QUICK else [pytest.mark.slow]) for f in codec.FORMATS]
# Slowest where nodes are many: seconds for each tile.
FEW = [pytest.param(b, c, id=f"{b}-{c}") for b, c in QUICK[1:]]


def tiles(count: int, seed: int = 0) -> np.ndarray:
    """Of halves: ties everywhere, half precision's range and ordinary values, in turn."""
    found = np.random.default_rng(seed).standard_normal((count, codec.TILE_SIZE)).astype(np.float16)
    found[::3, ::5] = np.finfo(np.float16).max
    found[::3, 2::5] = np.finfo(np.float16).min
    found[1::3] = 0
    return found.astype(np.float32)


@needs_simulator
@pytest.mark.parametrize("bits, codebook", FORMATS)
def test_simulated_search(bits, codebook):
    targets = tiles(1 if bits < 3 else 3)
    found = metal_executor.viterbi(targets, bits, codebook)
    np.testing.assert_array_equal(found, ops.viterbi_search(targets, bits, codebook))


@needs_simulator
@pytest.mark.slow
@pytest.mark.parametrize("order", ["reverse", "random:5"])
@pytest.mark.parametrize("bits, codebook", FEW)
def test_every_schedule_gives_the_same(bits, codebook, order):
    targets = tiles(2, 1)
    found = metal_executor.viterbi(targets, bits, codebook, order=order)
    np.testing.assert_array_equal(found, ops.viterbi_search(targets, bits, codebook))


@needs_simulator
@pytest.mark.slow
@pytest.mark.parametrize("file", ["viterbi.npz", "viterbi_half.npz"])
def test_vectors(file):
    """An independent exact search, state for state."""
    searches = np.load(VECTORS / file)
    targets = searches["tiles"].astype(np.float16).astype(np.float32)
    for name in sorted(set(searches) - {"tiles"}):
        width, codebook = name[1:].split("_")
        found = metal_executor.viterbi(targets, codec.bits_of_half(codec.half_bits(float(width))), codebook)
        np.testing.assert_array_equal(found, searches[name], name)


@needs_simulator
def test_parts_are_searched_one_after_the_other():
    """Scratch for two tiles: three are searched in two parts."""
    targets = tiles(3, 2)
    (kept,) = metal_executor.viterbi_plan(1, 8, "3inst")["scratch"].values()
    found = metal_executor.viterbi(targets, 8, "3inst", history_bytes=2 * kept + 1)
    np.testing.assert_array_equal(found, ops.viterbi_search(targets, 8, "3inst"))


@pytest.mark.parametrize("bits", codec.WIDTHS)
def test_parts_cover_the_tiles_once_and_bound_the_scratch(bits):
    for count in (0, 1, 5, 100, 511, 4096):
        made = metal_executor.viterbi_plan(count, bits, "mul1")
        assert made["scratch"].keys() == ({"history"} if count else set())
        assert sum(made["scratch"].values()) <= 1 << 30
        known = {"tiles": count * 1024, "values": 1 << 17, "y": count * 512, **made["scratch"]}
        ends, used = {"viterbi": [0, 0], "traceback": [0, 0]}, 0
        assert len(made["dispatches"]) % 4 == 0
        for i, d in enumerate(made["dispatches"]):
            assert d["threadgroup_bytes"] <= 32768 and d["threads"][0] <= 512 and d["grid"][1:] == (1, 1)
            size = d["grid"][0]
            stem, pieces = metal_executor.stem(d["kernel"]), {b["name"]: b for b in d["buffers"]}
            for b in d["buffers"]:
                assert b["offset"] + b["bytes"] <= known[b["name"]], b
            pass_ = i // 2 % 2
            for name, one in ("tiles", 1024), ("y", 512):
                assert pieces[name]["offset"] == ends[stem][pass_] * one and pieces[name]["bytes"] == size * one
            ends[stem][pass_] += size
            used = max(used, pieces["history"]["bytes"])
            assert d["after"] == list(range(i)) or set(d["after"]) >= {i - 1}, "each waits for the one before"
        assert all(e == [count, count] for e in ends.values()) and used == sum(made["scratch"].values())


def test_what_no_search_has_is_refused():
    for half_bits, codebook in ((1, 0), (9, 2), (18, 0), (6, 3)):
        with pytest.raises(ValueError, match="a search has a width, a codebook"):
            _ext.plan_viterbi(1, half_bits, codebook)


@pytest.mark.parametrize("bits, codebook", codec.FORMATS)
def test_accesses_are_what_the_kernels_declare(bits, codebook):
    texts = shaders.sources(ops.SHADERS)
    for d in metal_executor.viterbi_plan(3, bits, codebook)["dispatches"]:
        text = texts[metal_executor.stem(d["kernel"])]
        declared = re.findall(r"device (const )?\w+\* \w+ \[\[buffer\((\d+)\)\]\]", text)
        access = {int(slot): "r" if const else "w" for const, slot in declared}
        assert {b["slot"]: b["access"] for b in d["buffers"]} == access
        assert set(d["constants"]) == {"max_threads"}


# What is replaced, and a width at which it is wrong.
WRONG = {
    "ties to the highest": ("traceback.metal", "c < least || i == 0", "c <= least || i == 0", 3),
    "ends stay free": ("viterbi.metal", "args.forced && !begins", "false", 6),
    "another slot": ("viterbi.metal", "uint slot = 0;", "uint slot = 1;", 6),
    "another seam": ("traceback.metal", "kSteps / 2 - 1", "kSteps / 2", 6),
    "not rotated": ("viterbi.metal", "(t + 1) % kSteps ^ args.rotation", "(t + 1) % kSteps", 6),
    "lanes keep the larger": ("viterbi.metal", "min(kept, from_lane", "max(kept, from_lane", 6),
    "the last lane alone": ("viterbi.metal", "best[0] = min(best[0]", "best[0] = max(best[0]", 8),
    "half rates begin high": (
        "search.h",
        "(t + 1) * H / 2 - t * H / 2",
        "((t + 1) * H + 1) / 2 - (t * H + 1) / 2",
        3.5,
    ),
    "nodes of another pass": ("viterbi.metal", "(pass * highs + high)", "high", 2),
}
SEEN = [pytest.param(n, marks=[] if n in ("ends stay free", "another slot") else [pytest.mark.slow]) for n in WRONG]


@needs_simulator
@pytest.mark.parametrize("name", SEEN)
def test_a_wrong_kernel_is_noticed(name, tmp_path):
    file, right, wrong, bits = WRONG[name]
    folder = tmp_path / "kernels"
    shutil.copytree(metal_executor.SHADERS, folder)
    text = (folder / file).read_text()
    assert right in text
    (folder / file).write_text(text.replace(right, wrong))
    targets = tiles(1, 3)
    targets[0, 10:60] = 0
    try:
        found = metal_executor.viterbi(targets, bits, "mul1", directory=folder)
    except metal_sim.KernelError:
        return
    assert not np.array_equal(found, ops.viterbi_search(targets, bits, "mul1"))


@pytest.mark.parametrize("bits", codec.WIDTHS)
def test_the_primitive_searches_after_a_test(bits, gpu_search):  # noqa: F811
    targets = np.random.default_rng(5).standard_normal((3, 256))
    expected = search._search_on_cpu(targets.astype(np.float16).astype(np.float32), bits, "mul1")
    for _ in range(2):
        np.testing.assert_array_equal(ops.viterbi_search(targets, bits, "mul1"), expected)
    assert gpu_search == [4, 3, 3]  # the test, once
    assert ops.viterbi_search(targets[:0], bits, "mul1").shape == (0, 256)


def test_many_tiles_are_searched_in_slices(gpu_search, monkeypatch):  # noqa: F811
    monkeypatch.setattr(search, "_TILES_AT_A_TIME", 3)
    targets = tiles(8, 7)
    expected = search._search_on_cpu(targets, 8, "mcg")
    np.testing.assert_array_equal(ops.viterbi_search(targets, 8, "mcg"), expected)
    assert gpu_search == [3, 1, 3, 3, 2]


def spoilt(monkeypatch, spoil):
    run = _ext.trellis_viterbi
    monkeypatch.setattr(_ext, "trellis_viterbi", lambda *arguments: spoil(run(*arguments)))


def not_built(states):
    raise RuntimeError("[mlx_marlin] the Metal kernel trellis_viterbi<6> could not be built: a.metal:7:3: error: no")


@pytest.mark.parametrize(
    "spoil, reason", [(lambda s: s ^ 1, "1024 of 1024 states differ"), (not_built, "not be built")]
)
def test_a_gpu_that_fails_its_test_is_not_used(spoil, reason, gpu_search, monkeypatch):  # noqa: F811
    spoilt(monkeypatch, spoil)
    targets = tiles(2, 4)
    with pytest.warns(RuntimeWarning, match=reason) as warned:
        found = [ops.viterbi_search(targets, 3, "mcg") for _ in range(2)]
    assert len(warned) == 1 and gpu_search in ([4], [])
    for states in found:
        np.testing.assert_array_equal(states, search._search_on_cpu(targets, 3, "mcg"))


def test_searches_of_several_threads_run_together():
    """While one request is computed the others gather; those of one key are the next."""
    begun, go, given = threading.Event(), threading.Event(), []

    def compute(rows, key):
        given.append((key, len(rows)))
        begun.set()
        assert go.wait(30)
        if key == "wrong":
            raise RuntimeError("out of memory")
        return rows * 2

    gathering = Gathering(compute)
    requests = [("a", 3), ("b", 1), ("a", 2), ("b", 4), ("wrong", 1)]
    with ThreadPoolExecutor(8) as pool:
        first = pool.submit(gathering.run, "a", np.zeros((1, 2)))
        assert begun.wait(30)
        results = []
        for i, (key, count) in enumerate(requests):
            results.append(pool.submit(gathering.run, key, np.full((count, 2), i)))
            while sum(map(len, gathering._waiting.values())) < i + 1:
                time.sleep(0.001)
        go.set()
        assert first.result().shape == (1, 2)
        for i, (_, count) in enumerate(requests[:-1]):
            np.testing.assert_array_equal(results[i].result(), np.full((count, 2), 2 * i))
        with pytest.raises(RuntimeError, match="out of memory"):
            results[-1].result()
    assert given == [("a", 1), ("a", 5), ("b", 5), ("wrong", 1)]


@needs_gpu
@pytest.mark.parametrize("bits, codebook", codec.FORMATS)
def test_the_gpu_gives_the_cpus_states(bits, codebook):
    assert ops.search_fault(bits, codebook) == ""
    targets = tiles(300, 6)
    np.testing.assert_array_equal(
        ops.viterbi_search(targets, bits, codebook), search._search_on_cpu(targets, bits, codebook)
    )
