"""Checkpoint directories: what is read, and what every kind of bad input says."""

import json
import struct
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_marlin import TrellisModelLoader, codec
from mlx_marlin.storage.safetensors import read_header
from tests.support import architectures
from tests.support.checkpoints import MARKERS, SIZES, Checkpoint, Sizes

LINEAR = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def checkpoint():
    return architectures.llama(Sizes(layers=1))


@pytest.fixture
def directory(checkpoint, tmp_path):
    return checkpoint.write(tmp_path / "model")


def change(directory: Path, **changes) -> None:
    """Replace (or with None remove) tensors of LINEAR, by suffix."""
    file = directory / "model.safetensors"
    tensors = dict(mx.load(str(file)))
    mx.eval(tensors)
    for suffix, value in changes.items():
        tensors.pop(f"{LINEAR}.{suffix}", None)
        if value is not None:
            tensors[f"{LINEAR}.{suffix}"] = value
    mx.save_safetensors(str(file), tensors)


def write_header(directory: Path, header: bytes, data: bytes = b"\0" * 64, length: int | None = None) -> Path:
    file = directory / "model.safetensors"
    file.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + data)
    return file


def entry(dtype="F16", shape=(4,), offsets=(0, 8), **more) -> bytes:
    return json.dumps({"a.trellis": {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}}).encode()


def test_names_are_in_numerical_order(tmp_path):
    directory = architectures.llama(Sizes(layers=11)).write(tmp_path / "m", shards=3)
    loader = TrellisModelLoader(directory)
    layers = [int(name.split(".")[2]) for name in loader.names if ".layers." in name]
    assert layers == sorted(layers) and layers[-1] == 10
    assert len(loader.names) == 7 * 11 + 1


def test_load_weight_gives_the_stored_tensors(checkpoint, directory):
    loader = TrellisModelLoader(directory)
    for name in (LINEAR, LINEAR.removeprefix("model.")):
        w = loader.load_weight(name)
        assert (np.array(w.trellis) == np.array(checkpoint.exl3[f"{LINEAR}.trellis"])).all()
        assert (np.array(w.suh) == np.array(checkpoint.exl3[f"{LINEAR}.suh"])).all()
        assert w.bits == checkpoint.bits[LINEAR] and (w.in_features, w.out_features) == (256, 256)
    w = loader.load_weight(LINEAR, in_features=SIZES.hidden)
    dense = np.array(checkpoint.dense[f"{LINEAR}.weight"])
    assert np.array_equal(codec.dequantize(w).T, dense)


def test_load_layer_gives_its_linears(directory):
    layer = TrellisModelLoader(directory).load_layer(0)
    assert sorted(layer) == sorted(
        [f"self_attn.{p}_proj" for p in "qkvo"] + [f"mlp.{p}_proj" for p in ("gate", "up", "down")]
    )


def test_layers_of_two_towers_that_share_a_number(tmp_path):
    checkpoint = Checkpoint(SIZES, {}, dense=False)
    for name in ("model.layers.0.mlp.up_proj", "vision.layers.0.mlp.up_proj", "vision.layers.0.mlp.gate_proj"):
        checkpoint.linear(name, 128, 128)
    layer = TrellisModelLoader(checkpoint.write(tmp_path / "m")).load_layer(0)
    assert sorted(layer) == ["mlp.gate_proj", "mlp.up_proj", "vision.layers.0.mlp.up_proj"]
    assert layer["mlp.up_proj"].bits == checkpoint.bits["model.layers.0.mlp.up_proj"]
    assert layer["vision.layers.0.mlp.up_proj"].bits == checkpoint.bits["vision.layers.0.mlp.up_proj"]


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32])
def test_biases_of_every_dtype(directory, dtype):
    bias = mx.array(np.linspace(-3, 3, 256).astype(np.float32)).astype(dtype)
    change(directory, bias=bias)
    loaded = TrellisModelLoader(directory).load_weight(LINEAR).bias
    assert loaded.dtype == dtype and mx.array_equal(loaded, bias)


@pytest.mark.parametrize("i", ["0", 0.0, None])
def test_layers_are_counted_with_integers(directory, i):
    with pytest.raises(ValueError, match="layers are counted with integers, got"):
        TrellisModelLoader(directory).load_layer(i)


def test_unknown_names_are_refused(directory):
    loader = TrellisModelLoader(directory)
    with pytest.raises(KeyError, match="no quantized linear 'layers.0.nothing'"):
        loader.load_weight("layers.0.nothing")
    with pytest.raises(KeyError, match="no quantized linear in layer 7"):
        loader.load_layer(7)


