"""The mlx_marlin and mlx_marlin-convert commands: mlx-lm's own over EXL3 models, and what they refuse."""

import json
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

import mlx_marlin
from mlx_marlin import __main__ as cli
from mlx_marlin.lm import commands
from mlx_marlin.lm.serving import guard
from tests.lm.test_bad_models import broken, remove
from tests.lm.test_distributed import Rank, free_port, launch
from tests.support import architectures
from tests.support.checkpoints import SPLITTABLE
from tests.support.commands import HANGS, refused, run
from tests.support.paths import MODELS

EXL3 = MODELS / "docs-moe-exl3-mixed"
LAYER = f"model.layers.{architectures.MOE_LAYER}"


def test_generate():
    """In a process of its own, which imports everything."""
    arguments = ["--model", str(EXL3), "--prompt", "The list of", "-m", "8", "--ignore-chat-template"]
    command = [sys.executable, "-m", "mlx_marlin", "generate", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=HANGS)
    assert result.returncode == 0, result.stderr
    assert "Generation: 8 tokens" in result.stdout
    assert "Loaded 4 groups of weights" in result.stderr and "Loaded" not in result.stdout


def test_loading_shows_a_line_now_and_then(monkeypatch, capsys):
    """Where stderr is a file: each group takes 4 seconds here."""
    times = iter(range(0, 100, 4))
    monkeypatch.setattr(cli.time, "monotonic", lambda: float(next(times)))
    loading = cli._Loading()
    for done in range(1, 7):
        loading(done, 6)
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["Loading: 3 of 6 groups of weights", "Loaded 6 groups of weights"]


def test_benchmark():
    result = run("benchmark", "--model", str(EXL3), "-p", "8", "-g", "4", "-n", "1")
    assert result.returncode == 0, result.stderr
    assert "Averages: prompt_tps=" in result.stdout


def test_server_answers_a_request(tmp_path):
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


ALL_THAT_LOAD = [("generate", "--prompt", "x"), ("benchmark", "-n", "1"), ("server", "--port", "0")]


@pytest.mark.parametrize("command", ALL_THAT_LOAD)
def test_commands_refuse_a_broken_directory_before_anything_runs(tmp_path, command):
    directory = broken(tmp_path, remove(f"{LAYER}.input_layernorm"))
    result = run(*command, "--model", str(directory))
    line = refused(result)
    assert line.startswith(f"mlx_marlin: {directory}: the checkpoint has no tensor for {LAYER}.input_layernorm.weight")
    assert not result.stdout.replace("Running warmup..", "").strip()


@pytest.mark.parametrize("command", ALL_THAT_LOAD)
def test_commands_refuse_a_model_that_is_nowhere(tmp_path, command):
    line = refused(run(*command, "--model", str(tmp_path / "no such model")))
    assert "no such model is no directory here, and could not be had from the Hugging Face Hub: " in line


@pytest.mark.parametrize(
    "arguments",
    [
        ("--mod", "BAD"),
        ("--model", "GOOD", "--model", "BAD"),
        ("--model=BAD",),
        ("--model", "GOOD", "--draft-model", "BAD"),
        ("--model", "GOOD", "--draft-m", "BAD"),
    ],
)
def test_the_server_refuses_however_the_model_is_given(tmp_path, arguments):
    """It loads in a thread, and would keep listening without a model."""
    bad = broken(tmp_path, remove(f"{LAYER}.input_layernorm"))
    filled = [a.replace("BAD", str(bad)).replace("GOOD", str(EXL3)) for a in arguments]
    assert "the checkpoint has no tensor for" in refused(run("server", "--port", "0", *filled))


def test_the_server_starts_without_a_model(monkeypatch):
    import mlx_lm.server

    for name in ("ModelProvider", "_run_http_server"):
        monkeypatch.setattr(mlx_lm.server, name, getattr(mlx_lm.server, name))
    guard(commands._check_served, False)
    arguments = dict(model=None, draft_model=None, adapter_path=None, pipeline=False, trust_remote_code=False)
    arguments.update(chat_template="", use_default_chat_template=False)
    mlx_lm.server.ModelProvider(type("Arguments", (), arguments)())


def strip_config(directory: Path) -> None:
    config = json.loads((directory / "config.json").read_text())
    del config["quantization_config"]
    (directory / "config.json").write_text(json.dumps(config))


def remove_shard(directory: Path) -> None:
    (directory / "model-00002-of-00003.safetensors").unlink()


def truncate_shard(directory: Path) -> None:
    file = directory / "model-00003-of-00003.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def cut_header(directory: Path) -> None:
    """One file, which ends inside its header."""
    (directory / "model.safetensors.index.json").unlink()
    for file in directory.glob("model-0000[23]*"):
        file.unlink()
    (file,) = directory.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:2000])
    file.rename(directory / "model.safetensors")


def add_ghost(directory: Path) -> None:
    index = directory / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["ghost"] = "model-00001-of-00003.safetensors"
    index.write_text(json.dumps(content))


DAMAGES = {
    remove_shard: "model-00002-of-00003.safetensors is missing",
    truncate_shard: "it is truncated",
    cut_header: "it is truncated",
    add_ghost: "does not hold tensor 'ghost'",
}


