"""Includes of csrc run one way, and the CPU's code knows nothing of MLX."""

import re
from pathlib import Path

import pytest

from tests.support.paths import ROOT

CSRC = ROOT / "csrc"
# A file includes only what stands before it, or lies in its own folder.
ORDER = ["format.h", "call.h", "cpu", "viterbi", "plan", "metal", "primitives", "bindings"]
# The same inside cpu/: its files, how vectors are handled, and the loop nests over them.
CPU_ORDER = ["cpu", "cpu/simd", "cpu/tier"]
PURE = {"cpu", "viterbi", "plan"}


def includes(path: Path) -> list[str]:
    return re.findall(r'^\s*#include "(.+)"', path.read_text(), re.MULTILINE)


def sources(folder: str) -> list[Path]:
    found = [p for p in (CSRC / folder).rglob("*") if p.suffix in (".h", ".cpp")]
    return found or [CSRC / folder]


def test_every_file_is_ordered():
    assert {p.name for p in CSRC.iterdir()} == set(ORDER)


@pytest.mark.parametrize("folder", ORDER)
def test_includes_run_one_way(folder):
    before = ORDER[: ORDER.index(folder) + 1]
    for path in sources(folder):
        for name in includes(path):
            if (ROOT / "kernels" / name).exists():
                assert folder not in ("cpu", "viterbi"), f"{path} includes a shader's header"
            elif name.startswith("mlx/"):
                assert folder not in PURE, f"{path} includes MLX"
            else:
                assert (CSRC / name).exists(), f"{path}: {name} is not named from csrc on"
                assert name.split("/")[0] in before, f"{path} includes {name}"


@pytest.mark.parametrize("folder", CPU_ORDER)
def test_includes_of_the_cpu_run_one_way(folder):
    before = CPU_ORDER[: CPU_ORDER.index(folder) + 1]
    for path in (CSRC / folder).glob("*.*"):
        for name in includes(path) if path.suffix in (".h", ".cpp") else ():
            if name.startswith("cpu/"):
                assert Path(name).parent.as_posix() in before, f"{path} includes {name}"
