"""What a conversion makes of the files, dtypes and names of its source, and what it says before it begins."""

import json
import shutil

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm import utils as mlx_lm_utils

from mlx_marlin import TrellisModelLoader, codec
from mlx_marlin.lm.model import load_exl3_model
from mlx_marlin.quantize import conversion, convert
from tests.support.generic_checkpoints import logits
from tests.support.small_conversions import (  # noqa: F401
    SMALL,
    add_tokenizer,
    correlation,
    header,
    quick_conversions,
    small,
    source_of,
    values,
)

pytestmark = pytest.mark.usefixtures("quick_conversions")


def test_every_file_that_is_no_weight_is_copied_as_it_is(tmp_path, text):
    source, _ = source_of(tmp_path)
    noise = bytes(range(256)) * 3
    files = ("tokenizer.model", "tiktoken.model", "preprocessor_config.json", "chat_template.jinja", "code/modeling.py")
    for name in files:
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_bytes(b"{{ text }}\r\n" if name.endswith("jinja") else noise + name.encode())
    for name in ("consolidated.00.pth", "original/model.bin", ".gitattributes", "quantization_config.json"):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_bytes(noise)
    convert(source, source / "exl3", bits=8, calibration=text)  # inside of the source: not copied into itself
    found = {str(p.relative_to(source / "exl3")) for p in (source / "exl3").rglob("*") if p.is_file()}
    made = {"config.json", "quantization_config.json", "model.safetensors", "plan.txt"}
    assert found == {*files, *made, "tokenizer.json", "tokenizer_config.json"}
    for name in files:
        assert (source / "exl3" / name).read_bytes() == (source / name).read_bytes()


def test_a_link_that_leads_nowhere_is_told_first(tmp_path, text):
    source, _ = source_of(tmp_path)
    (source / "chat_template.jinja").symlink_to(tmp_path / "gone")
    with pytest.raises(ValueError, match="chat_template.jinja is a link"):
        convert(source, tmp_path / "exl3", bits=8, calibration=text)
    assert not (tmp_path / "exl3").exists()


def test_biases_that_choose_experts_stay_float32(tmp_path, text):
    """As large as they are published, with differences that half precision loses."""
    name, bias = "model.layers.1.mlp.gate.e_score_correction_bias", np.array([34.5001, 34.5002], np.float32)

    def change(checkpoint):
        checkpoint.dense[name] = mx.array(bias)

    source, _ = source_of(tmp_path, "deepseek_v3", change)
    convert(source, tmp_path / "exl3", bits=8, calibration=text)
    found = header(tmp_path / "exl3")[name]
    assert found.dtype == "F32" and np.array_equal(values(found), bias)
    model, _ = load_exl3_model(tmp_path / "exl3", dtype=mx.float16)
    assert np.array_equal(np.array(model.layers[1].mlp.gate.e_score_correction_bias), bias)


def test_bfloat16_biases_of_routers_become_float32(tmp_path, text):
    source, checkpoint = source_of(tmp_path, "gpt_oss")
    convert(source, tmp_path / "exl3", bits=8, calibration=text)
    name = "model.layers.0.mlp.router.bias"
    assert header(tmp_path / "exl3")[name].dtype == "F32" and header(source)[name].dtype == "BF16"
    assert np.array_equal(values(header(tmp_path / "exl3")[name]), values(header(source)[name]))


@pytest.mark.parametrize(
    "name, tensor",
    [("qwen2_moe", "model.layers.0.self_attn.q_proj.bias"), ("llama", "model.layers.1.input_layernorm.weight")],
)
def test_values_beyond_half_precision_are_named(tmp_path, text, name, tensor):
    def change(checkpoint):
        large = np.array(checkpoint.dense[tensor].astype(mx.float32))
        large[3] = 1e5
        checkpoint.dense[tensor] = mx.array(large)

    source, _ = source_of(tmp_path, name, change)
    with pytest.raises(ValueError, match=f"{tensor} holds values that EXL3's half precision cannot: up to 100000"):
        convert(source, tmp_path / "exl3", bits=8, calibration=text)


