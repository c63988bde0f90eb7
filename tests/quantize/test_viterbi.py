"""The encoder's tile search: exact, tail-biting, the same everywhere."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from mlx_marlin import _ext, codec, ops
from mlx_marlin.ops import search
from tests.support.paths import VECTORS

CASES = [
    pytest.param(file, name, id=name)
    for file in ("viterbi.npz", "viterbi_half.npz")
    for name in sorted(set(np.load(VECTORS / file)) - {"tiles"})
]
# Those that the search has code of its own for; the others run that of the set before them.
SETS = [s for s in _ext.instruction_sets() if s in ("baseline", "avx2", "avx512", "neon")]


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    """Also where a GPU would search: tests/ops/test_search.py is about that."""
    monkeypatch.setattr(search, "searches_on_gpu", lambda: False)


@pytest.fixture
def force():
    """Sets the instruction set; afterwards the best one runs again."""
    yield _ext.set_instruction_set
    _ext.set_instruction_set("auto")


def exhaustive(tile, bits, values):
    """The same two passes in plain NumPy, with stored decisions instead of recomputed ones."""
    fresh = codec.fresh_bits(bits)  # the same on the rotated tile: 128 is even
    nodes = (1 << 16) >> np.append(fresh, fresh[0])  # before each step

    def run(target, minima, last):
        decisions = []
        for t, x in enumerate(target):
            cost = np.repeat(minima, 1 << fresh[t]) + np.square(x - values)
            decisions.append(cost.reshape(-1, nodes[t + 1]).argmin(0))
            minima = cost.reshape(-1, nodes[t + 1]).min(0)
        path = [int(cost.argmin()) if last is None else last]
        for t in range(255, 0, -1):
            low = path[-1] >> fresh[t]
            path.append(int(decisions[t - 1][low]) * nodes[t] + low)
        return path[::-1]

    tile = tile.astype(np.float16).astype(np.float64)
    seam = run(np.roll(tile, -128), np.zeros(nodes[0]), None)[127]
    start = np.full(nodes[0], np.inf)
    start[seam % nodes[0]] = 0
    return np.array(run(tile, start, seam), np.uint16)


@pytest.mark.parametrize("file, name", CASES)
@pytest.mark.parametrize("isa", [s for s in SETS if s != "baseline"] or SETS)
def test_vectors(file, name, isa, force):
    """An independent exact search, state for state."""
    force(isa)
    width, codebook = name[1:].split("_")
    bits = codec.bits_of_half(codec.half_bits(float(width)))
    searches = np.load(VECTORS / file)
    np.testing.assert_array_equal(ops.viterbi_search(searches["tiles"], bits, codebook), searches[name])


@pytest.mark.parametrize("bits", [1, 1.5, 2.5, 3, 3.5, 5, 7])
def test_plain_search(bits):
    """The widths that the vectors lack, and a tile count that is no multiple of the batch."""
    tiles = np.random.default_rng(codec.half_bits(bits)).standard_normal((5, 256))
    found = ops.viterbi_search(tiles, bits, "mul1")
    values = codec.decode(np.arange(1 << 16, dtype=np.uint16), "mul1").astype(np.float64)
    for tile, states in zip(tiles[[0, 4]], found[[0, 4]]):
        np.testing.assert_array_equal(states, exhaustive(tile, bits, values))


@pytest.mark.parametrize("bits", codec.WIDTHS)
def test_instruction_sets_and_threads_agree(bits, force):
    tiles = np.random.default_rng(7).standard_normal((7, 256)).astype(np.float32)
    tiles[3] = 0  # every cost ties: the lowest state must win everywhere
    tiles[5] = 100  # far outside the codebook
    tiles = tiles[:4] if "baseline" in SETS and bits > 2 else tiles
    codebook = "mul1" if codec.is_half_rate(bits) else "3inst"
    results = []
    for isa in SETS:
        force(isa)
        # Without vectors a search takes longer than all others together: on one thread, too, at one width only.
        counts = (1, 3) if isa != "baseline" or bits == 2 else (3,)
        results += [ops.viterbi_search(tiles, bits, codebook, threads=n) for n in counts]
    for other in results[1:]:
        np.testing.assert_array_equal(other, results[0])
    codec.pack(results[0][None], bits)  # raises unless tail-biting


def test_no_tiles():
    assert ops.viterbi_search(np.empty((0, 256), np.float32), 3, "mcg").shape == (0, 256)


@pytest.mark.parametrize(
    "tiles, bits, codebook, message",
    [
        (np.zeros((2, 255), np.float32), 3, "mul1", r"\[2, 255\]"),
        (np.zeros((2, 256), np.int32), 3, "mul1", "int32"),
        (np.full((2, 256), np.nan, np.float32), 3, "mul1", "finite"),
        (np.full((2, 256), 1e5, np.float32), 3, "mul1", "half precision"),
        (np.zeros((2, 256), np.float32), 0, "mul1", "whole widths as integers; got 0"),
        (np.zeros((2, 256), np.float32), 9, "mul1", "whole widths as integers; got 9"),
        (np.zeros((2, 256), np.float32), 4.5, "mul1", "whole widths as integers; got 4.5"),
        (
            np.zeros((2, 256), np.float32),
            2.5,
            "mcg",
            "half rates exist for mul1 only, got 2.5 bits with codebook 'mcg'",
        ),
        (np.zeros((2, 256), np.float32), 3, "mul2", "'mul2'"),
    ],
)
def test_bad_input(tiles, bits, codebook, message):
    with pytest.raises(ValueError, match=message):
        ops.viterbi_search(tiles, bits, codebook)


def test_searches_of_several_threads_share_the_workers():
    tiles = np.random.default_rng(3).standard_normal((9, 256))
    expected = ops.viterbi_search(tiles, 4, "mul1", threads=1)
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda n: ops.viterbi_search(tiles, 4, "mul1", threads=n), [1, 2, 3, 4] * 3):
            np.testing.assert_array_equal(found, expected)
