"""mlx_marlin info: against the headers, the converter's own list, and models that are really loaded and run."""

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import cache as mlx_lm_cache

from mlx_marlin import __main__ as cli
from mlx_marlin.device import default_device, memory_bytes
from mlx_marlin.lm.info import CONTEXT, describe
from mlx_marlin.lm.info_report import report
from mlx_marlin.lm.memory import UnknownCache, cache_bytes
from mlx_marlin.lm.model import load_exl3_model
from mlx_marlin.loader.exl3 import QuantizedLinear
from mlx_marlin.storage.safetensors import TensorInfo, read_header
from tests.support import architectures
from tests.support.checkpoints import SIZES
from tests.support.commands import run
from tests.support.paths import MODELS

SHIPPED = sorted(path.name for path in MODELS.iterdir() if (path / "quantization_config.json").is_file())
EXL3 = MODELS / "docs-moe-exl3-mixed"


@pytest.fixture
def no_reading(monkeypatch):
    for place, name in ((QuantizedLinear, "load"), *((TensorInfo, way) for way in ("rows", "array", "read"))):
        monkeypatch.setattr(place, name, lambda *_, **__: pytest.fail("a weight was read"))


def tensors_of(directory: Path) -> dict[str, TensorInfo]:
    return {name: info for file in directory.glob("*.safetensors") for name, info in read_header(file).items()}


@pytest.mark.parametrize("name", SHIPPED)
def test_the_shipped_models(name, no_reading):
    directory = MODELS / name
    info, tensors = describe(directory), tensors_of(directory)
    stored = json.loads((directory / "quantization_config.json").read_text())["tensor_storage"]
    config = json.loads((directory / "config.json").read_text())
    assert sum(info.bytes.values()) == sum(t.nbytes for t in tensors.values())
    codes = sum(t.nbytes for n, t in tensors.items() if n.endswith(".trellis"))
    embedding = {n.rpartition(".")[2]: t for n, t in tensors.items() if n.startswith("model.embed_tokens.")}
    assert info.bytes["embedding"] == sum(t.nbytes for t in embedding.values())
    assert info.bytes["trellis"] == codes - sum(t.nbytes for part, t in embedding.items() if part == "trellis")
    assert info.bytes["left out"] == 0 and not info.left_out
    assert info.format == "EXL3 (ExLlamaV3)" and info.version == config["quantization_config"]["version"]
    assert [info.architecture] == config["architectures"] and info.model_type == config["model_type"]
    # Widths, by the converter's own list of modules.
    widths = {key: m["bits_per_weight"] for key, m in stored.items() if m.get("quant_format") == "exl3"}
    assert info.head_bits == widths.pop("lm_head")
    assert info.embedding_bits == (6 if set(embedding) == {"trellis", "signs"} else None)
    for histogram, of_experts in ((info.projections, False), (info.experts, True)):
        wanted: dict[str, Counter] = {}
        for key, bits in widths.items():
            if (".experts." in key) == of_experts:
                wanted.setdefault(key.rpartition(".")[2], Counter())[f"{bits:g}"] += 1
        assert histogram == wanted
    sizes = {key: 256 * tensors[f"{key}.trellis"].shape[0] * tensors[f"{key}.trellis"].shape[1] for key in widths}
    by_width = Counter()
    for key, bits in widths.items():
        by_width[f"{bits:g}"] += sizes[key]
    assert info.widths == by_width
    parts = [t.nbytes for n, t in tensors.items() if n.rpartition(".")[0] in widths]
    assert info.linear_bits_per_weight == pytest.approx(8 * sum(parts) / sum(sizes.values()))
    assert info.bits_per_weight == pytest.approx(8 * sum(info.bytes.values()) / info.weights)
    codebooks = Counter(
        next((c for c in ("mcg", "mul1") if f"{key}.{c}" in tensors), "3inst") for key in (*widths, "lm_head")
    )
    assert info.codebooks == codebooks


