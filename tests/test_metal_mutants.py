"""Every barrier of the Metal kernels is needed, and the simulator sees it missing, every time."""

import re
import shutil

import pytest

import cases
import metal_executor as metal
import metal_sim
from mlx_marlin import ops
from mlx_marlin.kernels import KernelConfig, make_name

pytestmark = pytest.mark.skipif(bool(metal_sim.unavailable()), reason=str(metal_sim.unavailable()))

BARRIER = re.compile(r"threadgroup_barrier\([^;]*\);")
SOURCES = sorted(path for path in metal.SHADERS.iterdir() if path.suffix in (".metal", ".h"))
MUTANTS = [(path.name, i) for path in SOURCES for i in range(len(BARRIER.findall(path.read_text())))]

# Few tokens for one expert: routing, 16-row tiles of two slices, ranges of k that meet in threadgroup memory.
MATRIX = (cases.Case(3, "mcg", "float16", 17, "block", "silu", routing="one_expert"), ("base", 16, 128, 16))
ROWS = (cases.Case(3, "mcg", "float16", 1, "block", "silu", top_k=2), ("decode", 1, 128, 16))
LINEAR = (cases.Case(3, "mcg", "float16", 1, "block", "none"), ("decode", 1, 128, 16))


def run(case, tiles, directory):
    variant, rows, columns, simdgroups = tiles
    config = KernelConfig(make_name(variant), rows, columns, simdgroups, True, variant)
    x, indices, scores = case.inputs()
    if case.linear:
        return metal.linear(x, ops._prepare_weight("test", case.weight()), config, directory=directory)
    return metal.swiglu(x, indices, case.bank(), scores=scores, config=config, directory=directory)


def test_there_are_barriers():
    assert {name for name, _ in MUTANTS} == {"gate_up.metal", "linear.metal", "product.h", "route.metal"}


@pytest.mark.slow
@pytest.mark.parametrize("name, index", MUTANTS, ids=str)
def test_a_missing_barrier_is_seen(name, index, tmp_path):
    directory = tmp_path / "kernels"
    shutil.copytree(metal.SHADERS, directory)
    text = (directory / name).read_text()
    match = list(BARRIER.finditer(text))[index]
    (directory / name).write_text(text[: match.start()] + text[match.end() :])
    seen = []
    for case, tiles in (MATRIX, ROWS, LINEAR):
        try:
            run(case, tiles, directory)
        except metal_sim.KernelError as error:
            seen.append(str(error))
    assert seen and all("race" in error for error in seen), seen
