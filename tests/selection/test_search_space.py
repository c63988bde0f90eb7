"""Which configs are the same code, which are worth timing on a machine, and how one from elsewhere is fitted."""

import inspect
from dataclasses import replace
from itertools import product

import mlx.core as mx
import numpy as np
import pytest

from mlx_marlin import device, kernels, ops
from mlx_marlin.kernels import Hardware, KernelConfig, Problem, cpu, metal
from tests.support import cases
from tests.support.paths import ROOT

M1 = Hardware(cores=8, gpu_l1=8 << 10)
M4_MAX = Hardware(cores=40)


def swiglu(rows=4, bits=3, on="cpu", **more):
    sizes = {"top_k": 8, "hidden": 2048, "intermediate": 768, "experts": 128} | more
    return Problem.swiglu(rows=rows, bits=bits, dtype="float32", device=on, **sizes)


def linear(rows=1, hidden=256, out=128, on="cpu"):
    return Problem.linear(hidden, out, rows=rows, bits=3, dtype="float32", device=on)


# One interface


def test_both_devices_answer_the_same_questions():
    asked = {name: value for name, value in vars(kernels.KernelRules).items() if inspect.isfunction(value)}
    asked = {name: list(inspect.signature(f).parameters)[1:] for name, f in asked.items() if name[0] != "_"}
    assert len(asked) >= 8
    for rules in (cpu, metal):
        assert {name: list(inspect.signature(getattr(rules, name)).parameters) for name in asked} == asked
        assert rules.TILE_ROWS.keys() == set(kernels.VARIANTS) and isinstance(rules.COMPILED_AT_RUN_TIME, bool)
        for variant in kernels.VARIANTS:
            columns = {tiles[1] for tiles in rules.legal_tiles(variant)}
            assert columns == set(rules.TILE_COLUMNS) and rules.legal_tiles(variant)[0][0] in rules.TILE_ROWS[variant]


# The same code on the CPU


@pytest.fixture
def two_cores(monkeypatch):
    monkeypatch.setattr(cpu, "cpu_threads", lambda: 2)


@pytest.mark.parametrize("rows, distinct", [(1, 4), (2, 8), (4, 12), (16, 20), (64, 28), (300, 28)])
def test_candidates_hold_each_distinct_config_once(two_cores, rows, distinct):
    problem = swiglu(rows)
    found = kernels.candidates(problem)
    assert len(found) == distinct == len({kernels.effective(problem, c) for c in found})
    every = [
        KernelConfig(kernels.make_name(variant), *tiles, True, variant)
        for variant, panels in cpu.TILE_ROWS.items()
        for tiles in product(panels, cpu.TILE_COLUMNS, (1, 2))
    ]
    assert all(kernels.feasible(problem, c) is None for c in every)  # legal all the same
    assert {kernels.effective(problem, c) for c in every} == {kernels.effective(problem, c) for c in found}
    assert found[0] == kernels.default(problem)


def test_columns_end_with_the_output_and_threads_with_the_tasks(two_cores):
    assert kernels.candidates(linear(1, out=128)) == [kernels.default(linear())]  # one task
    wide = kernels.candidates(linear(1, out=256))
    assert (wide[0].tile_size_n, wide[0].simdgroups) == (128, 2)  # a task for each thread
    assert {(c.tile_size_n, c.simdgroups) for c in wide[1:]} == {(128, 1), (256, 1)}  # 256 columns are one task


