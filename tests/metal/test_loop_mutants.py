"""Whatever loop of a Metal kernel is broken, the self-test refuses a config that runs it.

A mutant is the shader folder with one loop changed: its bound one less, or its stride doubled. Loops are found in the
sources. What the self-test sees is the result of a kernel, as on a GPU: the simulator's race checks are off. An access
out of bounds, which a GPU may answer with anything, stops the simulator.

The last full run, mutants by file: refused for a wrong result, for an access out of bounds or an endless loop; the same
for every input (UNSEEN).

========================= ======= ====== ====== ====
file                      mutants result access same
========================= ======= ====== ====== ====
accelerator_product.h          35     34      1
activation.h                    2      2
combine.metal                   2      2
decode.metal                    2      2
embedding.metal                14     13           1
gate_up.metal                   6      6
hadamard.h                      6      6
linear.metal                   10     10
product.h                      14     12      2
rotate.metal                    2      2
rotated.h                       8      8
route.metal                    26     13     13
tile_product.h                 74     73      1
traceback.metal                15      9      6
trellis.h                       8      6      2
viterbi.metal                  32     28      4
all                           256    226     29    1
========================= ======= ====== ====== ====
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_marlin import kernels, ops
from mlx_marlin.kernels import KernelConfig, Problem
from mlx_marlin.ops import search
from mlx_marlin.selection import selftest, small_cases
from mlx_marlin.weights.experts import ExpertBank, ExpertStack
from tests import metal_sim
from tests.support import metal_executor
from tests.support.metal_selection import config

pytestmark = pytest.mark.skipif(bool(metal_sim.unavailable()), reason=str(metal_sim.unavailable()))

LOOP = re.compile(r"for \(([^;{}]*);([^;{}]*);([^;{}]*)\) \{|while \(([^;{}]*)\) \{")
STRUCT = re.compile(r"^struct (\w+) \{", re.MULTILINE)

LAYER = Problem.swiglu(2048, 768, experts=128, top_k=8, bits=3, codebooks="mcg", device="gpu", combine=True)
M5 = replace(LAYER, accelerators=True)
HALF = Problem.linear(2048, 768, bits=2.5, codebooks="mul1", device="gpu", accuracy="half")
M5_HALF = replace(HALF, accelerators=True)
EIGHT = Problem.linear(2048, 768, bits=7, codebooks="mcg", device="gpu", accuracy="half")
# 16 simdgroups share 104 steps of k: some end one step after a block of scales.
UNEVEN = replace(HALF, hidden=1664)
# One projection of experts; rows are slots.
GATHERED = Problem.linear(2048, 768, experts=128, bits=3, codebooks="mcg", device="gpu")
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
    "half units": (EIGHT, config("base", 16, 128, 4, False)),
    "few simdgroups": (LAYER, config("base", 8, 128, 4)),
    "many rows": (LAYER, config("large_batch", 64, 128, 16)),
    "gathered": (GATHERED, config("base", 8, 128, 4)),
    "linear": (HALF, config("decode", 2, 128, 4)),
    "accelerators": (M5, config("large_batch", 48, 128, 16)),
    "half accelerators": (M5_HALF, config("base", 32, 256, 4, False)),
    "narrow accelerators": (M5_HALF, config("base", 32, 32, 16)),
    "uneven rows": (UNEVEN, config("prefill4", 4, 16, 16, False)),
    "uneven matrices": (UNEVEN, config("base", 8, 16, 16, False)),
    "uneven accelerators": (replace(UNEVEN, accelerators=True), config("base", 32, 32, 16)),
}
OTHERS = "kernels that no config chooses"
# The encoder's search has a self-test of its own, for each width: which loops are there depends on it.
SEARCHES = {f"search at {bits} bits": (bits, "mul1") for bits in (3, 2.5, 6, 1, 8, 2, 1.5, 3.5, 4, 5, 7)}
SEARCH_FILES = ("viterbi.metal", "traceback.metal")
# Those to try first, by file or the struct around.
LIKELY = {
    "TransposedProduct": [OTHERS],
    "MatrixProduct": ["half matrices", "half units", "matrices"],
    "decode.metal": [OTHERS],
    "embedding.metal": [OTHERS],
    "product.h": ["half rows", "few simdgroups", "narrow accelerators", "accelerators"],
    "route.metal": ["rows", "gathered", "many rows"],
    "gate_up.metal": ["narrow", "fused", "narrow matrices", "few simdgroups"],
    "linear.metal": ["narrow", "fused", "gathered"],
    "rotate.metal": ["matrices"],
    "rotated.h": ["matrices", "half matrices"],
    "combine.metal": ["rows"],
    "trellis.h": ["half rows", "half matrices"],
    "accelerator_product.h": ["half accelerators", "narrow accelerators", "accelerators", "uneven accelerators"],
}

# Mutants that do the same for every input: file, the loop with what follows, which change of it, why.
UNSEEN = {
    ("embedding.metal", "for (uint i = 0; i < kGroupLane; ++i) {\n      if ((i & width) == 0) {"): (
        "bound",
        "the last i, 7, has every bit: nothing is done",
    ),
}


def _is_unseen(file: str, source: str, what: str) -> bool:
    return any(file == f and source.startswith(loop) and what == kind for (f, loop), (kind, _) in UNSEEN.items())


@dataclass(frozen=True)
class Mutant:
    """One loop changed: the file, where the loop begins there, what it becomes."""

    file: str
    line: int
    what: str
    start: int
    end: int
    text: str
    struct: str = ""  # around it

    def __str__(self) -> str:
        return f"{self.file}:{self.line} {self.what}"

    def write(self, folder: Path) -> Path:
        shutil.copytree(metal_executor.SHADERS, folder)
        path = folder / self.file
        source = path.read_text()
        path.write_text(source[: self.start] + self.text + source[self.end :])
        return folder


def _bound(condition: str, step: str) -> str | None:
    """One time less; with `<=` one time more, as the loop after it does what this one leaves."""
    if " <= " in condition or " > " in condition:
        return condition + " + 1"
    left, less, right = condition.partition(" < ")
    fixed = re.fullmatch(r" \w+ ([+*])= (\d)", step)
    last = f"{fixed[1]} {fixed[2]}" if fixed else "+ 1"
    return f"{left} {last} < {right}" if less else None


def _stride(step: str) -> str | None:
    if match := re.fullmatch(r" \+\+(\w+)", step):
        return f" {match[1]} += 2"
    if match := re.fullmatch(r" --(\w+)", step):
        return f" {match[1]} -= min({match[1]}, 2u)"
    if match := re.fullmatch(r" (\w+) ([+*])= (\w+)", step):
        return f" {match[1]} {match[2]}= 2 * {match[3]}"
    return None


def _sources() -> list[Path]:
    return sorted(metal_executor.SHADERS.glob("*.*"))


def _changes(loop: re.Match) -> Iterator[tuple[str, str]]:
    """What is changed of a loop, and the loop with that."""
    first, condition, step, of_while = loop.groups()
    if of_while is not None:
        yield "bound", f"while ({_bound(of_while, '')}) {{"
        return
    changed = {"bound": (_bound(condition, step), step)}
    if step.strip():  # otherwise the loop inside takes the steps
        changed["stride"] = condition, _stride(step)
    for what, (new_condition, new_step) in changed.items():
        assert None not in (new_condition, new_step), f"{what} of {loop[0]}"
        yield what, f"for ({first};{new_condition};{new_step}) {{"


def mutants() -> list[Mutant]:
    found = []
    for path in _sources():
        text = path.read_text()
        for loop in LOOP.finditer(text):
            line = text[: loop.start()].count("\n") + 1
            struct = (STRUCT.findall(text, 0, loop.start()) or [""])[-1]
            for what, changed in _changes(loop):
                if not _is_unseen(path.name, text[loop.start() :], what):
                    found.append(Mutant(path.name, line, what, loop.start(), loop.end(), changed, struct))
    return found


def stale(name: str, size: int) -> np.ndarray:
    """Memory as a GPU gives it: in tables of slots and tiles numbers of another layer, elsewhere large values."""
    if name in ("order", "row_tiles"):
        return np.random.default_rng(0).integers(4096, size=size // 4, dtype=np.uint32).view(np.uint8)
    return np.full(size, 0x7B, np.uint8)


class Simulated:
    """Runs the self-test's cases in the simulator, with the kernels of a folder."""

    def __init__(self, directory: Path):
        self.options = {"directory": directory, "races": False, "stale": stale}

    def __call__(self, problem: Problem, config: KernelConfig, case: dict) -> np.ndarray:
        try:
            return self._run(problem, config, case)
        except metal_sim.KernelError as error:
            raise RuntimeError(str(error)) from error

    def _run(self, problem, config, case):
        if case.get("of") == "embedding":
            table = case["trellis"], case["signs"], problem.intermediate, problem.bits[0][0]
            return metal_executor.embedding(case["indices"], *table, **self.options)
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


