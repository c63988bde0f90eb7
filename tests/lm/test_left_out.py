"""Every tensor of a checkpoint is used, exactly as it is meant, or named as left out."""

import logging
import shutil
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm import utils as mlx_lm_utils

from mlx_marlin import TrellisModelLoader
from mlx_marlin.lm.model import cast_dense, load_exl3_model, open_checkpoint
from mlx_marlin.loader.contents import AUDIO, DRAFT, NGRAM, OTHER, VISION, LeftOut, parts_of
from mlx_marlin.loader.scaling import up_divisor, without_folded_scales
from tests.support import architectures, generic_checkpoints
from tests.support.checkpoints import SIZES, Checkpoint
from tests.support.commands import run
from tests.support.generic_checkpoints import logits
from tests.support.left_out_parts import draft_behind, draft_in_front, extend, tower
from tests.support.paths import MODELS

EXL3 = MODELS / "docs-moe-exl3-mixed"


def extended(name: str, *additions) -> tuple[Checkpoint, set[str]]:
    """A checkpoint with additions, and the names of their tensors."""
    checkpoint = architectures.ARCHITECTURES[name]()
    return checkpoint, extend(checkpoint, *additions)


def left(left_out: LeftOut) -> set[str]:
    return {name for names in left_out.tensors.values() for name in names}


@pytest.mark.parametrize(
    "name, part, add",
    [
        ("qwen3_moe", DRAFT, draft_in_front),
        ("mixtral", DRAFT, draft_behind),
        ("llama", VISION, tower("model.visual")),
        ("llama", AUDIO, lambda c: c.linear("audio_tower.layers.7.fc1", 128, 128)),
    ],
)
def test_what_mlx_lm_knows_nothing_of(tmp_path, name, part, add):
    plain, _ = extended(name)
    known = load_exl3_model(plain.write(tmp_path / "plain"))[0]
    checkpoint, added = extended(name, add)
    model, _ = load_exl3_model(checkpoint.write(tmp_path / "model", shards=2))
    assert np.array_equal(logits(model), logits(known))
    assert left(model.left_out) == left(known.left_out) | added
    assert added <= model.left_out.tensors[part].keys() and model.left_out.expected
    assert model.left_out.nbytes == sum(checkpoint.exl3[name].nbytes for name in left(model.left_out))


def test_nothing_is_left_out_of_a_text_model(tmp_path):
    for name in architectures.ARCHITECTURES:
        checkpoint = architectures.ARCHITECTURES[name]()
        _, _, mapping = open_checkpoint(checkpoint.write(tmp_path / name))
        others = ("mtp.", "model.visual.", "vision_tower.")
        assert not [tensor for tensor in left(mapping.left_out) if not tensor.startswith(others)], name


def ngram_tables(directory: Path) -> int:
    """A file as ExLlamaV3 writes it for Qwen3.8-Flash-Next; returns the bytes of its tensors."""
    tensors = {
        "model.ngram_embedding.shard_0.trellis": mx.zeros((50, 31), mx.int16),
        "model.ngram_embedding.head_bias": mx.zeros((8, 160), mx.float16),
        "model.ngram_embedding.head_offsets": mx.zeros((8,), mx.int64),
    }
    metadata = {"format": "exl3_ngram_trellis", "K": "3"}
    mx.save_safetensors(str(directory / "ngram_embedding.safetensors"), tensors, metadata)
    return sum(value.nbytes for value in tensors.values())


def test_ngram_tables_are_named(tmp_path, caplog):
    directory = architectures.llama().write(tmp_path / "model")
    size = ngram_tables(directory)
    with caplog.at_level(logging.INFO):
        model, _ = load_exl3_model(directory)
    assert model.left_out.tensors.keys() == {NGRAM} and model.left_out.nbytes == size
    # A model is another one without them.
    assert not model.left_out.expected
    assert [(r.levelname, r.getMessage()) for r in caplog.records] == [
        ("WARNING", "the model leaves out of the checkpoint: n-gram tables (3 tensors, 0.0 MB)")
    ]


def test_a_tensor_that_a_model_drops_by_itself(tmp_path, caplog):
    """Buffers of older checkpoints; mlx-lm's sanitize takes them away."""
    checkpoint = architectures.llama()
    checkpoint.exl3["model.layers.0.self_attn.rotary_emb.inv_freq"] = mx.zeros(32)
    with caplog.at_level(logging.INFO):
        model, _ = load_exl3_model(checkpoint.write(tmp_path / "model"))
    assert model.left_out.tensors == {OTHER: {"model.layers.0.self_attn.rotary_emb.inv_freq": 128}}
    (record,) = caplog.records
    assert record.levelname == "WARNING" and "other tensors (1 tensors, 0.0 MB: model.layers.0" in record.getMessage()


