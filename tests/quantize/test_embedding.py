"""Quantized token embeddings: the search's error, the layout, and whole conversions."""

import json
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_marlin import TrellisEmbedding, TrellisModelLoader, codec
from mlx_marlin.lm.model import load_exl3_model
from mlx_marlin.quantize import cli, convert, embedding
from mlx_marlin.quantize.embedding import embedding_signs, pack_rings, quantize_rows, quantize_table
from mlx_marlin.storage.safetensors import Tensor, read_header, write_tensors
from tests.quantize.test_convert import DENSE, dense_shapes, make_source
from tests.support.paths import VECTORS

# Mean squared error of mul1 on unit Gaussian tiles at the best input scale; at 7 and 8 bits clipped tails rule, and a
# scale of its own for each ring does better than one for all.
TILE_ERROR = {1: 0.2715, 2: 0.06813, 3: 0.01733, 4: 0.004468, 5: 0.001157, 6: 0.0003164, 7: 9.315e-05, 8: 3.132e-05}
NAME = "model.embed_tokens"


@pytest.mark.parametrize("name", sorted(p.stem for p in VECTORS.glob("embedding_k*.npz")))
def test_packing_is_the_inverse_of_unpacking(name):
    v = np.load(VECTORS / f"{name}.npz")
    scales, states = codec.unpack_embedding(v["trellis"], len(v["signs"]))
    np.testing.assert_array_equal(pack_rings(states, scales, int(v["K"])), v["trellis"])


@pytest.mark.parametrize("bits", TILE_ERROR)
def test_error_per_element(bits):
    """Gaussian rows of very different magnitudes; 160 rings, whose mean error has a standard error of about 1 %."""
    rng = np.random.default_rng(bits)
    magnitudes = np.exp(rng.uniform(-4, 2, (80, 1)))
    rows = (rng.standard_normal((80, 512)) * magnitudes).astype(np.float32)
    signs = embedding_signs(512, 0)
    decoded = codec.decode_embedding(quantize_rows(rows, signs, bits), signs, 512)
    error = np.mean(np.square((decoded.astype(np.float64) - rows) / magnitudes))
    assert error < 1.03 * TILE_ERROR[bits]
    assert error > (0.97 if bits <= 4 else 0.5) * TILE_ERROR[bits]


def test_rows_that_are_not_gaussian():
    rows = np.zeros((4, 300), np.float32)
    rows[1, 7] = 1000.0  # rotated: 256 values of one magnitude
    rows[2] = 3e-3
    rows[3, :256] = np.random.default_rng(0).standard_normal(256) ** 5
    signs = embedding_signs(300, 0)
    trellis = quantize_rows(rows, signs, 6)
    decoded = codec.decode_embedding(trellis, signs, 300).astype(np.float64)
    assert trellis.shape == (4, 2 * 97) and not decoded[0].any()
    power = np.sum(np.square(rows, dtype=np.float64), axis=1)
    errors = np.sum(np.square(decoded - rows), axis=1)[1:] / power[1:]
    assert errors.max() < 4 * TILE_ERROR[6], errors
    assert np.sum(np.square(decoded[3, 256:])) == 0
    with pytest.raises(ValueError, match="beyond half precision"):
        quantize_rows(np.full((1, 256), 1e6, np.float32), embedding_signs(256, 0), 4)


def test_signs_depend_on_the_seed_alone():
    signs = embedding_signs(300, [3, 4])
    assert signs.shape == (2, 256) and signs.dtype == np.float16 and set(np.unique(signs)) == {-1.0, 1.0}
    np.testing.assert_array_equal(signs, embedding_signs(300, [3, 4]))
    assert (signs != embedding_signs(300, [4, 4])).any()


@pytest.mark.parametrize("dtype", ("F16", "BF16", "F32"))
def test_tables_are_quantized_in_blocks(dtype, tmp_path, monkeypatch):
    values = np.random.default_rng(0).standard_normal((11, 300)).astype(np.float16)
    bits = values.astype(np.float32).view(np.uint32) >> 16
    tensor = {
        "F16": Tensor.of(values),
        "F32": Tensor.of(values.astype(np.float32)),
        "BF16": Tensor("BF16", values.shape, bits.astype(np.uint16).tobytes()),
    }[dtype]
    if dtype == "BF16":
        values = (bits << 16).view(np.float32)
    write_tensors(tmp_path / "t.safetensors", {"e": tensor})
    table, signs = read_header(tmp_path / "t.safetensors")["e"], embedding_signs(300, 0)
    whole = quantize_rows(values.astype(np.float32), signs, 3, threads=2)
    monkeypatch.setattr(embedding, "_BLOCK_RINGS", 8)
    seen = []
    monkeypatch.setattr(embedding, "quantize_rows", lambda rows, *a: seen.append(len(rows)) or quantize_rows(rows, *a))
    np.testing.assert_array_equal(quantize_table(table, signs, 3, threads=1), whole)
    assert seen == [4, 4, 3]


