"""Loading whole models, what it refuses, what it costs, and the commands."""

import json
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import checkpoints
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

import mlx_marlin
from mlx_marlin import TrellisLinear, TrellisSwitchGLU
from mlx_marlin.lm import load_exl3_model
from mlx_marlin.lm.mapping import LinearSource, _Placeholders
from mlx_marlin.lm.model import activation_of, cast_dense
from mlx_marlin.loader import TrellisModelLoader

MODELS = Path(__file__).parent.parent / "models"
EXL3 = MODELS / "docs-moe-exl3-mixed"
LAYER = "model.layers.1"


@pytest.mark.parametrize("name", ["random-qwen3_moe", "random-glm4_moe_lite"])
def test_the_shipped_random_models_give_the_expected_logits(name):
    model, _ = load_exl3_model(MODELS / name)
    expected = np.load(MODELS / name / "expected.npz")
    got = np.array(model(mx.array(expected["tokens"])))
    assert np.abs(got - expected["logits"]).max() <= 1e-4 * np.abs(expected["logits"]).max()
    assert (got.argmax(-1) == expected["logits"].argmax(-1)).all()


@pytest.mark.parametrize("name, perplexity", [("docs-moe-exl3-3.0bpw", 11.487), ("docs-moe-exl3-mixed", 11.565)])
def test_perplexity_of_the_shipped_models(name, perplexity):
    # The numbers were measured with an independent implementation, in float32.
    model, tokenizer = mlx_marlin.load(MODELS / name)
    text = (MODELS / "docs-moe" / "heldout.txt").read_text()[20_000:]
    tokens = np.array(tokenizer.encode(text)[:4097])
    losses = [
        nn.losses.cross_entropy(
            model(mx.array(tokens[None, i : i + 256])), mx.array(tokens[None, i + 1 : i + 257])
        ).mean()
        for i in range(0, 4096, 256)
    ]
    assert abs(np.exp(np.mean([loss.item() for loss in losses])) - perplexity) < 0.002


def test_load_takes_the_keywords_of_mlx_lm():
    model, tokenizer, config = mlx_marlin.load(
        EXL3,
        tokenizer_config={"trust_remote_code": True},
        model_config={"rope_theta": 500.0},
        return_config=True,
        lazy=True,
    )
    assert config["rope_theta"] == 500.0 and model.args.rope_theta == 500.0
    assert tokenizer.decode(tokenizer.encode("hello")) == "hello"


def test_the_quantized_head_of_a_tied_model_is_used():
    model, _ = load_exl3_model(EXL3)
    assert json.loads((EXL3 / "config.json").read_text())["tie_word_embeddings"]
    assert isinstance(model.lm_head, TrellisLinear)


@pytest.mark.parametrize("dtype", [None, mx.float32, mx.bfloat16, mx.float16])
def test_dtype_of_the_unquantized_parameters(dtype):
    model, _ = load_exl3_model(MODELS / "random-qwen3_moe", dtype=dtype)
    wanted = dtype or mx.float32
    for path, module in model.named_modules():
        for name, value in (
            tree_flatten(module.parameters()) if type(module) in (nn.Embedding, nn.RMSNorm, nn.Linear) else []
        ):
            assert value.dtype == wanted, f"{path}.{name}"
    assert model.lm_head.suh.dtype == mx.float16
    assert model(mx.array([[1, 2, 3]])).dtype == wanted


def test_a_gpu_keeps_the_dtype_of_the_source(monkeypatch):
    monkeypatch.setattr(mx, "default_device", lambda: mx.gpu)
    dense = {
        "model.embed_tokens.weight": mx.bfloat16,
        "gate.weight": mx.float16,
        "A_log": mx.float32,
        "ids": mx.int32,
    }
    cast = cast_dense(nn.Module(), {k: mx.zeros(2, d) for k, d in dense.items()}, None)
    # Routers are stored in float16, but run in the dtype of the model.
    assert {k: v.dtype for k, v in cast.items()} == {**dense, "gate.weight": mx.bfloat16}


def test_loading_shows_progress():
    seen = []
    load_exl3_model(EXL3, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(i, 4) for i in range(1, 5)]  # embeddings, norm and head; then three layers


def test_memory_at_the_peak(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints.codec, "dequantize", lambda w: np.zeros((1, 1), np.float32))
    monkeypatch.setattr(checkpoints, "EXPERTS", 16)
    for name, size in (("HIDDEN", 512), ("WIDTH", 384)):
        monkeypatch.setattr(checkpoints, name, size)
    config = {"num_hidden_layers": 6, "mlp_only_layers": [], "hidden_size": 512}
    directory = checkpoints.qwen3_moe(**config).write(tmp_path / "model", shards=3)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    model, _ = load_exl3_model(directory)
    peak, resident = mx.get_peak_memory() - before, mx.get_active_memory() - before
    layer = sum(value.nbytes for _, value in tree_flatten(model.layers[1].parameters()))
    assert resident > 20_000_000  # the test weighs something
    assert peak <= 1.15 * resident + layer
    assert resident <= 1.05 * sum(value.nbytes for _, value in tree_flatten(model.parameters()))


