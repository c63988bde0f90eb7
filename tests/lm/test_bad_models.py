"""Checkpoints that mlx-lm's model cannot be filled from: refused before a weight is read, naming the tensor."""

from pathlib import Path

import mlx.core as mx
import pytest

from mlx_marlin.lm.model import load_exl3_model
from tests.support import architectures, architectures_joined
from tests.support.checkpoints import SIZES, Checkpoint
from tests.support.paths import MODELS

LAYER = f"model.layers.{architectures.MOE_LAYER}"


def broken(tmp_path: Path, edit=None, config=None, make=architectures.qwen3_moe) -> Path:
    checkpoint = make()
    if edit:
        edit(checkpoint.exl3)
    checkpoint.config.update(config or {})
    return checkpoint.write(tmp_path / "model")


def remove(*names: str):
    return lambda tensors: [tensors.pop(key) for key in list(tensors) if any(key.startswith(name) for name in names)]


def quantize_as(name: str, like: str):
    """Give a tensor the quantized form of another."""

    def edit(tensors):
        tensors.pop(f"{name}.weight", None)
        tensors.update({name + key.removeprefix(like): v for key, v in tensors.items() if key.startswith(f"{like}.")})

    return edit


def copy(name: str, to: str):
    """Give a linear once more under another name."""
    return lambda tensors: tensors.update(
        {to + k.removeprefix(name): v for k, v in tensors.items() if k.startswith(name)}
    )


EXPERT = f"{LAYER}.mlp.experts.2.up_proj"


@pytest.mark.parametrize(
    "edit, message",
    [
        (remove(f"{EXPERT}."), rf"{EXPERT}\.trellis is missing, but other experts of the layer are there"),
        (  # not a number for each up to there in memory
            copy(f"{EXPERT}.", f"{LAYER}.mlp.experts.999999999.up_proj."),
            rf"{LAYER}\.mlp\.experts\.\d+\.\w+\.trellis is missing, but other experts of the layer are there",
        ),
        (
            remove(f"{LAYER}.mlp.experts.3."),
            rf"looks for {LAYER}\.mlp\.experts\.3\..*which the checkpoint does not have",
        ),
        (remove(f"{LAYER}.mlp.experts."), rf"no tensor for {LAYER}\.mlp\.switch_mlp"),
        (remove(f"{LAYER}.self_attn.q_proj."), rf"no tensor for {LAYER}\.self_attn\.q_proj\.weight"),
        (remove(f"{LAYER}.input_layernorm"), rf"no tensor for {LAYER}\.input_layernorm\.weight"),
        (remove("model.embed_tokens"), r"no tensor for model\.embed_tokens\.weight"),
        (
            lambda t: (remove(f"{EXPERT}.")(t), t.update({f"{EXPERT}.weight": mx.zeros((90, 192))})),
            rf"{EXPERT}\.weight has shape \[90, 192\], but .* wants \[96, 192\]",
        ),
        (
            lambda t: (remove(f"{EXPERT}.")(t), quantize_as(EXPERT, f"{LAYER}.self_attn.q_proj")(t)),
            rf"{EXPERT} is a \[256, 256\] matrix, but .* is \[256, 128\]; the experts of a layer have one size",
        ),
        (
            lambda t: t.update({"model.extra.weight": mx.zeros(3)}),
            r"has model\.extra\.weight, which is no parameter of",
        ),
        (
            lambda t: t.update({"model.norm.weight": mx.zeros(3)}),
            r"model\.norm\.weight has shape \[3\].* wants \[192\]",
        ),
        (
            lambda t: t.update({"model.norm.weight": mx.zeros(192, mx.uint8)}),
            r"model\.norm\.weight is mlx\.core\.uint8, but the model wants floating point",
        ),
        (
            quantize_as("model.extra", "lm_head"),
            r"model\.extra is quantized, but mlx-lm puts it at model\.extra\.weight, which",
        ),
        (
            quantize_as("model.embed_tokens", "lm_head"),
            r"model\.embed_tokens is quantized, .* a Embedding that needs a dense",
        ),
        (
            lambda t: t.update({f"{LAYER}.self_attn.q_proj.bias": mx.zeros(256, mx.float16)}),
            rf"{LAYER}\.self_attn\.q_proj has a bias, but the model wants none",
        ),
        (
            lambda t: (
                remove(f"{LAYER}.self_attn.k_proj.")(t),
                quantize_as(f"{LAYER}.self_attn.k_proj", "lm_head")(t),
            ),
            rf"{LAYER}\.self_attn\.k_proj.* gives outputs 0 to 256 of 256 where the model wants 128",
        ),
        (
            lambda t: (
                remove(f"{LAYER}.self_attn.o_proj.")(t),
                quantize_as(f"{LAYER}.self_attn.o_proj", "model.layers.0.mlp.x")(t),
            ),
            rf"no tensor for {LAYER}\.self_attn\.o_proj\.weight",
        ),
    ],
)
def test_a_checkpoint_that_does_not_fit_names_the_tensor(tmp_path, edit, message):
    directory = broken(tmp_path, edit)
    with pytest.raises(ValueError, match=message) as error:
        load_exl3_model(directory)
    assert str(directory) in str(error.value)


