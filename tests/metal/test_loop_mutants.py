"""Whatever loop of a Metal kernel is broken, the self-test refuses a config that runs it.

A mutant is the shader folder with one loop changed: its bound one less, or its stride doubled. What the self-test sees
is the result of a kernel, as on a GPU: the simulator's race checks are off.
"""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_marlin import kernels, ops
from mlx_marlin.kernels import KernelConfig, Problem
from mlx_marlin.selection import selftest, small_cases
from mlx_marlin.weights.experts import ExpertBank, ExpertStack
from tests import metal_sim
from tests.support import metal_executor
from tests.support.metal_selection import config

pytestmark = pytest.mark.skipif(bool(metal_sim.unavailable()), reason=str(metal_sim.unavailable()))

LOOP = re.compile(r"for \(([^;{}]*);([^;{}]*);([^;{}]*)\) \{")

LAYER = Problem.swiglu(2048, 768, experts=128, top_k=8, bits=3, codebooks="mcg", device="gpu", combine=True)
M5 = replace(LAYER, accelerators=True)
HALF = Problem.linear(2048, 768, bits=2.5, codebooks="mul1", device="gpu", accuracy="half")
M5_HALF = replace(HALF, accelerators=True)
EIGHT = Problem.linear(2048, 768, bits=7, codebooks="mcg", device="gpu", accuracy="half")
# 16 simdgroups share 104 steps of k: some end one step after a block of scales.
UNEVEN = replace(HALF, hidden=1664)
# Between them they run every loop: fused and separate prologues and epilogues, rows, matrices and accelerators, floats
# and halves.
PROBES = {
    "fused": (LAYER, config("decode", 3, 128, 4)),
    "narrow": (LAYER, config("decode", 1, 48, 4)),
    "rows": (LAYER, config("prefill4", 4, 128, 8)),
    "half rows": (HALF, config("prefill4", 4, 96, 8, False)),
    "matrices": (LAYER, config("base", 16, 256, 16)),
    "half matrices": (EIGHT, config("base", 8, 48, 4, False)),
    "narrow matrices": (LAYER, config("base", 8, 48, 8)),
    "few simdgroups": (LAYER, config("base", 8, 128, 4)),
    "many rows": (LAYER, config("large_batch", 64, 128, 16)),
    "linear": (HALF, config("decode", 2, 128, 4)),
    "accelerators": (M5, config("large_batch", 48, 128, 16)),
    "half accelerators": (M5_HALF, config("base", 32, 256, 4, False)),
    "narrow accelerators": (M5_HALF, config("base", 32, 32, 16)),
    "uneven rows": (UNEVEN, config("prefill4", 4, 16, 16, False)),
    "uneven matrices": (UNEVEN, config("base", 8, 16, 16, False)),
    "uneven accelerators": (replace(UNEVEN, accelerators=True), config("base", 32, 32, 16)),
}
# Those to try first, by file and the names of the functions around.
LIKELY = {
    "route.metal": ["rows", "many rows"],
    "gate_up.metal": ["narrow", "fused", "narrow matrices", "few simdgroups"],
    "linear.metal": ["narrow", "fused"],
    "rotate.metal": ["matrices"],
    "rotated.h": ["matrices", "half matrices"],
    "combine.metal": ["rows"],
    "trellis.h": ["half rows", "half matrices"],
    "accelerator_product.h": ["half accelerators", "narrow accelerators", "accelerators", "uneven accelerators"],
}

# Mutants whose results nobody can see: file, condition, which change of it, why.
UNSEEN = {
    ("linear.metal", "task < blocks * rows.count"): ("bound stride", "NaN for indices out of range: none are tested"),
    ("route.metal", "i < args.positions"): ("bound stride", "marks padding, whose rows are not written"),
    ("route.metal", "task < tasks"): ("bound", "the last part of those out of range"),
    ("route.metal", "bucket < buckets"): ("bound", "those out of range"),
    ("route.metal", "i < args.tiles"): ("bound stride", "marks unused tiles, which fresh memory is without"),
    ("hadamard.h", "mask < MARLIN_SIMD_SIZE"): ("bound", "from 16 the next is 32 in any case"),
}


def _is_unseen(file: str, condition: str, what: str) -> bool:
    return any(file == f and part in condition and what in kinds for (f, part), (kinds, _) in UNSEEN.items())


@dataclass(frozen=True)
class Mutant:
    """One loop changed: the file, where the loop begins there, what it becomes."""

    file: str
    line: int
    what: str
    start: int
    end: int
    text: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line} {self.what}"

    def write(self, folder: Path) -> Path:
        shutil.copytree(metal_executor.SHADERS, folder)
        path = folder / self.file
        source = path.read_text()
        path.write_text(source[: self.start] + self.text + source[self.end :])
        return folder


