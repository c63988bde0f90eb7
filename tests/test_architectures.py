"""Every architecture: logits of the EXL3 checkpoint against the same mlx-lm model with the dequantized weights."""

import checkpoints
import mlx.core as mx
import numpy as np
import pytest
from mlx_lm import utils as mlx_lm_utils

from mlx_marlin import TrellisLinear, TrellisSwitchGLU
from mlx_marlin.lm import load_exl3_model


def logits(model, tokens: int = 24) -> np.ndarray:
    ids = np.random.default_rng(7).integers(0, checkpoints.VOCAB, (2, tokens))
    return np.array(model(mx.array(ids)).astype(mx.float32))


def assert_same(got: np.ndarray, wanted: np.ndarray) -> None:
    assert np.isfinite(wanted).all() and wanted.std() > 0.1
    assert np.abs(got - wanted).max() <= 1e-4 * np.abs(wanted).max()
    assert (got.argmax(-1) == wanted.argmax(-1)).all()


@pytest.mark.parametrize("name", checkpoints.ARCHITECTURES)
def test_logits_equal_those_of_the_dequantized_weights(name, tmp_path):
    checkpoint = checkpoints.ARCHITECTURES[name]()
    model, _ = load_exl3_model(checkpoint.write(tmp_path / "exl3", shards=2))
    dense, _ = mlx_lm_utils.load_model(checkpoint.write_dense(tmp_path / "dense"))
    dense.set_dtype(mx.float32)
    assert_same(logits(model), logits(dense))
    kinds = [type(module) for _, module in model.named_modules()]
    experts = [name for name in checkpoint.bits if ".experts." in name]
    dropped = [name for name in checkpoint.bits if name.startswith("mtp.")]
    assert kinds.count(TrellisLinear) == len(checkpoint.bits) - len(experts) - len(dropped)
    assert kinds.count(TrellisSwitchGLU) == len(experts) // (3 * checkpoints.EXPERTS)


def test_the_head_of_a_model_that_mlx_lm_always_ties(tmp_path):
    checkpoint = checkpoints.gemma2()
    model, _ = load_exl3_model(checkpoint.write(tmp_path / "exl3"))
    head = checkpoint.dense.pop("lm_head.weight")
    dense, _ = mlx_lm_utils.load_model(checkpoint.write_dense(tmp_path / "dense"))
    dense.set_dtype(mx.float32)
    dense.model.embed_tokens.as_linear = lambda x: x @ head.T
    assert_same(logits(model), logits(dense))