@pytest.mark.parametrize(
    "tensor",
    [
        "model.layers.1.self_attn.o_proj.weight",
        "model.layers.0.block_sparse_moe.experts.1.w2.weight",
        "lm_head.weight",
    ],
)
def test_values_that_are_not_finite_are_named(tmp_path, text, tensor):
    def change(checkpoint):
        damaged = np.array(checkpoint.dense[tensor].astype(mx.float32))
        damaged[5, 7] = np.nan
        checkpoint.dense[tensor] = mx.array(damaged)

    source, _ = source_of(tmp_path, "mixtral" if "experts" in tensor else "llama", change)
    with pytest.raises(ValueError, match=f"tensor {tensor} holds values that are not finite"):
        convert(source, tmp_path / "exl3", bits=8, calibration=text)


def own_names(source, target):
    """The checkpoint as mlx-lm saves it."""
    model, config = mlx_lm_utils.load_model(source)
    mlx_lm_utils.save_model(target, model)
    mlx_lm_utils.save_config(config, target / "config.json")
    return add_tokenizer(target)


@pytest.mark.parametrize("name", ["qwen3_moe", "qwen3_5_moe", "gpt_oss"])
def test_the_names_of_mlx_lm_convert_too(tmp_path, text, name):
    source, _ = source_of(tmp_path, name)
    own = own_names(source, tmp_path / "own")
    convert(own, tmp_path / "exl3", bits=8, calibration=text)
    dense, _ = mlx_lm_utils.load_model(source)
    dense.set_dtype(mx.float32)
    assert not [tensor for tensor in header(tmp_path / "exl3") if "switch_mlp" in tensor]
    assert correlation(logits(load_exl3_model(tmp_path / "exl3")[0]), logits(dense)) > 0.8


@pytest.mark.parametrize("bits", [4, 2.5, 16, 0])
def test_prediction_layers(tmp_path, text, bits, monkeypatch):
    """Qwen3.5's: quantized with fused experts split, kept, or left out; said, and counted."""
    monkeypatch.setattr("mlx_marlin.quantize.progress._TICK_SECONDS", 0.0)
    monkeypatch.setattr("mlx_marlin.quantize.extras._FILE_LINEARS", 3)  # several parts
    reports = []

    def change(c):
        c.norm("mtp.norm", SMALL.hidden)
        c.block_norms("mtp.layers.0")
        c.attention("mtp.layers.0", norms="head", gated=True)
        c.experts("mtp.layers.0.mlp")
        c.fuse_experts("mtp.layers.0.mlp", interleaved=False)

    source, checkpoint = source_of(tmp_path, "qwen3_5_moe", change)
    convert(source, tmp_path / "exl3", bits=6, mtp_bits=bits, calibration=text, progress=reports.append)
    assert [r.done for r in reports] == sorted(r.done for r in reports) and reports[-1].done == 1
    config = json.loads((tmp_path / "exl3/config.json").read_text())["quantization_config"]
    extra = json.loads((tmp_path / "exl3/quantization_config.json").read_text())
    found = {name for name in header(tmp_path / "exl3") if name.startswith("mtp.")}
    original = {name for name in checkpoint.dense if name.startswith("mtp.")}
    assert config.get("mtp_bits") == (bits or None) and not [n for n in extra["tensor_storage"] if n.startswith("mtp.")]
    note = "left out" if not bits else "kept as they are" if bits == 16 else f"linears at {bits} bits"
    assert note in (tmp_path / "exl3/plan.txt").read_text()
    load_exl3_model(tmp_path / "exl3")
    if bits in (0, 16):
        assert found == (original if bits else set())
        return
    loader = TrellisModelLoader(tmp_path / "exl3")
    names = {name for name in checkpoint.bits if name.startswith("mtp.")}
    assert {name for name in loader.names if name.startswith("mtp.")} == names
    assert found & original == {n for n in original if "norm" in n or n.endswith("mlp.gate.weight")}
    for name in ("mtp.fc", "mtp.layers.0.mlp.experts.1.up_proj", "mtp.layers.0.mlp.experts.0.down_proj"):
        w = loader.load_weight(name)
        wanted = codec.dequantize(TrellisModelLoader(checkpoint.write(tmp_path / "twin")).load_weight(name))
        decoded = codec.dequantize(w)
        assert w.bits == bits and np.sum(wanted * decoded) / np.linalg.norm(wanted) / np.linalg.norm(decoded) > 0.75


