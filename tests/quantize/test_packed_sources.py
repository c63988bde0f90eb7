"""Sources in fp8, mxfp4 and nvfp4: the values of their tensors, and what a conversion makes of them."""

import json

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm import utils as mlx_lm_utils

from mlx_marlin.lm.model import load_exl3_model
from mlx_marlin.quantize import convert
from mlx_marlin.quantize.packed import PackedTensor, unpacked
from mlx_marlin.quantize.source import Source
from mlx_marlin.storage.safetensors import TensorInfo, read_header
from tests.support.checkpoints import write_directory
from tests.support.generic_checkpoints import logits
from tests.support.small_conversions import (  # noqa: F401
    add_tokenizer,
    correlation,
    header,
    mark_fp8,
    quick_conversions,
    source_of,
)

pytestmark = pytest.mark.usefixtures("quick_conversions")


def to_fp8(tensors, block):
    """Block-scaled, as DeepSeek and Qwen publish: linears and experts, but not heads and routers."""
    result = {}
    for name, value in tensors.items():
        if not name.endswith("_proj.weight"):
            result[name] = value
            continue
        w = np.array(value.astype(mx.float32))
        rows, columns = (-(-n // block) for n in w.shape)
        padded = np.pad(w, [(0, rows * block - w.shape[0]), (0, columns * block - w.shape[1])])
        scale = np.abs(padded.reshape(rows, block, columns, block)).max(axis=(1, 3)) / 448
        wide = np.repeat(np.repeat(scale, block, 0), block, 1)[: w.shape[0], : w.shape[1]]
        result[name] = mx.to_fp8(mx.array(w / wide))
        result[f"{name}_scale_inv"] = mx.array(scale.astype(np.float32))
    return result


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3"])
def test_fp8_in_blocks_is_read_directly(tmp_path, text, name):
    source, checkpoint = source_of(tmp_path, name)
    quantization = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [64, 64]}
    config = {**json.loads((source / "config.json").read_text()), "quantization_config": quantization}
    packed = write_directory(tmp_path / "fp8", config, to_fp8(checkpoint.dense, 64), 1)
    mark_fp8(packed / "model.safetensors")
    convert(add_tokenizer(packed), tmp_path / "exl3", bits=8, calibration=text)
    dense, _ = mlx_lm_utils.load_model(source)
    dense.set_dtype(mx.float32)
    assert correlation(logits(load_exl3_model(tmp_path / "exl3")[0]), logits(dense)) > 0.8
    found = json.loads((tmp_path / "exl3/config.json").read_text())["quantization_config"]
    assert found["quant_method"] == "exl3" and found["original_quantization_config"] == quantization
    assert not [tensor for tensor in header(tmp_path / "exl3") if "scale_inv" in tensor]


def test_fp8_decodes_exactly(tmp_path):
    """Against arithmetic on the bits, partial blocks included."""
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 127, (100, 72), np.uint8) | rng.integers(0, 2, (100, 72), np.uint8) << 7
    scales = rng.uniform(0.5, 2, (2, 2)).astype(np.float32)
    mx.save_safetensors(str(tmp_path / "m.safetensors"), {"w": mx.array(codes), "w_scale_inv": mx.array(scales)})
    mark_fp8(tmp_path / "m.safetensors")
    tensors = unpacked(read_header(tmp_path / "m.safetensors"), {"quant_method": "fp8", "weight_block_size": [64, 64]})
    exponent, mantissa = (codes >> 3 & 15).astype(int), (codes & 7).astype(float)
    magnitude = np.where(exponent > 0, (1 + mantissa / 8) * 2.0 ** (exponent - 7), mantissa / 8 * 2.0**-6)
    wide = np.repeat(np.repeat(scales, 64, 0), 64, 1)[:100, :72]
    wanted = np.where(codes >> 7, -1, 1) * magnitude * wide
    assert isinstance(tensors["w"], PackedTensor) and tensors["w"].shape == (100, 72)
    np.testing.assert_allclose(tensors["w"].floats(), wanted, rtol=2**-8)


