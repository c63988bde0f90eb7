"""Every example of docs/tuning.md and the tuning notebook, executed; the commands of bench/README.md, parsed."""

import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from msgspec import structs

from mlx_marlin import device, profile
from mlx_marlin.kernels import Problem
from mlx_marlin.profile import json as profile_json
from mlx_marlin.profile.schema import Measured, Timing
from mlx_marlin.storage import atomic
from tests.support.paths import ROOT
from tests.support.tuning import DECODE, PREFILL, cpu_profile, entry

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
    stored = images(notebook)
    (parameters,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    parameters.source += "\nbatch_sizes = [1, 4]\nnum_iter, num_warmup = 2, 1"
    folder = ROOT / "bench/notebooks"
    # What was tuned before is neither used nor shown.
    path = profile.default_path("cpu")
    atomic.write_bytes(path, profile_json.encode(cpu_profile({Problem.linear(256, 512, rows=3, bits=5): entry()})))
    before = path.read_bytes()
    nbclient.NotebookClient(notebook, kernel_name="python3", resources={"metadata": {"path": str(folder)}}).execute()
    # On a GPU one figure more: of the memory, which every config on a CPU takes alike.
    assert len(images(notebook)) == 3 + (device.default_device() == "gpu") and len(stored) == 3
    assert printed(notebook).count("configs timed at 2 batch sizes") == 3
    assert printed(notebook).count("in the profile profile.json") == 2
    assert path.read_bytes() == before


def images(notebook) -> list:
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return [output.data["image/png"] for output in outputs if "image/png" in output.get("data", {})]


def printed(notebook) -> str:
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "".join(output.get("text", "") for output in outputs)


def test_the_notebook_is_kept_with_its_outputs_and_without_paths():
    nbformat, path = pytest.importorskip("nbformat"), ROOT / "bench/notebooks/tuning.ipynb"
    notebook = nbformat.read(path, as_version=4)
    assert path.stat().st_size < 400_000 and len(images(notebook)) == 3
    assert "experts per token: 4" in printed(notebook) and "in the profile profile.json" in printed(notebook)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert not any(output.get("name") == "stderr" or output.output_type == "error" for output in outputs)
    rest = [{**output.get("data", {}), "image/png": ""} for output in outputs]
    assert not re.search(r"(?<![\w.])/\w[\w.-]*/", f"{printed(notebook)} {rest}")


@pytest.fixture
def plot(monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "agg")
    return pytest.importorskip("mlx_marlin.autotune.plot", reason="needs matplotlib", exc_type=ImportError)


def test_figures_show_what_was_measured(plot):
    from mlx_marlin.autotune import BenchmarkResult

    timed = {1: [(DECODE, 2.0), (PREFILL, 3.0)], 4: [(PREFILL, 4.0), (DECODE, 8.0), (DECODE, 6.0)]}
    results = {rows: [BenchmarkResult(c, ms, 1.0, 1.0, 0.0) for c, ms in found] for rows, found in timed.items()}
    ax = plot.variants_by_rows(results)
    assert {line.get_label(): list(map(tuple, line.get_xydata())) for line in ax.lines} == {
        "decode": [(0, 1.0), (1, 1.5)],
        "prefill4": [(0, 1.5), (1, 1.0)],
    }
    assert [label.get_text() for label in ax.get_xticklabels()] == ["1\n2.00 ms", "4\n4.00 ms"]
    entries = {
        rows: entry(DECODE, default=PREFILL, timings=tuple(Measured(c, Timing(9, ms, 0.0)) for c, ms in found))
        for rows, found in timed.items()
    }
    ax = plot.configs_by_rows(entries)
    ratios = {points.get_label(): points.get_offsets()[:, 1].tolist() for points in ax.collections}
    assert ratios == {"decode": [2 / 3, 1.5, 2.0], "prefill4": [1.0, 1.0]}
    entries[4] = structs.replace(entries[4], config=PREFILL, decision="undecided")
    assert [text.get_text() for text in plot.chosen_configs({"up": entries}).texts] == [
        "decode 2 x 64, 1\nsaves 50 % (40 to 60)",
        "prefill4 4 x 64, 1\nthe default, undecided",
    ]
    with pytest.raises(ValueError, match="benchmark a layer first"):
        plot.chosen_configs({})


def test_pareto_front(plot):
    points = [(1.0, 9.0), (2.0, 5.0), (2.0, 7.0), (3.0, 5.0), (4.0, 1.0), (5.0, 2.0), (1.0, 9.0)]
    assert plot.pareto_front(points) == [(1.0, 9.0), (2.0, 5.0), (4.0, 1.0)]
    assert plot.pareto_front([]) == []
