"""The default config beside every candidate, by counted work: it loses a tenth at most, whatever the problem."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from mlx_marlin import kernels
from mlx_marlin.kernels import KernelConfig, Problem, cpu, metal
from tests import metal_sim
from tests.support.cpu_work import DECODE_ROWS, rows_of_matrices, work

ROWS = (1, 2, 3, 4, 8, 12, 16, 17, 32, 33, 64, 100, 200)
LINEARS = ((2048, 4096), (2048, 512), (4096, 2048), (768, 2048), (2048, 768), (2048, 8192), (512, 128))
# Qwen3-30B-A3B, Mixtral 8x7B, gpt-oss-20b, and a layer of few small experts: (hidden, intermediate, experts, top-k).
EXPERTS = ((2048, 768, 128, 8), (4096, 14336, 8, 2), (2880, 2880, 32, 4), (1024, 512, 16, 4))
PROBLEMS = [
    *(Problem.linear(*size) for size in LINEARS),
    *(Problem.linear(2048, 768, experts=n) for n in (16, 128)),
    *(Problem.swiglu(h, i, experts=n, top_k=k) for h, i, n, k in EXPERTS),
]


def label(problem):
    return f"{problem.kind}-{problem.hidden}x{problem.intermediate}x{problem.experts}"


def routed(problem, seed):
    """The expert of each slot, drawn evenly, distinct ones for a row; of as many experts as occur."""
    draws = np.random.default_rng(seed).random((problem.rows, problem.experts))
    chosen = np.argpartition(draws, problem.top_k - 1, axis=1)[:, : problem.top_k]
    return np.unique(chosen, return_inverse=True)[1].reshape(-1)


def every_config(problem, threads):
    for variant, columns in product(kernels.VARIANTS, (128, 256)):
        for panel in cpu.TILE_ROWS[variant]:
            if problem.rows_per_matrix <= 16 * panel:  # smaller ones decode far too often
                yield KernelConfig(kernels.make_name(variant), panel, columns, threads, True, variant)


@pytest.mark.parametrize("threads", [1, 2, 8, 12, 64])
@pytest.mark.parametrize("problem", PROBLEMS, ids=label)
def test_default_on_the_cpu(problem, threads, monkeypatch):
    """Means of three routings: a default does not know which it meets."""
    monkeypatch.setattr(cpu, "cpu_threads", lambda: threads)
    for rows in ROWS:
        asked = replace(problem, rows=rows)
        default = kernels.default(asked)
        assert kernels.feasible(asked, default) is None
        routings = [rows_of_matrices(asked, seed) for seed in range(3 if problem.experts > 1 else 1)]
        for tier in DECODE_ROWS:
            configs = [default, *every_config(asked, threads)]
            costs = {config: sum(work(asked, config, r, tier) for r in routings) for config in configs}
            best = min(costs, key=costs.get)
            assert costs[default] <= 1.1 * costs[best], (rows, tier, default, best, costs[default] / costs[best])


@pytest.mark.parametrize(
    "rows, panel", [(1, 1), (2, 2), (3, 4), (4, 4), (8, 16), (12, 16), (16, 16), (32, 64), (64, 64)]
)
def test_a_linears_rows_share_a_panel(rows, panel, monkeypatch):
    """Panels of 4 would decode each tile of 12 rows three times."""
    monkeypatch.setattr(cpu, "cpu_threads", lambda: 2)
    config = kernels.default(Problem.linear(2048, 4096, rows=rows))
    assert config.tile_size_m >= rows and (config.tile_size_m, config.tile_size_n) == (max(panel, 2), 256)


@pytest.mark.parametrize("problem", [Problem.linear(2048, 4096), Problem.swiglu(2048, 768, experts=128, top_k=8)])
def test_defaults_follow_from_rows_per_matrix(problem):
    shared = {rows: replace(problem, rows=rows).rows_per_matrix for rows in (1, 16, 128)}
    assert shared[1] == 1 and shared[128] > shared[16] > 1
    if problem.kind == "linear":
        assert shared[16] == 16
    else:
        assert shared[16] == pytest.approx(16 * 8 / (128 * (1 - (15 / 16) ** 16)))


def gpu_configs(problem):
    """Row tiles near the problem's rows; not prefill4 with 16 simdgroups, which the model does not know to spill."""
    shared = problem.rows_per_matrix
    for variant, columns, simdgroups in product(kernels.VARIANTS, (16, 32, 64, 128), (8, 16)):
        for rows in metal.TILE_ROWS[variant]:
            config = KernelConfig(kernels.make_name(variant), rows, columns, simdgroups, True, variant)
            spills = variant == "prefill4" and simdgroups == 16
            if rows <= max(4, 4 * shared) and shared <= 16 * rows and not spills:
                if kernels.feasible(problem, config) is None:
                    yield config


