"""quantize_weight: the error of the codes, the gain of calibration, padding, determinism."""

import numpy as np
import pytest

from bench.quality import gaussian_errors, tile_error
from mlx_marlin import TrellisWeight, codec
from mlx_marlin.quantize import hessian as hessians
from mlx_marlin.quantize import quantize_weight
from mlx_marlin.quantize.ldlq import ldlq, quantize_tiles
from mlx_marlin.quantize.regularise import INPUT_SCALE, expected_scale, feedback_scale, gaussian_error
from mlx_marlin.quantize.weight import expected_loss, prepare, quantize_prepared

TABLE = tile_error.REFERENCE


@pytest.mark.parametrize("codebook, bits", [f for f in TABLE if 1 < f[1] <= 4])
def test_tile_error(codebook, bits):
    """120 tiles have a standard error near 1 %, so the bound is wider than the 4000 tiles' one below."""
    assert tile_error.tile_error(codebook, bits, 120) <= 1.04 * TABLE[codebook, bits]


@pytest.mark.slow
@pytest.mark.parametrize("codebook, bits", list(TABLE))
def test_tile_error_of_4000_tiles(codebook, bits):
    """K = 7 and 8 are dominated by clipped tails, whose standard error in the table is 10 to 30 %."""
    error = tile_error.tile_error(codebook, bits, 4000)
    print(f"{codebook} K={bits}: {error:.4g}, table {TABLE[codebook, bits]:.4g}")
    assert error <= (1.015 if bits <= 6 else 1.3) * TABLE[codebook, bits]


@pytest.mark.parametrize("codebook, bits", list(TABLE))
def test_expected_errors_follow_the_table(codebook, bits):
    """The curves by which losses are expected, against ExLlamaV3's errors, at the scale that each codebook has best.

    At 6 bits and more the curves bend there, as values begin to be clipped; 7 and 8 have few such values.
    """
    scale = INPUT_SCALE[codebook, bits]
    found = float(gaussian_error(np.array([scale**2]), bits, codebook)[0]) / scale**2
    assert found == pytest.approx(TABLE[codebook, bits], rel=0.06 if bits < 6 else 0.12 if bits == 6 else 0.4)


@pytest.mark.parametrize("bits", [2, 3.5])
def test_expected_errors_of_other_scales(bits):
    """A few of the tiles that the curves are made of, at every width of the targets."""
    found = np.exp(gaussian_errors.log_errors("mul1", bits, tiles=8))
    expected = gaussian_error(np.square(gaussian_errors.DEVIATIONS), bits, "mul1")
    np.testing.assert_allclose(expected, found, rtol=0.15)


@pytest.fixture(scope="module")
def calibrated():
    """A weight with uneven rows and inputs that span their dimensions unevenly."""
    rng = np.random.default_rng(0)
    weight = 0.02 * rng.standard_normal((192, 320)) * np.exp(0.4 * rng.standard_normal((192, 1)))
    mixing = rng.standard_normal((192, 192)) * np.exp(-np.arange(192) / 60)[:, None]
    x = rng.standard_normal((2000, 192)) @ mixing
    return weight.astype(np.float32), x.T @ x / len(x)


def output_error(weight, quantized, h):
    error = weight - codec.dequantize(quantized)
    return np.sum((h @ error) * error) / np.sum((h @ weight) * weight)


@pytest.mark.parametrize(
    "bits", [pytest.param(1, marks=pytest.mark.slow), 2, 2.5, pytest.param(4, marks=pytest.mark.slow)]
)
def test_calibration_lowers_the_output_error(calibrated, bits):
    weight, h = calibrated
    plain = quantize_weight(weight, bits)
    aware = quantize_weight(weight, bits, hessian=h)
    assert (aware.in_features, aware.out_features) == (192, 320) and aware.padded_shape == (256, 384)
    assert output_error(weight, aware, h) < 0.6 * output_error(weight, plain, h)


def test_plain_error_follows_the_table(calibrated):
    """Without a Hessian the relative error is the tiles' own, padding and scales included."""
    weight, _ = calibrated
    for bits in (3, 1.5, 3.5):
        w = quantize_weight(weight, bits)
        assert w.bits == bits and type(w.bits) is type(bits)
        error = weight - codec.dequantize(w)
        assert np.mean(np.square(error)) / np.mean(np.square(weight)) < 1.05 * TABLE["mul1", bits]


@pytest.mark.parametrize("codebook", codec.CODEBOOKS)
def test_deterministic_whatever_the_threads(calibrated, codebook):
    weight, h = calibrated
    if codebook != "mul1":  # the codebooks differ in the values searched only: less of the weight
        weight, h = weight[:128, :256], h[:128, :128]
    one, three = (quantize_weight(weight, 2, codebook, h, seed=5, threads=n) for n in (1, 3))
    for name in ("trellis", "suh", "svh"):
        np.testing.assert_array_equal(np.array(getattr(one, name)), np.array(getattr(three, name)))
    other = quantize_weight(weight, 2, codebook, h, seed=6)
    assert not np.array_equal(np.array(one.trellis), np.array(other.trellis))