def test_loading_says_once_what_it_left_out(tmp_path, caplog):
    checkpoint, _ = extended("qwen3_5_moe", draft_in_front, tower("model.visual"))
    with caplog.at_level(logging.INFO):
        model, _ = load_exl3_model(checkpoint.write(tmp_path / "model"))
    (record,) = caplog.records
    assert record.levelname == "INFO" and record.name == "mlx_marlin.lm"
    assert record.getMessage() == f"the model leaves out of the checkpoint: {model.left_out}"
    assert f"{DRAFT} (" in record.getMessage() and f"{VISION} (" in record.getMessage()


def test_the_command_shows_what_is_left_out(tmp_path):
    directory = Path(shutil.copytree(EXL3, tmp_path / "model"))
    tensors = dict(mx.load(str(directory / "model.safetensors")))
    mx.eval(tensors)
    mx.save_safetensors(str(directory / "model.safetensors"), {**tensors, "mtp.norm.weight": mx.zeros(500_000)})
    said = run("generate", "--model", str(directory), "--prompt", "x", "-m", "1", "--ignore-chat-template")
    assert said.returncode == 0, said.stderr
    line = f"mlx_marlin: the model leaves out of the checkpoint: {DRAFT} (1 tensors, 2.0 MB)\n"
    assert said.stderr.count(line) == 1 and "leaves out" not in said.stdout


@pytest.mark.parametrize(
    "add, message",
    [
        (lambda c: c.linear("model.extra", 128, 128), r"model\.extra is quantized.*does not have; it is unknown"),
        (lambda c: c.plain("model.extra.weight", 3), r"has model\.extra\.weight, which.*; it is unknown to ExLlamaV3"),
        (
            lambda c: c.linear("model.layers.0.mlp.gate_proj.slice.1", 128, 128),
            r"gate_proj\.slice\.1 is quantized.*a slice of an MLP wider than 55296, which ExLlamaV3",
        ),
        (lambda c: c.linear("model.layers.9.self_attn.q_proj", 128, 128), r"layers\.9.*a layer behind the 2 of config"),
        (
            lambda c: c.exl3.update({"model.embed.trellis": mx.zeros((160, 98), mx.int16)}),
            r"model\.embed\.trellis .*a quantized embedding's, which ExLlamaV3 writes since 1\.6\.0 \(-eb\)",
        ),
        (
            lambda c: c.exl3.update(
                {"model.more.trellis": mx.zeros((160, 65), mx.int16), "model.more.signs": mx.ones((1, 256), mx.float16)}
            ),
            r"model\.more is quantized.*does not have; it seems to be a quantized embedding, .* since 1\.6\.0 \(-eb\)",
        ),
    ],
)
def test_something_unknown_is_described(tmp_path, add, message):
    checkpoint, _ = extended("llama", add)
    with pytest.raises(ValueError, match=message) as error:
        load_exl3_model(checkpoint.write(tmp_path / "model"))
    assert "embed" in str(error.value) or "was written by 1.6.5" in str(error.value)


def test_parts_by_name():
    names = {
        "model.layers.2.eh_proj": DRAFT,
        "model.layers.3.self_attn.q_proj": DRAFT,  # of several, only one is joined to the model
        "language_model.mtp.layers.0.mlp.up_proj": DRAFT,
        "model.mtp_layers.0.input_proj": DRAFT,
        "model.visual.blocks.30.attn.proj": VISION,
        "vision_tower.encoder.layers.9.mlp.fc1": VISION,
        "multi_modal_projector.linear_1": VISION,
        "audio_tower.layers.9.fc1": AUDIO,
        "model.ngram_embedding.shard_0.trellis": NGRAM,
    }
    text = ["model.layers.1.mlp.gate.weight", "lm_head", "model.embed_tokens.weight", "model.layers.1.division.x"]
    assert parts_of([*names, *text], layers=2) == names
    assert parts_of(["model.layers.2.self_attn.q_proj"], layers=2) == {}


# Markers of codebooks.


@pytest.mark.parametrize("suffix", ["mcg", "mul1"])
@pytest.mark.parametrize("value", [0, 1, -877912082, 2**31 - 1])
def test_the_values_of_markers(tmp_path, suffix, value):
    checkpoint = architectures.qwen3_moe()
    name = [n for n in checkpoint.exl3 if n.endswith(f".{suffix}")][-1]  # all of them are looked at
    checkpoint.exl3[name] = mx.array(value, mx.int32)
    directory = checkpoint.write(tmp_path / "model")
    right = {"mcg": "0xcbac1fed", "mul1": "0x83dcd12d"}[suffix]
    with pytest.raises(ValueError, match=rf"{name} holds {value & 0xFFFFFFFF:#010x}, but .* has {right}"):
        TrellisModelLoader(directory)