# What cannot be loaded.


def broken(tmp_path: Path, edit=None, config=None, make=checkpoints.qwen3_moe) -> Path:
    checkpoint = make()
    if edit:
        edit(checkpoint.exl3)
    checkpoint.config.update(config or {})
    return checkpoint.write(tmp_path / "model")


def remove(*names: str):
    return lambda tensors: [tensors.pop(key) for key in list(tensors) if any(key.startswith(name) for name in names)]


def quantize_as(name: str, like: str):
    """Give a tensor the quantized form of another."""

    def edit(tensors):
        tensors.pop(f"{name}.weight", None)
        tensors.update({name + key.removeprefix(like): v for key, v in tensors.items() if key.startswith(f"{like}.")})

    return edit


EXPERT = f"{LAYER}.mlp.experts.2.up_proj"


@pytest.mark.parametrize(
    "edit, message",
    [
        (remove(f"{EXPERT}."), rf"{EXPERT}\.trellis is missing, but other experts of the layer are there"),
        (
            remove(f"{LAYER}.mlp.experts.3."),
            rf"looks for {LAYER}\.mlp\.experts\.3\..*which the checkpoint does not have",
        ),
        (remove(f"{LAYER}.mlp.experts."), rf"no tensor for {LAYER}\.mlp\.switch_mlp"),
        (remove(f"{LAYER}.self_attn.q_proj."), rf"no tensor for {LAYER}\.self_attn\.q_proj\.weight"),
        (remove(f"{LAYER}.input_layernorm"), rf"no tensor for {LAYER}\.input_layernorm\.weight"),
        (remove("model.embed_tokens"), r"no tensor for model\.embed_tokens\.weight"),
        (
            lambda t: (remove(f"{EXPERT}.")(t), t.update({f"{EXPERT}.weight": mx.zeros((96, 192))})),
            rf"{EXPERT} is not quantized, but other experts of the layer are",
        ),
        (
            lambda t: (remove(f"{EXPERT}.")(t), quantize_as(EXPERT, f"{LAYER}.self_attn.q_proj")(t)),
            rf"{EXPERT} is a \[256, 256\] matrix, but .* is \[256, 128\]; the experts of a layer have one size",
        ),
        (
            lambda t: t.update({"model.extra.weight": mx.zeros(3)}),
            r"has model\.extra\.weight, which is no parameter of",
        ),
        (
            lambda t: t.update({"model.norm.weight": mx.zeros(3)}),
            r"model\.norm\.weight has shape \[3\].* wants \[192\]",
        ),
        (
            quantize_as("model.extra", "lm_head"),
            r"model\.extra is quantized, but mlx-lm puts it at model\.extra\.weight, which",
        ),
        (
            quantize_as("model.embed_tokens", "lm_head"),
            r"model\.embed_tokens is quantized, .* a Embedding that needs a dense",
        ),
        (
            lambda t: t.update({f"{LAYER}.self_attn.q_proj.bias": mx.zeros(256, mx.float16)}),
            rf"{LAYER}\.self_attn\.q_proj has a bias, but the model wants none",
        ),
        (
            lambda t: (
                remove(f"{LAYER}.self_attn.k_proj.")(t),
                quantize_as(f"{LAYER}.self_attn.k_proj", "lm_head")(t),
            ),
            rf"{LAYER}\.self_attn\.k_proj.* gives outputs 0 to 256 of 256 where the model wants 128",
        ),
        (
            lambda t: (
                remove(f"{LAYER}.self_attn.o_proj.")(t),
                quantize_as(f"{LAYER}.self_attn.o_proj", "model.layers.0.mlp.x")(t),
            ),
            rf"no tensor for {LAYER}\.self_attn\.o_proj\.weight",
        ),
    ],
)
def test_a_checkpoint_that_does_not_fit_names_the_tensor(tmp_path, edit, message):
    directory = broken(tmp_path, edit)
    with pytest.raises(ValueError, match=message) as error:
        load_exl3_model(directory)
    assert str(directory) in str(error.value)


def test_a_bias_that_the_model_wants_must_be_there(tmp_path):
    name = f"{LAYER}.self_attn.v_proj"
    directory = broken(tmp_path, remove(f"{name}.bias"), make=checkpoints.qwen2_moe)
    with pytest.raises(ValueError, match=rf"{name} has no bias, but the model wants one"):
        load_exl3_model(directory)


