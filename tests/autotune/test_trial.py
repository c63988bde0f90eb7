"""Tuning a layer: for real on small ones, and with planted outcomes."""

import logging
import random
import time
from dataclasses import replace

import mlx.core as mx
import pytest

from mlx_marlin import kernels
from mlx_marlin.autotune import trial, workload
from mlx_marlin.autotune.trial import Objective, Trial
from mlx_marlin.autotune.tuner import BenchmarkResult, MixedBPWAutoTuner
from mlx_marlin.autotune.workload import ConfigClock, Workload
from mlx_marlin.kernels import KernelConfig, Problem
from mlx_marlin.layers.linear import TrellisLinear
from mlx_marlin.measure.race import Limits, RaceSettings
from mlx_marlin.profile import files as profile_files
from mlx_marlin.profile.schema import MAX_REASON
from tests.support.tuning import PlantedClock, linear, mixed_experts

FAST = RaceSettings(rounds=3, warmup=1)


pytestmark = pytest.mark.usefixtures("tuning_sandbox")


def tuner(**more):
    return MixedBPWAutoTuner(device="cpu", **({"race": FAST} | more))


def default_of(layer, rows=1):
    return kernels.default(TrellisLinear(layer).problem(rows, mx.float32, "cpu"))


def only_entry(tuner):
    (found,) = tuner.config.problems.values()
    return found


# For real


def test_benchmark_layer_gives_real_values():
    mine, layer, start = tuner(), mixed_experts(), time.time()
    results = mine.benchmark_layer(layer, 4, num_warmup=1, num_iter=3, top_k=2)
    problem = layer.problem(4, mx.float32, "cpu", top_k=2)
    assert {r.config for r in results} == set(kernels.candidates(problem))
    bytes_touched = Workload.of_layer(layer, 4, top_k=2).bytes_touched
    for r in results:
        assert isinstance(r, BenchmarkResult)
        assert r.latency_ms > 0 and r.throughput_gbps == pytest.approx(bytes_touched / r.latency_ms / 1e6)
        assert r.memory_footprint_mb > 0.05 and start <= r.timestamp <= time.time()
    entry = mine.config.problems[problem]
    assert entry.verdict == "correct" and all(0 <= m.error < 2e-5 for m in entry.timings)
    ratio, low, high = entry.over_control
    assert 0 < low <= ratio <= high and entry.objective == (1.0, 0.0, 0.0)
    assert mine.config.lookup_table[4][256][2, 3, 4, 6] == entry.config
    assert mine.config.benchmark_count == len(results)
    assert mine.select_kernel(4, 256, [2, 3, 4, 6]) == entry.config


def test_given_configs_only():
    default = default_of(linear())
    other, impossible = replace(default, simdgroups=1), replace(default, tile_size_n=7)
    mine = tuner()
    results = mine.benchmark_layer(linear(), 1, [other, impossible], 1, 3)
    assert [r.config for r in results] == [other]
    entry = only_entry(mine)
    assert {m.config for m in entry.timings} == {other, default}
    assert [r.config for r in entry.rejected] == [impossible] and "infeasible: " in entry.rejected[0].reason


def test_configs_must_be_configs():
    with pytest.raises(ValueError, match="configs must be KernelConfigs, got 'moe_trellis_swiglu'"):
        tuner().benchmark_layer(linear(), 1, ["moe_trellis_swiglu"])


def test_a_problem_of_another_device_is_refused():
    problem = Problem.linear(256, 256, bits=3, device="gpu")
    with pytest.raises(ValueError, match="the tuner times on the cpu, but the problem is for the gpu"):
        tuner().benchmark_layer(problem, 1)


@pytest.mark.parametrize("layer, message", [("layer", "got str"), (None, "got NoneType")])
def test_not_a_layer(layer, message):
    for call in (lambda: tuner().benchmark_layer(layer, 1), lambda: tuner().benchmark_all([linear(), layer], [1])):
        with pytest.raises(ValueError, match=message):
            call()


def test_no_rows():
    for call in (lambda: tuner().benchmark_layer(linear(), 0), lambda: tuner().benchmark_all([linear()], [1, 0])):
        with pytest.raises(ValueError, match="at least 1 row, got 0"):
            call()