def test_mxfp4_is_read_directly(tmp_path, text):
    """gpt-oss: blocks and scales of its experts; the values are those of MLX's own mxfp4."""
    source, checkpoint = source_of(tmp_path, "gpt_oss")
    packed, restored = {}, {}
    for name, value in checkpoint.dense.items():
        if not name.endswith("proj.weight") or "experts" not in name:
            packed[name] = restored[name] = value
            continue
        words, scales = mx.quantize(value, group_size=32, bits=4, mode="mxfp4")
        stem = name.removesuffix(".weight")
        packed[f"{stem}_blocks"] = words.view(mx.uint8).reshape(*scales.shape, 16)
        packed[f"{stem}_scales"] = scales
        restored[name] = mx.dequantize(words, scales, group_size=32, bits=4, mode="mxfp4", dtype=mx.bfloat16)
    config = json.loads((source / "config.json").read_text())
    dense, _ = mlx_lm_utils.load_model(write_directory(tmp_path / "restored", config, restored, 1))
    dense.set_dtype(mx.float32)
    config["quantization_config"] = {"quant_method": "mxfp4"}
    add_tokenizer(write_directory(tmp_path / "mxfp4", config, packed, 1))
    read = Source(tmp_path / "mxfp4").tensors
    for name, value in restored.items():
        assert np.array_equal(read[name].floats(), np.array(value.astype(mx.float32))), name
    convert(tmp_path / "mxfp4", tmp_path / "exl3", bits=8, calibration=text)
    assert correlation(logits(load_exl3_model(tmp_path / "exl3")[0]), logits(dense)) > 0.8


def to_nvfp4(tensors, method):
    """As NVIDIA's Model Optimizer and compressed-tensors store experts, and the values that they stand for."""
    packed, restored = {}, {}
    for name, value in tensors.items():
        stem = name.removesuffix(".weight")
        if not name.endswith("_proj.weight") or "experts" not in name:
            packed[name] = restored[name] = value
            continue
        whole = 2.0 ** -len(name) / 3
        words, scales = mx.quantize(value.astype(mx.float32) / whole, group_size=16, bits=4, mode="nvfp4")
        exact = mx.dequantize(words, scales, group_size=16, bits=4, mode="nvfp4", dtype=mx.float32)
        restored[name] = (exact * whole).astype(mx.bfloat16)
        codes = words.view(mx.uint8).reshape(value.shape[0], -1)
        packed[f"{stem}.weight_scale"] = scales
        if method == "modelopt":
            packed |= {f"{stem}.weight": codes, f"{stem}.weight_scale_2": mx.array(whole)}
            packed[f"{stem}.input_scale"] = mx.array(0.25)
        else:
            packed |= {f"{stem}.weight_packed": codes, f"{stem}.weight_global_scale": mx.array([1 / whole])}
            packed[f"{stem}.input_global_scale"] = mx.array([4.0])
    return packed, restored


def write_nvfp4(directory, config, packed):
    write_directory(directory, config, packed, 1)
    mark_fp8(directory / "model.safetensors", lambda name: name.endswith("weight_scale"))
    return add_tokenizer(directory)


