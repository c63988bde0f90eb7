"""Directories that are meant to do harm, or that change while they are read: an error that says what, and no more
memory than the files justify."""

import json
import os
import shutil
import struct
import tracemalloc
from pathlib import Path

import mlx.core as mx
import pytest

import mlx_marlin
from mlx_marlin import TrellisModelLoader
from mlx_marlin.lm.mlx_lm_host import MLX_LM
from mlx_marlin.lm.model import build, load_exl3_model
from mlx_marlin.lm.shapes import check_call
from mlx_marlin.lm.sharding import sharded_load
from mlx_marlin.lm.tokenizer import check_tokenizer
from tests.support import architectures
from tests.support.paths import MODELS
from tests.support.small_conversions import add_tokenizer

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture(scope="module")
def checkpoint():
    return architectures.qwen3_moe()


@pytest.fixture
def directory(checkpoint, tmp_path):
    return checkpoint.write(tmp_path / "model")


@pytest.fixture
def sharded(checkpoint, tmp_path):
    return checkpoint.write(tmp_path / "model", shards=2)


def change(file: Path, **changes) -> None:
    content = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**content, **changes}))


def nested(levels: int) -> bytes:
    return b'{"a":' * levels + b"1" + b"}" * levels


# Sizes that agree with every tensor, and contradict each other.


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"num_experts_per_tok": 99}, "num_experts_per_tok = 99"),
        ({"num_experts_per_tok": "2"}, "num_experts_per_tok = '2'"),
        ({"head_dim": 256, "num_attention_heads": 1, "num_key_value_heads": 3}, "num_key_value_heads = 3"),
        ({"rope_theta": "a"}, "rope_theta = 'a'"),
        ({"mlp_only_layers": None}, "mlx-lm cannot build"),
    ],
)
def test_a_config_that_contradicts_itself(checkpoint, changes, named):
    config = {**checkpoint.config, **changes}
    with pytest.raises(ValueError) as error:
        check_call(build(Path("here"), config), Path("here"), config, MLX_LM)
    assert str(error.value).startswith("here/config.json: ") and named in str(error.value)
    assert "\n" not in str(error.value)


def test_it_is_refused_before_a_weight_is_read(directory, monkeypatch):
    change(directory / "config.json", num_experts_per_tok=99)
    monkeypatch.setattr(mlx_marlin.lm.model, "fill", None)
    with pytest.raises(ValueError, match=r"config\.json: sizes contradict .*num_experts_per_tok = 99"):
        load_exl3_model(directory)


def test_nothing_is_computed(checkpoint):
    """A model of 40 GB."""
    sizes = dict(hidden_size=8192, vocab_size=200_000, moe_intermediate_size=8192, num_experts=64, num_hidden_layers=3)
    config = {**checkpoint.config, **sizes, "num_attention_heads": 64, "head_dim": 128, "num_key_value_heads": 8}
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    check_call(build(Path("here"), config), Path("here"), config, MLX_LM)
    assert mx.get_peak_memory() - before < 1 << 20


@pytest.mark.parametrize("key", ["num_hidden_layers", "num_experts", "hidden_size", "vocab_size", "head_dim"])
@pytest.mark.parametrize("value", [10**9, 2**31, 2**63, 2**64 + 1, -1, 0.5, "x", None, [1], {"a": 1}], ids=repr)
def test_a_size_of_another_kind(directory, key, value):
    """It is refused, or means the same as what was there (a model that ignores the key); memory stays small."""
    change(directory / "config.json", **{key: value})
    mx.reset_peak_memory()
    before = mx.get_active_memory()  # what other tests hold
    tracemalloc.start()
    try:
        load_exl3_model(directory)
    except ValueError as error:
        assert str(directory) in str(error)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50 << 20 and mx.get_peak_memory() - before < 100 << 20


# Files that change while they are read.


def test_a_file_that_becomes_shorter_between_two_weights(directory):
    loader = TrellisModelLoader(directory)
    os.truncate(directory / WEIGHTS, 20000)
    with pytest.raises(ValueError, match=rf"{WEIGHTS} ends early: \d+ bytes wanted at \d+, \d+ there"):
        for name in loader.names:
            loader.load_weight(name)


