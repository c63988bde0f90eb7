"""Every architecture: logits of the EXL3 checkpoint against the same mlx-lm model with the dequantized weights."""

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm import utils as mlx_lm_utils
from mlx_lm.models.switch_layers import SwitchGLU

from mlx_marlin import TrellisLinear, TrellisSwitchGLU
from mlx_marlin.layers.experts import TrellisExperts
from mlx_marlin.lm.model import load_exl3_model
from tests.support import architectures, architectures_gemma, generic_checkpoints
from tests.support.checkpoints import SIZES
from tests.support.generic_checkpoints import logits


def assert_same(got: np.ndarray, wanted: np.ndarray) -> None:
    assert np.isfinite(wanted).all() and wanted.std() > 0.1
    assert np.abs(got - wanted).max() <= 1e-4 * np.abs(wanted).max()
    assert (got.argmax(-1) == wanted.argmax(-1)).all()


def load_dense(checkpoint, directory):
    """mlx-lm's own model of the dense form, in float32."""
    dense, _ = mlx_lm_utils.load_model(checkpoint.write_dense(directory))
    dense.set_dtype(mx.float32)
    return dense


@pytest.mark.parametrize("name", architectures.ARCHITECTURES)
def test_logits_equal_those_of_the_dequantized_weights(name, tmp_path):
    checkpoint = architectures.ARCHITECTURES[name]()
    model, _ = load_exl3_model(checkpoint.write(tmp_path / "exl3", shards=2))
    assert_same(logits(model), logits(load_dense(checkpoint, tmp_path / "dense")))
    kinds = [type(module) for _, module in model.named_modules()]
    experts = [name for name in checkpoint.bits if ".experts." in name]
    dropped = [name for name in checkpoint.bits if name.startswith("mtp.")]
    assert kinds.count(TrellisLinear) == len(checkpoint.bits) - len(experts) - len(dropped)
    assert kinds.count(TrellisSwitchGLU) == len(experts) // (3 * SIZES.experts)


def test_the_head_of_a_model_that_mlx_lm_always_ties(tmp_path):
    checkpoint = architectures_gemma.gemma2()
    model, _ = load_exl3_model(checkpoint.write(tmp_path / "exl3"))
    head = checkpoint.dense.pop("lm_head.weight")
    dense = load_dense(checkpoint, tmp_path / "dense")
    dense.model.embed_tokens.as_linear = lambda x: x @ head.T
    assert_same(logits(model), logits(dense))


def of_further_architectures() -> list:
    """Their names; one cannot be built without what newer configs leave out."""
    lacks = {"phimoe": architectures.needs_new_mlx_lm("cannot build phimoe without rope_scaling")}
    return [pytest.param(name, marks=lacks.get(name, ())) for name in generic_checkpoints.CONFIGS]


@pytest.mark.parametrize("name", of_further_architectures())
def test_logits_of_further_architectures(name, tmp_path):
    checkpoint, dense = generic_checkpoints.make(name)
    model, _ = load_exl3_model(checkpoint.write(tmp_path / "exl3", shards=2))
    assert_same(logits(model), logits(dense))


def test_experts_without_a_fused_kernel_keep_their_activation(tmp_path):
    checkpoint, _ = generic_checkpoints.make("step3p5")
    model, _ = load_exl3_model(checkpoint.write(tmp_path / "exl3"))
    glu = model.layers[1].mlp.switch_mlp
    assert isinstance(glu, SwitchGLU) and type(glu.activation).__name__ == "ClampedSwiGLU"
    assert {type(glu[name]) for name in generic_checkpoints.PROJECTIONS} == {TrellisExperts}