def test_numbers_of_a_shipped_model():
    """Worked out by hand from config.json: 3 layers, 16 experts, hidden 256, 4 heads and 2 KV heads of 64."""
    info = describe(EXL3, 1000)
    attention, experts = 3 * 256 * (256 + 128 + 128 + 256), 3 * 16 * 3 * 256 * 128
    assert sum(info.widths.values()) == attention + experts
    router_and_norms = 3 * (16 * 256 + 2 * 256 + 2 * 64) + 256
    assert info.weights == attention + experts + 2 * 2048 * 256 + router_and_norms
    # Keys and values of 1024 tokens (mlx-lm's steps of 256), float32 on the CPU.
    assert info.memory.cache == 3 * 2 * 2 * 64 * 1024 * 4 and info.memory.context == 1000
    assert info.memory.available == memory_bytes(default_device()) and info.memory.fits


@pytest.mark.parametrize("name", ("qwen3_moe", "gpt_oss", "deepseek_v3", "gemma3", "gemma4", "qwen3_next", "llama"))
@pytest.mark.parametrize("quantized_embedding", (False, True))
def test_memory_is_that_of_the_loaded_model(name, quantized_embedding, tmp_path):
    checkpoint = architectures.ARCHITECTURES[name]()
    if quantized_embedding:
        checkpoint.quantize_embedding(3)
    directory = checkpoint.write(tmp_path / "model")
    info = describe(directory, 3)
    model, _ = load_exl3_model(directory)
    whole = sum(value.nbytes for _, value in tree_flatten(model.parameters()))
    # Experts keep their biases in float32 and a few words each; markers are not kept.
    assert info.memory.weights == pytest.approx(whole, rel=0.02)
    cache = mlx_lm_cache.make_prompt_cache(model)
    for token in (1, 2, 3):
        mx.eval(model(mx.array([[token]]), cache=cache))
    assert info.memory.cache == sum(c.nbytes for c in cache)


def test_caches_grow_as_they_should(tmp_path):
    directory = architectures.gpt_oss().write(tmp_path / "model")  # every other layer sees 16 tokens only
    token = 2 * SIZES.kv_heads * SIZES.head_dim * 4
    for context, tokens in ((1, 256 + 16), (256, 256 + 16), (257, 512 + 16), (100_000, 100_096 + 16)):
        assert describe(directory, context).memory.cache == tokens * token
    states = architectures.qwen3_next().write(tmp_path / "states")
    first, later = (describe(states, n).memory.cache for n in (256, 512))
    assert later - first == 256 * token  # one of two layers has states of one size instead


def test_what_is_left_out(tmp_path):
    checkpoint = architectures.qwen3_next()
    checkpoint.quantize_embedding(5)
    info = describe(checkpoint.write(tmp_path / "model"))
    size = sum(v.nbytes for k, v in checkpoint.exl3.items() if k.startswith("mtp."))
    assert info.left_out == {"multi-token prediction layers": size} and info.bytes["left out"] == size
    assert "fc" not in info.projections
    assert info.embedding_bits == 5 and info.bytes["embedding"] == 160 * 2 * (1 + 16 * 5) + 512
    assert sum(info.bytes.values()) == sum(v.nbytes for v in checkpoint.exl3.values())
    text = report(info)
    assert "left out: multi-token prediction layers (" in text and "token embedding 5 bits" in text


def test_a_model_that_mlx_lm_does_not_have(tmp_path):
    checkpoint = architectures.qwen3_next()
    checkpoint.config["model_type"] = "qwen99"
    info = describe(checkpoint.write(tmp_path / "model"))
    assert info.memory is None and "qwen99" in info.not_loadable
    assert set(info.left_out) == {"multi-token prediction layers"}  # by the names
    assert "mlx-lm cannot load it: " in report(info)