def shorten(file: Path) -> None:
    os.truncate(file, 20000)


def replace(file: Path) -> None:
    shutil.copyfile(file, file.with_name("other"))
    os.replace(file.with_name("other"), file)


def overwrite(file: Path) -> None:
    with open(file, "r+b") as stream:
        stream.seek(30000)
        stream.write(b"changed")


@pytest.mark.parametrize("load", [load_exl3_model, sharded_load])
@pytest.mark.parametrize("harm", [shorten, replace, overwrite, Path.unlink])
def test_a_file_that_changes_while_a_model_is_loaded(directory, harm, load):
    def progress(done, total):
        if done == 1:
            harm(directory / WEIGHTS)

    add_tokenizer(directory)
    with pytest.raises(ValueError, match=rf"{WEIGHTS} ends early|changed while it was read"):
        load(directory, progress=progress)


# Paths.


@pytest.mark.parametrize(
    "name", ["../model.safetensors", "/etc/model.safetensors", "sub/model.safetensors", "..", "", "a\0.safetensors", 7]
)
def test_an_index_that_leads_elsewhere(sharded, name):
    content = json.loads((sharded / INDEX).read_text())
    content["weight_map"]["lm_head.suh"] = name
    (sharded / INDEX).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"{INDEX}: tensor 'lm_head.suh' is said to be in .* not a file of this dir"):
        load_exl3_model(sharded)


@pytest.mark.parametrize("name", ["model-00002-of-00002.safetensors", INDEX, "config.json"])
def test_links_in_a_circle(sharded, name):
    (sharded / name).unlink()
    (sharded / name).symlink_to(sharded / "between")
    (sharded / "between").symlink_to(sharded / name)
    with pytest.raises(ValueError, match=rf"{name} is a link that leads in a circle"):
        load_exl3_model(sharded)


# Headers.


def write_header(directory: Path, header: bytes, data: bytes = b"\0" * 64) -> None:
    (directory / WEIGHTS).write_bytes(struct.pack("<Q", len(header)) + header + data)


def entry(shape, offsets, dtype="F16") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    "header, message",
    [
        (b'{"a.trellis": 1}'.decode().encode("utf-16"), "the header of .* cannot be read as JSON: 'utf-8' codec"),
        (b"\xef\xbb\xbf{}", "cannot be read as JSON: Unexpected UTF-8 BOM"),
        (b'{"\xff": 1}', "cannot be read as JSON: 'utf-8' codec"),
        (nested(100), "the header of .* nests too deeply: more than 64 levels"),
        (nested(100_000), "the header of .* nests too deeply"),
        ({"a": entry([2**31 - 1] * 4, [0, 64])}, r"which is 4253\d* bytes, but its data_offsets span 64"),
        ({"a": entry([2**32], [0, 2**33])}, "dimensions must be integers from 0 to 2147483647"),
        ({"a": entry([2**31 - 1], [2**64 - 2, 2**64 + 2**32 - 4])}, "it is truncated"),
        ({"a": entry([8], [0, 16]), "b": entry([8], [8, 24])}, "tensors 'a' and 'b' overlap in the file"),
    ],
)
def test_headers(directory, header, message):
    write_header(directory, header if isinstance(header, bytes) else json.dumps(header).encode())
    with pytest.raises(ValueError, match=message):
        TrellisModelLoader(directory)


def test_a_header_of_many_gigabytes(directory):
    (directory / WEIGHTS).write_bytes(struct.pack("<Q", 2**40) + b"{}")
    os.truncate(directory / WEIGHTS, 2**33)  # sparse
    with pytest.raises(ValueError, match="announces a header of 1099511627776 bytes; the limit is 100000000"):
        TrellisModelLoader(directory)


# JSON beside the weights.


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", INDEX])
@pytest.mark.parametrize("levels", [100, 900, 100_000])
def test_levels_of_json(sharded, name, levels):
    (sharded / name).write_bytes(nested(levels))
    with pytest.raises(ValueError, match=rf"{name} nests too deeply"):
        load_exl3_model(sharded)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("value", ["x", 1.5, True, {"a": 1}, [1, "x"], 2**31, [[1]]], ids=repr)
