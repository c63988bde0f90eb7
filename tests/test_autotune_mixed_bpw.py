"""The autotuner's data, devices, candidates, inputs, look-ups, adaptation and files."""

import json
import math
import random
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from mlx_marlin import autotune, device, kernels, ops, profile
from mlx_marlin.autotune.tuner import AutotuneConfig, BenchmarkResult, KernelConfig, MixedBPWAutoTuner
from mlx_marlin.autotune.workload import Workload
from mlx_marlin.kernels import Problem
from mlx_marlin.profile.active import ProfileError
from tests.support.tuning import BASE, DECODE, DOCUMENT, LARGE, PREFILL, linear, mixed_experts, table

pytestmark = pytest.mark.usefixtures("tuning_sandbox")


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
    values = (result.config, result.latency_ms, result.throughput_gbps, result.memory_footprint_mb, result.timestamp)
    assert values == (DECODE, 1.5, 20.0, 3.0, 12.0)


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
@pytest.mark.parametrize("on, rows", [("cpu", 17), ("cpu", 64), ("gpu", 1), ("gpu", 4), ("gpu", 64)])
def test_candidates_cover_all_variants(on, rows, bits):
    """On the CPU from the rows on that fill a wide panel; below, variants run the same code."""
    sizes = {"rows": rows, "experts": 4, "top_k": 2, "bits": bits}
    problem = Problem.swiglu(256, 128, **sizes, dtype="float32", device=on, accuracy="half")
    found = kernels.candidates(problem)
    assert found[0] == kernels.default(problem) and len(set(found)) == len(found)
    assert {c.kernel_variant for c in found} == set(kernels.VARIANTS)
    assert all(kernels.feasible(problem, c) is None for c in found)
    assert {c.use_fp32_acc for c in found} == {True, False}
    assert all(c.use_fp32_acc for c in kernels.candidates(replace(problem, accuracy="float32")))


def test_synthetic_inputs():
    for layer, shape in ((linear(), (5, 256)), (mixed_experts(), (5, 2, 256))):
        made = Workload.of_layer(layer, 5, top_k=2)
        assert made.x.shape == (5, 256)
        y = made.run(kernels.default(made.problem), made.x, 0)
        assert y.shape == shape and np.isfinite(np.array(y)).all()


# Selection


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
    monkeypatch.setattr(kernels.catalogue, "feasible", lambda p, c: "no" if c.kernel_variant == "prefill4" else None)
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
    "rows, variant", [(1, "decode"), (2, "prefill4"), (16, "prefill4"), (17, "base"), (32, "base"), (33, "large_batch")]
)
def test_default_variant_and_accumulation(rows, variant):
    config = MixedBPWAutoTuner(device_name="Quantum 9").select_kernel(rows, 4096, [4])
    assert config.kernel_variant == variant and config.use_fp32_acc
    assert kernels.parse_name(config.kernel_name).variant == variant
    if variant == "large_batch":
        assert config.tile_size_n == 128


@pytest.mark.parametrize("rows", [1, 4, 17, 33])
@pytest.mark.parametrize("widths", [[2], [3], [2, 3, 4], [8]])
def test_a_default_runs_on_this_machine(rows, widths):
    """Its sizes are the mappings', which not every machine has: they are clamped where they run."""
    config = MixedBPWAutoTuner(device="cpu").select_kernel(rows, 256, widths)
    layer = linear(max(widths))
    made = Workload.of_layer(layer, rows)
    made.check(config)
    y = ops.trellis_linear(made.x, layer, config=config, stream=mx.cpu)
    assert np.array_equal(np.array(y), np.array(made.run(kernels.fitted(made.problem, config), made.x, 0)))


def test_no_fallback():
    assert MixedBPWAutoTuner(device_name="Quantum 9").select_kernel(1, 256, [2], fallback_to_default=False) is None
    assert tuner_with(table()).select_kernel(1, 256, [8], fallback_to_default=False) is None