def test_benchmark_all_names_layers(capsys):
    results = tuner().benchmark_all([linear(3), linear(4)], [1, 2], 1, 2, verbose=False)
    assert list(results) == ["layer_0", "layer_1"] and all(list(r) == [1, 2] for r in results.values())
    named = tuner().benchmark_all({"up": linear(3)}, [1], 1, 2)
    assert list(named) == ["up"] and named["up"][1]
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("error", [MemoryError, ValueError, RuntimeError])
def test_one_layer_that_fails_does_not_stop_the_others(error, monkeypatch, caplog):
    """RuntimeError: MLX, out of memory."""
    of_layer = Workload.of_layer

    def scarce(layer, rows, **more):
        if rows == 1:
            raise error("no room")
        return of_layer(layer, rows, **more)

    monkeypatch.setattr(Workload, "of_layer", scarce)
    (results,) = tuner().benchmark_all([linear()], [1, 2], 1, 2, verbose=False).values()
    assert results[1] == [] and results[2] and "skipping layer_0 at 1 rows: no room" in caplog.text


def test_nothing_is_left_in_memory():
    mx.clear_cache()
    before = mx.get_active_memory()
    tuner().benchmark_layer(Problem.linear(1024, 1024, rows=8, bits=3), 8)
    assert mx.get_active_memory() - before < 100_000 and mx.get_cache_memory() == 0


# Files


def test_results_round_trip(tmp_path):
    mine = tuner(config_path=tmp_path / "t.json")
    mine.benchmark_layer(linear(), 2, num_warmup=1, num_iter=2)
    mine.export_config()
    assert MixedBPWAutoTuner.load_config(tmp_path / "t.json").config == mine.config


def test_endless_reasons_and_odd_configs_can_be_stored(tmp_path, monkeypatch, caplog):
    """A profile with them was written once, and could not be read again."""
    default = default_of(linear())
    crashing = replace(default, simdgroups=1)
    odd = [
        replace(default, kernel_name="it's\n"),
        replace(default, tile_size_m=-1),
        replace(default, tile_size_n="wide"),
        replace(default, kernel_variant="fastest"),
        replace(default, simdgroups=1 << 40),
    ]
    call = Workload._call

    def verbose_crash(self, config, *rest):
        if config == crashing:
            raise RuntimeError("a compiler's log \udc80 " * 1000)
        return call(self, config, *rest)

    monkeypatch.setattr(Workload, "_call", verbose_crash)
    caplog.set_level(logging.INFO, "mlx_marlin")
    mine = tuner(config_path=tmp_path / "t.json")
    assert [r.config for r in mine.benchmark_layer(linear(), 1, [default, crashing, *odd], 1, 2)] == [default]
    mine.export_config()
    stored = profile_files.load(tmp_path / "t.json")
    assert stored == mine.config
    (rejected,) = only_entry(mine).rejected
    assert rejected.config == crashing and len(rejected.reason) == MAX_REASON
    assert rejected.reason.startswith("RuntimeError: a compiler's log ? a")
    assert all(f"rejected {config}: infeasible: " in caplog.text for config in odd)


# Memory


BIG = Problem.linear(1024, 1024, rows=16, bits=3)


@pytest.fixture
def endless_cache(monkeypatch):
    """A cache so large that only the memory limit ends the copying."""
    monkeypatch.setattr(workload, "last_level_cache", lambda: 1 << 40)


@pytest.mark.parametrize("megabytes", [0.9, 1.2, 3])
def test_a_limit_that_binds_lets_the_default_run(endless_cache, megabytes):
    mine = tuner(memory_limit=int(megabytes * 1e6))
    default = kernels.default(BIG)
    assert mine.benchmark_layer(BIG, 16, [default], 1, 2)
    assert only_entry(mine).config == default


def test_copies_go_until_the_default_fits(endless_cache, monkeypatch):
    codes = 1024 * 1024 * 3 // 8
    mine = tuner(memory_limit=Workload.synthetic(BIG, memory_limit=3 * codes).weight_bytes + 2 * codes)
    monkeypatch.setattr(workload, "call_bytes", lambda p: 0)  # as if a call took nothing: the copies fill the limit
    made, dropped = [], []
    copies, drop = Workload._copies, Workload.drop_copy
    monkeypatch.setattr(Workload, "_copies", lambda self, *a: made.append(copies(self, *a)) or made[-1])
    monkeypatch.setattr(Workload, "drop_copy", lambda self: dropped.append(len(self.sets)) or drop(self))
    assert mine.benchmark_layer(BIG, 16, [kernels.default(BIG)], 1, 2)
    assert dropped == [3] and len(made[0]) == 2


