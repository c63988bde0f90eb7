"""Damaged headers and directories: each loads completely and runs, or is refused with a message; nothing crashes,
nothing is random."""

import json
import random
import struct
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from mlx_marlin.lm.model import load_exl3_model
from mlx_marlin.lm.tokenizer import check_tokenizer
from mlx_marlin.storage.safetensors import read_header
from tests.support import architectures, mutations
from tests.support.checkpoints import Sizes
from tests.support.paths import MODELS

INDEX = "model.safetensors.index.json"
TOKENIZER = ("tokenizer_config.json", "generation_config.json", "special_tokens_map.json")

# Changes of config.json that once loaded and then failed in the first call, or ended in an error of other code.
CORPUS = [
    {"num_experts_per_tok": 99},
    {"num_experts_per_tok": "2"},
    {"num_key_value_heads": 3, "num_attention_heads": 1, "head_dim": 256},
    {"rope_theta": "a"},
    {"rope_theta": None},
    {"eos_token_id": {"a": 1}},
    {"rms_norm_eps": "x"},
    {"head_dim": 0},
    {"num_attention_heads": 0},
    {"vocab_size": 2**63},
    {"tie_word_embeddings": [1]},
    {"text_config": {}},
    {"text_config": [1]},
    {"quantization_config": {"quant_method": ["exl3"]}},
    {"architectures": 7},
    {"architectures": [7]},
    {"architectures": [[]]},
    {"model_type": ["x"]},
    {"mlp_only_layers": [[]]},
]


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """File name -> bytes of a sharded MoE checkpoint and of a dense one."""
    root = tmp_path_factory.mktemp("fuzz")
    directories = [
        architectures.qwen3_moe(Sizes(layers=1), dense_layers=()).write(root / "moe", shards=2),
        architectures.llama(Sizes(layers=1)).write(root / "dense"),
    ]
    files = [{path.name: path.read_bytes() for path in directory.iterdir()} for directory in directories]
    for found in files:
        found["generation_config.json"] = b'{"eos_token_id": [0, 1], "temperature": 0.5}'
    return files


@pytest.fixture(autouse=True)
def no_random_weights(monkeypatch):
    """Initial weights become NaN, so that one that is left shows."""
    for name in ("uniform", "normal"):
        monkeypatch.setattr(mx.random, name, lambda *_, shape=(), **__: mx.full(shape, float("nan")))
    assert mx.isnan(nn.Linear(2, 2).weight).all().item()


def check(directory: Path, files: dict[str, bytes]) -> bool:
    """Whether a directory with these files loads, in which case it must run."""
    for path in directory.iterdir():
        path.unlink()
    for name, content in files.items():
        (directory / name).write_bytes(content)
    try:
        model, _ = load_exl3_model(directory)
    except (ValueError, FileNotFoundError) as error:
        assert str(directory) in str(error)
        return False
    for key, value in tree_flatten(model.parameters()):
        if mx.issubdtype(value.dtype, mx.floating):
            assert not mx.isnan(value).any().item(), f"{key} was not loaded"
    mx.eval(model(mx.array([[1, 2, 3]])))
    return True


def run_directory(seed: int, originals, directory: Path) -> bool:
    rng = random.Random(seed)
    files = dict(rng.choice(originals))
    name = rng.choice([*files, "config.json", "config.json"])
    if name.endswith(".safetensors"):
        files[name] = mutations.of_safetensors(rng, files[name])
        if rng.random() < 0.5:
            files.pop(INDEX, None)  # which would notice some of these first
    else:
        files[name] = mutations.of_json_file(rng, files[name])
    try:
        return check(directory, files)
    except Exception as error:
        raise AssertionError(f"seed {seed}: {name}: {type(error).__name__}: {error}") from error


@pytest.mark.parametrize("changes", CORPUS, ids=str)
def test_directories_that_once_failed(originals, tmp_path, changes):
    files = dict(originals[0])
    files["config.json"] = json.dumps({**json.loads(files["config.json"]), **changes}).encode()
    check(tmp_path, files)


def test_directories(originals, tmp_path):
    loaded = sum(run_directory(seed, originals, tmp_path) for seed in range(150))
    assert 10 < loaded < 140  # the mutations reach both ends


@pytest.mark.slow
def test_many_directories(originals, tmp_path, fuzz_times):
    for seed in range(1000, 1000 + 10_000 * fuzz_times):
        run_directory(seed, originals, tmp_path)


def run_header(seed: int, originals, file: Path) -> None:
    rng = random.Random(seed)
    files = rng.choice(originals)
    content = files[rng.choice([name for name in files if name.endswith(".safetensors")])]
    (length,) = struct.unpack("<Q", content[:8])
    data = mutations.of_safetensors(rng, content[: 8 + length] + bytes(64) if rng.random() < 0.1 else content)
    file.write_bytes(data)
    tensors = {}
    with mutations.refusals(seed, ValueError, file):
        tensors = read_header(file)
    assert sum(info.nbytes for info in tensors.values()) <= len(data), seed
    for info in tensors.values():
        assert info.array().nbytes == info.nbytes, seed


def test_headers(originals, tmp_path):
    for seed in range(500):
        run_header(seed, originals, tmp_path / "a.safetensors")


@pytest.mark.slow
def test_many_headers(originals, tmp_path, fuzz_times):
    for seed in range(1000, 1000 + 60_000 * fuzz_times):
        run_header(seed, originals, tmp_path / "a.safetensors")


def run_tokenizer(seed: int, directory: Path) -> None:
    """What passes the checks is also what transformers can make a tokenizer of, or refuses with an error of ours."""
    rng, files = random.Random(seed), {}
    for name in ("tokenizer.json", *TOKENIZER):
        source = MODELS / "docs-moe" / name
        files[name] = source.read_bytes() if source.exists() else b"{}"
    name = rng.choice(TOKENIZER)
    files[name] = mutations.of_json_file(rng, files[name])
    for path, content in files.items():
        (directory / path).write_bytes(content)
    with mutations.refusals(seed, ValueError, directory / name):
        check_tokenizer(directory)


def test_tokenizers(tmp_path):
    for seed in range(200):
        run_tokenizer(seed, tmp_path)
