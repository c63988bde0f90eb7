"""Predicted times with a range: what explain shows, and what the tuner measures first."""

import json
from dataclasses import asdict, replace

import msgspec
import pytest

from mlx_marlin import kernels, profile
from mlx_marlin.autotune import run as tuning_run
from mlx_marlin.autotune import trial as tuning_trial
from mlx_marlin.autotune.tuner import MixedBPWAutoTuner
from mlx_marlin.device.machine import device_name
from mlx_marlin.kernels import KernelConfig, Problem
from mlx_marlin.measure.race import RaceSettings
from mlx_marlin.profile import json as profile_json
from mlx_marlin.profile.schema import AutotuneConfig, Entry, Timing
from mlx_marlin.profile.uncertainty import Range, Uncertainty
from mlx_marlin.selection import choices
from tests.support.tuning import tune

PROBLEM = Problem.linear(256, 256, rows=4, bits=3, codebooks="mul1", device="cpu")
FIRST = KernelConfig("moe_trellis_swiglu_prefill4", 4, 128, 1, True, "prefill4")
SECOND = replace(FIRST, tile_size_n=256)
DOUBT = Uncertainty(3, Range(1.5, 3.0, 13.0), Range(30.0, 40.0, 50.0), (SECOND,), 0.125)


def entry(uncertainty, config=FIRST, default=FIRST):
    timing = Timing(0, 0.049, 0.0)
    return Entry(config, timing, default, timing, (1.0, 1.0, 1.0), "default", "unchecked", 0.0, uncertainty=uncertainty)


def predicted(entries):
    made = AutotuneConfig(device_name("cpu"), "CPU", source="predicted")
    for problem, found in entries.items():
        made.add(problem, found)
    return made


@pytest.fixture
def shipped(monkeypatch, tuning_sandbox):
    """Stands in for the profile that the package predicts of this machine."""

    def ship(entries):
        made = predicted(entries)
        monkeypatch.setattr("mlx_marlin.profile.active.predicted", lambda name: ("predicted profile x.json", made))
        profile.refresh()

    yield ship
    profile.refresh()


# The quantities


def test_intercept_and_slope_make_the_range():
    total = DOUBT.total_us
    assert (total.low, total.likely, total.high) == (34.5, 49.0, 89.0)


@pytest.mark.parametrize(
    "stage, work, matters",
    [
        (Range(3, 3, 3), Range(40, 40, 50), False),  # 49 to 59
        (Range(3, 3, 3), Range(40, 40, 53), True),  # 62 of 49
        (Range(3, 3, 13), Range(40, 40, 40), True),
        (Range(3, 3, 3), Range(31, 40, 40), False),  # 40 of 49
        (Range(3, 3, 3), Range(30, 40, 40), True),  # 39 of 49
    ],
)
def test_more_than_25_percent_matters(stage, work, matters):
    assert Uncertainty(3, stage, work).matters is matters


def test_a_range_is_in_order():
    with pytest.raises(ValueError, match="got 2, 1, 3"):
        Range(2, 1, 3)


# In a profile


def test_it_is_written_and_read():
    made = predicted({PROBLEM: entry(DOUBT)})
    assert profile_json.decode(profile_json.encode(made)) == made


def test_profiles_without_it_stay_as_they_were():
    text = profile_json.encode(predicted({PROBLEM: entry(None)}))
    assert b"uncertainty" not in text
    assert profile_json.decode(text).problems[PROBLEM].uncertainty is None


@pytest.mark.parametrize(
    "change, where",
    [
        ({"stage_us": {"low": 5.0, "likely": 3.0, "high": 13.0}}, r"low <= likely <= high.*uncertainty\.stage_us"),
        ({"stages": 0}, r"uncertainty\.stages"),
        ({"saved": 1.0}, r"uncertainty\.saved"),
        ({"more": 1}, r"unknown field `more`.*uncertainty"),
        ({"contenders": [asdict(SECOND) | {"more": 1}]}, r"unknown field `more`.*uncertainty\.contenders\[0\]"),
        ({"contenders": [asdict(SECOND) | {"kernel_name": "x"}]}, r"x.*problems\[0\]"),
    ],
)
def test_a_bad_one_is_named(change, where):
    raw = json.loads(profile_json.encode(predicted({PROBLEM: entry(DOUBT)})))
    raw["problems"][0]["uncertainty"] |= change
    with pytest.raises(profile.ProfileError, match=where):
        profile_json.decode(json.dumps(raw).encode())


