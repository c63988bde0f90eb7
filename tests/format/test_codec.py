"""The codec against vectors of an independent implementation, bit for bit; and that planted errors are noticed."""

import re
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest

from mlx_marlin import codec, ops
from mlx_marlin.weights.synthetic import random_weight
from mlx_marlin.weights.trellis import TrellisWeight
from tests.support import cases, golden, references
from tests.support.paths import ROOT
from tests.support.planted import PLANTED, PLANTED_FLOAT32, PLANTED_HALF_RATES

HALF_RATES = (1.5, 2.5, 3.5)


def assert_same_bits(actual, expected):
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
    assert actual.tobytes() == expected.tobytes()


@pytest.mark.parametrize("codebook", codec.CODEBOOKS)
def test_every_state_of_a_codebook(codebook):
    expected = golden.load("codebooks")[f"t_{codebook}"]
    values = codec.decode(np.arange(1 << 16, dtype=np.uint16), codebook)
    assert_same_bits(values.view(np.uint16), expected)
    assert_same_bits(codec.codebook_values(codebook).view(np.uint16), expected)


def test_the_formats_are_those_of_the_cases():
    assert codec.FORMATS == cases.FORMATS


@pytest.mark.parametrize("bits, codebook", cases.FORMATS)
def test_unpack_decode_and_pack(bits, codebook):
    z = golden.load(f"decode_k{bits}_{codebook}")
    assert (z["K"], str(z["cb"])) == (bits, codebook)
    assert_same_bits(codec.unpack(z["trellis"]), z["states"])
    assert_same_bits(codec.inner(SimpleNamespace(trellis=z["trellis"], codebook=codebook)), z["inner"])
    assert_same_bits(codec.pack(z["states"], bits), z["trellis"])


@pytest.mark.parametrize("bits", codec.WIDTHS)
def test_any_bit_pattern_survives_unpack_and_pack(bits):
    rng = np.random.default_rng(codec.half_bits(bits))
    trellis = rng.integers(0, 1 << 16, (3, 5, codec.words_per_tile(bits)), np.uint16).view(np.int16)
    assert_same_bits(codec.pack(codec.unpack(trellis), bits), trellis)


@pytest.mark.parametrize("bits", codec.WIDTHS)
def test_a_state_is_the_one_before_it_and_its_fresh_bits(bits):
    trellis = np.random.default_rng(0).integers(0, 1 << 16, (1, 1, codec.words_per_tile(bits)), np.uint16)
    states, fresh = codec.unpack(trellis)[0, 0].astype(int), codec.fresh_bits(bits)
    for t, state in enumerate(states):
        assert state >> fresh[t] == states[t - 1] & (1 << 16 - fresh[t]) - 1
    assert fresh.tolist() == [int(bits), int(bits + 0.5)] * 128
    assert codec.ends(bits)[-1] == 256 * bits == 16 * codec.words_per_tile(bits)


@pytest.mark.parametrize("bits", HALF_RATES)
def test_searched_states_of_a_half_rate_are_a_stream(bits):
    states = golden.load("viterbi_half")[f"k{bits}_mul1"][None]
    trellis = codec.pack(states, bits)
    assert codec.trellis_bits(trellis.shape) == bits
    assert_same_bits(codec.unpack(trellis), states)


def test_widths():
    assert codec.MAX_BITS == 8 and [type(bits) for bits in codec.WIDTHS if bits in HALF_RATES] == [float] * 3
    for bits in codec.WIDTHS:
        back = codec.bits_of_half(codec.half_bits(bits))
        assert (back, type(back)) == (bits, type(bits))
        found = codec.trellis_bits((8, 8, codec.words_per_tile(bits)))
        assert (found, type(found)) == (bits, type(bits))
        assert codec.is_half_rate(bits) == (bits in HALF_RATES)
        codec.check_bits(bits, "mul1")
        assert codec.format_word(bits, "mul1") == int(2 * bits) | 2 << 8
    codec.check_bits(np.int64(3), "mcg")
    codec.check_bits(np.float64(2.5))


