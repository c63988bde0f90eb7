"""The autotuner: devices, candidates, look-ups, adaptation, files, and tuning with planted outcomes and for real."""

import json
import math
import random
import time
from dataclasses import replace

import cases
import mlx.core as mx
import numpy as np
import pytest

from mlx_marlin import device, kernels, profile, workload
from mlx_marlin.autotune import AutotuneConfig, BenchmarkResult, KernelConfig, MixedBPWAutoTuner
from mlx_marlin.kernels import Problem
from mlx_marlin.layers import TrellisLinear, TrellisSwitchGLU
from mlx_marlin.profile import ProfileError
from mlx_marlin.race import Rules
from mlx_marlin.trial import Objective, Trial
from mlx_marlin.workload import ConfigClock, Workload

DECODE = KernelConfig("moe_trellis_swiglu_decode", 2, 64, 1, True, "decode")
PREFILL = KernelConfig("moe_trellis_swiglu_prefill4", 4, 64, 1, True, "prefill4")
BASE = KernelConfig("moe_trellis_swiglu", 16, 64, 1, True, "base")
LARGE = KernelConfig("moe_trellis_swiglu_large_batch", 64, 128, 1, True, "large_batch")
FAST = Rules(rounds=3, warmup=1)


@pytest.fixture(autouse=True)
def sandbox(tmp_path, monkeypatch):
    """No profile of the machine, and weight copies for a small cache."""
    monkeypatch.setenv("MLX_MARLIN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(workload, "last_level_cache", lambda: 1 << 16)
    profile.refresh()
    yield
    profile.use_profile(None)


def linear(bits=3, out=256):
    return cases.random_weight(np.random.default_rng(bits), 256, out, bits)


def experts(triples=((2, 3, 4), (3, 3, 3), (4, 2, 6))):
    rng = np.random.default_rng(7)
    formats = [[(b, "mul1") for b in triple] for triple in triples]
    return TrellisSwitchGLU(*cases.random_experts(rng, 256, 128, formats).values())


def tuner_with(table, **keywords):
    tuner = MixedBPWAutoTuner(**keywords)
    tuner.config.lookup_table = table
    return tuner


# Dataclasses and devices


def test_kernel_config_defaults():
    config = KernelConfig("moe_trellis_swiglu", 64, 64, 8)
    assert config.use_fp32_acc is False and config.kernel_variant == "base"


def test_benchmark_result_fields():
    result = BenchmarkResult(DECODE, 1.5, 20.0, 3.0, 12.0)
    assert (result.config, result.latency_ms, result.throughput_gbps) == (DECODE, 1.5, 20.0)
    assert (result.memory_footprint_mb, result.timestamp) == (3.0, 12.0)


def test_autotune_config_defaults():
    config = AutotuneConfig("M4 Max", "M4")
    assert config.tile_size_mapping == {2: 128, 3: 96, 4: 64, 8: 64}
    assert config.simdgroup_mapping == {2: 16, 3: 12, 4: 8, 8: 4}
    assert config.lookup_table == {} and config.adaptation_enabled and config.adaptation_history_len == 100
    assert config.benchmark_count == 0


def test_device_is_detected():
    tuner = MixedBPWAutoTuner()
    assert tuner.device_name == device.device_name(device.default_device())
    assert tuner.device_family in ("M1", "M2", "M3", "M4", "M5", "CPU")


@pytest.mark.parametrize("name", ["M4 Max", "Apple M4 Max"])
def test_device_name_with_and_without_apple(name):
    tuner = MixedBPWAutoTuner(device_name=name)
    assert (tuner.device_name, tuner.device_family) == ("M4 Max", "M4")


def test_unknown_device_family():
    assert MixedBPWAutoTuner(device_name="Quantum 9").device_family == "Unknown"


# Candidates and inputs


@pytest.mark.parametrize("bits", [((2, 2, 2),), ((4, 4, 4),), ((2, 3, 4), (8, 8, 8))])
def test_candidates_cover_all_variants(bits):
    problem = Problem("swiglu", 4, 2, 256, 128, 4, bits, ("mul1",), "silu", "float32", "cpu")
    found = kernels.candidates(problem)
    assert found[0] == kernels.default(problem) and len(set(found)) == len(found)
    assert {c.kernel_variant for c in found} == set(kernels.VARIANTS)
    assert all(kernels.feasible(problem, c) is None for c in found)


@pytest.mark.parametrize("layer", [linear(), TrellisLinear(linear()), experts()])
def test_workload_inputs(layer):
    w = Workload.of_layer(layer, 5, top_k=2)
    assert w.x.shape == (5, 256) and w.x.dtype == mx.float32
    y = w.run(kernels.default(w.problem), w.x, 3)
    assert y.shape == ((5, 2, 256) if w.problem.kind == "swiglu" else (5, 256))
    assert np.isfinite(np.array(y)).all()


def test_workload_routes_to_distinct_experts():
    w = Workload.of_layer(experts(), 50, top_k=2)
    for indices, _ in w._routings:
        assert (np.array(indices)[:, 0] != np.array(indices)[:, 1]).all()


def test_workload_rotates_over_more_than_the_cache():
    w = Workload.of_layer(linear(), 1)
    assert len(w.sets) * w.bytes_touched > 1 << 16
    assert mx.array_equal(w.sets[0][0].arrays[0], w.sets[1][0].arrays[0])
    assert w.sets[0][0].arrays[0] is not w.sets[1][0].arrays[0]


def test_bytes_touched_are_those_of_the_active_experts():
    w = Workload.of_layer(experts(), 1, top_k=1)
    # gate and up are 256 x 128, down 128 x 256: 32768 weights each, with 384 float16 scales.
    per_bits = {t: sum(32768 * b // 8 + 768 for b in t) for t in ((2, 3, 4), (3, 3, 3), (4, 2, 6))}
    chosen = [int(np.array(i)[0, 0]) for i, _ in w._routings]
    expected = np.mean([list(per_bits.values())[e] for e in chosen]) + 2 * 256 * 4
    assert w.bytes_touched == pytest.approx(expected)


def test_synthetic_workload_has_the_problem():
    problem = Problem(
        "swiglu",
        3,
        2,
        200,
        128,
        6,
        ((2, 3, 4), (3, 3, 3)),
        ("3inst", "mul1"),
        "gelu_tanh",
        "float32",
        "cpu",
        combine=True,
        bias=True,
    )
    w = Workload.synthetic(problem)
    gate, up, down = (s.source for s in w.sets[0])
    assert sorted(set(zip(gate.bits, up.bits, down.bits))) == [(2, 3, 4), (3, 3, 3)]
    assert {c for s in (gate, up, down) for c in s.codebooks} == {"3inst", "mul1"}
    assert w.check(kernels.default(problem)) < 2e-5


@pytest.mark.parametrize("dtype", kernels.DTYPES)
@pytest.mark.parametrize("activation", kernels.ACTIVATIONS)
def test_check_agrees_with_the_codec(activation, dtype):
    problem = Problem("swiglu", 7, 2, 256, 128, 3, ((3, 3, 3),), ("mcg",), activation, dtype, "cpu")
    assert 0 <= Workload.synthetic(problem).check(kernels.default(problem)) < workload.TOLERANCE[dtype]


def test_check_finds_a_wrong_result(monkeypatch):
    w = Workload.of_layer(experts(), 3, top_k=2)
    right = w._call
    for wrong in (lambda y: y * 1.001, lambda y: y.at[0, 0, 0].add(1.0), lambda y: y * mx.nan, lambda y: y[..., :-1]):
        monkeypatch.setattr(w, "_call", lambda *a, wrong=wrong: wrong(right(*a)))
        with pytest.raises(ValueError, match="wrong result"):
            w.check(kernels.default(w.problem))


@pytest.mark.parametrize("layer, message", [("layer", "got str"), (None, "got NoneType")])
def test_not_a_layer(layer, message):
    with pytest.raises(ValueError, match=message):
        MixedBPWAutoTuner().benchmark_layer(layer, 1)


def test_no_rows():
    with pytest.raises(ValueError, match="at least 1 row"):
        MixedBPWAutoTuner().benchmark_layer(linear(), 0)


# Selection


def table():
    return {
        1: {256: {(2, 4): DECODE, (3,): DECODE}},
        4: {256: {(2, 4): PREFILL}, 1024: {(2, 4): LARGE}},
        16: {256: {(2, 4): BASE}},
    }


@pytest.mark.parametrize(
    "batch, hidden, widths, expected",
    [
        (4, 256, [2, 4], PREFILL),  # exact
        (4, 256, [4, 2, 4], PREFILL),  # in any order
        (4, 1024, [2, 4], LARGE),
        (6, 256, [2, 4], PREFILL),  # nearest batch
        (10, 256, [2, 4], PREFILL),  # as far from 4 as from 16: the smaller
        (100, 256, [2, 4], BASE),
        (4, 600, [2, 4], PREFILL),  # nearest hidden
        (4, 640, [2, 4], PREFILL),  # as far: the smaller
        (4, 641, [2, 4], LARGE),
        (16, 1024, [2, 4], LARGE),  # nearest batch before nearest hidden
    ],
)
def test_select_kernel(batch, hidden, widths, expected):
    assert tuner_with(table()).select_kernel(batch, hidden, widths, fallback_to_default=False) == expected


def test_select_kernel_prefers_decode_if_there_is_any():
    tuner = tuner_with(table())
    assert tuner.select_kernel(4, 256, [2, 4], use_decode=True) == DECODE
    assert tuner_with({4: {256: {(2, 4): PREFILL}}}).select_kernel(4, 256, [2, 4], use_decode=True) == PREFILL


def test_infeasible_neighbours_are_passed_over(monkeypatch):
    tuner = tuner_with({4: {256: {(2, 4): PREFILL}}, 16: {256: {(2, 4): BASE}}})
    monkeypatch.setattr(kernels, "feasible", lambda p, c: "no" if c.kernel_variant == "prefill4" else None)
    assert tuner.select_kernel(5, 256, [2, 4]) == BASE


@pytest.mark.parametrize(
    "widths, tile, simdgroups",
    [
        ([2], 128, 16),
        ([3], 96, 12),
        ([4], 64, 8),
        ([8], 64, 4),
        ([2, 3], 96, 12),
        ([2, 4, 8], 64, 4),
        ([5], 64, 8),
        ([6], 64, 8),
        ([7], 64, 4),
        ([1], 128, 16),
    ],
)
def test_default_is_that_of_the_widest_bit_width(widths, tile, simdgroups):
    config = MixedBPWAutoTuner(device_name="Quantum 9").select_kernel(1, 4096, widths)
    assert (config.tile_size_m, config.tile_size_n, config.simdgroups) == (tile, tile, simdgroups)


@pytest.mark.parametrize(
    "rows, variant",
    [
        (1, "decode"),
        (2, "prefill4"),
        (16, "prefill4"),
        (17, "base"),
        (32, "base"),
        (33, "large_batch"),
    ],
)
def test_default_variant_and_accumulation(rows, variant):
    config = MixedBPWAutoTuner(device_name="Quantum 9").select_kernel(rows, 4096, [4])
    assert config.kernel_variant == variant and config.use_fp32_acc
    assert kernels.parse_name(config.kernel_name).variant == variant
    if variant == "large_batch":
        assert config.tile_size_n == 128


def test_no_fallback():
    assert MixedBPWAutoTuner(device_name="Quantum 9").select_kernel(1, 256, [2], fallback_to_default=False) is None
    assert tuner_with(table()).select_kernel(1, 256, [8], fallback_to_default=False) is None


@pytest.mark.parametrize("widths", [[], [0], [9]])
def test_bad_widths(widths):
    with pytest.raises(ValueError, match="bit_widths"):
        MixedBPWAutoTuner().select_kernel(1, 256, widths)


# Adaptation


def record(tuner, config, times, **more):
    for t in times:
        tuner.record_latency(config.kernel_name, 1, t, **{"hidden_dim": 256, "bit_widths": [2, 4], **more})


def around(mean, n=10, seed=0):
    rng = random.Random(seed)
    return [mean * math.exp(rng.gauss(0, 0.02)) for _ in range(n)]


@pytest.fixture
def adaptive():
    return tuner_with(table())


def test_no_history_gives_none(adaptive):
    assert adaptive.adapt_selection(1, 256, [2, 4]) is None


def test_four_samples_are_too_few(adaptive):
    record(adaptive, DECODE, around(1.0, 4))
    assert adaptive.adapt_selection(1, 256, [2, 4]) is None


def test_disabled(adaptive):
    record(adaptive, DECODE, around(1.0))
    adaptive.config.adaptation_enabled = False
    assert adaptive.adapt_selection(1, 256, [2, 4]) is None


def test_incumbent_stays_among_equals(adaptive):
    record(adaptive, DECODE, around(1.0, seed=1))
    record(adaptive, BASE, around(1.0, seed=2))
    assert adaptive.adapt_selection(1, 256, [2, 4]) == DECODE


def test_significantly_faster_wins(adaptive):
    record(adaptive, DECODE, around(1.0, seed=1))
    record(adaptive, BASE, around(0.8, seed=2))
    record(adaptive, PREFILL, around(0.9, seed=3))
    assert adaptive.adapt_selection(1, 256, [4, 2]) == BASE


def test_top_k_limits_the_challengers(adaptive):
    record(adaptive, DECODE, around(1.0, 40, seed=1))
    noisy = [0.5, 0.5, 0.5, 9.0, 9.0]
    record(adaptive, BASE, noisy)
    record(adaptive, PREFILL, around(0.8, 40, seed=3))
    assert adaptive.adapt_selection(1, 256, [2, 4], top_k=1) == DECODE
    assert adaptive.adapt_selection(1, 256, [2, 4], top_k=2) == PREFILL


def test_unsampled_incumbent_yields_to_the_best_sampled(adaptive):
    record(adaptive, BASE, around(1.0, 6))
    record(adaptive, PREFILL, around(2.0, 20))
    assert adaptive.adapt_selection(1, 256, [2, 4]) == PREFILL


def test_samples_without_a_key_count_for_any(adaptive):
    record(adaptive, DECODE, around(1.0), hidden_dim=None, bit_widths=None)
    assert adaptive.adapt_selection(1, 256, [2, 4]) == DECODE
    assert adaptive.adapt_selection(1, 4096, [3]) == DECODE
    assert adaptive.adapt_selection(2, 256, [2, 4]) is None  # another batch size


def test_samples_of_another_key_do_not_count(adaptive):
    record(adaptive, DECODE, around(1.0), hidden_dim=512)
    record(adaptive, DECODE, around(1.0), bit_widths=[3])
    assert adaptive.adapt_selection(1, 256, [2, 4]) is None


def test_history_is_trimmed(adaptive):
    record(adaptive, DECODE, [1.0] * 250)
    assert adaptive.get_statistics()["adaptation_samples"] == 100
    adaptive.config.adaptation_history_len = 10
    record(adaptive, DECODE, [2.0])
    assert adaptive.get_statistics()["adaptation_samples"] == 10


def test_problem_and_config_give_the_key(adaptive):
    problem = Problem("swiglu", 1, 2, 256, 128, 4, ((2, 4, 4),), ("mul1",), "silu", "float32", "cpu")
    narrow = replace(DECODE, tile_size_n=16)
    for t in around(1.0):
        adaptive.record_latency(DECODE.kernel_name, 1, t, problem=problem)
        adaptive.record_latency(narrow.kernel_name, 1, 0.7 * t, problem=problem, config=narrow)
    assert adaptive.adapt_selection(1, 256, [2, 4]) == narrow


def test_clear_adaptation_history(adaptive):
    record(adaptive, DECODE, around(1.0))
    adaptive.clear_adaptation_history()
    assert adaptive.adapt_selection(1, 256, [2, 4]) is None


@pytest.mark.parametrize("latency", [0.0, -1.0, math.nan, math.inf])
def test_bad_latency(adaptive, latency):
    with pytest.raises(ValueError, match="positive and finite"):
        adaptive.record_latency(DECODE.kernel_name, 1, latency)


def test_a_name_of_another_package_is_recorded(adaptive):
    for t in around(0.5):
        adaptive.record_latency("their_kernel", 1, t, 256, [2, 4])
    config = adaptive.adapt_selection(1, 256, [2, 4])
    assert (config.kernel_name, config.kernel_variant) == ("their_kernel", "decode")


# Files


def test_export_and_load(tmp_path):
    path = tmp_path / "configs" / "tuned.json"
    tuner = tuner_with(table(), config_path=path)
    text = tuner.export_config()
    assert path.read_text() == text
    loaded = MixedBPWAutoTuner.load_config(path)
    assert loaded.config == tuner.config and loaded.device_name == tuner.device_name
    assert loaded.select_kernel(4, 256, [2, 4]) == PREFILL
    assert MixedBPWAutoTuner(config_path=path).config == tuner.config


def test_export_without_a_path_writes_nothing(tmp_path):
    assert (
        json.loads(tuner_with(table()).export_config())["lookup_table"]["1"]["256"]["(3,)"]["kernel_variant"]
        == "decode"
    )
    assert not list(tmp_path.rglob("*.json"))


def test_documents_file_of_another_machine_answers(tmp_path):
    from test_profile import DOCUMENT

    path = tmp_path / "m4.json"
    path.write_text(json.dumps(DOCUMENT))
    tuner = MixedBPWAutoTuner.load_config(path)
    assert (tuner.device_name, tuner.device_family) == ("M4 Max", "M4")
    config = tuner.select_kernel(4, 4096, [2, 4])
    assert (config.kernel_name, config.tile_size_m) == ("moe_trellis_mixed_swiglu_decode", 64)
    assert tuner.select_kernel(8, 2048, [4, 2]) == config


def test_missing_and_malformed_files(tmp_path):
    with pytest.raises(FileNotFoundError):
        MixedBPWAutoTuner.load_config(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text('{"device_name": 3}')
    with pytest.raises(ProfileError, match="at "):
        MixedBPWAutoTuner(config_path=tmp_path / "bad.json")


def test_the_machines_profile_is_found(tmp_path):
    tuner = tuner_with(table())
    tuner.export_config(profile.default_path("cpu"))
    assert MixedBPWAutoTuner(device="cpu").config.lookup_table == table()
    assert MixedBPWAutoTuner("M4 Max", device="cpu").config.lookup_table == {}


def test_statistics():
    stats = tuner_with(table()).get_statistics()
    assert stats["lookup_table_entries"] == 5 and stats["benchmark_count"] == 0 and stats["problems"] == 0


# Layers look problems up


def layer_problem(rows=1, **changes):
    problem = Problem("swiglu", rows, 2, 256, 128, 4, ((2, 4, 4),), ("mul1",), "silu", "float32", "cpu")
    return replace(problem, **changes)


def write_profile(path, entries, **changes):
    from test_profile import entry

    made = AutotuneConfig.of_machine("cpu")
    for p, c in entries.items():
        made.add(p, entry(c))
    if changes:
        made.fingerprint = replace(made.fingerprint, **changes)
    profile.save(made, path)
    profile.refresh()


def test_lookup_exact_then_nearest_rows_of_the_same_variant():
    write_profile(
        profile.default_path("cpu"), {layer_problem(1): DECODE, layer_problem(4): PREFILL, layer_problem(64): LARGE}
    )
    assert profile.lookup(layer_problem(4)) == PREFILL
    assert profile.lookup(layer_problem(2)) == PREFILL and profile.lookup(layer_problem(16)) == PREFILL
    assert profile.lookup(layer_problem(500)) == LARGE
    assert profile.lookup(layer_problem(20)) is None  # no timing of the base kernel's sizes
    assert "entry for 4 rows" in profile.find(layer_problem(4)).origin


def test_lookup_falls_back_to_the_projection():
    write_profile(profile.default_path("cpu"), {layer_problem(4): PREFILL})
    assert profile.lookup(layer_problem(4, experts=64)) == PREFILL
    assert profile.lookup(layer_problem(4, bits=((3, 3, 3),))) is None


def test_lookup_refuses_what_is_infeasible():
    write_profile(profile.default_path("cpu"), {layer_problem(1): replace(DECODE, simdgroups=10_000)})
    found = profile.lookup(layer_problem(1))
    assert found is None or found.simdgroups <= kernels.cpu_threads()


def test_foreign_profile_is_used_only_when_allowed(tmp_path):
    path = tmp_path / "foreign.json"
    write_profile(path, {layer_problem(1): DECODE}, chip="Another chip")
    with pytest.raises(ProfileError, match="foreign profile: it was measured on Another chip"):
        profile.use_profile(path)
    assert profile.lookup(layer_problem(1)) is None
    before = profile.generation()
    profile.use_profile(path, allow_foreign=True)
    assert profile.lookup(layer_problem(1)) == DECODE and profile.generation() != before
    profile.use_profile(None)
    assert profile.lookup(layer_problem(1)) is None


def test_documents_file_is_clamped_to_the_variant(tmp_path):
    from test_profile import DOCUMENT

    path = tmp_path / "m4.json"
    path.write_text(json.dumps(DOCUMENT))
    profile.use_profile(path, allow_foreign=True)
    problem = layer_problem(4, hidden=4096)
    # The document prefers a decode kernel at 4 rows with tiles that the CPU's decode does not have.
    found = profile.lookup(problem)
    assert found.kernel_name == "moe_trellis_mixed_swiglu_decode" and kernels.feasible(problem, found) is None


def test_a_bad_file_at_the_default_path_is_ignored_aloud(caplog):
    path = profile.default_path("cpu")
    path.parent.mkdir(parents=True)
    path.write_text("{}")
    profile.refresh()
    assert profile.lookup(layer_problem(1)) is None
    assert "ignoring the tuned profile" in caplog.text and str(path) in caplog.text


def test_a_gpu_problem_without_a_gpu_has_no_profile():
    if not mx.is_available(mx.Device(mx.gpu)):
        assert profile.lookup(layer_problem(1, device="gpu", dtype="float16")) is None


def test_predicted_profile_answers_before_the_default(monkeypatch):
    predicted = AutotuneConfig("M4 Max", "M4", lookup_table=table(), source="predicted")
    monkeypatch.setattr(profile, "predicted", lambda name: ("predicted profile", predicted))
    tuner = MixedBPWAutoTuner(device="cpu")
    assert tuner.select_kernel(4, 256, [2, 4]) == PREFILL
    assert tuner.select_kernel(4, 256, [2, 4], fallback_to_default=False) is None
    tuner.config.lookup_table = {4: {256: {(2, 4): DECODE}}}
    assert tuner.select_kernel(4, 256, [2, 4]) == DECODE


# Benchmarks


@pytest.fixture
def few(monkeypatch):
    """Five candidates instead of all."""
    every = kernels.candidates
    monkeypatch.setattr(kernels, "candidates", lambda problem: every(problem)[:5])


def test_benchmark_layer_gives_real_values():
    tuner = MixedBPWAutoTuner(device="cpu", rules=FAST)
    layer, start = experts(), time.time()
    results = tuner.benchmark_layer(layer, 4, num_warmup=1, num_iter=3, top_k=2)
    assert len(results) > 10 and all(isinstance(r, BenchmarkResult) for r in results)
    problem = layer.problem(4, mx.float32, "cpu", top_k=2)
    bytes_touched = Workload.of_layer(layer, 4, top_k=2).bytes_touched
    for r in results:
        assert r.latency_ms > 0 and r.throughput_gbps == pytest.approx(bytes_touched / r.latency_ms / 1e6)
        assert r.memory_footprint_mb > 0.05 and start <= r.timestamp <= time.time()
    entry = tuner.config.problems[problem]
    assert entry.verdict == "correct" and all(0 <= m.error < 2e-5 for m in entry.timings)
    assert tuner.config.lookup_table[4][256][2, 3, 4, 6] == entry.config
    assert tuner.config.benchmark_count == len(results)
    assert tuner.select_kernel(4, 256, [2, 3, 4, 6]) == entry.config


def test_benchmark_given_configs_only():
    problem_default = kernels.default(TrellisLinear(linear()).problem(1, mx.float32, "cpu"))
    wide = replace(problem_default, tile_size_n=256)
    impossible = replace(problem_default, tile_size_n=7)
    tuner = MixedBPWAutoTuner(device="cpu", rules=FAST)
    results = tuner.benchmark_layer(linear(), 1, [wide, impossible], 1, 3)
    assert [r.config for r in results] == [wide]
    (entry,) = tuner.config.problems.values()
    assert {m.config for m in entry.timings} == {wide, problem_default}
    assert [r.config for r in entry.rejected] == [impossible] and "infeasible: " in entry.rejected[0].reason


def test_benchmark_all_names_layers(few, capsys):
    tuner = MixedBPWAutoTuner(device="cpu", rules=FAST)
    results = tuner.benchmark_all([linear(3), linear(4)], [1, 2], 1, 2, verbose=False)
    assert list(results) == ["layer_0", "layer_1"] and all(list(r) == [1, 2] for r in results.values())
    named = tuner.benchmark_all({"up": linear(3)}, [1], 1, 2)
    assert list(named) == ["up"] and named["up"][1]
    captured = capsys.readouterr()
    assert captured.out == ""


def test_benchmark_then_round_trip(few, tmp_path):
    tuner = MixedBPWAutoTuner(device="cpu", config_path=tmp_path / "t.json", rules=FAST)
    tuner.benchmark_layer(linear(), 2, num_warmup=1, num_iter=2)
    tuner.export_config()
    assert MixedBPWAutoTuner.load_config(tmp_path / "t.json").config == tuner.config


def test_memory_limit_stops_a_layer_and_skips_it_in_a_batch(caplog):
    tuner = MixedBPWAutoTuner(device="cpu", memory_limit=1000, rules=FAST)
    with pytest.raises(MemoryError, match="memory limit is 0 MB"):
        tuner.benchmark_layer(linear(), 1)
    assert tuner.benchmark_all([linear()], [1], 1, 2, verbose=False) == {"layer_0": {1: []}}
    assert "skipping layer_0 at 1 rows" in caplog.text


def test_memory_limit_bounds_the_copies(monkeypatch):
    monkeypatch.setattr(workload, "last_level_cache", lambda: 1 << 40)
    w = Workload.of_layer(linear(), 1, memory_limit=10 * 25_000)
    assert 1 < len(w.sets) and len(w.sets) * w.weight_bytes <= 250_000


def test_config_beyond_the_memory_limit_is_skipped_with_its_reason(monkeypatch):
    default = kernels.default(TrellisLinear(linear()).problem(1, mx.float32, "cpu"))
    greedy = replace(default, tile_size_n=16)
    warm_up = ConfigClock.warm_up

    def planted(self, calls):
        warm_up(self, calls)
        if self.config == greedy:
            raise MemoryError("a call takes 9999 MB, the memory limit is 1 MB")

    monkeypatch.setattr(ConfigClock, "warm_up", planted)
    tuner = MixedBPWAutoTuner(device="cpu", rules=FAST)
    tuner.benchmark_layer(linear(), 1, [greedy], 1, 3)
    (entry,) = tuner.config.problems.values()
    assert entry.config == default
    assert [(r.config, r.reason) for r in entry.rejected] == [
        (greedy, "MemoryError: a call takes 9999 MB, the memory limit is 1 MB")
    ]


class PlantedClock(ConfigClock):
    """A clock that gives planted times instead of measured ones."""

    mean: dict = {}
    rng = random.Random(0)

    def warm_up(self, calls):
        self.memory_bytes = 1 << 20

    def __call__(self):
        return self.mean.get(self.config, 1.0) * math.exp(self.rng.gauss(0, 0.03))


@pytest.fixture
def planted(monkeypatch):
    monkeypatch.setattr("mlx_marlin.trial.ConfigClock", PlantedClock)
    monkeypatch.setattr(PlantedClock, "mean", {})
    return PlantedClock


def test_wrong_and_crashing_configs_never_win(planted, monkeypatch):
    layer = TrellisLinear(linear())
    default = kernels.default(layer.problem(1, mx.float32, "cpu"))
    wrong, crashing, good = (replace(default, tile_size_n=n) for n in (16, 32, 64))
    planted.mean = {wrong: 0.1, crashing: 0.1, good: 0.9}
    call = Workload._call

    def sabotaged(self, config, *rest):
        if config == crashing:
            raise RuntimeError("[metal] could not compile")
        y = call(self, config, *rest)
        return y + 0.01 if config == wrong else y

    monkeypatch.setattr(Workload, "_call", sabotaged)
    for seed in range(100):
        planted.rng = random.Random(seed)
        tuner = MixedBPWAutoTuner(device="cpu", rules=Rules(seed=seed))
        tuner.benchmark_layer(layer, 1, [wrong, crashing, good])
        (entry,) = tuner.config.problems.values()
        assert entry.config in (default, good)
        reasons = {r.config: r.reason for r in entry.rejected}
        assert "wrong result: a row is off by" in reasons[wrong] and "RuntimeError: [metal]" in reasons[crashing]
    assert entry.decision == "faster" and entry.config == good


def test_a_wrong_default_is_an_error(monkeypatch):
    call = Workload._call
    monkeypatch.setattr(Workload, "_call", lambda self, *a: call(self, *a) + 1)
    with pytest.raises(ValueError, match="the default config fails"):
        MixedBPWAutoTuner(device="cpu").benchmark_layer(linear(), 1)


def test_each_config_is_checked_once_per_problem_class(few, planted, monkeypatch):
    checks = []
    check = Workload.check
    monkeypatch.setattr(Workload, "check", lambda self, c: checks.append(c) or check(self, c))
    tuner = MixedBPWAutoTuner(device="cpu", rules=FAST)
    for rows in (2, 3, 2):
        tuner.benchmark_layer(linear(), rows, num_iter=2)
    assert len(checks) == len(set(checks)) == len(tuner.config.problems.popitem()[1].timings)


def test_objective_weighs_memory(planted, monkeypatch):
    layer = TrellisLinear(linear())
    default = kernels.default(layer.problem(1, mx.float32, "cpu"))
    fast = replace(default, tile_size_n=64)
    planted.mean = {fast: 0.8}
    monkeypatch.setattr(
        planted, "warm_up", lambda self, calls: setattr(self, "memory_bytes", 10**6 * (9 if self.config == fast else 1))
    )

    def winner(**objective):
        tuner = MixedBPWAutoTuner(device="cpu", objective=objective)
        tuner.benchmark_layer(layer, 1, [fast])
        return tuner.config.problems.popitem()[1].config

    assert winner(latency=1.0) == winner(throughput=1.0) == fast
    assert winner(latency=1.0, memory=1.0) == default


@pytest.mark.parametrize("weights", [{"latency": 0.0}, {"latency": -1.0}, {"memory": math.nan}])
def test_bad_objective(weights):
    with pytest.raises(ValueError, match="objective weights"):
        Objective(**weights)


def test_stored_times_are_times_whatever_the_objective(planted, monkeypatch):
    layer = TrellisLinear(linear())
    monkeypatch.setattr(planted, "__call__", lambda self: 2.0)
    other = replace(kernels.default(layer.problem(1, mx.float32, "cpu")), tile_size_n=64)
    monkeypatch.setattr(
        planted,
        "warm_up",
        lambda self, calls: setattr(self, "memory_bytes", 10**6 * (9 if self.config == other else 1)),
    )
    tuner = MixedBPWAutoTuner(device="cpu", objective={"memory": 1.0})
    results = tuner.benchmark_layer(layer, 1, [other])
    assert results[0].latency_ms == pytest.approx(2000.0)


def test_deadline_in_the_past_enters_nothing():
    tuner = MixedBPWAutoTuner(device="cpu", rules=FAST)
    assert tuner.benchmark_layer(linear(), 1, deadline=time.perf_counter() - 1) == []
    assert tuner.config.problems == {}


def test_trial_runs_the_default_in_any_case():
    w = Workload.of_layer(linear(), 1)
    entry = Trial(w, FAST, Objective(), 1 << 40, {}).run([])
    assert entry.config == entry.default and entry.decision == "default" and len(entry.timings) == 1
