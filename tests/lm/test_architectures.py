"""Every architecture: logits of the EXL3 checkpoint against the same mlx-lm model with the dequantized weights."""

import logging
import re
import shutil
from collections import Counter
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm import utils as mlx_lm_utils
from mlx_lm.models import switch_layers
from mlx_lm.models.switch_layers import SwitchGLU

import mlx_marlin
from mlx_marlin import TrellisEmbedding, TrellisLinear, TrellisSwitchGLU, TrellisSwitchMLP, codec
from mlx_marlin.layers.experts import TrellisExperts, TrellisSwitch
from mlx_marlin.lm.mlx_lm_host import MLX_LM
from mlx_marlin.lm.model import load_exl3_model
from mlx_marlin.lm.placeholders import EXPERT
from mlx_marlin.loader.contents import VISION
from tests.support import architectures, architectures_gemma, generic_checkpoints
from tests.support.checkpoints import HALF_RATES, SIZES, Sizes
from tests.support.generic_checkpoints import logits
from tests.support.left_out_parts import PARTS, extend
from tests.support.paths import MODELS
from tests.support.vlm_checkpoints import qwen3_vl_moe
from tests.support.vlm_latents import mistral4
from tests.support.vlm_towers import minimax_m3_vl


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


def assert_top_k_is_known(model) -> None:
    """The top-k that layers took from the config is the one that the model's router gave them."""
    layers = [module for _, module in model.named_modules() if isinstance(module, TrellisSwitch)]
    assert [layer.top_k for layer in layers] == [layer.explain(1).problem.top_k for layer in layers]


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
    experts = [name for name in used if EXPERT.fullmatch(name)]
    kinds = kinds_of(model)
    assert kinds[TrellisLinear] == len(used) - len(experts) and kinds[TrellisEmbedding] == 1
    matrices = 3 * kinds[TrellisSwitchGLU] + 2 * kinds[TrellisSwitchMLP]
    assert matrices * SIZES.experts == len(experts) and not (kinds[TrellisSwitchGLU] and kinds[TrellisSwitchMLP])
    assert_top_k_is_known(model)


# Of their checkpoints mlx-lm's models take the text.
TOWERS = {make.__name__: make for make in (qwen3_vl_moe, mistral4, minimax_m3_vl)}


@pytest.mark.parametrize("name", architectures.known_to_mlx_lm(TOWERS))
def test_logits_of_text_models_beside_towers(name, tmp_path):
    checkpoint = TOWERS[name]().checkpoint
    checkpoint.quantize_embedding()
    wanted = logits(load_dense(checkpoint, tmp_path / "dense"))
    model, _ = load_exl3_model(checkpoint.write(tmp_path / "exl3", shards=2))
    assert_same(logits(model), wanted)
    assert set(model.left_out.tensors) == {VISION} and model.left_out.expected
    assert kinds_of(model)[TrellisSwitchGLU] and not kinds_of(model)[SwitchGLU]


def test_the_head_of_a_model_that_mlx_lm_always_ties(tmp_path):
    checkpoint = architectures_gemma.gemma2()
    model, _ = load_exl3_model(checkpoint.write(tmp_path / "exl3"))
    head = checkpoint.dense.pop("lm_head.weight")
    dense = load_dense(checkpoint, tmp_path / "dense")
    dense.model.embed_tokens.as_linear = lambda x: x @ head.T
    assert_same(logits(model), logits(dense))


def of_further_architectures() -> list:
    """Their names; one cannot be built without what newer configs leave out."""
    values = architectures.known_to_mlx_lm(generic_checkpoints.CONFIGS)
    lacks = architectures.needs_new_mlx_lm("cannot build phimoe without rope_scaling")
    return [pytest.param("phimoe", marks=lacks) if value.values == ("phimoe",) else value for value in values]


def test_more_linears_than_a_function_takes_arguments(tmp_path):
    """As real models have them: 18 000 in 48 layers of 128 experts."""
    checkpoint = architectures.qwen3_moe(Sizes(layers=1, experts=360, hidden=128, width=128), dense_layers=())
    assert len(checkpoint.bits) > 1024
    wanted = logits(load_dense(checkpoint, tmp_path / "dense"))
    assert_same(logits(load(checkpoint.write(tmp_path / "exl3"))), wanted)


@pytest.mark.parametrize("name", of_further_architectures())
def test_logits_of_further_architectures(name, tmp_path):
    checkpoint, dense = generic_checkpoints.make(name, embedding_bits=EMBEDDING_BITS[name])
    added = {part: extend(checkpoint, add) for part, add in PARTS.get(name, {}).items()}
    model, _ = load_exl3_model(checkpoint.write(tmp_path / "exl3", shards=2))
    assert_same(logits(model), logits(dense))
    assert_top_k_is_known(model)
    assert {part: set(sizes) for part, sizes in model.left_out.tensors.items()} == added
    assert set(HALF_RATES) <= set(checkpoint.bits.values()) and kinds_of(model)[TrellisEmbedding] == 1
    assert not [m for m in model.modules() if type(m) in (SwitchGLU, switch_layers.SwitchMLP)]  # all are fused


def test_experts_without_a_fused_kernel_keep_their_activation(tmp_path, monkeypatch):
    monkeypatch.delitem(MLX_LM.activations, "mlx_lm.models.step3p5.ClampedSwiGLU")
    checkpoint, _ = generic_checkpoints.make("step3p5")
    model, _ = load_exl3_model(checkpoint.write(tmp_path / "exl3"))
    glu = model.layers[1].mlp.switch_mlp
    assert isinstance(glu, SwitchGLU) and type(glu.activation).__name__ == "ClampedSwiGLU"
    assert {type(glu[name]) for name in generic_checkpoints.PROJECTIONS} == {TrellisExperts}


# Its attention is a Metal kernel: nothing can be compared without a GPU.
GPU_ONLY = {"muse_spark"}


def test_every_module_of_mlx_lm_with_experts_is_tested():
    """A new version of mlx-lm shows here what is new in it."""
    folder = Path(switch_layers.__file__).parent
    modules = {file.stem for file in folder.glob("*.py") if re.search(r"\bSwitch(GLU|MLP)\b", file.read_text("utf-8"))}
    # gemma4's text model is a module of its own.
    tested = {*architectures.ARCHITECTURES, *generic_checkpoints.CONFIGS, "gemma4_text"}
    assert modules - tested - {"switch_layers"} <= GPU_ONLY and not tested & GPU_ONLY