GPU_LINEARS = [
    pytest.param(
        Problem.linear(2048, 512, rows=n, bits=3, codebooks="mcg", device="gpu"), id=f"linear-{n}", marks=marks
    )
    for n, marks in ((1, ()), (8, ()), *((n, pytest.mark.slow) for n in (2, 4, 16, 32)))
]
GPU_LARGE = [
    *(Problem.linear(1024, 2048, rows=n, bits=3, codebooks="mul1", device="gpu") for n in (1, 2, 4, 8, 16, 32, 64)),
    *(Problem.linear(1024, 512, rows=n, experts=16, bits=3, codebooks="mcg", device="gpu") for n in (4, 16, 48)),
    *(Problem.swiglu(2048, 768, rows=1, experts=8, top_k=8, bits=n, codebooks="mcg", device="gpu") for n in (2, 3)),
]


@pytest.mark.skipif(bool(metal_sim.unavailable()), reason=str(metal_sim.unavailable()))
@pytest.mark.parametrize(
    "problem",
    [*GPU_LINEARS, *(pytest.param(p, id=f"{label(p)}-{p.rows}", marks=pytest.mark.slow) for p in GPU_LARGE)],
)
def test_default_on_a_gpu(problem, monkeypatch):
    """By the cost model, on chips of 8 to 80 cores, in the mean of three routings.

    What costs a tenth less as is likely may be passed over where it costs more if a stage costs as much as it may.
    """
    from bench.metal.chips import CHIPS
    from bench.metal.model import time_range
    from bench.metal.work import count

    configs, counted = list(gpu_configs(problem)), {}
    routings = [None] if problem.experts == 1 else [routed(problem, seed) for seed in range(3)]
    for chip in ("M1", "M4", "M2 Pro", "M1 Max", "M4 Max", "M2 Ultra", "M3 Ultra"):
        monkeypatch.setattr(metal, "gpu_cores", lambda cores=CHIPS[chip].cores: cores)
        default = kernels.default(problem)
        for config in {default, *configs} - counted.keys():
            counted[config] = [[c.work for c in count(problem, config, routing=r)] for r in routings]
        times = {config: [time_range(w, CHIPS[chip]) for w in works] for config, works in counted.items()}
        likely, most = (
            {config: sum(getattr(t, end) for t in of) for config, of in times.items()} for end in ("likely", "high")
        )
        better = [c for c in times if 1.1 * likely[c] < likely[default] and most[c] <= most[default]]
        assert not better, (chip, default, min(better, key=likely.get))
        assert likely[default] <= 1.15 * min(likely.values()), (chip, default, min(likely, key=likely.get))


def test_a_gpus_default_follows_from_its_cores(monkeypatch):
    """Few threadgroups of wide tiles would leave most of 80 cores idle; 8 cores have enough of them."""
    problem = Problem.linear(2048, 4096, rows=8, device="gpu")
    columns = {}
    for cores in (8, 80):
        monkeypatch.setattr(metal, "gpu_cores", lambda cores=cores: cores)
        columns[cores] = kernels.default(problem).tile_size_n
    assert columns[80] < columns[8]