@pytest.mark.parametrize(
    "part, joined", [("self_attn.k_proj", "self_attn.qkv_proj"), ("mlp.up_proj", "mlp.gate_up_proj")]
)
def test_parts_of_one_linear_are_quantized_alike(tmp_path, part, joined):
    def edit(tensors):
        outputs = tensors[f"{LAYER}.{part}.svh"].size
        remove(f"{LAYER}.{part}.")(tensors)
        tensors[f"{LAYER}.{part}.weight"] = mx.zeros((outputs, 256), mx.float16)

    directory = broken(tmp_path, edit, make=architectures_joined.phi3)
    message = rf"{LAYER}\.{part}\.weight is not quantized, but others of .*_proj are, .* {LAYER}\.{joined};"
    with pytest.raises(ValueError, match=message):
        load_exl3_model(directory)


def test_a_bias_that_the_model_wants_must_be_there(tmp_path):
    name = f"{LAYER}.self_attn.v_proj"
    directory = broken(tmp_path, remove(f"{name}.bias"), make=architectures.qwen2_moe)
    with pytest.raises(ValueError, match=rf"{name} has no bias, but the model wants one"):
        load_exl3_model(directory)


def test_latent_attention_needs_a_dense_kv_b_proj(tmp_path):
    name = f"{LAYER}.self_attn.kv_b_proj"
    quantized = Checkpoint(SIZES, {}, dense=False)
    quantized.linear(name, 128, 512)
    edit = lambda tensors: (tensors.pop(f"{name}.weight"), tensors.update(quantized.exl3))  # noqa: E731
    directory = broken(tmp_path, edit, make=architectures.glm4_moe_lite)
    with pytest.raises(ValueError, match=rf"{name} is quantized, .* a MultiLinear that needs a dense weight"):
        load_exl3_model(directory)


@pytest.mark.parametrize(
    "config, message",
    [
        ({"model_type": "no_such_model"}, "mlx-lm cannot build a no_such_model model"),
        ({"model_type": "base"}, "mlx-lm cannot build a base model"),
        ({"model_type": None}, "model_type must name an architecture"),
        ({"model_type": "../x"}, "model_type must name an architecture"),
        ({"model_file": "code.py"}, "model_file, code inside the checkpoint, is not run"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, but the checkpoint has only"),
        ({"num_hidden_layers": "two"}, "mlx-lm cannot build a qwen3_moe model"),
        ({"hidden_size": -5}, "config.json: mlx-lm cannot build|model wants|wants"),
        ({"hidden_size": 10**12}, "mlx-lm cannot build a qwen3_moe model"),
        ({"hidden_size": 320}, r"model wants|wants 320"),
        ({"num_experts": 9}, f"looks for {LAYER}.mlp.experts.4.*which the checkpoint does not have"),
        ({"num_experts": 3}, "the checkpoint has|cannot take"),
        ({"num_attention_heads": 0}, "mlx-lm|wants"),
        ({"num_hidden_layers": 1}, "which is no parameter of|which the model does not have"),
    ],
)
def test_a_config_that_does_not_fit(tmp_path, config, message):
    directory = broken(tmp_path, config=config)
    with pytest.raises(ValueError, match=message) as error:
        load_exl3_model(directory)
    assert str(directory) in str(error.value)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff", b"[" * 100_000, b'{"a": 1, "a": 2}', b"null"])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_garbage_instead_of_a_config(tmp_path, name, content):
    directory = broken(tmp_path)
    (directory / name).write_bytes(content)
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        load_exl3_model(directory)


def test_directories_without_config_or_trellis(tmp_path):
    directory = broken(tmp_path)
    (directory / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        load_exl3_model(directory)
    with pytest.raises(ValueError, match="holds no EXL3 tensors; load it with mlx_lm.load"):
        load_exl3_model(MODELS / "docs-moe")
