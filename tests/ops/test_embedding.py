"""The quantized token embedding: every path against the codec, bit for bit."""

import pickle

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_marlin import EmbeddingWeight, TrellisEmbedding, _ext, codec, ops
from mlx_marlin.weights.synthetic import random_embedding
from tests import metal_sim
from tests.support import metal_executor
from tests.support.paths import VECTORS

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
needs_simulator = pytest.mark.skipif(bool(metal_sim.unavailable()), reason=str(metal_sim.unavailable()))


def random_table(bits: int, features: int, rows: int = 9, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Random words are a legal trellis; scales are ordinary halves."""
    trellis, signs = random_embedding(np.random.default_rng(seed), rows, features, bits)
    trellis[0, 0] = 0  # the converter may find a scale of 0
    return trellis, signs


def layer_of(bits: int, features: int, **more) -> tuple[TrellisEmbedding, np.ndarray]:
    trellis, signs = random_table(bits, features, **more)
    return TrellisEmbedding(EmbeddingWeight(trellis, signs, features)), codec.decode_embedding(trellis, signs, features)


def as_dtype(table: np.ndarray, dtype: mx.Dtype) -> np.ndarray:
    return np.array(mx.array(table).astype(dtype).astype(mx.float32))


@pytest.mark.parametrize("name", sorted(p.stem for p in VECTORS.glob("embedding_k*.npz")))
def test_vectors(instruction_set, name):
    v = np.load(VECTORS / f"{name}.npz")
    expected = v["y64"].astype(np.float16)  # one rounding of the exact rows
    layer = TrellisEmbedding(EmbeddingWeight(v["trellis"], v["signs"], int(v["hidden"])))
    y = layer(mx.arange(len(expected)))
    assert y.dtype == mx.float16 and layer.bits == v["K"]
    np.testing.assert_array_equal(np.array(y), codec.decode_embedding(v["trellis"], v["signs"], int(v["hidden"])))
    # Butterflies in float32 may round a half to its neighbour.
    np.testing.assert_allclose(np.array(y), expected, rtol=2**-10, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("features", (256, 320, 1, 777))
@pytest.mark.parametrize("bits", range(1, 9))
def test_every_width(bits, features, dtype):
    layer, table = layer_of(bits, features)
    layer.set_dtype(DTYPES[dtype])
    ids = np.array([[3, 0, 8], [8, 8, 1]])
    y = layer(mx.array(ids))
    assert y.dtype == DTYPES[dtype] and y.shape == (2, 3, features)
    np.testing.assert_array_equal(np.array(y.astype(mx.float32)), as_dtype(table, DTYPES[dtype])[ids])


def test_instruction_sets(instruction_set):
    layer, table = layer_of(5, 600)
    np.testing.assert_array_equal(np.array(layer(mx.arange(9))), table)


@needs_simulator
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits, features", [(1, 256), (2, 777), (3, 320), (5, 600), (7, 1), (8, 2304)])
def test_simulated_metal(bits, features, dtype):
    trellis, signs = random_table(bits, features)
    ids = np.array([8, 0, 3, 3, 9], np.uint32)  # the last one is out of range
    y = metal_executor.embedding(ids, trellis, signs, features, bits, dtype)
    expected = as_dtype(codec.decode_embedding(trellis, signs, features), DTYPES[dtype])
    np.testing.assert_array_equal(y[:4], expected[ids[:4]])
    assert np.isnan(y[4]).all()


def test_the_plan_covers_many_rows():
    """A grid has at most 65535 threadgroups along y."""
    plan = _ext.plan_embedding(70000, 1, 9, 600, 4)
    grids = [d["grid"] for d in plan["dispatches"]]
    assert grids == [(1, 65535, 1), (1, 4465, 1)]
    y = [next(b for b in d["buffers"] if b["name"] == "y") for d in plan["dispatches"]]
    assert [(b["offset"], b["bytes"]) for b in y] == [(0, 65535 * 1200), (65535 * 1200, 4465 * 1200)]
    assert _ext.plan_embedding(0, 1, 9, 600, 4)["dispatches"] == []


def test_no_ids():
    layer, _ = layer_of(4, 320)
    assert layer(mx.zeros((2, 0), mx.int32)).shape == (2, 0, 320)


@pytest.mark.parametrize("rows", (9, 4096, 5000))
def test_as_linear(rows):
    layer, table = layer_of(3, 96, rows=rows)
    x = np.random.default_rng(1).standard_normal((2, 3, 96)).astype(np.float32)
    y = np.array(layer.as_linear(mx.array(x)))
    wanted = x.astype(np.float64) @ table.astype(np.float64).T
    assert y.shape == (2, 3, rows)
    np.testing.assert_allclose(y, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


def test_it_is_a_module_like_nn_embedding():
    layer, table = layer_of(4, 320)
    copy = pickle.loads(pickle.dumps(layer))
    np.testing.assert_array_equal(np.array(copy(mx.arange(9))), table)
    assert not layer.trainable_parameters() and set(layer.parameters()) == {"trellis", "signs"}
    compiled = mx.compile(layer)
    np.testing.assert_array_equal(np.array(compiled(mx.array([4, 2]))), table[[4, 2]])
    assert repr(layer) == "TrellisEmbedding(9, 320, bits=4)"
    assert isinstance(layer, nn.Module)


@pytest.mark.parametrize("ids", ([9], [-1], np.array([3, 1 << 40])))
def test_known_ids_out_of_range_are_refused_by_the_call(ids):
    layer, _ = layer_of(4, 320)
    with pytest.raises(ValueError, match=r"\[trellis_embedding\]"):
        layer(mx.array(ids))


def test_ids_that_are_known_later_make_the_evaluation_fail():
    layer, _ = layer_of(4, 320)
    y = layer(mx.array([3.0, 9.0]).astype(mx.int32))
    with pytest.raises((ValueError, RuntimeError), match="9"):
        mx.eval(y)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(trellis=np.zeros((9, 130), np.float32)), "int16, got"),
        (dict(trellis=np.zeros((9, 128), np.int16)), r"\[rows, 2 \* \(1 \+ 16\*K\)\]"),
        (dict(trellis=np.zeros((9, 2 * (1 + 16 * 9)), np.int16)), "K from 1 to 8"),
        (dict(trellis=np.zeros((0, 2 * 65), np.int16)), "at least one row"),
        (dict(signs=np.ones((2, 128), np.float16)), r"float16 \[groups, 256\]"),
        (dict(signs=np.ones((2, 256), np.float32)), r"float16 \[groups, 256\]"),
        (dict(signs=np.full((2, 256), 0.5, np.float16)), r"are \+1 and -1"),
        (dict(features=256), r"\(256, 512\]"),
        (dict(features=513), r"\(256, 512\]"),
        (dict(features="320"), r"\(256, 512\]"),
    ],
)
def test_bad_weights(change, message):
    trellis, signs = random_table(4, 320)
    with pytest.raises(ValueError, match=message):
        EmbeddingWeight(**{"trellis": trellis, "signs": signs, "features": 320, **change})


def test_bad_arguments():
    layer, _ = layer_of(4, 320)
    with pytest.raises(ValueError, match="must be integers"):
        layer(mx.array([1.0]))
    with pytest.raises(ValueError, match="must be an EmbeddingWeight"):
        TrellisEmbedding(np.zeros(3))
    with pytest.raises(ValueError, match="dtype must be float32"):
        ops.trellis_embedding(mx.array([1]), layer.trellis, layer.signs, 320, 4, dtype=mx.int32)
    with pytest.raises(ValueError, match="no gradient"):
        mx.grad(lambda s: ops.trellis_embedding(mx.array([1]), layer.trellis, s, 320, 4).sum())(layer.signs)