@pytest.mark.parametrize("rows", [1, 3, 5, 17, 65])
@pytest.mark.parametrize("kind", ["swiglu", "linear"])
def test_the_same_code_gives_the_same_bits(kind, rows):
    """Different code may give the same bits too, so this can only refute: a panel that is wrongly called the same."""
    activation = "silu" if kind == "swiglu" else "none"
    case = cases.Case(3, "mul1", "float32", rows, "blocks", activation, top_k=2 if kind == "swiglu" else 1)
    x, indices, scores = case.inputs()
    problem = case.problem()
    results: dict = {}
    for variant, panels in cpu.TILE_ROWS.items():
        for panel, columns in product(panels, cpu.TILE_COLUMNS):
            config = KernelConfig(kernels.make_name(variant), panel, columns, 1, True, variant)
            if kind == "linear":
                y = ops.trellis_linear(x, case.weight(), config=config, stream=mx.cpu)
            else:
                y = ops.trellis_swiglu(x, indices, case.bank(), scores=scores, config=config, stream=mx.cpu)
            same = kernels.effective(problem, config)
            results.setdefault((same.tile_size_m, same.tile_size_n), set()).add(np.array(y).tobytes())
    assert all(len(bits) == 1 for bits in results.values())


def test_rules_are_those_of_the_kernels():
    """csrc/cpu/segments.cpp says the same."""
    source = (ROOT / "csrc/cpu/segments.cpp").read_text()
    assert "largest = 64, beyond = 128" in source
    assert cpu.TILE_ROWS["large_batch"][-1] == 64 and cpu._LARGEST_SEGMENT == 128
    assert "std::max(1, config.task_columns / MARLIN_HADAMARD_SIZE)" in source


# Derived from the hardware


def test_threads_follow_the_cores(monkeypatch):
    monkeypatch.setattr(cpu, "cpu_threads", lambda: 12)
    threads = {c.simdgroups for c in kernels.candidates_on(swiglu(64), Hardware(cores=12, fast_cores=8))}
    assert threads == {1, 6, 8, 12}
    # 2 blocks of 128 columns: two tasks at most.
    few = kernels.candidates_on(linear(out=256), Hardware(cores=12, fast_cores=8))
    assert {kernels.effective(linear(out=256), c).simdgroups for c in few} == {1, 2}


def test_integers_are_candidates_where_halves_are_allowed(two_cores):
    half = swiglu(16, accuracy="half")
    found = kernels.candidates(half)
    assert found[0] == kernels.default(half) and not found[0].use_fp32_acc
    assert all(kernels.feasible(half, c) is None for c in found)
    exact = {replace(c, use_fp32_acc=True) for c in found if not c.use_fp32_acc}
    floats = {c for c in found if c.use_fp32_acc}
    assert exact == {kernels.effective(swiglu(16), c) for c in kernels.candidates(swiglu(16))}
    assert floats and floats < exact and {c.tile_size_n for c in floats} == {256}


def test_other_codebooks_have_no_integers(two_cores):
    half = swiglu(16, accuracy="half", codebooks=("3inst", "mcg"))
    assert kernels.effective(half, kernels.default(half)).use_fp32_acc
    assert len(kernels.candidates(half)) == len(kernels.candidates(swiglu(16)))
    mixed = swiglu(16, accuracy="half", codebooks=("mcg", "mul1"))
    assert not kernels.effective(mixed, kernels.default(mixed)).use_fp32_acc


@pytest.mark.parametrize("on", kernels.DEVICES)
def test_who_asks_for_float32_gets_it(on):
    exact, half = swiglu(on=on), swiglu(on=on, accuracy="half")
    rounding = replace(kernels.default(exact), use_fp32_acc=False)
    assert 'is for accuracy "half" only' in kernels.feasible(exact, rounding)
    assert kernels.fitted(exact, rounding) == kernels.default(exact)
    assert kernels.feasible(half, rounding) is None and kernels.fitted(half, rounding) == rounding


def test_panels_that_the_caches_favour_come_first():
    def first(hardware, hidden=2048):
        return next(cpu.worth_timing(swiglu(64, hidden=hidden), hardware)).tile_size_m

    assert first(Hardware(cores=1, l1d=32 << 10, l2_per_core=1)) == 16  # 16 KB of weights and 16 rows of x
    assert first(Hardware(cores=1, l1d=48 << 10, l2_per_core=1)) == 32
    assert first(Hardware(cores=1, l1d=1, l2_per_core=1 << 20)) == 32  # 32 rows of 10 KB in 512 KB
    assert first(Hardware(cores=1, l1d=1, l2_per_core=1 << 20), hidden=7168) == 16


