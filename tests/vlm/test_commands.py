"""The mlx_marlin vlm commands: mlx-vlm's own over EXL3 models, and what they refuse."""

import sys
from dataclasses import replace
from fnmatch import fnmatch

import mlx.core as mx
import mlx_vlm
import pytest
from mlx_vlm import utils as mlx_vlm_utils
from mlx_vlm.speculative.drafters.mtp_split import MTPSplitter

from mlx_marlin import __main__ as cli
from mlx_marlin import vlm
from mlx_marlin.lm import hub
from mlx_marlin.loader.directory import NGRAM_TABLES
from mlx_marlin.vlm import commands
from tests.lm.test_distributed import launch
from tests.support.checkpoints import SPLITTABLE
from tests.support.vlm_checkpoints import PROCESSED, qwen3_vl_moe, write_processor
from tests.vlm.test_load import picture

QUESTION = "What is this?"


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_processor(qwen3_vl_moe(PROCESSED).checkpoint.write(tmp_path_factory.mktemp("vlm") / "exl3"))


@pytest.fixture
def fresh(monkeypatch):
    """What the commands replace in mlx-vlm is put back."""
    for name in ("get_model_path", "load_model", "load_processor"):
        monkeypatch.setattr(mlx_vlm_utils, name, getattr(mlx_vlm_utils, name))
    monkeypatch.setattr(MTPSplitter, "load", MTPSplitter.load)


def run(monkeypatch, *arguments) -> None:
    monkeypatch.setattr(sys, "argv", ["mlx_marlin", "vlm", *map(str, arguments)])
    cli.main()


def refused(monkeypatch, capfd, *arguments) -> str:
    """The one line that a command gives as its reason."""
    with pytest.raises(SystemExit, match="^2$"):
        run(monkeypatch, *arguments)
    *_, line = capfd.readouterr().err.strip().splitlines()
    return line


def test_generate_answers_about_a_picture(directory, fresh, monkeypatch, capfd, tmp_path):
    model, processor = vlm.load(directory)
    prompt = mlx_vlm.apply_chat_template(processor, model.config, QUESTION, num_images=1)
    picture().save(tmp_path / "a.png")
    wanted = mlx_vlm.generate(model, processor, prompt, [str(tmp_path / "a.png")], max_tokens=6, temperature=0.0)
    capfd.readouterr()
    options = ("--max-tokens", 6, "--temperature", 0, "--image", tmp_path / "a.png")
    run(monkeypatch, "generate", "--model", directory, "--prompt", QUESTION, *options)
    out, err = capfd.readouterr()
    assert out.strip() == wanted.text.strip() and "the model leaves out" in err


@pytest.mark.parametrize("command", ["generate", "chat", "server"])
def test_commands_refuse_a_broken_directory_before_anything_runs(command, fresh, monkeypatch, capfd, tmp_path):
    checkpoint = qwen3_vl_moe(PROCESSED).checkpoint
    del checkpoint.exl3["model.language_model.norm.weight"]
    directory = write_processor(checkpoint.write(tmp_path / "model"))
    line = refused(monkeypatch, capfd, command, "--model", directory)
    assert line.startswith(
        f"mlx_marlin: {directory}: the checkpoint has no tensor for language_model.model.norm.weight"
    )


def test_a_repository_is_fetched_as_mlx_vlm_does_it(directory, fresh, monkeypatch):
    """Also files that mlx-lm has no use for: n-gram tables, other tokenizers; of models that are not ours too."""
    asked = []
    monkeypatch.setattr(hub, "_download", lambda repo, **k: asked.append(k) or directory)
    vlm.load("some/repo")
    commands.check("some/repo")
    commands.install()
    mlx_vlm_utils.get_model_path("some/repo")
    whole = [k["allow_patterns"] for k in asked if k["allow_patterns"] != hub.DESCRIPTION_FILES]
    assert len(whole) >= 3
    for name in (NGRAM_TABLES, "model-00001-of-00002.safetensors", "spiece.model", "processor_config.json"):
        assert all(any(fnmatch(name, pattern) for pattern in patterns) for patterns in whole), name


def test_commands_refuse_a_model_that_is_nowhere(fresh, monkeypatch, capfd, tmp_path):
    line = refused(monkeypatch, capfd, "generate", "--model", tmp_path / "no such model")
    assert "no such model is no directory here, and could not be had from the Hugging Face Hub: " in line


@pytest.mark.parametrize(("command", "option"), [("convert", "--hf-path"), ("convert", "--hf"), ("train", "--model")])
def test_what_writes_other_formats_refuses_exl3(command, option, directory, fresh, monkeypatch, capfd):
    """By the option, or where it is abbreviated when the model is loaded."""
    line = refused(monkeypatch, capfd, command, option, directory)
    assert f"mlx_vlm {command} cannot work on EXL3 weights; give it the model that they were made from" in line


def test_activations_are_not_quantized(directory, fresh):
    commands.install()
    with pytest.raises(ValueError, match="activations are quantized for models in nvfp4 or mxfp8 only"):
        mlx_vlm.load(str(directory), quantize_activations=True)


def test_a_command_that_is_none(monkeypatch, capfd):
    assert "mlx-vlm has no command 'benchmark'; it has chat, " in refused(monkeypatch, capfd, "benchmark")


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["tensor", "experts"])
def test_generate_runs_on_two_ranks(parallel, tmp_path):
    sizes = replace(SPLITTABLE, vocab=PROCESSED.vocab)
    directory = write_processor(qwen3_vl_moe(sizes).checkpoint.write(tmp_path / "exl3"))
    model, processor = vlm.load(directory)
    prompt = mlx_vlm.apply_chat_template(processor, model.config, QUESTION, num_images=1)
    picture().save(tmp_path / "a.png")
    wanted = mlx_vlm.generate(model, processor, prompt, [str(tmp_path / "a.png")], max_tokens=6, temperature=0.0)
    options = ("--max-tokens", 6, "--temperature", 0, "--image", tmp_path / "a.png", "--parallel", parallel)
    command = ("-m", "mlx_marlin", "vlm", "generate", "--model", directory, "--prompt", QUESTION, *options)
    result = launch(*map(str, command))
    assert result.stdout.strip() == wanted.text.strip(), result.stderr


class Ranks:
    """A group of two, of which this is the first."""

    def size(self) -> int:
        return 2

    def rank(self) -> int:
        return 0


@pytest.mark.parametrize(
    ("command", "options", "message"),
    [
        ("server", (), "mlx_vlm server runs on one rank; generate runs on several, and so does"),
        ("chat", (), "mlx_vlm chat runs on one rank"),
        ("generate", ("--draft-model", "x"), "--draft-model is for one rank; leave it out"),
        ("generate", ("--parallel", "whole"), "--parallel must be one of tensor, experts, got 'whole'"),
        ("generate", ("--parallel", "experts"), "128 is split into 64 per rank here; a trellis can be split at"),
    ],
)
def test_what_several_ranks_cannot_do(command, options, message, directory, fresh, monkeypatch, capfd):
    monkeypatch.setattr(mx.distributed, "init", Ranks)
    monkeypatch.setattr(mx.distributed, "all_sum", lambda x, **_: x)
    assert message in refused(monkeypatch, capfd, command, "--model", directory, *options)
