"""Every example of docs/tuning.md and the tuning notebook, executed; the commands of bench/README.md, parsed."""

import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from mlx_marlin import profile
from tests.support.paths import ROOT

GUIDE = ROOT / "docs" / "tuning.md"


def examples(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", GUIDE.read_text(), re.MULTILINE | re.DOTALL)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A directory that looks like the repository's root, with a cache of its own."""
    for name in ("models", "bench"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "configs").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLX_MARLIN_CACHE_DIR", str(tmp_path / "cache"))
    profile.refresh()
    yield tmp_path
    profile.use_profile(None)


def test_python_examples(place):
    """All blocks in one namespace, in order, as a reader would."""
    blocks, namespace = examples("python"), {}
    assert len(blocks) == 5
    for i, block in enumerate(blocks):
        exec(compile(block, f"docs/tuning.md, example {i + 1}", "exec"), namespace)


def test_shell_examples(place):
    """No outcome may depend on how fast the machine is today: a check is free to find something slower.

    One batch size and few samples, which take seconds: what the full command adds are more problems like these.
    """
    commands = [line for block in examples("bash") for line in block.splitlines()]
    assert len(commands) == 2
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for command in commands:
        command += " --batch-sizes 1 --iterations 2 --warmup 1"
        done = subprocess.run(command, shell=True, capture_output=True, text=True, env=os.environ | {"PATH": path})
        allowed = (0, 1) if "--check" in command else (0,)
        assert done.returncode in allowed, f"{command}\n{done.stdout}\n{done.stderr}"
        assert "slower than" in done.stdout if done.returncode else done.stdout, command


BENCH_COMMANDS = re.findall(r"^    python -m (bench\..*)$", (ROOT / "bench/README.md").read_text(), re.MULTILINE)


@pytest.mark.parametrize("command", BENCH_COMMANDS)
def test_bench_commands_are_understood(command, monkeypatch, capsys):
    """Values are parsed before --help ends it; options that it does not have are left to the text that it prints."""
    module, *arguments = shlex.split(command.replace("<machine>", "machine"))
    monkeypatch.setattr(sys, "argv", [module, *arguments, "--help"])
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(module).main()
    told = capsys.readouterr()
    assert ended.value.code == 0, told.err
    unknown = [a for a in arguments if a.startswith("--") and not re.search(rf"{a}\b", told.out)]
    assert not unknown, f"{module} has no {', '.join(unknown)}"


def test_notebook(place):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("matplotlib")
    notebook = nbformat.read(ROOT / "bench/notebooks/tuning.ipynb", as_version=4)
    assert all(not cell.get("outputs") for cell in notebook.cells), "the notebook is kept without outputs"
    (parameters,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    parameters.source += "\nbatch_sizes = [1, 8]\nnum_iter, num_warmup = 2, 1"
    folder = ROOT / "bench/notebooks"
    nbclient.NotebookClient(notebook, kernel_name="python3", resources={"metadata": {"path": str(folder)}}).execute()
    figures = [o for cell in notebook.cells for o in cell.get("outputs", []) if "image/png" in o.get("data", {})]
    assert len(figures) == 3
    assert not (folder / "configs").exists()


def test_pareto_front():
    plot = pytest.importorskip("mlx_marlin.autotune.plot", reason="needs matplotlib", exc_type=ImportError)
    points = [(1.0, 9.0), (2.0, 5.0), (2.0, 7.0), (3.0, 5.0), (4.0, 1.0), (5.0, 2.0), (1.0, 9.0)]
    assert plot.pareto_front(points) == [(1.0, 9.0), (2.0, 5.0), (4.0, 1.0)]
    assert plot.pareto_front([]) == []