def test_a_layer_beyond_the_limit(caplog):
    small = tuner(memory_limit=1000)
    with pytest.raises(MemoryError, match=r"the memory limit is 0\.0 MB"):
        small.benchmark_layer(linear(), 1)
    assert small.benchmark_all([linear()], [1], 1, 2, verbose=False) == {"layer_0": {1: []}}
    assert "skipping layer_0 at 1 rows" in caplog.text


def test_a_config_beyond_the_limit_is_skipped_with_its_reason(monkeypatch):
    default = kernels.default(BIG)
    greedy, modest = replace(default, simdgroups=1), replace(default, tile_size_n=128)
    run = ConfigClock._run

    def hungry(self, length):
        held = mx.zeros((1 << 20,)) if self.config == greedy else None
        if held is not None:
            mx.eval(held)
        return run(self, length)

    monkeypatch.setattr(ConfigClock, "_run", hungry)
    mine = tuner(memory_limit=3_000_000)
    mine.benchmark_layer(BIG, 16, [greedy, modest], 1, 2)
    entry = only_entry(mine)
    assert {m.config for m in entry.timings} == {default, modest}
    (rejected,) = entry.rejected
    assert rejected.config == greedy and "MemoryError: a call takes" in rejected.reason


# Planted


@pytest.fixture
def planted(monkeypatch):
    monkeypatch.setattr("mlx_marlin.autotune.trial.ConfigClock", PlantedClock)
    monkeypatch.setattr("mlx_marlin.autotune.trial.measure.control", lambda stream, floor: lambda: 1.0)
    for name in ("mean", "bytes"):
        monkeypatch.setattr(PlantedClock, name, {})
    return PlantedClock


def sabotage(monkeypatch, wrong=(), crashing=()):
    call = Workload._call

    def sabotaged(self, config, *rest):
        if config in crashing:
            raise RuntimeError("[metal] could not compile")
        y = call(self, config, *rest)
        return y + 0.01 if config in wrong else y

    monkeypatch.setattr(Workload, "_call", sabotaged)


@pytest.mark.parametrize("runs", [10, pytest.param(100, marks=pytest.mark.slow)])
def test_wrong_and_crashing_configs_never_win(planted, monkeypatch, runs):
    layer = linear(out=384)
    default = default_of(layer, 4)
    wrong, crashing, good = (replace(default, tile_size_n=n) for n in (16, 32, 64))
    planted.mean = {wrong: 0.1, crashing: 0.1, good: 0.9}
    sabotage(monkeypatch, [wrong], [crashing])
    right, verdicts = 0, {}
    for seed in range(runs):
        planted.rng = random.Random(seed)
        mine = tuner(race=RaceSettings(seed=seed))
        mine.checked = verdicts
        mine.benchmark_layer(layer, 4, [wrong, crashing, good])
        entry = only_entry(mine)
        assert entry.config in (default, good)
        right += entry.config == good and entry.decision == "faster"
        reasons = {r.config: r.reason for r in entry.rejected}
        assert "wrong result: of 16 rows one is off by" in reasons[wrong]
        assert reasons[crashing] == "RuntimeError: [metal] could not compile"
    assert right >= runs - 1


def test_a_config_that_is_wrong_at_other_rows_never_wins(planted, monkeypatch):
    """Its verdict counts for all rows of a variant, so it is reached at all of them."""
    layer = linear()
    wrong = replace(default_of(layer, 4), simdgroups=1)
    planted.mean = {wrong: 0.1}
    call = Workload._call
    monkeypatch.setattr(
        Workload, "_call", lambda self, c, x, *r: call(self, c, x, *r) + 0.01 * (c == wrong and len(x) > 4)
    )
    mine = tuner()
    for rows in (2, 4, 16):
        mine.benchmark_layer(layer, rows, [wrong])
    assert all(e.config != wrong and e.rejected for e in mine.config.problems.values())


def test_a_wrong_default_is_an_error(monkeypatch, caplog):
    sabotage(monkeypatch, wrong=[default_of(linear())])
    with pytest.raises(ValueError, match="the default config fails, so nothing can be compared with it: KernelConfig"):
        tuner().benchmark_layer(linear(), 1)
    assert tuner().benchmark_all([linear()], [1], 1, 2) == {"layer_0": {1: []}}
    assert "skipping layer_0 at 1 rows: the default config fails" in caplog.text


def test_each_config_is_checked_once_per_problem_class(planted, monkeypatch):
    checks, check = [], Workload.check
    monkeypatch.setattr(
        Workload, "check", lambda self, c: checks.append((workload.problem_class(self.problem), c)) or check(self, c)
    )
    mine = tuner()

    def wanted(rows):
        return kernels.candidates(TrellisLinear(linear()).problem(rows, mx.float32, "cpu"))

    for rows in (2, 3, 2, 20):
        mine.benchmark_layer(linear(), rows, num_iter=2)
    assert len(checks) == len(set(checks)) == len(mine.checked)
    assert {p.rows for p, _ in checks} == {16, 32}
    assert len(checks) == len({c for r in (2, 3) for c in wanted(r)}) + len(wanted(20))