# What is shown


def test_explain_shows_it(shipped):
    shipped({PROBLEM: entry(DOUBT)})
    reason = str(choices.from_profile(PROBLEM))
    assert "entry for 4 rows in the predicted profile x.json; predicted 49 us, 34.5 to 89: 3 dependent stages" in reason
    assert "of 1.5 to 13 us, work of 30 to 50 us" in reason
    assert "prefill4 4 x 256 with 1 simdgroups saves up to 12 % within that range, mlx_marlin-tune decides" in reason


def test_explain_says_nothing_of_what_is_certain(shipped):
    shipped({PROBLEM: entry(None)})
    assert str(choices.from_profile(PROBLEM)).endswith("entry for 4 rows in the predicted profile x.json")


# What is measured first


def test_a_prediction_names_the_configs_that_can_run(shipped):
    narrow = Problem.linear(256, 128, rows=4, bits=3, codebooks="mul1", device="cpu")
    shipped({PROBLEM: entry(DOUBT), narrow: entry(DOUBT)})
    found = profile.prediction(PROBLEM)
    assert found.first == (FIRST, SECOND) and found.open == 0.125
    # The contender's 256 columns become the 128 that there are: nothing is left open.
    found = profile.prediction(narrow)
    assert found.first == (FIRST,) and found.open == 0.0 and found.uncertainty.contenders == ()
    assert profile.prediction(replace(PROBLEM, hidden=1024)) is None


def test_contenders_enter_the_race_first(shipped, monkeypatch):
    default = kernels.default(PROBLEM)
    others = [c for c in kernels.candidates(PROBLEM) if c not in (default, FIRST, SECOND)]
    shipped({PROBLEM: entry(DOUBT)})
    entered = []
    monkeypatch.setattr(tuning_trial, "race", lambda clocks, *a, **k: entered.extend(clocks) or _nothing())
    mine = MixedBPWAutoTuner(device="cpu", race=RaceSettings(rounds=2, warmup=0))
    mine.benchmark_layer(PROBLEM, 4, [*others, SECOND, FIRST], 0, 2)
    assert entered[0] == default
    assert [c for c in entered if c in (FIRST, SECOND)] == [c for c in entered[1:3] if c != default]


def _nothing():
    from mlx_marlin.measure.race import Race

    return Race(None)


def test_quick_tuning_times_what_is_predicted(shipped):
    far = replace(kernels.default(PROBLEM), tile_size_n=128, tile_size_m=2, kernel_variant="decode")
    far = replace(far, kernel_name=kernels.make_name("decode"), simdgroups=1)
    assert kernels.feasible(PROBLEM, far) is None and far not in tuning_run.one_step(PROBLEM)
    shipped({PROBLEM: entry(msgspec.structs.replace(DOUBT, contenders=(far,)))})
    assert far in tuning_run.one_step(PROBLEM)


def test_what_the_range_leaves_open_is_tuned_first(shipped, monkeypatch, capsys):
    """Of 1, 16 and 64 rows the predictions leave 64 open most, 16 a little and 1 not at all."""
    asked = []
    monkeypatch.setattr(tuning_run.Run, "_tune_one", lambda self, problem, *rest: asked.append(problem))
    assert tune("--batch-sizes", "1,16,64") in (0, 2)
    assert [p.rows for p in asked] == [1, 16, 64]
    saved = {1: None, 16: 0.05, 64: 0.2}
    entries = {}
    for problem in asked:
        config = kernels.default(problem)
        contender = replace(config, simdgroups=2 if config.simdgroups == 1 else 1)
        doubt = msgspec.structs.replace(DOUBT, contenders=(contender,), saved=saved[problem.rows] or 0.0)
        entries[problem] = entry(doubt if saved[problem.rows] else None, config, config)
    shipped(entries)
    asked.clear()
    capsys.readouterr()
    assert tune("--batch-sizes", "1,16,64") in (0, 2)
    assert [p.rows for p in asked] == [64, 16, 1]
    shown = capsys.readouterr().err
    assert "first the 2 of them whose fastest config the predictions leave open" in shown
    assert "64 rows, predicted 34.5 to 89 us, up to 20 % open" in shown