def test_tables_must_be_finite(tmp_path):
    values = np.ones((3, 256), np.float16)
    values[1, 1] = np.inf
    write_tensors(tmp_path / "t.safetensors", {"e": Tensor.of(values)})
    with pytest.raises(ValueError, match="not finite"):
        quantize_table(read_header(tmp_path / "t.safetensors")["e"], embedding_signs(256, 0), 3)


@pytest.fixture(scope="module", params=("tied", pytest.param("untied", marks=pytest.mark.slow)))
def source(request, tmp_path_factory):
    tied, rows = request.param == "tied", 256  # fewer than other tests have, for the search
    shapes = {
        n: (rows, *shape[1:]) if shape[0] == DENSE["vocab_size"] else shape for n, shape in dense_shapes().items()
    }
    if tied:
        del shapes["lm_head.weight"]
    path = tmp_path_factory.mktemp("source") / "model"
    make_source(path, {**DENSE, "vocab_size": rows, "tie_word_embeddings": tied}, shapes, "BF16")
    return path


def logits(directory, ids):
    model, _ = load_exl3_model(directory)
    return model, np.array(model(mx.array(ids)[None]))


@pytest.fixture(scope="module", autouse=True)
def small_vocabulary():
    """The tokenizer of the sources has 2048 tokens."""
    with pytest.MonkeyPatch.context() as patch:
        tokens = np.random.default_rng(0).integers(0, 256, (8, 64))
        patch.setattr("mlx_marlin.quantize.calibration.calibration_tokens", lambda *_: tokens)
        yield


@pytest.fixture(scope="module")
def converted(source, tmp_path_factory):
    output = tmp_path_factory.mktemp("converted") / "model"
    convert(source, output, bits=3, embed_bits=4)
    return output


def test_a_conversion(source, converted, tmp_path):
    output = Path(shutil.copytree(converted, tmp_path / "model"))
    tensors = read_header(output / "model.safetensors")
    assert (tensors[f"{NAME}.trellis"].dtype, tensors[f"{NAME}.trellis"].shape) == ("I16", (256, 65))
    assert (tensors[f"{NAME}.signs"].dtype, tensors[f"{NAME}.signs"].shape) == ("F16", (1, 256))
    assert f"{NAME}.weight" not in tensors and "lm_head.trellis" in tensors
    config = json.loads((output / "config.json").read_text())
    listed = json.loads((output / "quantization_config.json").read_text())
    assert not any("embed" in key for key in config["quantization_config"])
    assert listed["tensor_storage"].pop(NAME) == {
        "stored_tensors": {
            f"{NAME}.signs": {"shape": [1, 256], "n_bytes": 512, "dtype": "torch.float16"},
            f"{NAME}.trellis": {"shape": [256, 65], "n_bytes": 256 * 130, "dtype": "torch.int16"},
        }
    }
    # Its error, and the model against the same one with the decoded table.
    w = TrellisModelLoader(output).load_weight(NAME, out_features=192)
    decoded = codec.decode_embedding(np.array(w.trellis), np.array(w.signs), 192)
    original = read_header(source / "model.safetensors")[f"{NAME}.weight"].floats()
    error = np.mean(np.square(decoded - original)) / np.mean(np.square(original))
    assert error < 1.1 * TILE_ERROR[4]
    ids = np.random.default_rng(1).integers(0, 256, 24)
    model, got = logits(output, ids)
    assert isinstance(model.model.embed_tokens, TrellisEmbedding)
    twin = dict(mx.load(str(output / "model.safetensors")))
    mx.eval(twin)
    del twin[f"{NAME}.trellis"], twin[f"{NAME}.signs"]
    mx.save_safetensors(str(output / "model.safetensors"), {**twin, f"{NAME}.weight": mx.array(decoded)})
    _, wanted = logits(output, ids)
    assert np.abs(got - wanted).max() <= 1e-4 * np.abs(wanted).max()
    assert (got.argmax(-1) == wanted.argmax(-1)).all()


def test_the_result_is_the_same_each_time(source, converted, tmp_path, monkeypatch):
    monkeypatch.setattr("mlx_marlin.kernels.cpu_threads", lambda: 1)
    convert(source, tmp_path / "again", bits=3, embed_bits=4)
    assert (tmp_path / "again/model.safetensors").read_bytes() == (converted / "model.safetensors").read_bytes()


def test_the_command_passes_the_width_on(monkeypatch):
    seen = {}
    monkeypatch.setattr("mlx_marlin.quantize.convert", lambda *_, **keywords: seen.update(keywords) or 1 / 0)
    for options, wanted in (([], None), (["--embed-bits", "5"], 5)):
        with pytest.raises(ZeroDivisionError):
            cli.main(["--model", "a", "--output", "b", "--bits", "3", *options])
        assert seen["embed_bits"] == wanted


@pytest.mark.parametrize("bits", (0, 9, 2.5, "4", 16))
def test_bad_widths(bits, tmp_path):
    with pytest.raises(ValueError, match="embed_bits must be a whole number from 1 to 8, or None"):
        convert(tmp_path / "nothing", tmp_path / "out", bits=4, embed_bits=bits)
