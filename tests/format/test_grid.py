"""The metal-marlin scalar grid: weights, layers and directories."""

import json

import mlx.core as mx
import numpy as np
import pytest

from mlx_marlin import GridWeight, TrellisModelLoader
from mlx_marlin.layers import GridLinear
from mlx_marlin.storage.safetensors import Tensor, write_tensors
from tests.support.paths import VECTORS

EXAMPLES = np.load(VECTORS / "metal_marlin.npz")
PARTS = ("indices", "scales", "su", "sv")
SHAPE = tuple(int(n) for n in EXAMPLES["shape"])


def tensors(bits):
    return {part: EXAMPLES[f"b{bits}_{part}"] for part in PARTS}


def write_safetensors(path, arrays):
    write_tensors(path, {name: Tensor.of(array) for name, array in arrays.items()})


@pytest.fixture(params=["v2 tensor", "v2 batch", "v3 underscores", "v3 dots"])
def directory(request, tmp_path):
    names = {bits: f"model.layers.0.mlp.linear_{bits}.weight" for bits in (2, 3, 4, 8)}
    version, spelling = request.param.split()
    join = (lambda n, p: f"{n}.{p}") if spelling == "dots" else (lambda n, p: f"{n.replace('.', '__')}__{p}")
    entries = [{"name": n, "bits": b, "shape": list(SHAPE), "mse": 0.0} for b, n in names.items()]
    if version == "v2":
        for bits, name in names.items():
            arrays = {join(name, part): a for part, a in tensors(bits).items()}
            write_safetensors(tmp_path / f"layer_0000/{spelling}_{bits:04}.safetensors", arrays)
        (tmp_path / "layer_0000/index.json").write_text(json.dumps({"tensors": entries}))
    else:
        arrays = {join(name, part): a for bits, name in names.items() for part, a in tensors(bits).items()}
        write_safetensors(tmp_path / "model-00001-of-00001.safetensors", arrays)
        (tmp_path / "quantization_index.json").write_text(json.dumps({"layers": entries}))
    return tmp_path


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_directories(directory, bits):
    loader = TrellisModelLoader(directory)
    assert loader.names == [f"model.layers.0.mlp.linear_{b}" for b in (2, 3, 4, 8)]
    w = loader.load_weight(f"layers.0.mlp.linear_{bits}")
    assert isinstance(w, GridWeight) and w.bits == bits and (w.out_features, w.in_features) == SHAPE
    np.testing.assert_allclose(w.dequantize(), EXAMPLES[f"b{bits}_weight"], rtol=0, atol=1e-6)
    assert set(loader.load_layer(0)) == {f"mlp.linear_{b}" for b in (2, 3, 4, 8)}


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("rows", [1, 5])
def test_linear(bits, rows):
    layer = GridLinear(GridWeight(**tensors(bits), shape=SHAPE))
    x = np.random.default_rng(bits).standard_normal((2, rows, SHAPE[1])).astype(np.float32)
    wanted = x.astype(np.float64) @ EXAMPLES[f"b{bits}_weight"]
    y = layer(mx.array(x))
    assert y.dtype == mx.float32
    np.testing.assert_allclose(np.array(y), wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())
    assert layer(mx.array(x).astype(mx.float16)).dtype == mx.float16
    assert not layer.trainable_parameters()


@pytest.mark.parametrize("bits", [0, 1, 5, 6, 7, 9])
def test_widths_without_kernels(bits):
    parts = tensors(2)
    parts["indices"] = np.concatenate([np.array([bits], np.uint8), parts["indices"][1:]])
    with pytest.raises(ValueError, match=f"{bits} bits.*2, 3, 4, 8"):
        GridWeight(**parts, shape=SHAPE)


@pytest.mark.parametrize(
    "part, value, message",
    [
        ("indices", lambda a: a[:-1], "must hold 1 \\+ 1536 bytes"),
        ("indices", lambda a: a.astype(np.int16), "flat uint8, got int16"),
        ("su", lambda a: a[:-1], r"su must be float32 \[128\]"),
        ("sv", lambda a: a.astype(np.float64), r"sv must be float32 \[48\], got float64"),
        ("scales", lambda a: a.T.copy(), "scales must be float32"),
    ],
)
def test_damaged_weight(part, value, message):
    parts = tensors(2)
    parts[part] = value(parts[part])
    with pytest.raises(ValueError, match=message):
        GridWeight(**parts, shape=SHAPE)


def test_groups_that_mlx_lacks():
    parts = tensors(2)
    parts["scales"] = np.ones((8, 48), np.float32)
    w = GridWeight(**parts, shape=SHAPE)
    with pytest.raises(ValueError, match="32, 64, 128"):
        GridLinear(w)


def test_index_and_tensor_disagree(directory):
    index = next(p for p in [directory / "layer_0000/index.json", directory / "quantization_index.json"] if p.exists())
    index.write_text(index.read_text().replace('"bits": 3', '"bits": 4'))
    with pytest.raises(ValueError, match="the index says 4 bits, the tensor's header byte 3"):
        TrellisModelLoader(directory).load_weight("layers.0.mlp.linear_3")


def test_missing_tensor(tmp_path):
    arrays = {f"a__{part}": a for part, a in tensors(2).items() if part != "sv"}
    write_safetensors(tmp_path / "layer_0000/tensor_0.safetensors", arrays)
    index = tmp_path / "layer_0000/index.json"
    index.write_text(json.dumps({"tensors": [{"name": "a", "bits": 2, "shape": list(SHAPE)}]}))
    with pytest.raises(ValueError, match="a__sv"):
        TrellisModelLoader(tmp_path)
