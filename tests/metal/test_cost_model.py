"""The cost model of the Metal kernels: it holds to the peers' measurements, and its table is the committed one."""

import json
import subprocess
import sys
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path

import pytest

from bench.metal import cost as metal_cost
from bench.metal.chips import CHIPS
from bench.metal.model import Work, dispatch_time, layer_time, stretch
from mlx_marlin import codec, kernels
from mlx_marlin.kernels import metal
from mlx_marlin.profile import files as profile_files
from mlx_marlin.profile import json as profile_json
from tests import metal_sim
from tests.support.paths import BENCH, ROOT

PROFILES = Path(profile_json.__file__).parent / "predicted"

needs_simulator = pytest.mark.skipif(bool(metal_sim.unavailable()), reason=str(metal_sim.unavailable()))


def test_calibration_holds():
    rows = metal_cost.calibration()["rows"]
    assert len(rows) == 15
    for row in rows:
        assert abs(row["measured/model"] - 1) <= row["held to"] == 0.25, row


def test_the_committed_table_is_the_model():
    committed = json.loads(metal_cost.CALIBRATION.read_text())
    now = metal_cost.calibration()
    assert committed["rows"] == now["rows"]
    assert committed["chips"] == now["chips"]
    assert committed["changes since"] == now["changes since"]


@needs_simulator
def test_the_peers_loops_are_counted():
    from bench.metal import peer_loops as metal_peer_loops

    assert json.loads(metal_peer_loops.RESULT.read_text()) == metal_peer_loops.count()


def test_time_grows_with_work_and_shrinks_with_cores():
    work = Work({"multiply": 1e9, "integer": 2e9}, 1e6, 1600, 8)
    times = [dispatch_time(work, CHIPS[c]).total for c in ("M4", "M4 Pro", "M4 Max")]
    assert times[0] > times[1] > times[2]
    assert dispatch_time(work, CHIPS["M4"]).bound == "complex"
    assert dispatch_time(Work({}, 1e9, 1600, 8), CHIPS["M4"]).bound == "memory"


def test_idle_cores_cost():
    chip = CHIPS["M4 Max"]
    assert stretch(chip, 1, 8) == pytest.approx(40 * 3)  # one core of 40, a third of its rate
    assert stretch(chip, 400, 8) == 1
    assert stretch(chip, 41, 16) == pytest.approx(80 / 41)


def test_dependent_stages_wait():
    a = Work({"integer": 1e8}, 0, 400, 8)
    b = Work({"integer": 1e8}, 0, 400, 8, after=(0,))
    chip = CHIPS["M4"]
    assert layer_time([a, b], chip) > layer_time([a, a], chip)


def test_every_chip_has_a_predicted_profile():
    for chip in CHIPS.values():
        name = chip.name.lower().replace(" ", "_")
        profile = profile_files.load(PROFILES / f"{name}.json")
        assert (profile.source, profile.device_name, profile.device_family) == (
            "predicted",
            chip.name,
            chip.family,
        )
        assert profile.fingerprint is None
        assert {p.rows for p in profile.problems if p.kind == "swiglu"} == {1, 2, 4, 8}
        assert {p.rows for p in profile.problems if p.kind == "linear"} == {1, 4}
        one_row = {p.widths for p in profile.problems if p.kind == "swiglu" and p.rows == 1}
        assert one_row == {(1.5,), (2,), (2.5,), (3,), (3.5,), (4,)}
        for problem, entry in profile.problems.items():
            assert kernels.feasible(problem, entry.config) is None
            assert entry.verdict == "unchecked" and entry.samples.n == 0
            assert entry.samples.median_ms <= entry.baseline.median_ms


def test_predictions_meet_their_goals():
    """One config, the one that a layer runs, against every limit."""
    result = json.loads((BENCH / "results" / "metal_predicted.json").read_text())
    assert result["source"] == "predicted"
    for bits in ("2", "3"):
        layer = result["bits"][bits]
        assert len(layer["default"]["dispatches"]) <= 4 and layer["default"]["stages"] <= 3
        for codebook, chips in layer["chips"].items():
            for name, row in chips.items():
                assert row["times floor"] <= row["goal"], (bits, codebook, name)
                assert row["dispatches"] <= 4 and row["stages"] <= 3, (bits, codebook, name)
    assert result["bits"]["3"]["default"]["traffic"]["summary"]["others / codes"] <= 0.03