def test_the_end_of_a_text(directory, name, value):
    change(directory / name, eos_token_id=value)
    with pytest.raises(ValueError, match=rf"{name}: eos_token_id must be a token's number"):
        load_exl3_model(directory)


@pytest.fixture(scope="module")
def with_tokenizer(tmp_path_factory):
    return shutil.copytree(MODELS / "random-qwen3_moe", tmp_path_factory.mktemp("tokenizer") / "model")


TYPES = {"number": 7, "text": "x", "flag": True, "list": [1], "object": {"a": 1}, "deep": [[{"content": 3}]]}
WRONG = {
    "bos_token": ("number", "flag", "list", "object"),
    "eos_token": ("number", "deep"),
    "unk_token": ("number", "object"),
    "additional_special_tokens": ("number", "text", "list", "object", "deep"),
    "extra_special_tokens": ("number", "list"),
    "add_bos_token": ("number", "text", "list"),
    "add_prefix_space": ("text",),
    "clean_up_tokenization_spaces": ("object",),
    "tokenizer_class": ("number", "list"),
    "padding_side": ("number",),
    "model_max_length": ("text", "list", "flag"),
    "added_tokens_decoder": ("number", "text", "list", "object"),
    "chat_template": ("number", "list", "object"),
    "chat_template_type": ("number", "list"),
    "tool_parser_type": ("flag",),
    "model_input_names": ("text", "list"),
}


@pytest.mark.parametrize("key, kind", [(key, kind) for key, kinds in WRONG.items() for kind in kinds])
def test_a_key_of_a_tokenizer_of_another_type(with_tokenizer, tmp_path, key, kind):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(with_tokenizer / name, tmp_path)
    check_tokenizer(tmp_path)
    change(tmp_path / "tokenizer_config.json", **{key: TYPES[kind]})
    with pytest.raises(ValueError, match=rf"tokenizer_config\.json: {key} must be "):
        check_tokenizer(tmp_path)


def test_modules_that_a_tokenizer_names(with_tokenizer, tmp_path):
    shutil.copy(with_tokenizer / "tokenizer.json", tmp_path)
    for name in ("..x", "a.b", "x/y", ""):
        change(tmp_path / "tokenizer_config.json", tool_parser_type=name)
        with pytest.raises(ValueError, match=r"tokenizer_config\.json: tool_parser_type must be a name, got"):
            check_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "tokenizer.json", "added_tokens.json"])
@pytest.mark.parametrize("content", [b"", b"[]", b"{", b'{"a": "\xff"}', "{}".encode("utf-16"), nested(100)])
def test_garbage_in_a_tokenizer(with_tokenizer, tmp_path, name, content):
    shutil.copy(with_tokenizer / "tokenizer.json", tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        check_tokenizer(tmp_path)


def test_other_files_of_a_tokenizer(with_tokenizer, tmp_path):
    shutil.copy(with_tokenizer / "tokenizer.json", tmp_path)
    change(tmp_path / "added_tokens.json", **{"<x>": "7"})
    with pytest.raises(ValueError, match=r"added_tokens\.json: '<x>' must be a token's number, got '7'"):
        check_tokenizer(tmp_path)
    (tmp_path / "added_tokens.json").unlink()
    change(tmp_path / "special_tokens_map.json", eos_token=3)
    with pytest.raises(ValueError, match=r"special_tokens_map\.json: eos_token must be a token: .*, got 3"):
        check_tokenizer(tmp_path)
    (tmp_path / "special_tokens_map.json").unlink()
    (tmp_path / "tokenizer_config.json").symlink_to("tokenizer_config.json")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json is a link that leads in a circle"):
        check_tokenizer(tmp_path)


@pytest.mark.parametrize("content", ["{}", '{"model": 7}', '{"model": {"type": "BPE", "vocab": [], "merges": 3}}'])
def test_a_tokenizer_that_transformers_cannot_make(with_tokenizer, tmp_path, content):
    directory = shutil.copytree(with_tokenizer, tmp_path / "model")
    (directory / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match=f"{directory}: transformers cannot make a tokenizer of tokenizer.json and "):
        mlx_marlin.load(str(directory))