DOCUMENTED_TILES = {2: (96, 128, 160), 3: (96,), 4: (48, 64, 96), 8: (32, 48, 64)}


@pytest.mark.parametrize("hardware", [None, M1, M4_MAX], ids=["unknown", "M1", "M4 Max"])
@pytest.mark.parametrize("rows", [1, 4, 16, 64])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_gpus_candidates_cover_the_ranges_of_the_bit_widths(bits, rows, hardware):
    problem = swiglu(rows, bits, "gpu", accuracy="half")
    found = kernels.candidates_on(problem, hardware)
    assert found[0] == kernels.default(problem) and len(set(found)) == len(found)
    assert all(kernels.feasible(problem, c) is None for c in found)
    assert set(DOCUMENTED_TILES[bits]) <= {c.tile_size_n for c in found}
    assert {c.simdgroups for c in found} == {4, 8, 12, 16}
    assert {c.kernel_variant for c in found} == set(kernels.VARIANTS)
    for on in (True, False):
        assert {replace(c, use_fp32_acc=on) for c in found} <= set(found)
    assert all(c.use_fp32_acc for c in kernels.candidates_on(swiglu(rows, bits, "gpu"), hardware))


@pytest.mark.parametrize("bits, columns, simdgroups", [(2, 160, 16), (3, 96, 12), (4, 96, 8), (8, 64, 4)])
def test_codes_in_flight_stay_in_a_gpus_cache(bits, columns, simdgroups):
    problem = swiglu(16, bits, "gpu")
    own = {tiles for variant in kernels.VARIANTS for tiles in metal.always_timed(problem, variant)}
    found = [(c.tile_size_m, c.tile_size_n, c.simdgroups) for c in kernels.candidates_on(problem, M1)]
    assert any(tiles[1:] == (columns, simdgroups) for tiles in found)
    limit = 1.25 * 8192  # a quarter more than the cache; the defaults of the variants may exceed it
    assert all(n * bits * 2 * s <= limit for m, n, s in found if (m, n, s) not in own)


def test_every_core_gets_a_threadgroup():
    """One row of a layer of 8 experts: 256 columns make 24 groups of gate and up, 16 columns 384."""
    wide = [c for c in kernels.candidates_on(swiglu(1, on="gpu"), M4_MAX) if c.tile_size_n == 256]
    assert not wide and any(c.tile_size_n == 256 for c in kernels.candidates_on(swiglu(1, on="gpu"), M1))
    tiny = linear(1, hidden=2048, out=128, on="gpu")  # not even 16 columns are enough for 40 cores
    assert {c.tile_size_n for c in kernels.candidates_on(tiny, M4_MAX)} >= {16}


def test_tiles_are_not_much_higher_than_the_rows():
    for rows, most in ((1, 2), (2, 4), (4, 8), (64, 64)):
        problem = swiglu(rows, on="gpu")
        own = {tiles[0] for v in kernels.VARIANTS for tiles in metal.always_timed(problem, v)}
        assert {c.tile_size_m for c in kernels.candidates_on(problem, M4_MAX)} - own <= set(range(1, most + 1))


def test_sums_stay_in_threadgroup_memory():
    small = replace(M4_MAX, threadgroup_bytes=16 << 10)
    problem = swiglu(64, on="gpu")
    many = [c for c in kernels.candidates_on(problem, small) if c.tile_size_m >= 8 and c.simdgroups == 16]
    own = {tiles for v in kernels.VARIANTS for tiles in metal.always_timed(problem, v)}
    assert {(c.tile_size_m, c.tile_size_n, c.simdgroups) for c in many} <= own
    assert {c.tile_size_m for c in kernels.candidates_on(problem, M4_MAX) if c.simdgroups == 16} == {
        1,
        2,
        3,
        4,
        8,
        16,
        64,
    }


