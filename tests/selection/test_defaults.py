"""The default config beside every candidate, by counted work: it loses a tenth at most, whatever the problem."""

from dataclasses import replace
from itertools import product

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


@pytest.mark.slow
@pytest.mark.skipif(bool(metal_sim.unavailable()), reason=str(metal_sim.unavailable()))
@pytest.mark.parametrize("rows", [1, 2, 4, 8, 16, 32])
def test_default_on_a_gpu(rows):
    """By the cost model, on a chip of the middle; known chips have a predicted profile each."""
    from bench.metal.chips import CHIPS
    from bench.metal.predict import predicted_us

    problem = Problem.linear(1024, 2048, rows=rows, bits=3, device="gpu")
    default = kernels.default(problem)
    tiles = ((32, 8), (64, 16), (128, 8), (128, 16))
    found = [
        KernelConfig(kernels.make_name(variant), panel, *tile, True, variant)
        for variant in kernels.VARIANTS
        for panel in metal.TILE_ROWS[variant]
        for tile in tiles
        if panel <= 8 * rows and rows <= 8 * panel
    ]
    legal = [config for config in found if kernels.feasible(problem, config) is None]
    times = {config: predicted_us(problem, config, CHIPS["M2 Pro"]) for config in {default, *legal}}
    assert times[default] <= 1.1 * min(times.values()), (default, min(times, key=times.get))