class SimulatedSearch:
    """What gathers searches of several threads, with the kernels of a folder."""

    def __init__(self, directory: Path):
        self.options = {"directory": directory, "races": False, "stale": stale}

    def run(self, key: tuple[float, str], targets: np.ndarray) -> np.ndarray:
        try:
            return metal_executor.viterbi(targets, *key, **self.options)
        except metal_sim.KernelError as error:
            raise RuntimeError(str(error)) from error


def fault(name: str, directory: Path, folder: Path) -> str | None:
    """What a self-test says of the kernels in a directory."""
    if name in SEARCHES:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(search, "_gathering", lambda: SimulatedSearch(directory))
            return search._test(*SEARCHES[name]) or None
    test = selftest.SelfTest("cpu", Simulated(directory), folder / f"{name}.json")
    return next(iter(test.others().values()), None) if name == OTHERS else test.fault(*PROBES[name])


def refused_by(directory: Path, folder: Path, names: Iterable[str]) -> str | None:
    """The first of the probes that is refused."""
    folder.mkdir(exist_ok=True)
    return next((name for name in names if fault(name, directory, folder)), None)


def probes_for(mutant: Mutant) -> Iterable[str]:
    """The likely ones first."""
    if mutant.file in SEARCH_FILES:
        return SEARCHES
    likely = LIKELY.get(mutant.file) or LIKELY.get(mutant.struct)
    likely = likely or (["many rows"] if "unit" in mutant.text else ["half rows", "matrices"])
    if mutant.text.endswith("k_end;) {"):  # over blocks of scales
        likely = [name for name in PROBES if name.startswith("uneven")]
    return dict.fromkeys([*likely, *PROBES, OTHERS])


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
    assert refused_by(mutant.write(tmp_path / "kernels"), tmp_path / "verdicts", probes_for(mutant))


@pytest.mark.slow
def test_the_unchanged_kernels_are_accepted(tmp_path):
    assert refused_by(metal_executor.SHADERS, tmp_path, [*PROBES, OTHERS, *SEARCHES]) is None


def test_every_loop_of_the_sources_has_mutants():
    """A loop that is written otherwise would be left out."""
    for path in _sources():
        for line in path.read_text().splitlines():
            if re.search(r"\b(for|while|do) *[({]", line.split("//")[0]):
                assert LOOP.search(line), f"{path.name}: {line}"


def test_the_unseen_mutants_exist():
    for file, loop in UNSEEN:
        assert loop in (metal_executor.SHADERS / file).read_text()


def test_the_quick_mutants_exist():
    assert len([m for m in mutants() if _is_quick(m)]) == len(QUICK)


@pytest.mark.parametrize("name", PROBES)
def test_probes_can_be_chosen(name):
    problem, chosen = PROBES[name]
    assert kernels.feasible(problem, chosen) is None
    small_cases.small_problem(problem, chosen)