# Biases that choose experts.


def with_float32_biases(name: str) -> tuple[Checkpoint, dict[str, np.ndarray]]:
    make = generic_checkpoints.make if name in generic_checkpoints.CONFIGS else None
    checkpoint = make(name)[0] if make else architectures.ARCHITECTURES[name]()
    biases = {}
    for key in checkpoint.exl3:
        if key.endswith(("e_score_correction_bias", "expert_bias", "router_bias")):
            biases[key] = np.random.default_rng(3).normal(0, 1, SIZES.experts).astype(np.float32)
            checkpoint.exl3[key] = mx.array(biases[key])
    return checkpoint, biases


@pytest.mark.parametrize("name", ["glm4_moe", "minimax", "dots1", "solar_open", "afmoe", "Klear", "step3p5"])
@pytest.mark.parametrize("dtype", [None, mx.float32, mx.bfloat16, mx.float16], ids=str)
def test_biases_that_choose_experts_keep_every_bit(tmp_path, name, dtype):
    checkpoint, biases = with_float32_biases(name)
    assert biases
    model, _ = load_exl3_model(checkpoint.write(tmp_path / "model"), dtype=dtype)
    parameters = dict(tree_flatten(model.parameters()))
    loaded = [value for key, value in parameters.items() if key.endswith("_bias")]
    assert len(loaded) == len(biases) and {value.dtype for value in loaded} == {mx.float32}
    assert {np.array(value).tobytes() for value in loaded} == {value.tobytes() for value in biases.values()}
    assert np.isfinite(logits(model)).all()
    assert model(mx.array([[1, 2]])).dtype == (dtype or mx.float32)


def test_biases_of_half_precision_are_widened():
    cast = cast_dense(nn.Module(), {"a.expert_bias": mx.zeros(2, mx.float16)}, mx.bfloat16)
    assert cast["a.expert_bias"].dtype == mx.float32


# Scales.


def close(got: np.ndarray, wanted: np.ndarray) -> bool:
    return np.abs(got - wanted).max() <= 1e-4 * np.abs(wanted).max() and (got.argmax(-1) == wanted.argmax(-1)).all()


def test_zero_scales_in_padded_columns(tmp_path, monkeypatch):
    """Of every linear: attention, experts, head."""
    original = Checkpoint.linear
    monkeypatch.setattr(Checkpoint, "linear", lambda self, *a, **k: original(self, *a, **{**k, "zero_padding": True}))
    checkpoint = architectures.qwen3_moe()
    padded = [np.array(v) for key, v in checkpoint.exl3.items() if key.endswith(".svh")]
    assert sum((svh == 0).any() for svh in padded) > 10
    monkeypatch.undo()
    got = logits(load_exl3_model(checkpoint.write(tmp_path / "exl3"))[0])
    wanted, _ = mlx_lm_utils.load_model(checkpoint.write_dense(tmp_path / "dense"))
    wanted.set_dtype(mx.float32)
    assert close(got, logits(wanted))


@pytest.mark.parametrize("name", architectures.known_to_mlx_lm(generic_checkpoints.UP_DIVISORS))
def test_an_unquantized_up_is_stored_divided_too(tmp_path, name):
    """The dense twin has the weights of the original model."""
    checkpoint, dense = generic_checkpoints.make(name)
    up = next(n for n in checkpoint.bits if ".experts." in n and n.endswith("up_proj"))
    for suffix in ("trellis", "suh", "svh", "mcg", "mul1"):
        checkpoint.exl3.pop(f"{up}.{suffix}", None)
    checkpoint.exl3[f"{up}.weight"] = checkpoint.dense[f"{up}.weight"] / generic_checkpoints.UP_DIVISORS[name]
    model, _ = load_exl3_model(checkpoint.write(tmp_path / "model"))
    assert close(logits(model), logits(dense))


def test_up_of_one_layer_of_one_model():
    mimo = {"model_type": "mimo_v2", "quantization_config": {"version": "1.6.5"}}
    assert [up_divisor(mimo, layer) for layer in (46, 47, 48)] == [1, 128, 1]
    assert up_divisor({**mimo, "quantization_config": {"version": "1.5.3"}}, 47) == 1
    assert up_divisor({**mimo, "quantization_config": None}, 47) == 128
    assert up_divisor({"model_type": "mistral3", "text_config": {"model_type": "mistral4"}}, 0) == 128
    assert up_divisor({"model_type": "qwen3_moe"}, 47) == 1
    assert without_folded_scales({**mimo, "attention_value_scale": 0.6})["attention_value_scale"] is None
    assert without_folded_scales({"model_type": "mimo_v2_flash", "attention_value_scale": 0.6}) == {
        "model_type": "mimo_v2_flash", "attention_value_scale": 0.6
    }  # fmt: skip
