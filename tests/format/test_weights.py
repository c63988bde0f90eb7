"""Weights and banks: what they accept, what they hold, and what they say about bad input."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_marlin import codec
from mlx_marlin.weights.experts import ExpertBank, ExpertStack
from mlx_marlin.weights.synthetic import random_weight
from mlx_marlin.weights.trellis import TrellisWeight
from tests.support import cases

ONES = np.ones(128, np.float16)
TRELLIS = np.random.default_rng(0).integers(-(1 << 15), 1 << 15, (8, 8, 48)).astype(np.int16)


def test_a_weight_takes_numpy_and_mlx_arrays():
    for convert in (np.asarray, mx.array):
        w = TrellisWeight(convert(TRELLIS), convert(ONES), convert(ONES), "mcg")
        assert (w.bits, w.codebook, w.in_features, w.out_features) == (3, "mcg", 128, 128)
        assert w.padded_shape == (128, 128)
        np.testing.assert_array_equal(np.array(w.trellis), TRELLIS)


@pytest.mark.parametrize("bits", codec.WIDTHS)
def test_bits_follow_from_the_shape(bits):
    w = TrellisWeight(np.zeros((8, 8, codec.words_per_tile(bits)), np.int16), ONES, ONES, "mul1")
    assert w.bits == bits and type(w.bits) is type(bits)


def test_packed_signs_are_expanded():
    words = np.random.default_rng(0).integers(-(1 << 15), 1 << 15, 8).astype(np.int16)
    w = TrellisWeight(TRELLIS, words, ONES)
    assert w.suh.dtype == mx.float16
    np.testing.assert_array_equal(np.array(w.suh), codec.unpack_signs(words))


def test_a_bias_of_logical_size_is_padded():
    w = TrellisWeight(TRELLIS, ONES, ONES, bias=np.ones(100, np.float16), out_features=100)
    np.testing.assert_array_equal(np.array(w.bias), np.arange(128) < 100)
    assert TrellisWeight(TRELLIS, ONES, ONES, bias=mx.ones((128,), mx.bfloat16), out_features=100).bias.size == 128


@pytest.mark.parametrize(
    "change, message",
    [
        ({"trellis": TRELLIS.astype(np.int32)}, "trellis must be int16, got mlx.core.int32"),
        ({"trellis": TRELLIS.astype(np.float16)}, "trellis must be int16, got mlx.core.float16"),
        ({"trellis": TRELLIS[0]}, r"shape \[k/16, n/16, 16\*K\] with K one of 1, .*, 8, got \[8, 48\]"),
        ({"trellis": TRELLIS[..., :36]}, r"K one of 1, 1\.5, .*, 8, got \[8, 8, 36\]"),
        (
            {"trellis": TRELLIS[..., :40], "codebook": "3inst"},
            "half rates exist for mul1 only, got 2.5 bits with codebook '3inst'",
        ),
        ({"trellis": np.zeros((8, 8, 144), np.int16)}, r"K one of 1, .*, 8, got \[8, 8, 144\]"),
        ({"trellis": TRELLIS[..., :0]}, r"K one of 1, .*, 8, got \[8, 8, 0\]"),
        ({"trellis": TRELLIS[:7]}, r"stands for a \[112, 128\] matrix; both sizes must be positive multiples of 128"),
        ({"trellis": TRELLIS[:, :0]}, r"stands for a \[128, 0\] matrix"),
        (
            {"suh": ONES[:64]},
            r"suh must be float16 of shape \[128\] \(or packed int16 signs \[8\]\), got .*float16 \[64\]",
        ),
        ({"svh": ONES.astype(np.float32)}, r"svh must be float16 of shape \[128\] .*, got .*float32 \[128\]"),
        ({"suh": np.zeros(16, np.int16)}, r"suh: packed signs must have shape \[8\], got \[16\]"),
        ({"svh": ONES[None]}, r"svh must be float16 .* got .*float16 \[1, 128\]"),
        ({"codebook": "mul2"}, "codebook must be one of 3inst, mcg, mul1, got 'mul2'"),
        ({"codebook": None}, "codebook must be one of 3inst, mcg, mul1, got None"),
        ({"bias": ONES[:5]}, r"bias must be floating point of shape \[128\] or \[128\], got .*float16 \[5\]"),
        ({"bias": np.zeros(128, np.int32)}, "bias must be floating point .* got .*int32"),
        ({"in_features": 129}, r"in_features must lie in \(0, 128\].*got 129"),
        ({"in_features": 0}, r"in_features must lie in \(0, 128\].*got 0"),
        ({"out_features": -1}, r"out_features must lie in \(0, 128\].*got -1"),
        ({"in_features": 100.7}, "in_features must be an integer, got 100.7"),
        ({"out_features": "100"}, "out_features must be an integer, got '100'"),
        ({"trellis": None}, "trellis must be an array of numbers, NumPy's or MLX's, got NoneType"),
        ({"suh": None}, "suh must be an array of numbers, .* got NoneType"),
        ({"svh": "scales"}, "svh must be an array of numbers, .* got str"),
        ({"bias": [None] * 128}, "bias must be an array of numbers, .* got list"),
    ],
)
def test_bad_weights(change, message):
    arguments = {"trellis": TRELLIS, "suh": ONES, "svh": ONES, "codebook": "mul1"} | change
    with pytest.raises(ValueError, match=message):
        TrellisWeight(**arguments)


def test_a_size_that_would_need_less_padding_is_refused():
    rng = np.random.default_rng(0)
    w = random_weight(rng, 256, 256, 2)
    assert TrellisWeight(w.trellis, w.suh, w.svh, in_features=129).in_features == 129
    with pytest.raises(ValueError, match=r"in_features must lie in \(128, 256\].*got 128"):
        TrellisWeight(w.trellis, w.suh, w.svh, in_features=128)


def test_a_stack_holds_the_words_of_every_expert_as_they_are():
    experts = cases.Case(4, "3inst", "float32", 1, "padded", "silu", mix="both", bias=True).experts()
    for name, weights in experts.items():
        stack = ExpertStack.of(name, weights)
        codes, offsets, formats = (np.array(a) for a in (stack.codes, stack.offsets, stack.formats))
        assert (codes.dtype, offsets.dtype, formats.dtype) == (np.uint32, np.int64, np.uint32)
        for e, w in enumerate(weights):
            words = np.array(w.trellis).reshape(-1).view(np.uint32)
            np.testing.assert_array_equal(codes[offsets[e] : offsets[e] + words.size], words)
            assert formats[e] == int(2 * w.bits) | codec.CODEBOOKS.index(w.codebook) << 8
            np.testing.assert_array_equal(np.array(stack.suh[e]), np.array(w.suh))
            np.testing.assert_array_equal(np.array(stack.svh[e]), np.array(w.svh))
            np.testing.assert_array_equal(np.array(stack.bias[e]), np.array(w.bias).astype(np.float32))
        assert codes.size == sum(w.trellis.size // 2 for w in weights)


def test_a_stack_gives_each_expert_back():
    rng = np.random.default_rng(4)
    weights = [random_weight(rng, 250, 120, bits, book, bias=True) for bits, book in ((2, "mcg"), (5, "mul1"))]
    stack = ExpertStack.of("gate", weights)
    assert len(list(stack)) == 2
    for got, given in zip(stack, weights):
        assert repr(got) == repr(given)
        assert all(mx.array_equal(getattr(got, n), getattr(given, n)) for n in ("trellis", "suh", "svh", "bias"))
    with pytest.raises(IndexError):
        stack[2]


def test_an_expert_without_bias_gets_zeros_where_others_have_one():
    rng = np.random.default_rng(0)
    stack = ExpertStack.of("up", [random_weight(rng, 128, 128, 2, bias=b) for b in (False, True)])
    assert not np.array(stack.bias[0]).any() and np.array(stack.bias[1]).any()
    assert ExpertStack.of("up", [random_weight(rng, 128, 128, 2)]).bias is None


def test_a_bank():
    case = cases.Case(4, "3inst", "float32", 1, "padded", "silu", mix="bits")
    bank = case.bank()
    assert (bank.num_experts, bank.hidden, bank.intermediate) == (cases.EXPERTS, 192, 384)
    assert bank.triples == tuple(
        tuple(bits for bits, _ in expert) for expert in cases.expert_formats(4, "3inst", "bits")
    )


def test_a_bank_takes_generators():
    experts = make(256, 128)
    bank = ExpertBank(*((w for w in experts[name]) for name in ("gate", "up", "down")))
    assert bank.triples == ((2, 2, 2), (2, 2, 2))


def make(hidden, intermediate, count=2):
    rng = np.random.default_rng(0)
    return cases.random_experts(rng, hidden, intermediate, [((2, "mul1"),) * 3] * count)


def test_bad_banks():
    good = make(256, 128)
    with pytest.raises(ValueError, match="one weight per expert, got 2, 2, 1"):
        ExpertBank(good["gate"], good["up"], good["down"][:1])
    for nothing in (None, 3):
        with pytest.raises(ValueError, match="up must be a list with one TrellisWeight per expert, got"):
            ExpertBank(good["gate"], nothing, good["down"])
    with pytest.raises(ValueError, match="gate needs at least one expert"):
        ExpertBank([], [], [])
    with pytest.raises(ValueError, match=r"up\[1\] must be a TrellisWeight, got ndarray"):
        ExpertBank(good["gate"], [good["up"][0], TRELLIS], good["down"])
    with pytest.raises(ValueError, match=r"gate\[1\] is .*in_features=128.* must have the sizes of gate\[0\]"):
        ExpertBank([good["gate"][0], make(128, 128)["gate"][0]], good["up"], good["down"])
    with pytest.raises(ValueError, match="gate and up must map hidden to one intermediate size"):
        ExpertBank(good["gate"], make(256, 256)["up"], good["down"])
    with pytest.raises(ValueError, match="down must map it back"):
        ExpertBank(good["gate"], good["up"], make(256, 256)["down"])
    with pytest.raises(ValueError, match="down must map it back"):
        ExpertBank(good["gate"], good["up"], make(200, 128)["down"])