def test_latent_attention_needs_a_dense_kv_b_proj(tmp_path):
    name = f"{LAYER}.self_attn.kv_b_proj"
    quantized = checkpoints.Checkpoint({})
    quantized.weight(name, 128, 512)
    edit = lambda tensors: (tensors.pop(f"{name}.weight"), tensors.update(quantized.exl3))  # noqa: E731
    directory = broken(tmp_path, edit, make=checkpoints.glm4_moe_lite)
    with pytest.raises(ValueError, match=rf"{name} is quantized, .* a MultiLinear that needs a dense weight"):
        load_exl3_model(directory)


@pytest.mark.parametrize(
    "config, message",
    [
        ({"model_type": "no_such_model"}, "mlx-lm cannot build a no_such_model model"),
        ({"model_type": "base"}, "mlx-lm cannot build a base model"),
        ({"model_type": None}, "model_type must name an architecture"),
        ({"model_type": "../x"}, "model_type must name an architecture"),
        ({"model_file": "code.py"}, "model_file, code inside the checkpoint, is not run"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, but the checkpoint has only"),
        ({"num_hidden_layers": "two"}, "mlx-lm cannot build a qwen3_moe model"),
        ({"hidden_size": -5}, "config.json: mlx-lm cannot build|model wants|wants"),
        ({"hidden_size": 10**12}, "mlx-lm cannot build a qwen3_moe model"),
        ({"hidden_size": 320}, r"model wants|wants 320"),
        ({"num_experts": 9}, "looks for model.layers.1.mlp.experts.4.*which the checkpoint does not have"),
        ({"num_experts": 3}, "the checkpoint has|cannot take"),
        ({"num_attention_heads": 0}, "mlx-lm|wants"),
        ({"num_hidden_layers": 1}, "which is no parameter of|which the model does not have"),
    ],
)
def test_a_config_that_does_not_fit(tmp_path, config, message):
    directory = broken(tmp_path, config=config)
    with pytest.raises(ValueError, match=message) as error:
        load_exl3_model(directory)
    assert str(directory) in str(error.value)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff", b"[" * 100_000, b'{"a": 1, "a": 2}', b"null"])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_garbage_instead_of_a_config(tmp_path, name, content):
    directory = broken(tmp_path)
    (directory / name).write_bytes(content)
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        load_exl3_model(directory)


def test_directories_without_config_or_trellis(tmp_path):
    directory = broken(tmp_path)
    (directory / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        load_exl3_model(directory)
    with pytest.raises(ValueError, match="holds no EXL3 tensors; load it with mlx_lm.load"):
        load_exl3_model(MODELS / "docs-moe")


def placeholder(loader: TrellisModelLoader, name: str) -> tuple[_Placeholders, np.ndarray]:
    placeholders = _Placeholders(loader)
    return placeholders, np.array(placeholders.make()[f"{name}.weight"])[:, 0]


def test_rows_that_a_model_takes_apart():
    loader = TrellisModelLoader(MODELS / "random-glm4_moe_lite")
    name = "model.layers.0.self_attn.q_b_proj"
    placeholders, codes = placeholder(loader, name)
    linear = loader.quantized[name]
    assert placeholders.read("a", codes, 512) == LinearSource(linear, None)
    assert placeholders.read("a", codes, 400) == LinearSource(linear, None)  # padded in the file
    assert placeholders.read("a", codes[128:384], 256) == LinearSource(linear, (1, 2))
    with pytest.raises(ValueError, match="outputs 64 to 192 of 512 where the model wants 128"):
        placeholders.read("a", codes[64:192], 128)
    with pytest.raises(ValueError, match="outputs 0 to 512 of 512 where the model wants 384"):
        placeholders.read("a", codes, 384)
    with pytest.raises(ValueError, match=f"{name}.* has its outputs reordered"):
        placeholders.read("a", codes[::-1], 512)
    other = placeholder(loader, "lm_head")[1]
    with pytest.raises(ValueError, match=f"joins .*{name}.*; linears that are quantized separately cannot be joined"):
        placeholders.read("a", np.concatenate([codes, other]), 1024)


def test_activations_without_a_kernel_are_named():
    class Odd(nn.Module):
        activation = nn.SiLU()

    with pytest.raises(
        ValueError, match=r"model\.mlp uses the activation mlx\.nn.*SiLU; experts can be quantized with"
    ):
        activation_of("model.mlp", Odd())


def test_unknown_children_of_the_experts_are_kept(tmp_path):
    from mlx_marlin.lm.model import replace_module

    model, _ = load_exl3_model(EXL3)
    old = model.layers[0].mlp.switch_mlp
    old.norm = nn.RMSNorm(4)
    new = model.layers[1].mlp.switch_mlp
    assert isinstance(old, TrellisSwitchGLU)
    replace_module(model, "model.layers.0.mlp.switch_mlp", new)
    assert model.layers[0].mlp.switch_mlp is new and new.norm is old.norm


# The commands.


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "mlx_marlin", *arguments],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )


def test_generate():
    result = run("generate", "--model", str(EXL3), "--prompt", "The list of", "-m", "8", "--ignore-chat-template")
    assert result.returncode == 0, result.stderr
    assert "Generation: 8 tokens" in result.stdout
    assert "Loaded 4 groups of weights" in result.stderr and "Loaded" not in result.stdout


def test_benchmark():
    result = run("benchmark", "--model", str(EXL3), "-p", "8", "-g", "4", "-n", "1")
    assert result.returncode == 0, result.stderr
    assert "Averages: prompt_tps=" in result.stdout


def test_server_answers_a_request(tmp_path):
    from test_distributed import free_port

    port = free_port()
    command = [sys.executable, "-m", "mlx_marlin", "server", "--model", str(EXL3), "--port", str(port)]
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions",
        json.dumps({"prompt": "The list of", "max_tokens": 4, "temperature": 0.0}).encode(),
        {"Content-Type": "application/json"},
    )
    with open(tmp_path / "log", "w") as log, subprocess.Popen(command, stdout=log, stderr=log) as server:
        try:
            while True:
                try:
                    answer = json.load(urllib.request.urlopen(request))
                    break
                except urllib.error.URLError:  # not listening yet
                    assert server.poll() is None, (tmp_path / "log").read_text()
                    time.sleep(0.2)
        finally:
            server.terminate()
    assert answer["usage"]["completion_tokens"] == 4
    assert answer["choices"][0]["text"]