@needs_simulator
@pytest.mark.parametrize(
    "bits, codebook", [*product((2, 3), codec.CODEBOOKS), (1.5, "mul1"), (2.5, "mul1"), (3.5, "mul1")]
)
def test_complex_operations_per_weight(bits, codebook):
    from bench.metal import work as metal_work
    from bench.metal.predict import qwen3_30b

    problem = replace(qwen3_30b(bits, codebook=codebook), hidden=512, intermediate=256, top_k=2)
    counted = metal_work.count(problem, kernels.default(problem))
    even, odd = (2.25, 3) if codebook == "mul1" else (1.25, 2)
    allowed = 2.5 if codec.is_half_rate(bits) else odd if bits % 2 else even
    products = [c for c in counted if c.inner_loop.weights]
    assert len(products) == 2
    assert sum(c.operations.weights for c in products) == 2 * 3 * 512 * 256
    for c in products:
        assert c.inner_loop.per_weight()["complex"] <= allowed
        # No lane-variable shuffle anywhere, and no barrier inside the loop over k.
        assert set(c.simd) <= {"shuffle_xor", "shuffle_down", "broadcast"}
        assert c.inner_loop.counts["variable_shift"] == c.inner_loop.counts["wide_variable_shift"] == 0
        assert c.barriers / c.work.groups <= 4


@pytest.mark.slow
@needs_simulator
@pytest.mark.parametrize("bits", [2, 3])
@pytest.mark.parametrize("codebook", ["mcg", "mul1"])
def test_a_prediction_is_what_the_model_gives(bits, codebook):
    from bench.metal import predict as metal_predict

    committed = json.loads((BENCH / "results" / "metal_predicted.json").read_text())
    problem = metal_predict.qwen3_30b(bits, codebook=codebook)
    for name, chip in CHIPS.items():
        now = metal_predict.predicted_us(problem, metal_predict.default_on(problem, chip), chip)
        row = committed["every chip"][name][str(bits)][codebook]
        assert now == pytest.approx(row["predicted us, default"], rel=0.01), "run bench/metal/cost.py predict"


@pytest.mark.slow
@needs_simulator
@pytest.mark.parametrize("bits, codebook", [(2.5, "mul1"), (3, "mcg")])
def test_the_shipped_profiles_are_what_the_model_gives(bits, codebook):
    from bench.metal import predict as metal_predict

    problem = replace(metal_predict.qwen3_30b(bits, codebook=codebook), combine=False)
    for chip in CHIPS.values():
        profile = profile_files.load(PROFILES / f"{chip.name.lower().replace(' ', '_')}.json")
        entry = profile.problems[problem]
        for config, timing in (
            (entry.config, entry.samples),
            (metal_predict.default_on(problem, chip), entry.baseline),
        ):
            now = metal_predict.predicted_us(problem, config, chip) / 1e3
            assert now == pytest.approx(timing.median_ms, rel=0.01), "run bench/metal/cost.py profiles"


@pytest.mark.slow
@needs_simulator
def test_the_default_of_experts_of_two_matrices_is_near_the_best():
    """Those of Nemotron 3 Nano at one row: no profile is shipped for such experts."""
    from bench.metal import predict as metal_predict

    problem = kernels.Problem.mlp(2688, 1856, experts=128, top_k=6, bits=3, codebooks="mcg", device="gpu")
    for name in ("M1", "M2 Pro", "M4", "M4 Max", "M5"):
        best_us, _ = metal_predict.ranking(problem, CHIPS[name])[0]
        default = metal_predict.default_on(problem, CHIPS[name])
        assert metal_predict.predicted_us(problem, default, CHIPS[name]) <= 1.05 * best_us, name


def test_prompts_meet_their_goals():
    """A layer of experts on M5: accelerators faster than matrices, with one half also than MLX's affine layer."""
    result = json.loads(metal_cost.PROMPTS.read_text())
    assert result["source"] == "predicted" and len(result["rows"]) == 24
    for row in result["rows"]:
        us = row["us"]
        assert 1.2 * us["accelerators"] <= us["matrices"], row
        assert us["accelerators, half"] <= row["affine us"], row
        if row["rows"] >= 2048:
            assert us["accelerators, half"] <= 1.35 * row["floor us"], row


