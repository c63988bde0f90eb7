"""The self-test's small cases: small, and running the kernels and loops that a layer runs."""

from dataclasses import replace

import numpy as np
import pytest

from mlx_marlin import kernels, ops
from mlx_marlin.selection import selftest, small_cases
from tests.support.planted_runs import GATHERED, LINEAR, MLP, SWIGLU


@pytest.mark.parametrize("rows", [1, 4, 16, 64])
@pytest.mark.parametrize("kind", [SWIGLU, MLP], ids=["swiglu", "mlp"])
def test_the_small_case_is_small(kind, rows):
    problem = replace(kind, rows=rows)
    for config in kernels.candidates(problem)[::17]:
        small = small_cases.small_problem(problem, config)
        assert kernels.feasible(small, config) is None
        assert small.rows == config.tile_size_m + 1
        assert small.bits == problem.bits and small.experts >= len(problem.bits)
        assert small.hidden * small.intermediate <= 2048 * 2048


def loops(problem, config):
    return small_cases._loops(ops.plan(problem, config))


@pytest.mark.parametrize(
    "name, rows, columns, simdgroups, wanted",
    [
        ("decode", 1, 48, 12, {"a narrow last group", "several blocks of input", "several blocks of scales"}),
        ("prefill4", 4, 160, 16, {"a narrow last group", "unequal ranges of k", "several blocks of scales"}),
        ("base", 16, 48, 12, {"a narrow last group", "several groups of columns", "several blocks of scales"}),
        ("large_batch", 64, 128, 16, {"several groups of columns", "several steps in a range"}),
    ],
)
def test_the_small_case_reaches_the_loops_that_a_layer_reaches(name, rows, columns, simdgroups, wanted):
    config = kernels.KernelConfig(kernels.make_name(name), rows, columns, simdgroups, False, name)
    layer = replace(SWIGLU, accuracy="half")
    reached = loops(small_cases.small_problem(layer, config), config)
    assert {f"trellis_linear: {what}" for what in wanted} <= reached
    for sizes in ((2048, 768), (4096, 1536), (1280, 640)):
        problem = replace(layer, hidden=sizes[0], intermediate=sizes[1], rows=rows + 1)
        if small_cases.code(ops.plan(problem, config)) == small_cases.code(ops.plan(layer, config)):
            assert loops(problem, config) <= reached


@pytest.mark.parametrize("problem", [SWIGLU, GATHERED, replace(SWIGLU, top_k=1)])
def test_sorting_is_tested_with_more_of_everything_than_threads(problem):
    """route.metal: 512 threads, and eight slots at a time."""
    for name, rows in (("decode", 2), ("prefill4", 4), ("large_batch", 64)):
        config = kernels.KernelConfig(kernels.make_name(name), rows, 128, 16, True, name)
        found = list(small_cases.routing_problems(problem, config))
        assert len(found) == 2
        for small in found:
            case = small_cases.make_case(small)
            slots = case["indices"].size
            counts = np.bincount(case["indices"].reshape(-1), minlength=small.experts)
            assert slots > 512 and counts[0] >= slots // 2 and counts[small.experts - 1] > 0
            assert counts[small.experts] >= 64  # out of range
            assert slots // max(1, 512 // (small.experts + 1)) > 8
        assert found[1].experts > 512
    assert not list(small_cases.routing_problems(problem, replace(config, tile_size_m=1)))
    assert not list(small_cases.routing_problems(LINEAR, config))


@pytest.mark.parametrize("hidden, intermediate", [(2048, 768), (4096, 1536), (7168, 2048), (2048, 8192)])
@pytest.mark.parametrize("columns, simdgroups", [(128, 16), (32, 8), (16, 4)])
def test_the_small_case_runs_the_kernels_that_the_layer_runs(hidden, intermediate, columns, simdgroups):
    """Sizes decide whether a product makes its own input: a verdict on the one is none on the other."""
    problem = replace(SWIGLU, hidden=hidden, intermediate=intermediate)
    config = kernels.KernelConfig("moe_trellis_swiglu_decode", 1, columns, simdgroups, True, "decode")
    small = small_cases.small_problem(problem, config)

    def compiled(problem):
        plan = ops.plan(replace(problem, rows=2), config)
        return [(d["kernel"], d["constants"]) for d in plan["dispatches"]]

    assert compiled(small) == compiled(problem)  # two rows are one pass
    wide, narrow = replace(problem, hidden=8192), replace(problem, hidden=1024)
    if columns > 16:
        assert selftest._key(wide, config) != selftest._key(narrow, config)


@pytest.mark.parametrize("hidden, intermediate, top_k", [(12288, 4096, 8), (6144, 2048, 16)])
def test_rows_in_several_passes_have_a_small_case(hidden, intermediate, top_k):
    sizes = {"hidden": hidden, "intermediate": intermediate, "top_k": top_k}
    problem = replace(SWIGLU, rows=65, combine=True, **sizes)
    config = kernels.default(problem)
    kinds = [d["kernel"] for d in ops.plan(problem, config)["dispatches"]]
    assert len(kinds) > len(set(kinds))
    small = small_cases.small_problem(problem, config)
    assert {d["kernel"] for d in ops.plan(small, config)["dispatches"]} == set(kinds)


@pytest.mark.parametrize(
    "problem",
    [
        replace(LINEAR, rows=1, hidden=14336, intermediate=4096),
        replace(LINEAR, rows=1, hidden=28672, intermediate=8192, dtype="float16"),
        replace(SWIGLU, rows=1, hidden=4096, intermediate=14336),
    ],
    ids=str,
)
def test_candidates_of_a_wide_layer_have_a_small_case(problem):
    for config in kernels.candidates(problem)[::7]:
        small_cases.small_problem(problem, config)


@pytest.mark.parametrize("rows", [1, 4, 64])
@pytest.mark.parametrize("problem", [SWIGLU, MLP, LINEAR], ids=["swiglu", "mlp", "linear"])
def test_layers_of_every_width_have_a_small_case(problem, rows):
    """Rows are rotated by as many simdgroups as a row's blocks can be shared among evenly."""
    threads = set()
    for blocks in range(1, 50, 1 if rows == 64 else 6):
        asked = replace(problem, hidden=128 * blocks, rows=rows)
        # The narrowest layer's default transforms x itself; others of its candidates do not.
        configs = kernels.default(asked), *kernels.candidates(asked)
        config = next(c for c in configs if rows < 64 or c.kernel_variant == "base")
        small = small_cases.small_problem(asked, config)
        plan = ops.plan(small, config)
        threads |= {d["threads"][0] for d in plan["dispatches"] if d["kernel"] == "trellis_rotate"}
    assert rows < 64 or threads == {32 * simdgroups for simdgroups in range(1, 9)}
