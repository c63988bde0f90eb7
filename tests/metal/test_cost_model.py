"""The cost model of the Metal kernels: it holds to the peers' measurements, and its table is the committed one."""

import json
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest

from bench.metal import cost as metal_cost
from bench.metal.chips import CHIPS, STAGE_US
from bench.metal.model import Work, dispatch_time, layer_time, stages, stretch, time_range, work_range
from mlx_marlin import codec, kernels
from mlx_marlin.profile import files as profile_files
from mlx_marlin.profile import json as profile_json
from tests import metal_sim
from tests.support.paths import BENCH

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


def test_intercept_and_slope_are_apart():
    a = Work({"integer": 1e8}, 0, 400, 8)
    chain = [a, replace(a, after=(0,)), replace(a, after=(1,))]
    for name in ("M4", "M2 Max", "M5 Max"):
        chip = CHIPS[name]
        slope, total = work_range(chain, chip), time_range(chain, chip)
        assert stages(chain) == 3 and stages([a, a]) == 1
        assert layer_time(chain, chip) == total.likely == slope.likely + 3 * 2.75
        assert total.low == slope.low + 3 * STAGE_US.low and total.high == slope.high + 39
        assert slope.low == pytest.approx(0.83 * slope.likely) and slope.high == pytest.approx(1.23 * slope.likely)


def test_a_complex_operation_takes_more_slots_on_m1_and_m2():
    """Beside as many others that the pipe is not what they wait for."""
    work = Work({"multiply": 1e8, "integer": 9e8}, 0, 4000, 8)
    m4, m2 = (work_range([work], replace(CHIPS["M4"], name=name)) for name in ("M4", "M2"))
    assert m2.likely / m4.likely == pytest.approx(11 / 10)
    assert m2.high / m4.high == pytest.approx(11.4 / 10) and m2.low / m4.low == pytest.approx(10.6 / 10)


def test_short_reads_may_be_slow_on_many_cores():
    work = [Work({}, 1e9, 4000, 8)]
    few, many = (work_range(work, CHIPS[name]) for name in ("M4", "M4 Max"))
    assert few.high == pytest.approx(1.25 * few.likely) and many.high == pytest.approx(1.79 * many.likely)


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
        for rows in (1, 2, 4, 8):
            widths = {p.widths for p in profile.problems if p.kind == "swiglu" and p.rows == rows}
            assert widths == {(1.5,), (2,), (2.5,), (3,), (3.5,), (4,)}
        for problem, entry in profile.problems.items():
            assert kernels.feasible(problem, entry.config) is None
            assert entry.verdict == "unchecked" and entry.samples.n == 0
            assert entry.samples.median_ms <= entry.baseline.median_ms
            doubt = entry.uncertainty
            if doubt is not None:
                assert doubt.matters and doubt.stage_us == STAGE_US
                assert doubt.total_us.likely == pytest.approx(1e3 * entry.samples.median_ms, abs=0.11)
                assert entry.config not in doubt.contenders and bool(doubt.contenders) == (doubt.saved > 0)
                assert all(kernels.feasible(problem, c) is None for c in doubt.contenders)
        assert any(e.uncertainty and e.uncertainty.contenders for e in profile.problems.values())


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


@needs_simulator
@pytest.mark.parametrize("bits", [pytest.param(b, marks=[] if b == 3 else [pytest.mark.slow]) for b in (2, 2.5, 3, 4)])
def test_the_searchs_prediction_is_what_the_model_gives(bits):
    from bench.metal import search

    committed = [row for row in json.loads(metal_cost.SEARCH.read_text()) if row["bits"] == bits]
    assert search.predict(widths=(bits,)) == committed, "run python -m bench.metal.cost search"
    for row in committed:
        low, likely, high = row["weights/s"]
        assert low >= likely >= high > 0


def test_a_30b_model_is_searched_in_an_hour_on_an_m4_max():
    rows = {(row["chip"], row["bits"]): row for row in json.loads(metal_cost.SEARCH.read_text())}
    assert rows["M4 Max", 3]["hours of 30.5e9"][1] < 1


@needs_simulator
@pytest.mark.parametrize("bits", [pytest.param(b, marks=[] if b == 3 else [pytest.mark.slow]) for b in (1, 2, 3, 4, 6)])
def test_operations_of_the_search(bits):
    """Three per state: a subtraction, a multiply-add and a minimum; nodes, addresses and lanes cost a fifth of that."""
    from tests.support import metal_counts

    forward = [r for d, r in metal_counts.viterbi(bits, "mul1") if "viterbi" in d["kernel"]]
    for result in forward:
        operations = result.operations.counts
        states = codec.TILE_SIZE << 16
        assert operations["float"] <= 3.1 * states
        # At low widths values are loaded at every step.
        assert sum(operations.values()) <= (3.65 if bits > 2 else 4.4) * states
        assert operations["special"] == operations["variable_shift"] == 0


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