def test_feedback_identity():
    """With R = L D L^T, the loss is the sum of each row's own rounding error times D."""
    rng = np.random.default_rng(3)
    a = rng.standard_normal((300, 128))
    r = a.T @ a / 300 + np.eye(128)
    lower, spread = hessians.block_factor(r)
    inner = rng.standard_normal((128, 128)).astype(np.float32)
    _, values = ldlq(inner, lower, 2, "mul1")
    error = (inner - values).astype(np.float64)
    rounding = lower.T @ error
    loss = np.sum((r @ error) * error)
    blocks = np.array([r[i, i] for i in range(128)])
    assert np.all(spread <= blocks + 1e-9), "a conditional variance exceeds the variance"
    np.testing.assert_allclose(np.mean(np.square(rounding)), TABLE["mul1", 2], rtol=0.1)
    np.testing.assert_allclose(loss, np.sum(spread[:, None] * np.square(rounding)), rtol=0.05)
    _, plain = quantize_tiles(inner, 2, "mul1")
    plain_error = (inner - plain).astype(np.float64)
    assert loss < np.sum((r @ plain_error) * plain_error)


def test_feedback_gain():
    """What independent rounding errors of the blocks below add to a block's target."""
    rng = np.random.default_rng(4)
    a = rng.standard_normal((400, 192)) * np.exp(-np.arange(192) / 40)
    lower, _ = hessians.block_factor(a.T @ a / 400 + 0.01 * np.eye(192))
    sizes = np.repeat(rng.uniform(0.5, 2, 12), 16)
    errors = sizes[:, None] * rng.standard_normal((192, 4000))
    added = errors - np.linalg.solve(lower.T, errors)
    found = hessians.feedback_gain(lower) @ np.square(sizes[::16])
    np.testing.assert_allclose(found, np.square(added).reshape(12, -1).mean(1), rtol=0.05, atol=1e-12)


@pytest.fixture(scope="module")
def whole():
    """A weight and a Hessian without padding, strongly correlated inputs."""
    rng = np.random.default_rng(1)
    x = rng.standard_normal((1500, 128)) @ (rng.standard_normal((128, 128)) * np.exp(-np.arange(128) / 25)[:, None])
    return (0.05 * rng.standard_normal((128, 128))).astype(np.float32), x.T @ x / len(x)


@pytest.mark.parametrize("bits", [1, 1.5, 2, 2.5, 3.5, 4])
def test_expected_loss_is_what_quantization_leaves(whole, bits):
    """Bits are allocated by it. The least-squares scales that follow the search lower it, most at 1 bit."""
    weight, h = whole
    prepared = prepare(weight, h, 0)
    c = quantize_prepared(prepared, bits, "mul1")
    error = weight - codec.dequantize(TrellisWeight(c.trellis, c.suh, c.svh, "mul1"))
    found = np.sum((prepared.hessian @ error) * error)
    assert 0.85 * found < expected_loss(prepared, bits, "mul1") < (1.3 if bits < 2 else 1.15) * found


@pytest.mark.parametrize("bits", [1, 1.5, 2])
def test_the_scale_makes_room_for_the_feedback(calibrated, bits):
    prepared = prepare(*calibrated, 0)
    inner = prepared.regularised.inner
    wide = expected_scale(inner, bits, "mul1")
    narrow, _ = feedback_scale(inner, prepared.gain, prepared.spread, bits, "mul1")
    losses = []
    for scale in (narrow, wide):
        _, values = ldlq(inner * np.float32(scale), prepared.factor, bits, "mul1")
        rounding = prepared.factor.T @ (inner - values / scale)
        losses.append(np.sum(prepared.spread[:, None] * np.square(rounding)))
    assert narrow < 0.95 * wide and losses[0] < 0.97 * losses[1]


@pytest.mark.parametrize("bits", [1, 2.5, 3, 3.5, 5])
def test_without_feedback_the_scale_is_the_codebooks_own(bits):
    inner = np.random.default_rng(0).standard_normal((128, 128)).astype(np.float32)
    found, _ = feedback_scale(inner, np.zeros((8, 8)), np.ones(128), bits, "mul1")
    assert found == pytest.approx(expected_scale(inner, bits, "mul1"), rel=0.11)


def test_zero_columns_and_rows_are_exact():
    weight = np.random.default_rng(1).standard_normal((128, 256)).astype(np.float32)
    weight[:, 7] = 0
    weight[9] = 0
    result = codec.dequantize(quantize_weight(weight, 3))
    assert not result[:, 7].any() and np.abs(result[9]).max() < 0.6
    assert not codec.dequantize(quantize_weight(np.zeros((128, 128)), 2)).any()


def test_bias_is_kept():
    weight = np.random.default_rng(1).standard_normal((130, 100))
    bias = np.arange(100, dtype=np.float16)
    w = quantize_weight(weight, 2, bias=bias)
    assert isinstance(w, TrellisWeight)
    np.testing.assert_array_equal(np.array(w.bias)[:100], bias)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"weight": np.zeros(4)}, r"\[4\]"),
        ({"weight": np.full((4, 4), np.inf)}, "not finite"),
        ({"K": 9}, "whole widths as integers; got 9"),
        ({"K": 4.5}, "whole widths as integers; got 4.5"),
        ({"K": 2.0}, "whole widths as integers; got 2.0"),
        ({"K": 2.5, "codebook": "mcg"}, "half rates exist for mul1 only, got 2.5 bits with codebook 'mcg'"),
        ({"codebook": "nf4"}, "'nf4'"),
        ({"hessian": np.eye(5)}, r"\[4, 4\], got shape \[5, 5\]"),
    ],
)
def test_bad_input(change, message):
    arguments = {"weight": np.ones((4, 4)), "K": 2, **change}
    with pytest.raises(ValueError, match=message):
        quantize_weight(**arguments)
