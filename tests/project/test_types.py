"""The type checker of `make lint`: what it must find in code over the package's own types, and what it must not."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mlx_marlin import _ext
from tests.support.paths import ROOT

# Lines with faults name the error that mypy must report there, and every other line none.
WRONG = """\
import mlx_marlin
from mlx_marlin import KernelConfig, _ext
from mlx_marlin.measure.race import race
from mlx_marlin.selection.evidence import Ledger

config = KernelConfig("moe_trellis_swiglu", 8, 128, 16)
by_name: dict[str, float] = {}
by_name[config] = 1.0  # index
names: Ledger[str] = Ledger(100, 0.05)
names.record(config, 1.0)  # arg-type
configs: Ledger[KernelConfig] = Ledger(100, 0.05)
leader: str = configs.leader(config, [config])  # assignment
winner: str = race({config: lambda: 1.0}, config).winner  # assignment
mlx_marlin.trellis_linaer  # attr-defined
_ext.set_num_threads("two")  # arg-type
model, tokenizer = mlx_marlin.load("directory", return_config=True)  # misc
"""

RIGHT = """\
import mlx.core as mx

import mlx_marlin
from mlx_marlin import AutotuneConfig, KernelConfig, MixedBPWAutoTuner, Problem, TrellisLinear
from mlx_marlin.selection.evidence import Ledger


def forward(layer: TrellisLinear, x: mx.array) -> mx.array:
    return layer(x)


config = KernelConfig("moe_trellis_swiglu", 8, 128, 16)
by_config: dict[KernelConfig, float] = {config: 1.0}
configs: Ledger[KernelConfig] = Ledger(100, 0.05)
configs.record(config, 1.0)
leader: KernelConfig = configs.leader(config, [config])
profile: AutotuneConfig = MixedBPWAutoTuner().config
choices = {problem: entry.config for problem, entry in profile.problems.items()}
first: KernelConfig = choices[Problem.linear(256, 256)]
model, tokenizer = mlx_marlin.load("directory")
whole, tokenizer, settings = mlx_marlin.load("directory", return_config=True)
"""


@pytest.mark.skipif(importlib.util.find_spec("mypy") is None, reason="mypy is not installed: make lint installs it")
def test_a_planted_error_is_reported():
    """With the project's settings, over the sources of the package; the extension's types are those of the build.

    In a folder that stays, with mypy's cache: it checks again what changed.
    """
    folder = ROOT / "build" / "types"
    stub = folder / "stubs" / "mlx_marlin" / "_ext.pyi"
    stub.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(Path(_ext.__file__).with_name("_ext.pyi"), stub)
    for name, code in (("wrong", WRONG), ("right", RIGHT)):
        (folder / f"{name}.py").write_text(code)
    checked = [folder / "wrong.py", folder / "right.py"]
    run = subprocess.run(
        [sys.executable, "-m", "mypy", "--cache-dir", folder / "cache", *checked],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "MYPYPATH": str(stub.parents[1])},
    )
    reported = re.findall(r"^(.+?):(\d+): error: .*\[([\w-]+)\]$", run.stdout, re.MULTILINE)
    found = [(Path(file).name, int(line), code) for file, line, code in reported]
    planted = [
        ("wrong.py", number, line.partition("  # ")[2])
        for number, line in enumerate(WRONG.splitlines(), 1)
        if "  # " in line
    ]
    assert sorted(found) == planted, run.stdout + run.stderr
