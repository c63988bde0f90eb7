"""Damaged checkpoint directories: each loads completely or is refused with a message; nothing crashes,
nothing is random."""

import json
import struct
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten

from mlx_marlin.lm.model import load_exl3_model
from tests.support import architectures
from tests.support.checkpoints import Sizes

pytestmark = pytest.mark.slow

SETTINGS = settings(
    max_examples=300, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
INDEX = "model.safetensors.index.json"

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8)
    | st.sampled_from([-1, 0, 1, 2**31, 2**53, 2**64, "F16", "I16", "..", "../a.safetensors", "exl3", "\0"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip


class Files(dict):
    """File name -> bytes, without printing the bytes."""

    def __repr__(self) -> str:
        return f"Files of {', '.join(sorted(self))}"


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """File name -> bytes of a sharded MoE checkpoint and of a dense one."""
    root = tmp_path_factory.mktemp("fuzz")
    directories = [
        architectures.qwen3_moe(Sizes(layers=1), dense_layers=()).write(root / "moe", shards=2),
        architectures.llama(Sizes(layers=1)).write(root / "dense"),
    ]
    return [Files((path.name, path.read_bytes()) for path in directory.iterdir()) for directory in directories]


@pytest.fixture(autouse=True)
def no_random_weights(monkeypatch):
    """Initial weights become NaN, so that one that is left shows."""
    for name in ("uniform", "normal"):
        monkeypatch.setattr(mx.random, name, lambda *_, shape=(), **__: mx.full(shape, float("nan")))
    assert mx.isnan(nn.Linear(2, 2).weight).all().item()


def check(directory: Path, files: dict[str, bytes]) -> None:
    for path in directory.iterdir():
        path.unlink()
    for name, content in files.items():
        (directory / name).write_bytes(content)
    try:
        model, _ = load_exl3_model(directory)
    except (ValueError, FileNotFoundError) as error:
        assert len(str(error)) > 10
        return
    for key, value in tree_flatten(model.parameters()):
        if mx.issubdtype(value.dtype, mx.floating):
            assert not mx.isnan(value).any().item(), f"{key} was not loaded"


def header_of(content: bytes) -> tuple[dict, bytes]:
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def with_header(header, data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def weight_file(draw, files: dict[str, bytes]) -> str:
    return draw(st.sampled_from(sorted(name for name in files if name.endswith(".safetensors"))))


@SETTINGS
@given(data=st.data())
def test_bytes_of_headers(originals, tmp_path, data):
    files = Files(data.draw(st.sampled_from(originals)))
    name = weight_file(data.draw, files)
    content = bytearray(files[name])
    (length,) = struct.unpack("<Q", content[:8])
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, 7 + length))] = data.draw(st.integers(0, 255))
    check(tmp_path, {**files, name: bytes(content)})


@SETTINGS
@given(data=st.data())
def test_truncation(originals, tmp_path, data):
    files = Files(data.draw(st.sampled_from(originals)))
    name = data.draw(st.sampled_from(sorted(files)))
    check(tmp_path, {**files, name: files[name][: data.draw(st.integers(0, len(files[name])))]})


@SETTINGS
@given(data=st.data())
def test_entries_of_headers(originals, tmp_path, data):
    files = Files(data.draw(st.sampled_from(originals)))
    name = weight_file(data.draw, files)
    header, content = header_of(files[name])
    tensor, other = (data.draw(st.sampled_from(sorted(header))) for _ in range(2))
    header["__metadata__"] = {"format": "pt"}
    change = data.draw(st.sampled_from(["entry", "field", "remove", "rename", "swap", "copy"]))
    if change == "entry":
        header[tensor] = data.draw(json_values)
    elif change == "field":
        header[tensor][data.draw(st.sampled_from(["dtype", "shape", "data_offsets"]))] = data.draw(json_values)
    elif change == "remove":
        del header[tensor]
    elif change == "rename":
        header[data.draw(st.text(max_size=12) | st.sampled_from(["a.trellis", "x.weight", "lm_head.weight"]))] = (
            header.pop(tensor)
        )
    elif change == "swap":
        header[tensor], header[other] = header[other], header[tensor]
    else:
        header[tensor] = header[other]
    if data.draw(st.booleans()):
        files.pop(INDEX, None)  # which would notice some of these first
    check(tmp_path, {**files, name: with_header(header, content)})


@SETTINGS
@given(data=st.data())
def test_configs(originals, tmp_path, data):
    files = Files(data.draw(st.sampled_from(originals)))
    config = json.loads(files["config.json"])
    for _ in range(data.draw(st.integers(1, 3))):
        key = data.draw(
            st.sampled_from(sorted(config))
            | st.sampled_from(["text_config", "layer_types", "quantization", "model_file"])
        )
        if data.draw(st.booleans()):
            config[key] = data.draw(json_values)
        else:
            config.pop(key, None)
    check(tmp_path, {**files, "config.json": json.dumps(config).encode()})


@SETTINGS
@given(data=st.data())
def test_indexes(originals, tmp_path, data):
    files = Files(originals[0])
    index = json.loads(files[INDEX])
    key = data.draw(st.sampled_from(sorted(index["weight_map"])) | st.text(max_size=8))
    index["weight_map"][key] = data.draw(json_values | st.sampled_from(sorted(files)))
    check(
        tmp_path,
        {**files, INDEX: json.dumps(index if data.draw(st.booleans()) else index["weight_map"]).encode()},
    )
