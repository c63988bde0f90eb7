"""The cost model of the Metal kernels: it holds to the peers' measurements, and its table is the committed
one."""

import json
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[1] / "bench"
sys.path.insert(0, str(BENCH))

import metal_cost  # noqa: E402
from metal_chips import CHIPS  # noqa: E402
from metal_model import Work, dispatch_time, layer_time, stretch  # noqa: E402


def test_calibration_holds():
    held = [row for row in metal_cost.calibration()["rows"] if row["held to"]]
    assert len(held) == 14
    for row in held:
        assert abs(row["measured/model"] - 1) <= row["held to"], row


def test_the_committed_table_is_the_model():
    committed = json.loads(metal_cost.CALIBRATION.read_text())
    now = metal_cost.calibration()
    assert committed["rows"] == now["rows"]
    assert committed["chips"] == now["chips"]


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