def test_blocks_of_a_weight_are_those_of_the_whole(directory):
    linear = TrellisModelLoader(directory).quantized["lm_head"]
    whole = codec.inner(linear.load())
    part = linear.load(rows=(1,), columns=(1, 0))
    assert np.array_equal(codec.inner(part), whole[128:][:, np.r_[128:256, 0:128]])
    assert np.array_equal(np.array(part.svh), np.array(linear.load().svh)[np.r_[128:256, 0:128]])


def test_packed_signs_of_older_checkpoints(directory):
    words = np.random.default_rng(0).integers(-(2**15), 2**15, 16, dtype=np.int16)
    change(directory, suh=None, svh=None, su=mx.array(words), sv=mx.array(words))
    w = TrellisModelLoader(directory).load_weight(LINEAR)
    assert np.array_equal(np.array(w.suh), codec.unpack_signs(words))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"trellis": None}, rf"{LINEAR}\.trellis is missing"),
        ({"suh": None}, rf"{LINEAR} needs either \.suh or \.su, got neither"),
        ({"sv": mx.zeros(16, mx.int16)}, rf"{LINEAR} needs either \.svh or \.sv, got svh and sv"),
        ({"scale": mx.zeros(1)}, rf"{LINEAR}\.scale belongs to an early form"),
        (
            {"mcg": mx.array(1, mx.int32), "mul1": mx.array(1, mx.int32)},
            rf"{LINEAR} has both \.mcg and \.mul1",
        ),
        (
            {"trellis": mx.zeros((16, 16, 48), mx.int16), "mcg": mx.zeros(3, mx.int32), "mul1": None},
            rf"{LINEAR}\.mcg must be I32 without dimensions, got I32 \[3\]",
        ),
        ({"trellis": mx.zeros((16, 16, 48), mx.int32)}, rf"{LINEAR}\.trellis must be I16, got I32"),
        ({"trellis": mx.zeros((16, 16), mx.int16)}, rf"{LINEAR}\.trellis: .*got \[16, 16\]"),
        (
            {"trellis": mx.zeros((16, 16, 144), mx.int16)},
            rf"{LINEAR}\.trellis: .*K one of 1, .*, 8, got \[16, 16, 144\]",
        ),
        (
            {"trellis": mx.zeros((16, 16, 40), mx.int16), "mcg": mx.array(MARKERS["mcg"], mx.int32), "mul1": None},
            rf"{LINEAR}\.trellis holds 2\.5 bits .* mul1 only, but the linear has \.mcg, so .* mcg; .* since 1\.5\.1",
        ),
        (
            {"trellis": mx.zeros((16, 16, 56), mx.int16), "mcg": None, "mul1": None},
            rf"{LINEAR}\.trellis holds 3\.5 bits .* mul1 only, but the linear has no \.mul1, so .* 3inst; .* again",
        ),
        (
            {"trellis": mx.zeros((16, 12, 48), mx.int16)},
            rf"{LINEAR}\.trellis .*\[256, 192\] .*multiples of 128",
        ),
        ({"trellis": mx.zeros((0, 16, 48), mx.int16)}, rf"{LINEAR}\.trellis .*positive multiples of 128"),
        ({"suh": mx.zeros(128, mx.float16)}, rf"{LINEAR}\.suh must be F16 \[256\], got F16 \[128\]"),
        ({"svh": mx.zeros(256, mx.float32)}, rf"{LINEAR}\.svh must be F16 \[256\], got F32 \[256\]"),
        (
            {"bias": mx.zeros(200, mx.float16)},
            rf"{LINEAR}\.bias must be floating point of shape \[256\], got F16 \[200\]",
        ),
        ({"weight": mx.zeros((256, 256))}, rf"{LINEAR} has both \.weight and \.trellis"),
    ],
)
def test_wrong_tensors_are_named(directory, changes, message):
    change(directory, **changes)
    with pytest.raises(ValueError, match=message) as error:
        TrellisModelLoader(directory)
    assert str(directory / "model.safetensors") in str(error.value)


