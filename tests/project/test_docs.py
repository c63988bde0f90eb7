"""Every example of docs/tuning.md and the tuning notebook, executed; every error has its line in the guide."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import mlx_marlin
from mlx_marlin import profile
from tests.support.paths import ROOT

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
    """No outcome may depend on how fast the machine is today: a check is free to find something slower."""
    commands = [line for block in examples("bash") for line in block.splitlines()]
    assert len(commands) >= 4
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for command in commands:
        done = subprocess.run(command, shell=True, capture_output=True, text=True, env=os.environ | {"PATH": path})
        allowed = (0, 1) if "--check" in command else (0,)
        assert done.returncode in allowed, f"{command}\n{done.stdout}\n{done.stderr}"
        assert "slower than" in done.stdout if done.returncode else done.stdout, command


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


# Functions whose result is a message: the reason why not, shown in errors and in the rejections of a profile.
REASONS = {"feasible", "_unfit_kernel", "infeasible", "foreign", "foreign_machine", "_fault"}
# Functions that raise what they are given.
RAISERS = {"error", "_fail"}


def texts(node: ast.AST):
    """The expressions under a node that become messages."""
    for n in ast.walk(node):
        if isinstance(n, ast.Raise) and isinstance(n.exc, ast.Call):
            yield from n.exc.args[:1]
        elif isinstance(n, ast.Call) and (getattr(n.func, "attr", None) or getattr(n.func, "id", None)) in RAISERS:
            yield from n.args
        elif isinstance(n, ast.FunctionDef) and n.name in REASONS:
            yield from (r.value for r in ast.walk(n) if isinstance(r, (ast.Return, ast.Assign)) and r.value)


def messages(path: Path):
    """(line, longest literal part) of the messages of a module."""
    source = ast.parse(path.read_text())
    # Messages that are put together first and raised afterwards.
    named = {
        target.id: n.value
        for n in ast.walk(source)
        if isinstance(n, ast.Assign)
        for target in n.targets
        if isinstance(target, ast.Name) and target.id in ("text", "why")
    }
    for text in texts(source):
        text = named.get(text.id, text) if isinstance(text, ast.Name) else text
        parts = [p.value for p in ast.walk(text) if isinstance(p, ast.Constant) and isinstance(p.value, str)]
        longest = max(parts, key=len, default="").strip()
        if len(longest) > 3 and " " in longest:  # no names, paths or separators
            yield text.lineno, longest


# Every module that a user of the tuner meets.
MODULES = [
    "adaptation",
    "autotune",
    "choices",
    "cpu_rules",
    "device",
    "dispatch",
    "evidence",
    "kernels",
    "lookup",
    "measure",
    "online",
    "plot",
    "profile",
    "profile_data",
    "profile_io",
    "race",
    "reference",
    "regression",
    "rules",
    "selection",
    "session",
    "stats",
    "trial",
    "tune_cli",
    "tuning_run",
    "workload",
]


def test_messages_are_found():
    """Of each kind at least one, so that the next test cannot pass by looking at nothing."""
    found = {module: {text for _, text in messages(PACKAGE / f"{module}.py")} for module in MODULES}
    assert any("rows, got tile_size_m=" in text for text in found["cpu_rules"])
    assert any("must be widths from 1 to 8" in text for text in found["tune_cli"])
    assert any("goes with --shape" in text for text in found["tune_cli"])
    assert any("a second entry for the same problem" in text for text in found["profile_io"])
    assert any("the default config fails" in text for text in found["trial"])
    assert sum(map(len, found.values())) > 60


@pytest.mark.parametrize("module", MODULES)
def test_every_error_is_in_the_guide(module):
    guide = " ".join(GUIDE.read_text().split()).replace("\\|", "|")
    path = PACKAGE / f"{module}.py"
    missing = [f"{path.name}:{line}: {text}" for line, text in messages(path) if text not in guide]
    assert not missing, "\n".join(missing)