@pytest.mark.parametrize("codebook", ["3inst", "mcg"])
@pytest.mark.parametrize("bits", HALF_RATES)
def test_half_rates_belong_to_mul1(bits, codebook):
    message = f"half rates exist for mul1 only, got {bits} bits with codebook '{codebook}'"
    trellis = golden.load(f"decode_k{bits}_mul1")["trellis"]
    for refused in (
        lambda: codec.check_bits(bits, codebook),
        lambda: codec.inner(SimpleNamespace(trellis=trellis, codebook=codebook)),
        lambda: TrellisWeight(
            np.zeros((8, 8, codec.words_per_tile(bits)), np.int16), *[np.ones(128, np.float16)] * 2, codebook
        ),
    ):
        with pytest.raises(ValueError, match=message):
            refused()


def test_pack_refuses_states_that_do_not_follow_each_other():
    states = codec.unpack(np.random.default_rng(0).integers(-9, 9, (1, 1, 48)).astype(np.int16))
    states[0, 0, 100] ^= 0x8000
    with pytest.raises(ValueError, match="not tail-biting windows of a 3-bit stream"):
        codec.pack(states, 3)
    with pytest.raises(ValueError, match=r"bits must be one of 1, 1\.5, .*, 8, whole widths as integers; got 9"):
        codec.pack(states, 9)
    with pytest.raises(ValueError, match=r"uint16 of shape \[k/16, n/16, 256\], got int64 \[3\]"):
        codec.pack(np.zeros(3, np.int64), 3)


def test_signs():
    z = golden.load("signs")
    assert_same_bits(codec.unpack_signs(z["words"]), z["signs"])
    with pytest.raises(ValueError, match="packed signs are int16"):
        codec.unpack_signs(z["signs"])


def test_tile_order_is_a_permutation_and_undone():
    matrix = np.arange(48 * 32).reshape(48, 32)
    tiles = codec.matrix_to_tiles(matrix)
    assert sorted(tiles.reshape(-1)) == list(range(matrix.size))
    np.testing.assert_array_equal(codec.tiles_to_matrix(tiles), matrix)
    # Storage positions 0..7 of a tile, from the format's description.
    np.testing.assert_array_equal(
        tiles[0, 0, :8], [r * 32 + c for r, c in ((0, 0), (1, 0), (8, 0), (9, 0), (0, 8), (1, 8), (8, 8), (9, 8))]
    )


@pytest.mark.parametrize("dtype, tolerance", [(np.float64, 1e-14), (np.float32, 1e-6), (np.float16, 1e-3)])
def test_hadamard(dtype, tolerance):
    x = np.random.default_rng(0).standard_normal((3, 256)).astype(dtype)
    y = codec.hadamard(x)
    assert y.dtype == dtype
    np.testing.assert_allclose(y, references.rotate(x.astype(np.float64)), atol=8 * tolerance)
    np.testing.assert_allclose(codec.hadamard(y), x, atol=8 * tolerance)
    assert_same_bits(codec.hadamard(x.T, axis=0), np.ascontiguousarray(y.T))
    with pytest.raises(ValueError, match="multiple of 128 long, got 100"):
        codec.hadamard(x[:, :100])


@pytest.mark.parametrize("name", golden.names("linear_*"))
def test_linear_vectors(name):
    z = golden.load(name)
    w = golden.weight(z)
    bias = 0 if w.bias is None else np.array(w.bias.astype(mx.float32))[: w.out_features]
    y = z["x"].astype(np.float64) @ codec.dequantize(w) + bias
    assert cases.row_error(y, z["y64"]) < 1e-6
    assert cases.row_error(references.reference_linear(z["x"], w), z["y64"]) < 1e-12


@pytest.mark.parametrize("name", golden.names("moe_*"))
def test_moe_vectors(name):
    z = golden.load(name)
    experts = golden.experts(z)
    np.testing.assert_array_equal([[experts[m][e].bits for m in experts] for e in range(len(z["bits"]))], z["bits"])
    y = references.reference_experts(z["x"].astype(np.float64), z["ids"], experts, z["probs"])
    assert cases.row_error(y, z["y64"]) < 1e-12


