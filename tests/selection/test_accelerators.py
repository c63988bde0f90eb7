"""Neural accelerators: chosen only where the machine has them, and left where a compiler is wrong about them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from mlx_marlin import kernels, ops, profile
from mlx_marlin.kernels import KernelConfig, Problem, make_name, metal
from mlx_marlin.ops.runtime import usable_accelerators
from mlx_marlin.profile import active
from mlx_marlin.profile import json as profile_json
from mlx_marlin.profile.schema import AutotuneConfig, Entry, Timing
from mlx_marlin.selection import choices, selftest, small_cases
from tests.selection.test_selftest import LINEAR, SWIGLU, Planted, halved, not_compiled

LAYER = replace(SWIGLU, rows=512, accelerators=True)
DENSE = replace(LINEAR, rows=512, accelerators=True)


def config(variant: str, rows: int, columns: int = 128, simdgroups: int = 16) -> KernelConfig:
    return KernelConfig(make_name(variant), rows, columns, simdgroups, True, variant)


@pytest.mark.parametrize(
    "architecture, darwin, usable",
    [
        ("applegpu_g17g", "25.2.0", True),
        ("applegpu_g17s", "26.0.0", True),
        ("applegpu_g18p", "25.10.1", True),
        ("applegpu_g17s", "25.1.0", False),  # macOS 26.1: its compiler is wrong for more than 8 rows
        ("applegpu_g17p", "25.2.0", False),
        ("applegpu_g16s", "26.0.0", False),
        ("", "25.2.0", False),
        ("applegpu_g17s", "", False),
    ],
)
def test_where_they_can_be_used(architecture, darwin, usable):
    assert usable_accelerators(architecture, darwin) == usable


def test_this_machine():
    assert not ops.has_accelerators("cpu")
    assert ops.linear_problem(_stack(), 64, "float16", "gpu").accelerators == ops.has_accelerators("gpu")


def _stack():
    (weights,) = small_cases.make_case(LINEAR)["weights"]
    return ops.prepare_weight("test", weights).source


@pytest.mark.parametrize("problem", [LAYER, DENSE, replace(LAYER, rows=256), replace(DENSE, rows=20, hidden=4096)])
def test_the_default_uses_them_for_many_rows(problem):
    chosen = kernels.default(problem)
    assert kernels.accelerated(problem, chosen) and kernels.feasible(problem, chosen) is None
    elsewhere = replace(problem, accelerators=False)
    assert not kernels.accelerated(elsewhere, kernels.default(elsewhere))
    reason = kernels.feasible(elsewhere, chosen)
    assert "M5" in reason and "macOS 26.2" in reason


@pytest.mark.parametrize("rows", [1, 4, 8])
@pytest.mark.parametrize("problem", [LAYER, DENSE])
def test_few_rows_do_not_use_them(problem, rows):
    few = replace(problem, rows=rows)
    assert kernels.default(few) == kernels.default(replace(few, accelerators=False))


@pytest.mark.parametrize("problem", [LAYER, DENSE])
def test_candidates(problem):
    every = kernels.candidates(problem)
    tiles = {(c.kernel_variant, c.tile_size_m) for c in every if kernels.accelerated(problem, c)}
    assert tiles == set(metal.ACCELERATOR_ROWS.items())
    assert all(c.tile_size_n % 32 == 0 for c in every if kernels.accelerated(problem, c))
    on_m5 = kernels.candidates_on(problem, kernels.Hardware(cores=40))
    assert {(c.kernel_variant, c.tile_size_m) for c in on_m5 if kernels.accelerated(problem, c)} == tiles
    elsewhere = replace(problem, accelerators=False)
    assert set(kernels.candidates(elsewhere)) == {c for c in every if not kernels.accelerated(problem, c)}


@pytest.mark.parametrize("problem", [LAYER, DENSE])
def test_bfloat16_needs_no_second_half(problem):
    """The 11 bits of one round less than the 8 bits of the result: both ways to sum are the same code."""
    chosen = kernels.default(problem)
    halved = replace(chosen, use_fp32_acc=False)
    for dtype, same in (("bfloat16", True), ("float16", False), ("float32", False)):
        asked = replace(problem, dtype=dtype, accuracy="half")
        kernels_of = [small_cases.code(ops.plan(asked, c)) for c in (chosen, halved)]
        assert (kernels_of[0] == kernels_of[1]) == same
        assert (kernels.effective(asked, halved) == chosen) == same
        every = [c for c in kernels.candidates(asked) if kernels.accelerated(asked, c)]
        assert len({replace(c, use_fp32_acc=True) for c in every}) == (len(every) if same else len(every) // 2)


def test_the_cpu_has_none():
    problem = Problem.linear(256, 256, rows=64)
    assert not any(kernels.accelerated(problem, c) for c in kernels.candidates(problem))


@pytest.mark.parametrize("variant, rows, fitting", [("base", 32, 16), ("large_batch", 48, 64)])
def test_a_config_from_a_machine_that_has_them(variant, rows, fitting):
    elsewhere = replace(LAYER, accelerators=False)
    found = kernels.fitted(elsewhere, config(variant, rows))
    assert found == config(variant, fitting)


def test_a_choice_says_so(monkeypatch):
    monkeypatch.setattr(choices.profile, "find", lambda problem: None)
    assert "on neural accelerators" in str(choices.from_profile(LAYER))
    assert "on neural accelerators" not in str(choices.from_profile(replace(LAYER, accelerators=False)))


@pytest.mark.parametrize("problem", [LAYER, DENSE])
def test_the_self_test_has_more_rows_than_a_unit(problem):
    """Compilers before macOS 26.2 were wrong from the ninth row on. A unit has 16 rows, a tile two or three."""
    chosen = kernels.default(problem)
    small = small_cases.small_problem(problem, chosen)
    indices = small_cases.make_case(small)["indices"]
    assert small.accelerators and np.bincount(np.ravel(indices)).max() == chosen.tile_size_m + 1 > 32


@pytest.fixture
def fresh_choices(monkeypatch):
    monkeypatch.setattr(choices, "_choices", choices._Choices())
    monkeypatch.setattr(choices.profile, "find", lambda problem: None)


def from_row_9(y):
    y[8:] += np.abs(y).max()
    return y


@pytest.mark.parametrize("spoil", [from_row_9, halved, not_compiled])
@pytest.mark.parametrize("problem", [LAYER, DENSE])
def test_matrices_take_their_place_where_they_are_wrong(fresh_choices, tmp_path, problem, spoil):
    tried = []

    def is_wrong(config):
        tried.append(config)
        return metal.accelerated(config)

    test = selftest.SelfTest("cpu", Planted(is_wrong, spoil), tmp_path / "verdicts.json")
    with pytest.warns(RuntimeWarning, match="is refused on this GPU"):
        choice, known = test.select(problem)
    assert known and choice.config == kernels.default(replace(problem, accelerators=False))
    assert sum(metal.accelerated(c) for c in dict.fromkeys(tried)) == 1, "no other one is tried"


def entry(chosen: KernelConfig) -> Entry:
    timing = Timing(10, 1.0, 0.0)
    return Entry(chosen, timing, chosen, timing, (1.0, 1.0, 1.0), "faster", "unchecked", timestamp=0.0)


def test_profiles_tell_machines_apart(monkeypatch):
    """Of one chip before and after the system that opened them. For few rows it makes no difference."""
    before = replace(LAYER, accelerators=False)
    table = AutotuneConfig("M5", "M5")
    table.problems[before] = entry(config("base", 16))
    few = replace(before, rows=1)
    table.problems[few] = entry(config("decode", 1, 64))
    table = profile_json.decode(profile_json.encode(table))
    monkeypatch.setattr(active._active, "sources", lambda device: [("a profile", table)])
    assert profile.find(LAYER) is None
    assert profile.find(replace(few, accelerators=True)).config == config("decode", 1, 64)
    table.problems[LAYER] = entry(config("base", 32))
    table = profile_json.decode(profile_json.encode(table))
    assert profile.find(LAYER).config == config("base", 32)
    assert profile.find(before).config == config("base", 16)