def test_checks_begin_only_while_there_is_time(planted, monkeypatch):
    """The default is checked first, the others as they enter the race; nothing begins after the deadline."""
    now, checked = [0.0], []
    monkeypatch.setattr("mlx_marlin.measure.race.time.perf_counter", lambda: now[0])

    def slow(self, config):
        now[0] += 1.0
        checked.append(config)
        return 0.0

    monkeypatch.setattr(Workload, "check", slow)
    layer, mine = linear(), tuner()
    default = default_of(layer, 16)
    assert mine.benchmark_layer(layer, 16, limits=Limits(deadline=3.5)) == [] and mine.config.problems == {}
    assert checked[0] == default and len(checked) == 4
    # The verdicts stay: the next run goes on where this one stopped.
    deadline = now[0] + 3.5
    mine.benchmark_layer(layer, 16, limits=Limits(deadline=deadline))
    assert len(checked) == len(set(checked)) == 8


def test_a_deadline_in_the_past_enters_nothing():
    mine = tuner()
    assert mine.benchmark_layer(linear(), 1, limits=Limits(deadline=time.perf_counter() - 1)) == []
    assert mine.config.problems == {}


def test_the_default_runs_in_any_case():
    entry = Trial(Workload.of_layer(linear(), 1), FAST, Objective(), None, {}).run([])
    assert entry.config == entry.default and entry.decision == "default" and len(entry.timings) == 1


# Objectives


def test_the_objective_weighs_memory_and_times_stay_times(planted):
    layer = linear(out=384)
    default = default_of(layer, 4)
    fast, lean = replace(default, tile_size_n=64), replace(default, tile_size_n=128)
    planted.mean = {fast: 0.8, lean: 1.1}
    planted.bytes = {fast: 9_000_000, default: 3_000_000, lean: 1_000_000}

    def entry(**objective):
        mine = tuner(objective=objective, race=RaceSettings(rounds=20))
        results = mine.benchmark_layer(layer, 4, [fast, lean])
        return only_entry(mine), {r.config: r.latency_ms for r in results}

    for weights in ({"latency": 1.0}, {"throughput": 1.0}):
        assert entry(**weights)[0].config == fast
    found, latencies = entry(latency=1.0, memory=1.0)
    assert found.config == lean and found.decision == "faster" and found.objective == (1.0, 0.0, 1.0)
    assert found.ratio[0] == pytest.approx(1.1, rel=0.03)  # a ratio of times, although it was chosen for its memory
    assert latencies[fast] == pytest.approx(800, rel=0.1) and found.samples.median_ms == pytest.approx(1100, rel=0.1)


@pytest.mark.parametrize("weights", [{"latency": 0.0}, {"latency": -1.0}, {"memory": float("nan")}, {"latency": "1"}])
def test_bad_weights(weights):
    with pytest.raises(ValueError, match="objective weights must be finite"):
        Objective(**weights)


@pytest.mark.parametrize("objective", [{"speed": 1}, "fast", {"latency": 1, 2: 3}])
def test_an_objective_of_unknown_weights(objective):
    with pytest.raises(ValueError, match="objective must be a dictionary with weights for latency, throughput, memory"):
        tuner(objective=objective)


def test_steps_count_what_differs():
    problem = Problem.swiglu(256, 128, rows=200, experts=4, top_k=2, bits=3, dtype="float32", device="gpu")
    a = kernels.default(problem)
    assert trial.steps(problem, a) == 0
    other = replace(a, tile_size_m=a.tile_size_m // 2, tile_size_n=64, simdgroups=4, use_fp32_acc=False)
    assert trial.steps(problem, other) == 4
    decode = KernelConfig("moe_trellis_swiglu_decode", 1, a.tile_size_n, a.simdgroups, True, "decode")
    assert trial.steps(problem, decode) == 1


def test_steps_do_not_count_what_is_the_same_code():
    problem = replace(BIG, rows=1)
    a = kernels.default(problem)  # a panel of two rows, which one row is the same in
    assert trial.steps(problem, replace(a, tile_size_m=1)) == 0
    assert trial.steps(problem, replace(a, tile_size_m=1, tile_size_n=128)) == 1
