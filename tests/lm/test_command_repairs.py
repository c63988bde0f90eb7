"""mlx-lm's commands where EXL3 models meet what they lack."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request

import mlx.core as mx
import pytest
from mlx_lm import utils as mlx_lm_utils

import mlx_marlin
from mlx_marlin import __main__ as cli
from mlx_marlin.lm import command_line, command_repairs, commands, hub
from tests.lm.test_commands import EXL3
from tests.support.commands import HANGS, refused, run
from tests.support.paths import MODELS
from tests.support.servers import free_port


@pytest.mark.parametrize("name", sorted(path.name for path in MODELS.iterdir() if path.is_dir()))
def test_chat_with_every_model(name):
    ends = "" if name.startswith("random") else "q\n"  # Ctrl-D ends it too
    result = run("chat", "--model", str(MODELS / name), "-m", "4", typed=f"hello\n{ends}")
    assert result.returncode == 0 and "4 tokens" in result.stdout, result.stdout + result.stderr
    has_template = "chat_template" in json.loads((MODELS / name / "tokenizer_config.json").read_text())
    assert result.stderr.count("no chat template") == (not has_template)


def test_plain_roles_are_those_of_the_server():
    from mlx_lm import server
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(EXL3)
    tokenizer.chat_template = command_repairs._PLAIN_ROLES
    messages = [{"role": role, "content": text} for role, text in (("system", "Be"), ("user", "hi"))]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == server.convert_chat(messages)


def test_models_are_listed_without_a_cache(tmp_path):
    port = free_port()
    command = [sys.executable, "-m", "mlx_marlin", "server", "--model", str(EXL3), "--port", str(port)]
    environment = {**os.environ, "HF_HOME": str(tmp_path / "nowhere")}
    with open(tmp_path / "log", "w") as log, subprocess.Popen(command, stderr=log, env=environment) as server:
        try:
            while True:
                try:
                    answer = json.load(urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models"))
                    break
                except urllib.error.URLError:  # not listening yet
                    assert server.poll() is None, (tmp_path / "log").read_text()
                    time.sleep(0.2)
            assert [model["id"] for model in answer["data"]] == [str(EXL3)]
        finally:
            server.kill()


@pytest.mark.parametrize("swallowed", [False, True])
def test_interrupts_end_in_one_line(monkeypatch, capsys, swallowed):
    """Also where mlx-lm's command ends as if it were done."""

    def command():
        with contextlib.suppress(KeyboardInterrupt) if swallowed else contextlib.nullcontext():
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(HANGS)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background has it ignored
    monkeypatch.setattr(cli, "_main", command)
    monkeypatch.setattr(cli.os, "_exit", sys.exit)  # the tests' process goes on
    try:
        with pytest.raises(SystemExit) as ended:
            cli.main()
    finally:
        signal.signal(signal.SIGINT, before)
    assert ended.value.code == 130 and capsys.readouterr().err == "\nmlx_marlin: interrupted\n"


def test_a_revision_is_that_of_the_model(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(hub, "_pinned", {})
    monkeypatch.setattr(
        hub, "_download", lambda repo, revision, allow_patterns: asked.append((repo, revision)) or tmp_path
    )
    monkeypatch.setattr(sys, "argv", ["mlx_marlin", "chat", "--model", "some/repo", "--revision=3.0bpw", "-m", "4"])
    command_line.take_revision()
    assert sys.argv == ["mlx_marlin", "chat", "--model", "some/repo", "-m", "4"]
    hub.fetch("some/repo")
    hub.fetch("some/draft")
    assert asked == [("some/repo", "3.0bpw"), ("some/draft", None)]


def test_a_revision_of_a_directory_is_refused():
    result = run("generate", "--model", str(EXL3), "--revision", "3.0bpw", "--prompt", "x")
    assert "is a directory here" in refused(result)


def test_weights_are_counted_and_not_words(monkeypatch):
    monkeypatch.setattr(mlx_lm_utils, "get_total_parameters", mlx_lm_utils.get_total_parameters)
    count = mlx_lm_utils.get_total_parameters
    dense, _ = mlx_lm_utils.load(str(MODELS / "docs-moe"))
    command_repairs.count_weights()
    model, _ = mlx_marlin.load(str(EXL3))
    # The source's head is its embedding; here it has weights of its own.
    head = model.lm_head.weight_count
    assert mlx_lm_utils.get_total_parameters(model) == count(dense) + head


def test_perplexity_of_a_text_file(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text((MODELS / "docs-moe" / "heldout.txt").read_text()[:4000])
    arguments = ["--model", str(EXL3), "--data-path", str(text), "--batch-size", "2", "--num-samples", "2"]
    result = run("perplexity", *arguments, "--sequence-length", "64")
    assert result.returncode == 0 and "Perplexity: " in result.stdout, result.stderr
    assert "fewer than one sequence of 100000" in refused(run("perplexity", *arguments, "--sequence-length", "100000"))


def test_converters_refuse_before_they_need_anything():
    for command in commands.CONVERTERS:
        assert "give it the model that they were made from" in refused(run(command, "--model", str(EXL3)))


def test_a_missing_extra_is_named(monkeypatch):
    def needs(*_):
        raise ModuleNotFoundError("No module named 'lm_eval'", name="lm_eval")

    monkeypatch.setattr(commands, "install", lambda *_, **__: None)
    monkeypatch.setattr(commands.mlx_lm_cli, "main", needs)
    monkeypatch.setattr(sys, "argv", ["mlx_marlin", "evaluate"])
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'mlx-lm\[evaluate\]'"):
        commands.run("evaluate")


@pytest.mark.skipif(mx.default_device() != mx.cpu, reason="MLX's GPU kernels take halves")
def test_unquantized_experts_run_on_the_cpu():
    result = run("generate", "--model", str(MODELS / "docs-moe"), "--prompt", "Return the", "-m", "4")
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("running on the CPU") == 1


def test_usage_names_the_subcommand():
    assert run("generate", "--help").stdout.startswith("usage: mlx_marlin generate ")