@needs_simulator
def test_a_prompt_is_what_the_model_gives():
    from bench.metal import prompts as metal_prompts

    committed = json.loads(metal_cost.PROMPTS.read_text())["rows"]
    now = metal_prompts.predict(("mcg",), (512,))["rows"]
    then = [row for row in committed if (row["codebook"], row["rows"]) == ("mcg", 512)]
    assert now == then, "run bench/metal/cost.py prompts"


def test_accelerators_run_beside_the_other_pipes():
    both = Work({"integer": 1e9}, 1e6, 1600, 8, {"tensor_multiply": 1e6})
    chip = CHIPS["M5"]
    time = dispatch_time(both, chip)
    assert time.bound == "accelerator" and time.total == time.accelerator > time.issue > 0
    # 2^14 operations each.
    assert 1e6 * 2**14 / (time.accelerator * 1e6) == pytest.approx(15.4)


def test_measured_times_stand_beside_their_predictions():
    from bench.first_run import first_run

    for codebook in ("mcg", "mul1"):
        config = kernels.default(first_run._problem(3, 1, "gpu", codebook))
        times = [{"bits": 3, "codebook": codebook, "rows": 1, "config": asdict(config), "us": 100.0}]
        for chip in CHIPS:
            found = [f for f in first_run.beside_predictions(times, chip) if "predicted us, default" in f]
            assert found[0]["ratio"] == round(100.0 / found[0]["predicted us, default"], 2)
        assert first_run.beside_predictions(times, "M9") == []


def test_the_first_run_times_what_its_questions_are_about():
    from bench.first_run import first_run

    one_row = first_run._configs(first_run._problem(3, 1, "gpu"))
    assert {(c.tile_size_n, c.simdgroups) for c in one_row} >= set(product(metal.TILE_COLUMNS, (4, 8, 16)))
    for rows in (16, 64):
        configs = first_run._configs(first_run._problem(3, rows, "gpu"))
        assert {(c.kernel_variant, c.use_fp32_acc) for c in configs} == set(product(kernels.VARIANTS, (True, False)))


def test_the_first_run_times_matrices_beside_accelerators():
    from bench.first_run import first_run

    problem = replace(first_run._problem(3, 256, "gpu"), accelerators=True)
    rows = {(c.kernel_variant, c.tile_size_m, c.use_fp32_acc) for c in first_run._configs(problem)}
    assert rows >= set(product(["base"], (16, 32), (True, False))) | set(
        product(["large_batch"], (48, 64), (True, False))
    )


def test_what_metals_validation_says_is_kept():
    from bench.first_run import first_run

    load = "Invalid device load executing kernel function trellis_combine encoder: 0, dispatch: 1\n"
    load += "buffer: x, length:64, resident:Read\n* frame #0: trellis_combine() at /program_source:885:56\n"
    logged = "2026-11-21 10:00:0{}.5+0100 python3[12:3a] -[X y:]:1: failed assertion `z'\n1\n2\n"
    banner = "2026-11-21 10:00:00.1+0100 python3[12:3a] Metal GPU Validation Enabled\n"
    output = banner + load + logged.format(1) + load + logged.format(2) + "E assert Invalid device load\n2 passed\n"
    found = first_run.validation(output)
    assert found["validation on"] and found["reported"] == [load.strip(), "-[X y:]:1: failed assertion `z'\n1\n2"]
    assert first_run.validation("2 passed\n") == {"validation on": False, "reported": []}


def test_first_run_collects_a_report(tmp_path):
    """The script for the first Mac, on this machine's CPU and a toy layer."""
    output = tmp_path / "report.json"
    command = [
        sys.executable,
        "-m",
        "bench.first_run.first_run",
        "--device",
        "cpu",
        "--small",
        "--output",
        str(output),
    ]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    report = json.loads(output.read_text())
    assert report["machine"]["fingerprint"]["device"] == "cpu"
    assert {(t["bits"], t["codebook"], t["rows"]) for t in report["layer"]} == {(3, "mcg", 1), (3, "mcg", 4)}
    assert all(t["us"] > 0 for t in report["layer"])
    assert report["self-tests"]["calls"] >= 16 and report["self-tests"]["wrong"] == {}