@pytest.mark.parametrize(
    "header, message",
    [
        (b"not json", "header of .* cannot be read as JSON"),
        (b"\xff\xfe", "header of .* cannot be read as JSON"),
        (b'{"a.trellis": {}}\xff', "header of .* cannot be read as JSON"),
        ('{"a": {}}'.encode("utf-16"), "header of .* cannot be read as JSON"),
        ('{"a": {}}'.encode("utf-32-le"), "header of .* cannot be read as JSON"),
        (b"\xef\xbb\xbf{}", "header of .* cannot be read as JSON"),
        (b'{"a\\ud800": {}}', "half of a surrogate pair"),
        (b"[]", "must be a JSON object, got list"),
        (b"[" * 100_000, "nests too deeply"),
        (b'{"a": 1' + b"0" * 5000 + b"}", "cannot be read as JSON"),
        (b'{"a": NaN}', "NaN is not JSON"),
        (b'{"a": {}, "a": {}}', "'a' appears twice"),
        (b'{"__metadata__": true}', "__metadata__ must map names to strings"),
        (b'{"a.trellis": 3}', r"tensor 'a\.trellis' needs dtype, shape and data_offsets"),
        (b'{"a.trellis": {"dtype": "F16"}}', r"tensor 'a\.trellis' needs dtype, shape and data_offsets"),
        (entry(dtype="F4"), "has dtype 'F4'"),
        (entry(dtype=["F16"]), "has dtype"),
        (entry(shape=(-4,)), r"has shape \[-4\]"),
        (entry(shape=(True,)), r"has shape \[True\]"),
        (entry(shape=(2**31,), offsets=(0, 2**32)), "integers from 0 to 2147483647"),
        (entry(shape="4"), "has shape '4'"),
        (entry(offsets=(0, 9)), "is 8 bytes, but its data_offsets span 9"),
        (entry(offsets=(8, 0)), "data_offsets span -8"),
        (entry(offsets=(-8, 0)), r"has data_offsets \[-8, 0\]"),
        (entry(offsets=(0.0, 8.0)), "has data_offsets"),
        (entry(offsets=(60, 68)), "ends at byte 68 of the data, but the file holds 64 .*truncated"),
        (entry(shape=(2**31 - 1,) * 4, offsets=(0, 8)), "data_offsets span 8"),
        (
            b'{"a": {"dtype": "F16", "shape": [4], "data_offsets": [0, 8]}, '
            b'"b": {"dtype": "F16", "shape": [4], "data_offsets": [6, 14]}}',
            "tensors 'a' and 'b' overlap",
        ),
    ],
)
def test_hostile_headers_are_refused(tmp_path, header, message):
    file = write_header(tmp_path, header)
    with pytest.raises(ValueError, match=message) as error:
        TrellisModelLoader(tmp_path)
    assert str(file) in str(error.value)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "has 0 bytes"),
        (b"\0\0\0", "has 3 bytes"),
        (struct.pack("<Q", 2**63) + b"{}", "header of 9223372036854775808 bytes; the limit"),
        (struct.pack("<Q", 50) + b"{}", "announces a header of 50 bytes but holds 2: it is truncated"),
    ],
)
def test_truncated_files_are_refused(tmp_path, content, message):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        TrellisModelLoader(tmp_path)


def test_a_truncated_checkpoint_names_the_tensor(directory):
    file = directory / "model.safetensors"
    last = max(read_header(file).items(), key=lambda item: item[1].start + item[1].nbytes)[0]
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match=f"tensor '{last}' ends at byte .* truncated"):
        TrellisModelLoader(directory)


def rewrite_index(directory: Path, rewrite) -> Path:
    index = directory / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    index.write_text(json.dumps(rewrite(content)))
    return index


@pytest.mark.parametrize(
    "name", ["../model.safetensors", "/etc/passwd", "sub/a.safetensors", "..", "config.json", 3, None]
)
def test_an_index_cannot_point_elsewhere(checkpoint, tmp_path, name):
    directory = checkpoint.write(tmp_path / "m", shards=2)
    index = rewrite_index(directory, lambda c: {"weight_map": {**c["weight_map"], f"{LINEAR}.suh": name}})
    with pytest.raises(ValueError, match=rf"{LINEAR}\.suh.* is not a file of this directory") as error:
        TrellisModelLoader(directory)
    assert str(index) in str(error.value)


def test_missing_shards_are_named(checkpoint, tmp_path):
    directory = checkpoint.write(tmp_path / "m", shards=2)
    (directory / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model-00002-of-00002\.safetensors is missing.*holds '"):
        TrellisModelLoader(directory)


def test_an_index_must_tell_the_truth(checkpoint, tmp_path):
    directory = checkpoint.write(tmp_path / "m", shards=2)
    rewrite_index(directory, lambda c: {"weight_map": {**c["weight_map"], "ghost": "model-00001-of-00002.safetensors"}})
    with pytest.raises(ValueError, match=r"model-00001-of-00002\.safetensors does not hold tensor 'ghost'"):
        TrellisModelLoader(directory)
    rewrite_index(directory, lambda c: {"weight_map": []})
    with pytest.raises(ValueError, match="has no weight_map"):
        TrellisModelLoader(directory)


def test_a_tensor_in_two_files_is_refused(checkpoint, directory):
    mx.save_safetensors(str(directory / "model-2.safetensors"), {f"{LINEAR}.suh": mx.zeros(256, mx.float16)})
    with pytest.raises(ValueError, match=rf"tensor '{LINEAR}\.suh' is both in"):
        TrellisModelLoader(directory)


def test_directories_without_weights(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no model\*\.safetensors"):
        TrellisModelLoader(tmp_path)
    with pytest.raises(FileNotFoundError, match="is not a directory"):
        TrellisModelLoader(tmp_path / "nothing")