@pytest.mark.parametrize("name", golden.names("embedding_*"))
def test_embedding_vectors(name):
    z = golden.load(name)
    groups, hidden = z["signs"].shape[0], int(z["hidden"])
    scales, states = codec.unpack_embedding(z["trellis"], groups)
    assert codec.embedding_bits(z["trellis"].shape, groups) == z["K"]
    assert_same_bits(states, z["states"])
    assert_same_bits(scales, z["scales"])
    values = codec.decode_embedding(z["trellis"], z["signs"], hidden)
    assert_same_bits(values, z["values"])
    np.testing.assert_allclose(values, z["y64"], rtol=2**-10, atol=2**-24)
    some = [7, 3, 7]
    assert_same_bits(codec.decode_embedding(z["trellis"][some], z["signs"], hidden), values[some])


def test_an_embedding_whose_arrays_do_not_fit():
    z = golden.load("embedding_k2")
    trellis, signs = z["trellis"], z["signs"]
    for arguments, message in (
        ((trellis.astype(np.float32), signs, 320), "the trellis of an embedding is int16, got float32"),
        ((trellis[:, :-1], signs, 320), r"shape \[rows, 2 \* \(1 \+ 16\*K\)\] with a whole K .*; got \[24, 65\]"),
        ((np.zeros((4, 50), np.int16), signs, 320), r"a whole K from 1 to 8.* got \[4, 50\]"),
        ((np.zeros((4, 2 * 145), np.int16), signs, 320), r"a whole K from 1 to 8.* got \[4, 290\]"),
        ((trellis[0], signs, 320), r"got \[66\]"),
        (
            (trellis, signs[:1], 320),
            r"the signs of an embedding of 320 elements are float16 \[2, 256\], got float16 \[1",
        ),
        ((trellis, signs, 256), r"the signs of an embedding of 256 elements are float16 \[1, 256\]"),
        ((trellis, signs.astype(np.float32), 320), r"float16 \[2, 256\], got float32"),
        ((trellis, signs, 0), "hidden must be a positive integer, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            codec.decode_embedding(*arguments)


@pytest.mark.parametrize("bits, codebook", cases.FORMATS)
def test_dequantize_removes_the_padding(bits, codebook):
    rng = np.random.default_rng(codec.half_bits(bits))
    w = random_weight(rng, 200, 130, bits, codebook)
    dense = codec.dequantize(w)
    assert (dense.shape, dense.dtype) == ((200, 130), np.float32)
    x = rng.standard_normal((4, 200))
    assert cases.row_error(x @ dense, references.reference_linear(x, w)) < 1e-6


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_decoder_is_above_the_tolerance_of_every_case(name, dtype, monkeypatch):
    function, planted, codebooks = PLANTED[name]
    for case in cases.pairwise():
        if case.dtype != dtype or not case.rows or case.codebook not in codebooks:
            continue
        if case.mix in ("codebooks", "both") and codebooks != codec.CODEBOOKS:
            continue  # the planted codebook may not be among the experts chosen
        inputs = case.inputs()
        right = case.reference(*inputs)
        with monkeypatch.context() as patch:
            patch.setattr(codec.trellis, function, planted)
            wrong = case.reference(*inputs)
        rounded = mx.array(wrong.astype(np.float32)).astype(getattr(mx, dtype))
        assert cases.row_error(rounded, right) > case.tolerance, f"{name} passes {case}"


@pytest.mark.parametrize("name", PLANTED_HALF_RATES)
def test_a_planted_half_rate_is_above_the_tolerance_of_every_case(name, monkeypatch):
    function, planted, _ = PLANTED_HALF_RATES[name]
    selected = [c for c in cases.pairwise() if c.rows and type(c.bits) is float and c.mix == "uniform"]
    assert {c.bits for c in selected} == set(HALF_RATES) and {c.dtype for c in selected} == set(cases.DTYPES)
    for case in selected:
        inputs = case.inputs()
        right = case.reference(*inputs)
        with monkeypatch.context() as patch:
            patch.setattr(codec.trellis, function, planted)
            assert cases.row_error(case.reference(*inputs), right) > case.tolerance, f"{name} passes {case}"


@pytest.mark.parametrize("name", PLANTED_HALF_RATES)
def test_a_planted_half_rate_differs_in_the_vectors(name, monkeypatch):
    function, planted, _ = PLANTED_HALF_RATES[name]
    monkeypatch.setattr(codec.trellis, function, planted)
    for bits in codec.WIDTHS:
        z = golden.load(f"decode_k{bits}_mul1")
        same = np.array_equal(codec.inner(SimpleNamespace(trellis=z["trellis"], codebook="mul1")), z["inner"])
        assert same == (bits not in HALF_RATES)


@pytest.mark.parametrize("name", PLANTED_FLOAT32)
def test_a_decoder_without_the_rounding_is_above_the_float32_tolerance(name, monkeypatch):
    function, planted, codebooks = PLANTED_FLOAT32[name]
    selected = [
        c
        for c in cases.pairwise()
        if c.rows and c.dtype == "float32" and c.codebook in codebooks and c.mix in ("uniform", "bits")
    ]
    assert selected
    for case in selected:
        inputs = case.inputs()
        right = case.reference(*inputs)
        with monkeypatch.context() as patch:
            patch.setattr(codec.trellis, function, planted)
            assert cases.row_error(case.reference(*inputs), right) > case.tolerance, f"{name} passes {case}"


@pytest.mark.parametrize("name", {**PLANTED, **PLANTED_FLOAT32})
def test_a_planted_decoder_differs_in_the_vectors(name, monkeypatch):
    function, planted, codebooks = {**PLANTED, **PLANTED_FLOAT32}[name]
    monkeypatch.setattr(codec.trellis, function, planted)
    for bits, codebook in cases.FORMATS:
        if codebook in codebooks:
            z = golden.load(f"decode_k{bits}_{codebook}")
            w = SimpleNamespace(trellis=z["trellis"], codebook=codebook)
            assert not np.array_equal(codec.inner(w), z["inner"])


def test_bad_input():
    good = np.zeros((8, 8, 48), np.int16)
    with pytest.raises(ValueError, match=r"a trellis tensor is int16, got float32"):
        codec.unpack(good.astype(np.float32))
    for shape in ((8, 8, 0), (8, 8, 8), (8, 8, 41), (8, 8, 72), (8, 8, 144), (8, 48)):
        with pytest.raises(ValueError, match=r"shape \[k/16, n/16, 16\*K\] with K one of 1, 1\.5, .*, 8, got \["):
            codec.unpack(np.zeros(shape, np.int16))
    with pytest.raises(ValueError, match="codebook must be one of 3inst, mcg, mul1, got 'MUL1'"):
        codec.decode(np.zeros(4, np.uint16), "MUL1")
    for states in (np.array([70_000]), np.array([1.5]), [3]):
        with pytest.raises(ValueError, match="states must be uint16, got"):
            codec.decode(states, "mcg")
    for bits in (0, 0.5, 4.5, 2.25, 9, 2.0, "3", None):
        with pytest.raises(ValueError, match=r"bits must be one of 1, 1\.5, 2, .*; got"):
            codec.pack(np.zeros((1, 1, 256), np.uint16), bits)
    with pytest.raises(ValueError, match="x must be floating point, got int64"):
        codec.hadamard(np.ones((2, 128), np.int64))
    assert [codec.padded(size) for size in (1, 128, 129, 576)] == [128, 128, 256, 640]
    assert isinstance(TrellisWeight(good, np.ones(128, np.float16), np.ones(128, np.float16)), TrellisWeight)


def test_the_kernels_have_the_same_constants():
    """codec/trellis.py keeps its own: it is the oracle. That all states decode alike is tested with the kernels."""
    halves = {name: multiplier for name, (multiplier, _) in codec.trellis._HALVES_HASH.items()}
    assert ops.CODEBOOK_MULTIPLIERS == {**halves, "mul1": codec.trellis._MUL1_MULTIPLIER}
    text = (ROOT / "csrc/format.h").read_text()
    defined = dict(re.findall(r"^#define MARLIN_(\w+) \(?([-+.\w]+?)[u)]*(?:\s|$)", text, re.MULTILINE))
    assert int(defined["3INST_INCREMENT"]) == codec.trellis._HALVES_HASH["3inst"][1]
    assert int(defined["HALVES_MASK"], 16) == codec.trellis._HALVES_MASK
    assert int(defined["HALVES_XOR"], 16) == codec.trellis._HALVES_XOR
    assert float.fromhex(defined["MUL1_SCALE"].rstrip("f")) == codec.trellis._MUL1_SCALE
    assert float.fromhex(defined["MUL1_OFFSET"].rstrip("f")) == codec.trellis._MUL1_OFFSET