@pytest.mark.parametrize("method", ["modelopt", "compressed-tensors"])
def test_nvfp4_is_read_directly(tmp_path, text, method):
    """The values are those of MLX's own nvfp4, times the scale of the whole tensor, whose order rounds differently."""
    source, checkpoint = source_of(tmp_path, "qwen3_moe")
    packed, restored = to_nvfp4(checkpoint.dense, method)
    config = json.loads((source / "config.json").read_text())
    dense, _ = mlx_lm_utils.load_model(write_directory(tmp_path / "restored", config, restored, 1))
    dense.set_dtype(mx.float32)
    quantization = {"quant_method": method, "quant_algo": "NVFP4"}
    if method == "modelopt":  # as older versions leave it
        write_nvfp4(tmp_path / "nvfp4", config, packed)
        (tmp_path / "nvfp4/hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "NVFP4"}}))
    else:
        write_nvfp4(tmp_path / "nvfp4", {**config, "quantization_config": quantization}, packed)
    opened = Source(tmp_path / "nvfp4")
    assert opened.tensors.keys() == restored.keys()
    lazy = opened.arrays()
    for name, value in restored.items():
        wanted = np.array(value.astype(mx.float32))
        np.testing.assert_allclose(opened.tensors[name].floats(), wanted, rtol=2**-7, err_msg=name)
        assert np.array_equal(np.array(lazy[name].astype(mx.float32)), opened.tensors[name].floats())
    convert(tmp_path / "nvfp4", tmp_path / "exl3", bits=8, calibration=text)
    assert correlation(logits(load_exl3_model(tmp_path / "exl3")[0]), logits(dense)) > 0.8
    assert not [name for name in header(tmp_path / "exl3") if "scale" in name]


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t, s: t.pop(f"{s}.weight_scale"), "weight_scale missing; nvfp4 has a scale of F8_E4M3 for each 16"),
        (lambda t, s: t.pop(f"{s}.weight_scale_2"), "weight_scale_2 missing; one value of F32 is wanted"),
        (lambda t, s: t.update({f"{s}.weight_scale": t[f"{s}.weight_scale"][:, :-1]}), "for each 16 values"),
        (lambda t, s: t.update({f"{s}.pre_quant_scale": mx.zeros(8)}), "scaled inputs .AWQ. is not read"),
        (lambda t, s: t.update({f"{s}.weight": mx.zeros((8, 8), mx.int8)}), r"weight is I8 \[8, 8\]; of what"),
    ],
    ids=["no scales", "no scale of the tensor", "scales of another shape", "scaled inputs", "codes of eight bits"],
)
def test_other_formats_of_the_same_tools_are_refused(tmp_path, change, message):
    source, checkpoint = source_of(tmp_path, "qwen3_moe")
    packed, _ = to_nvfp4(checkpoint.dense, "modelopt")
    change(packed, "model.layers.1.mlp.experts.1.up_proj")
    config = json.loads((source / "config.json").read_text())
    write_nvfp4(tmp_path / "bad", {**config, "quantization_config": {"quant_method": "modelopt"}}, packed)
    with pytest.raises(ValueError, match=message):
        Source(tmp_path / "bad")


def info(dtype, *shape):
    return TensorInfo(None, dtype, shape, 0, 0)


@pytest.mark.parametrize(
    "quantization, tensors, message",
    [
        (
            {"quant_method": "fp8", "weight_block_size": [64, 64]},
            {"w": info("F8_E4M3", 128), "w_scale_inv": info("F32", 2)},
            r"w is F8_E4M3 \[128\]; weight_block_size is of matrices",
        ),
        (
            {"quant_method": "fp8", "weight_block_size": [64.0, 64.0]},
            {"w": info("F8_E4M3", 128, 64), "w_scale_inv": info("F32", 2, 1)},
            "already quantized",
        ),
        (
            {"quant_method": "fp8", "weight_block_size": [True, True]},
            {"w": info("F8_E4M3", 2, 2), "w_scale_inv": info("F32", 2, 2)},
            "already quantized",
        ),
        (
            {"quant_method": "mxfp4"},
            {"w_blocks": info("U8", 16), "w_scales": info("U8")},
            r"w_blocks is U8 \[16\] and its w_scales U8 \[\]; mxfp4 has",
        ),
        (
            {"quant_method": "mxfp4"},
            {"w.weight": info("BF16", 2, 32), "w_blocks": info("U8", 2, 1, 16), "w_scales": info("U8", 2, 1)},
            r"w\.weight stands beside w_blocks",
        ),
        (
            {"quant_method": "compressed-tensors"},
            {
                "w.weight": info("BF16", 2, 32),
                "w.weight_packed": info("U8", 2, 16),
                "w.weight_scale": info("F8_E4M3", 2, 2),
                "w.weight_global_scale": info("F32", 1),
            },
            r"w\.weight stands beside w\.weight_packed",
        ),
    ],
    ids=["fp8 vector", "sizes with a point", "sizes that are none", "mxfp4 vector", "mxfp4 twice", "nvfp4 twice"],
)
def test_headers_that_do_not_fit_are_refused(quantization, tensors, message):
    with pytest.raises(ValueError, match=message):
        unpacked(tensors, quantization)