@pytest.mark.parametrize(
    "command", [("generate", "--prompt", "x"), ("benchmark", "-n", "1"), ("server", "--port", "0")]
)
def test_commands_refuse_a_broken_directory_before_anything_runs(tmp_path, command):
    directory = broken(tmp_path, remove(f"{LAYER}.input_layernorm"))
    result = run(*command, "--model", str(directory))
    assert result.returncode == 1 and not result.stdout.replace("Running warmup..", "").strip()
    assert f"mlx_marlin: {directory}: the checkpoint has no tensor for {LAYER}.input_layernorm.weight" in result.stderr
    assert "Traceback" not in result.stderr


def test_commands_that_write_weights_refuse_exl3(tmp_path):
    result = run("convert", "--hf-path", str(EXL3), "--mlx-path", str(tmp_path / "out"))
    assert result.returncode == 1 and "mlx_lm convert cannot work on EXL3 weights" in result.stderr
    assert not (tmp_path / "out").exists()


def test_lora_trains_beside_the_trellis_and_is_loaded_again(tmp_path):
    for name in ("train", "valid"):
        (tmp_path / f"{name}.jsonl").write_text('{"text": "Return a list of the elements of the sequence."}\n' * 4)
    paths = ["--data", str(tmp_path), "--adapter-path", str(tmp_path / "adapters")]
    sizes = ["--iters", "2", "--num-layers", "2", "--batch-size", "2", "--val-batches", "1", "--steps-per-report", "1"]
    result = run("lora", "--model", str(EXL3), "--train", *paths, *sizes)
    assert result.returncode == 0, result.stderr
    trained = [v for k, v in mx.load(str(tmp_path / "adapters" / "adapters.safetensors")).items() if "lora_b" in k]
    assert trained and all(mx.isfinite(v).all().item() for v in trained)
    assert any(v.any().item() for v in trained)  # they begin as zeros
    model, _ = mlx_marlin.load(EXL3, adapter_path=str(tmp_path / "adapters"))
    assert any("lora" in key for key, _ in tree_flatten(model.parameters()))
    assert np.isfinite(np.array(model(mx.array([[1, 2, 3]])))).all()


def test_a_compiled_function_may_capture_the_parameters():
    model, _ = load_exl3_model(EXL3)
    tokens = mx.array([[1, 2, 3, 4]])
    wanted = np.array(model(tokens))
    state = [model.state]
    step = mx.compile(lambda ids: model(ids), inputs=state, outputs=state)
    for _ in range(2):
        assert np.allclose(np.array(step(tokens)), wanted, atol=1e-5)
    assert np.allclose(np.array(model(tokens)), wanted, atol=1e-5)


def test_usage_and_unknown_commands():
    assert "usage: mlx_marlin COMMAND" in run().stdout
    result = run("nothing")
    assert result.returncode == 1 and "mlx-lm has no command 'nothing'" in result.stderr