def _bound(condition: str) -> str | None:
    if " <= " in condition:  # the loop after it does what this one leaves
        return condition + " + 1"
    left, less, right = condition.partition(" < ")
    return f"{left} + 1 < {right}" if less else None


def _stride(step: str) -> str | None:
    if match := re.fullmatch(r" \+\+(\w+)", step):
        return f" {match[1]} += 2"
    if match := re.fullmatch(r" (\w+) ([+*])= (\w+)", step):
        return f" {match[1]} {match[2]}= 2 * {match[3]}"
    return None


def mutants() -> list[Mutant]:
    found = []
    for path in sorted(metal_executor.SHADERS.glob("*.*")):
        text = path.read_text()
        if path.name in ("embedding.metal", "viterbi.metal", "traceback.metal"):  # no config runs them
            continue
        for match in LOOP.finditer(text):
            first, condition, step = match.groups()
            line = text[: match.start()].count("\n") + 1
            changed = {"bound": (_bound(condition), step), "stride": (condition, _stride(step))}
            for what, (new_condition, new_step) in changed.items():
                if None not in (new_condition, new_step) and not _is_unseen(path.name, condition, what):
                    loop = f"for ({first};{new_condition};{new_step}) {{"
                    found.append(Mutant(path.name, line, what, match.start(), match.end(), loop))
    return found


class Simulated:
    """Runs the self-test's cases in the simulator, with the kernels of a folder."""

    def __init__(self, directory: Path):
        self.options = {"directory": directory, "races": False}

    def __call__(self, problem: Problem, config: KernelConfig, case: dict) -> np.ndarray:
        try:
            return self._run(problem, config, case)
        except metal_sim.KernelError as error:
            raise RuntimeError(str(error)) from error

    def _run(self, problem, config, case):
        x = mx.array(case["x"]).astype(getattr(mx, problem.dtype))
        if problem.kind == "swiglu":
            scores = None if case["scores"] is None else mx.array(case["scores"])
            indices, bank = mx.array(case["indices"]), ExpertBank(*case["weights"])
            keywords = {"scores": scores, "activation": problem.activation, "config": config}
            return metal_executor.experts(x, indices, bank, **keywords, **self.options)
        stack = ops.prepare(ExpertStack.of("experts", case["weights"]))
        if case.get("of") == "weight":
            return metal_executor.decode(stack, **self.options)
        indices = None if problem.experts == 1 else case["indices"]
        transposed = case.get("of") == "gradient"
        return metal_executor.linear(x, stack, config, indices, transposed=transposed, **self.options)


def refused_by(directory: Path, folder: Path, likely: list[str]) -> str | None:
    """The first probe that is refused, or what the kernels that no config chooses say."""
    for name in [*likely, *(name for name in PROBES if name not in likely)]:
        folder.mkdir(exist_ok=True)
        test = selftest.SelfTest("cpu", Simulated(directory), folder / f"{name}.json")
        if test.fault(*PROBES[name]):
            return name
    return next(iter(selftest.SelfTest("cpu", Simulated(directory), folder / "others.json").others()), None)


# A quick run has the loop over k of rows and of accelerators, the one over units of a matrix tile, and the unrolled one
# of route.
QUICK = {
    *(("tile_product.h", "k < stop"), ("accelerator_product.h", "k < stop")),
    *(("product.h", "unit < product.units"), ("route.metal", "slot + kAhead <= end")),
}


def _is_quick(mutant: Mutant) -> bool:
    return mutant.what == "stride" and any(mutant.file == f and c in mutant.text for f, c in QUICK)


@pytest.mark.parametrize(
    "mutant", [pytest.param(m, id=str(m), marks=[] if _is_quick(m) else [pytest.mark.slow]) for m in mutants()]
)
def test_a_broken_loop_is_refused(mutant, tmp_path):
    likely = LIKELY.get(mutant.file, ["half rows", "matrices"] if "unit" not in mutant.text else ["many rows"])
    if mutant.text.endswith("k_end;) {"):  # over blocks of scales
        likely = [name for name in PROBES if name.startswith("uneven")]
    assert refused_by(mutant.write(tmp_path / "kernels"), tmp_path / "verdicts", likely)


@pytest.mark.slow
def test_the_unchanged_kernels_are_accepted(tmp_path):
    assert refused_by(metal_executor.SHADERS, tmp_path, []) is None


def test_the_quick_mutants_exist():
    assert len([m for m in mutants() if _is_quick(m)]) == len(QUICK)


@pytest.mark.parametrize("name", PROBES)
def test_probes_can_be_chosen(name):
    problem, chosen = PROBES[name]
    assert kernels.feasible(problem, chosen) is None
    small_cases.small_problem(problem, chosen)
