"""Every architecture: logits of the EXL3 checkpoint against the same mlx-lm model with the dequantized weights."""

import logging
import shutil
from collections import Counter

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm import utils as mlx_lm_utils
from mlx_lm.models.switch_layers import SwitchGLU

import mlx_marlin
from mlx_marlin import TrellisEmbedding, TrellisLinear, TrellisSwitchGLU, codec
from mlx_marlin.layers.experts import TrellisExperts
from mlx_marlin.lm.model import load_exl3_model
from tests.support import architectures, architectures_gemma, generic_checkpoints
from tests.support.checkpoints import HALF_RATES, SIZES
from tests.support.generic_checkpoints import logits
from tests.support.left_out_parts import PARTS, extend
from tests.support.paths import MODELS


def assert_same(got: np.ndarray, wanted: np.ndarray) -> None:
    assert np.isfinite(wanted).all() and wanted.std() > 0.1
    assert np.abs(got - wanted).max() <= 1e-4 * np.abs(wanted).max()
    assert (got.argmax(-1) == wanted.argmax(-1)).all()


def load_dense(checkpoint, directory):
    """mlx-lm's own model of the dense form, in float32."""
    dense, _ = mlx_lm_utils.load_model(checkpoint.write_dense(directory))
    dense.set_dtype(mx.float32)
    return dense


# Another width for each in turn.
EMBEDDING_BITS = {
    name: 1 + i % codec.MAX_BITS for i, name in enumerate((*architectures.ARCHITECTURES, *generic_checkpoints.CONFIGS))
}


def load(directory):
    """As a user does, with the tokenizer of another model."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MODELS / "random-qwen3_moe" / name, directory)
    return mlx_marlin.load(directory, accuracy="float32")[0]


def kinds_of(model) -> Counter:
    return Counter(type(module) for _, module in model.named_modules())


@pytest.mark.filterwarnings("ignore:`rope_scaling` is deprecated")  # in transformers, which reads it too
@pytest.mark.parametrize("name", architectures.ARCHITECTURES)
def test_logits_equal_those_of_the_dequantized_weights(name, tmp_path, caplog):
    """All that today's files hold: half rates, a quantized embedding, prediction layers and a tower."""
    checkpoint = architectures.ARCHITECTURES[name]()
    checkpoint.quantize_embedding(EMBEDDING_BITS[name], parts=1 + EMBEDDING_BITS[name] % 3)
    wanted = logits(load_dense(checkpoint, tmp_path / "dense"))
    added = {part: extend(checkpoint, add) for part, add in PARTS.get(name, {}).items()}
    with caplog.at_level(logging.INFO, "mlx_marlin"):
        model = load(checkpoint.write(tmp_path / "exl3", shards=2))
    assert_same(logits(model), wanted)

    left_out = {part: set(sizes) for part, sizes in model.left_out.tensors.items()}
    assert left_out.keys() == added.keys() and all(names <= left_out[part] for part, names in added.items())
    sizes = {part: sum(checkpoint.exl3[name].nbytes for name in names) for part, names in left_out.items()}
    listed = ", ".join(
        f"{part} ({len(left_out[part])} tensors, {sizes[part] / 1e6:.1f} MB)" for part in model.left_out.tensors
    )
    said = [f"the model leaves out of the checkpoint: {listed}"] if added else []
    assert [r.getMessage() for r in caplog.records if r.name == "mlx_marlin.lm"] == said

    dropped = {key.rpartition(".")[0] for names in left_out.values() for key in names}
    used = {name: bits for name, bits in checkpoint.bits.items() if name not in dropped}
    assert set(HALF_RATES) <= set(used.values())
    experts = [name for name in used if ".experts." in name]
    kinds = kinds_of(model)
    assert kinds[TrellisLinear] == len(used) - len(experts) and kinds[TrellisEmbedding] == 1
    assert kinds[TrellisSwitchGLU] == len(experts) // (3 * SIZES.experts)


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
    checkpoint, dense = generic_checkpoints.make(name, embedding_bits=EMBEDDING_BITS[name])
    added = {part: extend(checkpoint, add) for part, add in PARTS.get(name, {}).items()}
    model, _ = load_exl3_model(checkpoint.write(tmp_path / "exl3", shards=2))
    assert_same(logits(model), logits(dense))
    assert {part: set(sizes) for part, sizes in model.left_out.tensors.items()} == added
    assert set(HALF_RATES) <= set(checkpoint.bits.values()) and kinds_of(model)[TrellisEmbedding] == 1


def test_experts_without_a_fused_kernel_keep_their_activation(tmp_path):
    checkpoint, _ = generic_checkpoints.make("step3p5")
    model, _ = load_exl3_model(checkpoint.write(tmp_path / "exl3"))
    glu = model.layers[1].mlp.switch_mlp
    assert isinstance(glu, SwitchGLU) and type(glu.activation).__name__ == "ClampedSwiGLU"
    assert {type(glu[name]) for name in generic_checkpoints.PROJECTIONS} == {TrellisExperts}
