"""What the converter sees of experts of two matrices: their rows, scores, and effects."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_marlin import TrellisModelLoader, codec
from mlx_marlin.quantize import convert
from mlx_marlin.quantize.taps import Taps
from tests.support import architectures_mlp, generic_checkpoints
from tests.support.small_conversions import SMALL, add_tokenizer, quick_conversions, write_text  # noqa: F401

EXPERTS = "mixer.switch_mlp"


def moe_layer(latent: int | None):
    """The layer of experts of a model with random weights, in float32."""
    config = architectures_mlp.nemotron_h(SMALL, latent=latent).config
    mx.random.seed(3)
    layer = generic_checkpoints.new_model(config).layers[1]
    # Zeros otherwise, so that all experts would have one score.
    layer.mixer.gate.weight = mx.random.normal(layer.mixer.gate.weight.shape)
    layer.set_dtype(mx.float32)
    return layer


@pytest.mark.parametrize("latent", [None, 96])
def test_scores_are_what_an_experts_output_weighs_in_the_layers(latent):
    """Behind a projection its gain is in them, as for a random direction."""
    layer = moe_layer(latent)
    x = mx.array(np.random.default_rng(0).standard_normal((2, 9, SMALL.hidden)).astype(np.float32))
    wanted_out = np.array(layer(x))
    chosen, scores = map(np.array, layer.mixer.gate(layer.norm(x)))
    linears = [path for path, module in layer.named_modules() if type(module).__name__ == "Linear"]
    with Taps(layer, linears, [EXPERTS]) as taps:
        with taps.noting() as notes:
            out = np.array(layer(x))
        for add in notes.parts():
            add()
    np.testing.assert_allclose(out, wanted_out, atol=1e-5)
    rows = taps.experts[EXPERTS].rows
    assert len(rows.scores) == len(rows.indices) == 1
    np.testing.assert_array_equal(rows.indices[0], chosen.reshape(-1, 2))
    scores = scores.reshape(-1, 2)
    gain = 1.0 if latent is None else float(np.median(rows.scores[0] / scores))
    # Scores are differences of outputs of size 10.
    np.testing.assert_allclose(rows.scores[0], gain * scores, atol=1e-4)
    if latent is not None:
        weight = np.array(layer.mixer.fc2_latent_proj.weight).astype(np.float64)
        assert gain**2 == pytest.approx(np.sum(weight**2) / latent, rel=0.3)


@pytest.mark.parametrize("name", ["nemotron_h", pytest.param("phixtral", marks=pytest.mark.slow)])
def test_every_expert_is_quantized_with_a_width_of_its_own(name, tmp_path, quick_conversions):  # noqa: F811
    checkpoint = getattr(architectures_mlp, name)(SMALL)
    source = add_tokenizer(checkpoint.write_dense(tmp_path / "source"))
    plan = convert(source, tmp_path / "exl3", bits=4.5, head_bits=16, calibration=write_text(tmp_path / "text"))
    heads = {"lm_head", "lm_head.linear"}
    assert set(plan.widths) == checkpoint.bits.keys() - heads
    loader = TrellisModelLoader(tmp_path / "exl3")
    assert set(loader.names) - heads == set(plan.widths)
    experts = [n for n in plan.widths if ".experts." in n or ".moe.mlp." in n]
    assert len({plan.widths[n] for n in experts}) > 1
    for n in experts:
        truth, found = np.array(checkpoint.dense[f"{n}.weight"]).T, codec.dequantize(loader.load_weight(n))
        found = found[: truth.shape[0], : truth.shape[1]]
        # 1 for this matrix, whatever its width; 0 for another.
        assert np.sum(found * truth) / np.sum(found * found) == pytest.approx(1, abs=0.3), n
