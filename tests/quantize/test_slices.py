"""Experts of tensors that a checkpoint has of all of them: each is read alone, with the values of mlx-lm's stack."""

import gc
import json
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_marlin.quantize import convert, extras, packed
from mlx_marlin.quantize.layered import LayeredModel
from mlx_marlin.quantize.slices import Slice, found_slice
from mlx_marlin.quantize.source import Source
from mlx_marlin.quantize.taps import Taps
from mlx_marlin.storage.safetensors import TensorInfo
from tests.support import architectures
from tests.support.checkpoints import write_directory
from tests.support.small_conversions import SMALL, quick_conversions, source_of  # noqa: F401

TOKENS = np.zeros((1, 8), np.int32)
ROWS, COLUMNS = 6, 4
TENSORS = {
    "other": TensorInfo(None, "F32", (3, 2, 2), 0, 48),
    "fused": TensorInfo(None, "F32", (3, ROWS, COLUMNS), 0, 288),
}
NUMBERS = np.arange(ROWS * COLUMNS).reshape(1, ROWS, COLUMNS)


def mxfp4_source(tmp_path):
    """gpt-oss with its experts in blocks and scales."""
    source, checkpoint = source_of(tmp_path, "gpt_oss")
    tensors = {}
    for name, value in checkpoint.dense.items():
        if not name.endswith("proj.weight") or "experts" not in name:
            tensors[name] = value
            continue
        words, scales = mx.quantize(value, group_size=32, bits=4, mode="mxfp4")
        stem = name.removesuffix(".weight")
        tensors[f"{stem}_blocks"] = words.view(mx.uint8).reshape(*scales.shape, 16)
        tensors[f"{stem}_scales"] = scales
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4"}
    return write_directory(tmp_path / "mxfp4", config, tensors, 1)


def source_path(name, tmp_path):
    return mxfp4_source(tmp_path) if name == "mxfp4" else source_of(tmp_path, name)[0]


@pytest.mark.parametrize("name", ["qwen3_5_moe", "gpt_oss", "gemma4", "mxfp4"])
def test_experts_of_fused_tensors_are_read_one_by_one(name, tmp_path):
    model = LayeredModel(Source(source_path(name, tmp_path)), TOKENS, 1)
    for index, layer in enumerate(model.layers):
        model.load(index)
        found, parameters = model.experts(index), dict(tree_flatten(layer.parameters()))
        stacks = {path.removesuffix(".weight") for path, v in parameters.items() if v.ndim == 3 and "proj" in path}
        assert found.keys() == stacks and len(stacks) == 3
        for path, tensors in found.items():
            wanted = np.array(parameters[f"{path}.weight"].astype(mx.float32))
            for expert, values in enumerate(wanted):
                np.testing.assert_array_equal(tensors.read(expert), values)


def test_an_only_expert_is_read_whole(tmp_path):
    """A stack of one matrix is no tensor of all experts."""
    checkpoint = architectures.mixtral(replace(SMALL, hidden=384, experts=1))
    checkpoint.config["num_experts_per_tok"] = 1
    model = LayeredModel(Source(checkpoint.write_dense(tmp_path / "source")), TOKENS, 1)
    found = model.experts(0)
    assert len(found) == 3
    for path, tensors in found.items():
        name = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}[path.rpartition(".")[2]]
        wanted = checkpoint.dense[f"model.layers.0.block_sparse_moe.experts.0.{name}.weight"]
        np.testing.assert_array_equal(tensors.read(0), np.array(wanted.astype(mx.float32)))


@pytest.mark.parametrize("name", ["gpt_oss", "mxfp4"])
def test_they_are_not_in_memory_when_their_layer_is(name, tmp_path):
    model = LayeredModel(Source(source_path(name, tmp_path)), TOKENS, 1)
    mx.clear_cache()
    model.load(0)
    model.unload(0)
    gc.collect()  # arrays of other tests
    before = mx.get_active_memory()
    model.load(1)
    held = mx.get_active_memory() - before
    others = [value.nbytes for _, value in tree_flatten(model.layers[1].parameters()) if value.ndim < 3]
    assert held == pytest.approx(sum(others), rel=0.05)


def test_packed_experts_are_unpacked_once(tmp_path, monkeypatch):
    model = LayeredModel(Source(mxfp4_source(tmp_path)), TOKENS, 1)
    model.load(0)
    names, unpack, unpacked = model.names.experts(model.paths[0]), packed.PackedTensor.row, []
    monkeypatch.setattr(packed.PackedTensor, "row", lambda *given: unpacked.append(given[1]) or unpack(*given))
    taps = Taps(model.layers[0], [], names, model.experts(0))
    (experts,) = taps.experts.values()
    first, again = ([experts.weights["gate_proj"].weight(e) for e in (0, 1)] for _ in range(2))
    assert unpacked == [0, 1] and np.abs(first[0]).max() > 0
    np.testing.assert_array_equal(first, again)


def test_packed_experts_of_prediction_layers_are_unpacked_one_by_one(tmp_path, monkeypatch):
    source, name = Source(mxfp4_source(tmp_path)), "model.layers.1.mlp.experts.gate_up_proj.weight"
    whole = source.tensors[name].floats()
    monkeypatch.setattr(packed.PackedTensor, "floats", None)
    for rows in ((0, slice(None)), (1, slice(5)), (1, slice(5, None))):
        np.testing.assert_array_equal(extras._read(source, name, rows), whole[rows])


def test_an_expert_that_is_not_finite_is_named(tmp_path, text, quick_conversions):  # noqa: F811
    def damage(checkpoint):
        name = "model.layers.1.mlp.experts.gate_up_proj.weight"
        values = np.array(checkpoint.dense[name].astype(mx.float32))
        values[1, 3, 5] = np.inf
        checkpoint.dense[name] = mx.array(values).astype(checkpoint.dense[name].dtype)

    source, _ = source_of(tmp_path, "gpt_oss", damage)
    wanted = r"tensor model\.layers\.1\.mlp\.experts\.gate_up_proj\.weight holds values that are not finite"
    with pytest.raises(ValueError, match=wanted):
        convert(source, tmp_path / "exl3", bits=8, calibration=text)


@pytest.mark.parametrize(
    "take",
    [
        lambda x: x,
        lambda x: x[:, :3],
        lambda x: x[:, 3:],
        lambda x: x[:, 1::2],
        lambda x: x[:, 2:3],
        lambda x: x[..., 2:].swapaxes(1, 2),
        lambda x: x[:, ::-1],
        lambda x: x.reshape(1, 8, 3)[..., 1:],
    ],
)
def test_a_slice_takes_what_the_model_takes(take):
    values = np.random.default_rng(0).standard_normal((1, ROWS, COLUMNS))
    name, part = found_slice(mx.array(np.ascontiguousarray(take(NUMBERS + (1 << 40)))), TENSORS)
    assert name == "fused"
    np.testing.assert_array_equal(part.of(values[0]), take(values)[0])


@pytest.mark.parametrize(
    "made",
    [
        mx.array(NUMBERS[:, [0, 1, 3, 2]]),  # rows in another order
        mx.array(NUMBERS, mx.float32),  # scaled
        mx.array(2 * NUMBERS + (1 << 40)),
        mx.array(np.concatenate([NUMBERS, NUMBERS])),
    ],
)
def test_what_is_no_slice_is_read_as_the_model_makes_it(made):
    assert found_slice(made, TENSORS) is None


def test_a_slice_is_a_view():
    values = np.arange(12.0, dtype=np.float32).reshape(3, 4)
    assert np.shares_memory(Slice(4, (2, 4), (4, 1)).of(values), values)
