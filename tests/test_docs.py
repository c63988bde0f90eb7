"""Every example of docs/tuning.md and the tuning notebook, executed; every error has its line in the
guide.
"""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import mlx_marlin
from mlx_marlin import profile

ROOT = Path(__file__).parents[1]
GUIDE = ROOT / "docs" / "tuning.md"
PACKAGE = Path(mlx_marlin.__file__).parent


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
    assert len(blocks) >= 8
    for i, block in enumerate(blocks):
        exec(compile(block, f"docs/tuning.md, example {i + 1}", "exec"), namespace)


def test_shell_examples(place):
    commands = [line for block in examples("bash") for line in block.splitlines()]
    assert len(commands) >= 4
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for command in commands:
        done = subprocess.run(command, shell=True, capture_output=True, text=True, env=os.environ | {"PATH": path})
        # A machine that is busy is slower than it was, which --check says with 1.
        assert done.returncode <= ("--check" in command), f"{command}\n{done.stdout}\n{done.stderr}"
        assert done.stdout, command


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
    plot = pytest.importorskip("mlx_marlin.plot", reason="needs matplotlib", exc_type=ImportError)
    points = [(1.0, 9.0), (2.0, 5.0), (2.0, 7.0), (3.0, 5.0), (4.0, 1.0), (5.0, 2.0), (1.0, 9.0)]
    assert plot.pareto_front(points) == [(1.0, 9.0), (2.0, 5.0), (4.0, 1.0)]
    assert plot.pareto_front([]) == []


def messages(path: Path):
    """(line, longest literal part) of the messages that a module raises."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
            parts = [
                part.value
                for part in ast.walk(node.exc.args[0])
                if isinstance(part, ast.Constant) and isinstance(part.value, str)
            ]
            if parts:
                yield node.lineno, max(parts, key=len).strip()


@pytest.mark.parametrize(
    "module", ["rules", "selection", "choices", "dispatch", "online", "plot", "autotune", "workload", "trial"]
)
def test_every_error_is_in_the_guide(module):
    guide = " ".join(GUIDE.read_text().split())
    path = PACKAGE / f"{module}.py"
    missing = [f"{path.name}:{line}: {text}" for line, text in messages(path) if text not in guide]
    assert not missing, "\n".join(missing)