class Model(nn.Module):
    """A model with the cache that is given."""

    def __init__(self, make, look: bool = False):
        super().__init__()
        self.embed, self.make, self.look = nn.Embedding(4, 8), make, look

    def make_cache(self):
        return [self.make()]

    def __call__(self, tokens, cache):
        keys = self.embed(tokens)[:, None]
        if self.look and keys.sum().item() > 0:
            keys = -keys
        return cache[0].update_and_fetch(keys, keys)[0]


class Own(mlx_lm_cache.KVCache):
    """A model's own kind of cache."""


def test_caches_of_unknown_size():
    assert cache_bytes(Model(mlx_lm_cache.KVCache), 300, mx.float16) == 512 * 2 * 8 * 2
    chunked = Model(lambda: mlx_lm_cache.ChunkedKVCache(300))
    assert cache_bytes(chunked, 5000, mx.float32) == (512 + 256) * 2 * 8 * 4
    with pytest.raises(UnknownCache, match="keeps it in a Own, whose growth is not known here"):
        cache_bytes(Model(Own), 300, mx.float16)
    with pytest.raises(UnknownCache, match="cannot be traced"):  # and nothing is computed
        cache_bytes(Model(mlx_lm_cache.KVCache, look=True), 300, mx.float16)


def test_a_model_that_does_not_fit(monkeypatch):
    monkeypatch.setattr("mlx_marlin.lm.info.memory_bytes", lambda device: 10_000_000)
    assert describe(EXL3, 256).memory.fits
    info = describe(EXL3, 8192)
    assert not info.memory.fits and "it does not fit into the 10.00 MB" in report(info)
    monkeypatch.setattr("mlx_marlin.lm.info.cache_bytes", lambda *_: (_ for _ in ()).throw(UnknownCache("secret")))
    text = report(describe(EXL3))
    assert "a cache of unknown size" in text and "(secret)" in text and "the weights fit into" in text


@pytest.fixture
def info(monkeypatch, capsys):
    """The command in this process: the status, and what it prints to stdout and stderr."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["mlx_marlin", "info", *arguments])
        try:
            status = cli.main() or 0
        except SystemExit as end:
            status = end.code
        return status, *capsys.readouterr()

    return call


def test_the_command():
    text = run("info", str(EXL3))
    assert text.returncode == 0 and not text.stderr and text.stdout == report(describe(EXL3)) + "\n"


@pytest.mark.parametrize("name", SHIPPED)
def test_what_the_command_prints(name, info):
    directory = str(MODELS / name)
    status, text, error = info(directory)
    assert (status, error) == (0, "") and text.startswith(f"{directory}: EXL3 (ExLlamaV3), written by 1.")
    assert f"mlx_marlin chat --model {directory}" in text
    data = json.loads(info(directory, "--context", "100", "--json")[1])
    assert data["memory"]["context"] == 100 and data["bytes"]["trellis"] == describe(directory).bytes["trellis"]
    assert describe(directory).memory.context == CONTEXT


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["models/nothing"], "models/nothing is no directory here; give that of an EXL3 model. .* hf download"),
        ([str(EXL3 / "config.json")], "config.json is a file; give the directory that it is in"),
        ([str(MODELS / "docs-moe")], "holds no EXL3 tensors; mlx_marlin-convert --model .*docs-moe --output"),
        ([str(MODELS)], "holds no model"),
        ([str(EXL3), "--context", "0"], "the context must be at least one token, got 0"),
    ],
)
def test_errors_of_the_command(arguments, message, info):
    status, text, error = info(*arguments)
    (line,) = error.splitlines()
    assert (status, text) == (2, "") and line.startswith("mlx_marlin: ") and re.search(message, line), line


def test_a_reader_that_leaves_is_no_error():
    """As ``mlx_marlin info DIR | head -1``."""
    command = [sys.executable, "-m", "mlx_marlin", "info", str(EXL3)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        error = process.stderr.read()
    assert (process.returncode, error) == (141, b"")