def damaged(tmp_path: Path, damage) -> Path:
    """A sharded EXL3 directory without quantization_config, of which only tensor names tell what it is."""
    directory = architectures.qwen3_moe(SPLITTABLE).write(tmp_path / "model", shards=3)
    strip_config(directory)
    damage(directory)
    return directory


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_directory_is_never_loaded_by_others(tmp_path, monkeypatch, damage):
    """mlx-lm's sharded_load is not strict: it would run random weights."""
    import mlx_lm.utils

    for name in ("_download", "load_model", "sharded_load"):
        monkeypatch.setattr(mlx_lm.utils, name, getattr(mlx_lm.utils, name))
    commands.install()
    directory = damaged(tmp_path, damage)
    with pytest.raises(commands.CheckpointError, match=DAMAGES[damage]):
        mlx_lm.utils.sharded_load(str(directory))
    with pytest.raises(commands.CheckpointError, match=DAMAGES[damage]):
        mlx_lm.utils.load_model(directory)


def test_a_damaged_directory_is_refused_on_several_ranks(tmp_path):
    directory = damaged(tmp_path, truncate_shard)
    result = launch("-m", "mlx_marlin", "benchmark", "--model", str(directory), "-p", "4", "-g", "2", "-n", "1")
    output = result.stdout + result.stderr
    assert f"mlx_marlin: {directory}" in output and "it is truncated" in output
    assert "tps" not in output and "Traceback" not in output


def test_a_metal_marlin_directory_is_refused(tmp_path):
    directory = architectures.llama().write_dense(tmp_path / "model")
    (directory / "quantization_index.json").write_text('{"layers": []}')
    line = refused(run("generate", "--prompt", "x", "--model", str(directory)))
    assert "holds no EXL3 tensors" in line or "metal-marlin" in line


@pytest.mark.parametrize(
    "name, pipeline, message",
    [("mixtral", False, "has no tensor parallelism"), ("llama", True, "has no pipeline parallelism")],
)
def test_a_check_knows_how_many_ranks_there_are(tmp_path, monkeypatch, name, pipeline, message):
    directory = architectures.ARCHITECTURES[name]().write(tmp_path / "model")
    shutil.copy(EXL3 / "tokenizer.json", directory)
    commands.check(str(directory), pipeline=pipeline)
    monkeypatch.setattr(mx.distributed, "init", lambda: Rank(0, 2))
    with pytest.raises(commands.CheckpointError, match=message):
        commands.check(str(directory), pipeline=pipeline)


def test_commands_that_write_weights_refuse_exl3(tmp_path):
    line = refused(run("fuse", "--model", str(EXL3), "--save-path", str(tmp_path / "out")))
    assert "mlx_lm fuse cannot work on EXL3 weights" in line
    assert not (tmp_path / "out").exists()


def test_convert_is_another_command(tmp_path):
    line = refused(run("convert", "--hf-path", str(MODELS / "docs-moe"), "--mlx-path", str(tmp_path / "out"), "-q"))
    assert "mlx_marlin-convert makes EXL3 models" in line
    assert not (tmp_path / "out").exists()


@architectures.needs_new_mlx_lm("takes the gradient of the router with respect to expert indices, and fails")
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
    assert not any(module.training for module in model.modules())
    assert any("lora" in key for key, _ in tree_flatten(model.parameters()))
    assert np.isfinite(np.array(model(mx.array([[1, 2, 3]])))).all()


def test_usage_and_unknown_commands(monkeypatch, capsys):
    assert "usage: mlx_marlin COMMAND" in run().stdout
    assert run("--version").stdout == f"mlx_marlin {mlx_marlin.__version__}, mlx-lm {commands.version()}\n"
    assert "mlx-lm has no command 'nothing'; it has awq, benchmark, " in refused(run("nothing"))
    for name in ("utils", "models", "cli", "../x", ""):
        monkeypatch.setattr(sys, "argv", ["mlx_marlin", name])
        with pytest.raises(SystemExit, match="2"):
            cli.main()
        assert f"mlx-lm has no command {name!r}; it has awq, benchmark, " in capsys.readouterr().err


def test_missing_extras_are_one_line(tmp_path):
    conversion = ["--model", str(MODELS / "docs-moe"), "--output", str(tmp_path / "out"), "--bits", "3"]
    hide = "import sys; sys.modules[{!r}] = None; sys.argv = {!r}; from mlx_marlin.{} import main; sys.exit(main())"
    for module, argv, entry in (
        ("mlx_lm", ["mlx_marlin", "generate"], "__main__"),
        ("threadpoolctl", ["mlx_marlin-convert", *conversion], "quantize.cli"),
        ("mlx_lm", ["mlx_marlin-convert", *conversion], "quantize.cli"),
    ):
        code = hide.format(module, argv, entry)
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=HANGS)
        line = refused(result)
        assert line.startswith(argv[0]) and "pip install '.[lm]'" in line, line


def test_load_of_a_path_that_does_not_exist(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing is no directory here, and could not be had"):
        mlx_marlin.load(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match="from the Hugging Face Hub at revision 'x'"):
        mlx_marlin.load(tmp_path / "nothing", revision="x")
    shutil.copytree(EXL3, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no model\*.safetensors"):
        mlx_marlin.load(tmp_path / "model")