def test_this_machine_has_hardware():
    here = device.hardware("cpu")
    assert 1 <= here.fast_cores <= here.cores == kernels.cpu_threads()
    assert 8 << 10 <= here.l1d <= here.l2_per_core
    for rows in (1, 16):
        assert kernels.candidates_on(swiglu(rows), here)[0] == kernels.default(swiglu(rows))


# Configs from elsewhere

EXAMPLE = KernelConfig("moe_trellis_mixed_swiglu_decode", 64, 64, 12, False, "decode")


def test_a_feasible_config_fits_as_it_is(two_cores):
    config = KernelConfig("moe_trellis_swiglu", 8, 16, 1, True, "base")
    assert kernels.fitted(swiglu(), config) is config


def test_sizes_of_other_machines_are_clamped_to_the_variant(two_cores):
    fit = kernels.fitted(swiglu(accuracy="half"), EXAMPLE)
    assert fit == KernelConfig("moe_trellis_mixed_swiglu_decode", 2, 64, 2, False, "decode")
    on_gpu = kernels.fitted(swiglu(on="gpu", accuracy="half"), EXAMPLE)
    assert on_gpu == replace(EXAMPLE, tile_size_m=1)
    narrow = kernels.fitted(linear(1, out=128, on="gpu"), replace(EXAMPLE, tile_size_n=160))
    assert narrow.tile_size_n == 128 and kernels.feasible(linear(1, out=128, on="gpu"), narrow) is None


@pytest.mark.parametrize("on", ["cpu", "gpu"])
@pytest.mark.parametrize("variant", kernels.VARIANTS)
@pytest.mark.parametrize("tile, simdgroups", [(128, 16), (96, 12), (64, 8), (64, 4), (160, 16), (32, 4)])
def test_every_size_of_the_mappings_fits(on, variant, tile, simdgroups):
    for problem in (swiglu(20, on=on), linear(20, on=on), swiglu(20, hidden=128, intermediate=128, on=on)):
        config = KernelConfig(kernels.make_name(variant), tile, tile, simdgroups, True, variant)
        fit = kernels.fitted(problem, config)
        assert kernels.feasible(problem, fit) is None and fit.kernel_name == config.kernel_name


@pytest.mark.parametrize(
    "change",
    [
        {"tile_size_m": 7},
        {"tile_size_n": 100},
        {"simdgroups": 0},
        {"simdgroups": "4"},
        {"kernel_variant": "base"},
        {"kernel_name": "their_kernel"},
    ],
)
def test_what_is_nobodys_config_does_not_fit(change):
    config = replace(EXAMPLE, **change)
    assert kernels.fitted(swiglu(), config) is None and kernels.feasible(swiglu(), config)


def test_sizes_must_be_integers():
    for what in ("tile_size_m", "tile_size_n", "simdgroups"):
        reason = kernels.feasible(swiglu(), replace(EXAMPLE, **{what: 4.0}))
        assert reason == f"{what} must be an integer, got 4.0"


@pytest.mark.parametrize("rows", [1, 4])
def test_a_config_from_elsewhere_runs_and_is_right(rows):
    """By hand it may also round, which no problem of accuracy float32 is given otherwise."""
    case = cases.Case(3, "mul1", "float32", rows, "blocks", "silu", top_k=2)
    x, indices, _ = case.inputs()
    for config, tolerance in ((EXAMPLE, 8e-4), (replace(EXAMPLE, use_fp32_acc=True), case.tolerance)):
        y = ops.trellis_swiglu(x, indices, case.bank(), config=config, stream=mx.cpu)
        assert cases.row_error(y, case.reference(x, indices)) <= tolerance