def test_a_layer_from_1_to_2048_rows():
    """The table beside its goals: those that are met stay met, the others are said to be missed."""
    from bench.metal import prompts as metal_prompts

    result = json.loads(metal_cost.PROMPTS.read_text())
    assert result["source"] == "predicted"
    found = {(r["codebook"], r["rows"], r["chip"], r["accuracy"]): r for r in result["rows"]}
    assert {k[:3] for k in found} == set(product(("mcg", "mul1"), metal_prompts.ROWS, metal_prompts.SHOWN))
    assert len(result["rows"]) == len(found) == 2 * (7 * 6 + 4 * 2)
    for (codebook, rows, name, accuracy), row in found.items():
        low, us, high = row["us"]
        assert low <= us <= high
        assert row["goals"] == metal_prompts.goals(rows, CHIPS[name], us, row["floor us"], row["affine us"][1])
        if rows == 1:
            assert row["goals"]["one row"], row
        if (codebook, rows) in product(["mcg"], (1, 4, 16, 64)) or accuracy == "half":
            assert row["goals"]["affine"], row


@needs_simulator
def test_a_layer_is_what_the_model_gives():
    from bench.metal import prompts as metal_prompts

    committed = json.loads(metal_cost.PROMPTS.read_text())["rows"]
    now = metal_prompts.predict(("mcg",), (64,), ("M5",))["rows"]
    then = [row for row in committed if (row["codebook"], row["rows"], row["chip"]) == ("mcg", 64, "M5")]
    assert len(now) == 2 and now == then, "run python -m bench.metal.cost prompts"


@needs_simulator
def test_a_layer_put_together_is_the_layer():
    """From one expert's row tile and few rows of the rest: what counting the whole layer gives."""
    from bench.metal import layer as metal_layer
    from bench.metal import work as metal_work
    from bench.metal.predict import qwen3_30b

    problem = replace(qwen3_30b(3), hidden=512, intermediate=256, top_k=4)
    config = kernels.default(problem)
    whole = [c.work for c in metal_work.count(problem, config)]
    made = metal_layer.work(problem, config)
    assert [w.after for w in made] == [w.after for w in whole]
    for a, b in zip(made, whole, strict=True):
        assert (a.groups, a.simdgroups) == (b.groups, b.simdgroups)
        assert sum(a.operations.values()) == pytest.approx(sum(b.operations.values()), rel=0.01)
        assert a.bytes == pytest.approx(b.bytes, rel=0.02)


def test_random_routing():
    from bench.metal.layer import routing

    experts, tiles, units = routing(128, 8, 64, 64, 8)
    assert experts == pytest.approx(128 * (1 - (15 / 16) ** 64)) and tiles == pytest.approx(experts)
    assert units > 64 * 8 / 8
    assert routing(128, 8, 64, 1, 1)[1:] == pytest.approx((512, 512))
    assert routing(1, 1, 100, 64, 8) == (1, 2, 13)


@needs_simulator
def test_a_layer_runs_in_the_passes_of_its_plan():
    from bench.metal import layer as metal_layer
    from bench.metal.predict import qwen3_30b
    from mlx_marlin import ops

    problem = qwen3_30b(3, 2048)
    passes = metal_layer._pass_rows(problem, ops.plan(problem, kernels.default(problem))["dispatches"])
    assert sum(passes) == 2048 and len(passes) == 4


# Beside what others have published


def test_published_figures_lie_within_the_ranges():
    rows = json.loads(metal_cost.VALIDATION.read_text())
    outside = [row for row in rows if not row["within"]]
    assert len(rows) >= 20 and all(row["note"] for row in outside) and len(outside) <= 5
    for row in rows:
        low, likely, high = row["predicted"]
        assert low <= likely <= high
        assert row["within"] == (low <= row["published"][1] and row["published"][0] <= high)
        # One peer's series on M5 Max at 1 to 8 rows, and MLX's and llama.cpp's generation.
        if row["what"].startswith("experts") or row["what"].endswith("generation"):
            assert row["within"], row


def test_whole_models_of_mlx_are_what_the_model_gives():
    from bench.metal import validate as metal_validate
    from bench.metal import whole_model

    committed = json.loads(metal_cost.VALIDATION.read_text())
    now = metal_validate._whole_models()
    assert committed[-len(now) :] == now
    for row in json.loads(metal_cost.MODELS.read_text()):
        model = next(m for m in whole_model.MODELS if m.name == row["model"])
        found = whole_model.per_second(model, whole_model.Affine(), 1, CHIPS[row["chip"]])
        assert row["affine 4 bits"]["token"][1] == round(found.likely, 1)


def test_whole_models():
    from bench.metal import whole_model

    rows = json.loads(metal_cost.MODELS.read_text())
    keys = {(r["model"], r["chip"], r["bits"]) for r in rows}
    assert keys == set(product((m.name for m in whole_model.MODELS), whole_model.SHOWN, whole_model.BITS))
    for row in rows:
        for what in ("token", "prompt"):
            low, likely, high = row[what]
            assert 0 < low <= likely <= high
        assert ("prompt, half" in row) == (CHIPS[row["chip"]].family == "M5")


def test_two_stages_save_more_the_more_a_stage_costs():
    rows = json.loads(metal_cost.STAGES.read_text())
    assert len(rows) == 24
    for row in rows:
        low, likely, high = row["saved us"]
        assert low <= likely <= high and high > 5


def test_accelerators_run_beside_the_other_pipes():
    both = Work({"integer": 1e9}, 1e6, 1600, 8, {"tensor_multiply": 1e6})
    chip = CHIPS["M5"]
    time = dispatch_time(both, chip)
    assert time.bound == "accelerator" and time.total == time.accelerator > time.issue > 0
    # 2^14 operations each.
    assert 1e6 * 2**14 / (time.accelerator * 1e6) == pytest.approx(15.4)