@pytest.mark.parametrize("bits", [6, 16, 0])
def test_vision_towers(tmp_path, text, bits):
    def change(c):
        block = "model.visual.blocks.0"
        for name, n, k in (("attn.qkv", 384, 128), ("attn.proj", 128, 128), ("mlp.linear_fc1", 160, 128)):
            c.plain(f"{block}.{name}.weight", n, k, spread=0.1)
            c.plain(f"{block}.{name}.bias", n, spread=0.1)

    source, checkpoint = source_of(tmp_path, "qwen3_5_moe", change)
    convert(source, tmp_path / "exl3", bits=6, vision_bits=bits, calibration=text)
    config = json.loads((tmp_path / "exl3/config.json").read_text())["quantization_config"]
    assert config.get("vision_bits") == (6 if bits == 6 else None)
    original = {name for name in checkpoint.dense if "visual" in name}
    found = {name for name in header(tmp_path / "exl3") if "visual" in name}
    loader = TrellisModelLoader(tmp_path / "exl3")
    block = "model.visual.blocks.0"
    linears = [f"{block}.attn.{n}" for n in ("q_proj", "k_proj", "v_proj", "proj")] + [f"{block}.mlp.linear_fc1"]
    assert [n for n in loader.names if "visual" in n] == (sorted(linears) if bits == 6 else [])
    if bits != 6:
        assert found == (original if bits else set())
        return
    assert f"{block}.attn.qkv.weight" in found  # as ExLlamaV3 leaves it
    w = loader.load_weight(f"{block}.attn.k_proj")
    wanted = np.array(checkpoint.dense[f"{block}.attn.qkv.weight"].astype(mx.float32))[128:256].T
    decoded = codec.dequantize(w)
    assert np.sum(wanted * decoded) / np.linalg.norm(wanted) / np.linalg.norm(decoded) > 0.8
    bias = np.array(checkpoint.dense[f"{block}.attn.qkv.bias"].astype(mx.float32))[128:256]
    np.testing.assert_allclose(np.array(w.bias), bias, rtol=1e-3)
    assert loader.load_weight(f"{block}.mlp.linear_fc1").padded_shape == (128, 256)


def test_a_linear_that_is_made_of_others_is_told(tmp_path, text, monkeypatch):
    source, _ = source_of(tmp_path)
    from mlx_lm.models import llama

    name, plain = "model.layers.0.self_attn.q_proj.weight", llama.Model.sanitize
    monkeypatch.setattr(llama.Model, "sanitize", lambda self, w: plain(self, {**w, name: w[name] * 1}))
    with pytest.warns(UserWarning, match="model.layers.0.self_attn.q_proj is not quantized"):
        convert(source, tmp_path / "exl3", bits=8, calibration=text)
    assert header(tmp_path / "exl3")[name].dtype == "F32" or name in header(tmp_path / "exl3")


def test_an_interrupted_conversion_of_few_bytes_resumes(tmp_path, text, monkeypatch):
    """After the head, with prediction layers to come: their files are made again or taken as they are."""
    source, _ = source_of(tmp_path, "qwen3_5_moe")
    convert(source, tmp_path / "whole", bits=6, calibration=text)

    def stop(*_args, **_kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(conversion, "assemble", stop)
        with pytest.raises(KeyboardInterrupt):
            convert(source, tmp_path / "exl3", bits=6, calibration=text)
    convert(source, tmp_path / "exl3", bits=6, calibration=text, resume=True)
    for file in (tmp_path / "whole").iterdir():
        assert (tmp_path / "exl3" / file.name).read_bytes() == file.read_bytes(), file.name
    shutil.rmtree(tmp_path / "exl3")
