"""The benchmarks of tuning and selection, on sizes that take no time."""

import json
from dataclasses import replace

import pytest

from mlx_marlin import kernels
from mlx_marlin.autotune import workload
from mlx_marlin.kernels import Problem
from mlx_marlin.profile import json as profile_json
from mlx_marlin.profile.schema import Measured, Timing
from tests.support.tuning import BASE, DECODE, LARGE, PREFILL, cpu_profile, entry

TINY = ["--shape", "256,128,4,2", "--rows", "1", "16"]


@pytest.fixture(autouse=True)
def bench(tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_MARLIN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(workload, "last_level_cache", lambda: 1 << 16)


def problem(rows=4, **more):
    bits = ((2, 3, 4), (3, 4, 2), (4, 2, 3))
    return replace(Problem.swiglu(256, 128, rows=rows, experts=4, top_k=2, bits=bits), **more)


def stored(tmp_path, name, **configs):
    path = tmp_path / name
    timings = tuple(Measured(c, Timing(4, ms, 0.0)) for c, ms in ((PREFILL, 1.0), (BASE, 2.0), (LARGE, 3.0)))
    found = {problem(int(rows[1:])): entry(config, timings=timings) for rows, config in configs.items()}
    path.write_bytes(profile_json.encode(cpu_profile(found)))
    return str(path)


def run(capsys, module, *arguments):
    assert module.main([*map(str, arguments)]) == 0
    return json.loads(capsys.readouterr().out)


def test_gains_of_a_profile(tmp_path, capsys):
    from bench.cpu import profiles

    path, output = stored(tmp_path, "a.json", r4=PREFILL, r16=BASE), tmp_path / "out" / "gains.json"
    rows = run(capsys, profiles, path, "--rounds", 2, "--output", output)["rows"]
    assert [r["rows"] for r in rows] == [4, 16] and json.loads(output.read_text())["rows"] == rows
    assert json.loads(output.read_text())["machine"]["device"] == "cpu"
    first, second = rows
    assert first["tuned"] == first["uniform"] == "prefill4 4x64 s1" and first["default"] == "base 16x64 s1"
    # A panel of 16 rows at 4 rows is one of 4.
    assert first["tuned_over_default"] == first["tuned_over_uniform"] == {"ratio": 1.0, "low": 1.0, "high": 1.0}
    assert second["tuned_over_default"]["ratio"] == 1.0 and second["tuned_over_uniform"]["low"] > 0


def test_two_profiles_are_compared(tmp_path, capsys):
    from bench.cpu import profiles

    one = stored(tmp_path, "a.json", r1=DECODE, r4=PREFILL, r16=PREFILL)
    other = stored(tmp_path, "b.json", r1=BASE, r4=LARGE, r16=BASE)
    result = run(capsys, profiles, one, other, "--rounds", 2)
    assert (result["entries"], result["differing"]) == (3, 1)  # below 16 rows the two run the same code
    (pair,) = result["pairs"]
    assert (pair["rows"], pair["first"], pair["second"]) == (16, "prefill4 4x64 s1", "base 16x64 s1")
    assert pair["low"] <= pair["ratio"] <= pair["high"]
    assert pair["contains_1"] == (pair["low"] <= 1.0 <= pair["high"])


def test_tuning_twice(tmp_path, capsys):
    from bench.cpu import profiles

    output = tmp_path / "twice.json"
    arguments = [*TINY, "--iterations", 2, "--rounds", 2, "--quick", "--output", output]
    result = run(capsys, profiles, "--twice", *arguments)
    assert result["entries"] == 2 and len(result["pairs"]) == result["differing"] <= 2
    assert json.loads(output.read_text())["shape"] == "256,128,4,2"


@pytest.mark.parametrize("arguments", [[], ["a", "--twice"], ["a", "b", "c"]])
def test_profiles_asks_for_one_thing(arguments, capsys):
    from bench.cpu import profiles

    with pytest.raises(SystemExit):
        profiles.parse_args(arguments)
    assert "give one profile, two to compare, or --twice" in capsys.readouterr().err


def test_uniform_is_best_over_all_problems():
    from bench.cpu import contest

    p, q = problem(4), problem(64)
    timed = {p: {PREFILL: 1.0, LARGE: 1.5}, q: {PREFILL: 4.0, LARGE: 2.0, BASE: 1.9}}
    # At 4 rows the panels of 4, 16 and 64 rows are the same code: the last time given stands for it.
    assert contest.uniform_config({p: {PREFILL: 1.0}, q: timed[q]}) == BASE
    assert contest.uniform_config({p: {DECODE: 1.0}, q: {PREFILL: 1.0}}) is None
    impossible = replace(BASE, simdgroups=kernels.cpu_threads() + 1)
    assert contest.uniform_config({q: {impossible: 0.1, LARGE: 1.0}}) == LARGE


def test_selection_bench(tmp_path, capsys):
    from bench import bench_moe_kernel_selection as selection

    arguments = [*TINY, "--iterations", 2, "--tuning-rounds", 2, "--candidates", 3, "--json"]
    result = run(capsys, selection, *arguments, "--output", tmp_path / "s.json")
    assert [r["rows"] for r in result["rows"]] == [1, 16]
    for row in result["rows"]:
        assert set(row["median_ms"]) == {"tuned", "default", "uniform"} and row["over_default"]["ratio"] > 0
    assert result["overhead_us"]["selection"] > 0 and len(result["claims"]["specialised"]) == 1
    assert result["claims"]["specialised"][0]["saved"] == "nothing (the same code)"
    assert selection.main([*map(str, arguments[:-1])]) == 0
    assert "selection costs" in capsys.readouterr().out


def test_ab_test(capsys):
    from bench import kernel_ab_test

    result = run(capsys, kernel_ab_test, "--iterations", 2, "--shape", "256,128,4,2", "--json")
    assert result["verdict"] in ("no significant difference", "optimized is faster", "optimized is slower")
    assert result["low"] <= result["ratio"] <= result["high"] and 0 <= result["p_value"] <= 1