def test_predicted_profile_answers_before_the_default(monkeypatch):
    predicted = AutotuneConfig("M4 Max", "M4", lookup_table=table(), source="predicted")
    monkeypatch.setattr(profile, "predicted", lambda name: ("predicted profile", predicted))
    tuner = MixedBPWAutoTuner(device="cpu")
    assert tuner.select_kernel(4, 256, [2, 4]) == PREFILL
    assert tuner.select_kernel(4, 256, [2, 4], fallback_to_default=False) is None
    tuner.config.lookup_table = {4: {256: {(2, 4): DECODE}}}
    assert tuner.select_kernel(4, 256, [2, 4]) == DECODE


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


def test_asking_after_every_sample_finds_nothing_among_equals(monkeypatch):
    """Looks and switches share one level: 60 runs of 200 samples each, asked for every time."""
    wrong = 0
    for seed in range(60):
        tuner, rng = tuner_with(table()), random.Random(seed)
        for i in range(200):
            record(tuner, (DECODE, BASE, PREFILL)[i % 3], [math.exp(rng.gauss(0, 0.1))])
            answer = tuner.adapt_selection(1, 256, [2, 4])
            if i > 20 and answer != DECODE:  # by then the incumbent has its 5 samples
                wrong += 1
                break
    assert wrong <= 3


def test_incumbent_stays_among_equals(adaptive):
    record(adaptive, DECODE, around(1.0, seed=1))
    record(adaptive, BASE, around(1.0, seed=2))
    assert adaptive.adapt_selection(1, 256, [2, 4]) == DECODE


def test_significantly_faster_wins(adaptive):
    record(adaptive, DECODE, around(1.0, seed=1))
    record(adaptive, BASE, around(0.8, seed=2))
    record(adaptive, PREFILL, around(0.9, seed=3))
    assert adaptive.adapt_selection(1, 256, [4, 2]) == BASE


def test_it_switches_back_when_the_world_changes(adaptive):
    record(adaptive, DECODE, around(1.0, 10, seed=1))
    record(adaptive, BASE, around(0.8, 10, seed=2))
    assert adaptive.adapt_selection(1, 256, [2, 4]) == BASE
    record(adaptive, DECODE, around(1.0, 40, seed=3))
    record(adaptive, BASE, around(1.5, 40, seed=4))
    assert adaptive.adapt_selection(1, 256, [2, 4]) == DECODE


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
    problem = Problem.swiglu(256, 128, experts=4, top_k=2, bits=((2, 4, 4),))
    narrow = replace(DECODE, tile_size_n=16)
    for t in around(1.0):
        adaptive.record_latency(DECODE.kernel_name, 1, t, problem=problem)
        adaptive.record_latency(narrow.kernel_name, 1, 0.7 * t, problem=problem, config=narrow)
    assert adaptive.adapt_selection(1, 256, [2, 4]) == narrow


def test_clear_adaptation_history(adaptive):
    record(adaptive, DECODE, around(1.0))
    record(adaptive, BASE, around(0.5))
    assert adaptive.adapt_selection(1, 256, [2, 4]) == BASE
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
    text = json.loads(tuner_with(table()).export_config())
    assert text["lookup_table"]["1"]["256"]["(3,)"]["kernel_variant"] == "decode"
    assert not list(tmp_path.rglob("*.json"))


def test_documents_file_of_another_machine_answers(tmp_path):
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


def test_a_bad_profile_of_the_machine_is_ignored_aloud(caplog):
    """As the layers do."""
    path = profile.default_path("cpu")
    path.parent.mkdir(parents=True)
    path.write_text('{"device_name": 3}')
    tuner = MixedBPWAutoTuner(device="cpu")
    assert tuner.config == AutotuneConfig.of_machine("cpu") and "ignoring the tuned profile" in caplog.text
    with pytest.raises(ProfileError, match="device_name"):
        tuner.export_config(path)
    assert path.read_text() == '{"device_name": 3}'


def test_use_profile_is_found_beside_the_tuner():
    assert autotune.use_profile is profile.use_profile


def test_statistics():
    stats = tuner_with(table()).get_statistics()
    assert stats["lookup_table_entries"] == 5 and stats["benchmark_count"] == 0 and stats["problems"] == 0
