"""The script for the first Mac: what it asks, in which order, and what it keeps."""

import json
import subprocess
import sys
from dataclasses import asdict, replace
from itertools import product

from bench.first_run import first_run, search
from bench.metal.chips import CHIPS
from mlx_marlin import kernels
from mlx_marlin.kernels import metal
from tests.support.paths import ROOT


def test_measured_times_stand_beside_their_predictions():
    for codebook in ("mcg", "mul1"):
        config = kernels.default(first_run._problem(3, 1, "gpu", codebook))
        times = [{"bits": 3, "codebook": codebook, "rows": 1, "config": asdict(config), "us": 100.0}]
        for chip in CHIPS:
            found = [f for f in first_run.beside_predictions(times, chip) if "predicted us, default" in f]
            assert found[0]["ratio"] == round(100.0 / found[0]["predicted us, default"], 2)
        assert first_run.beside_predictions(times, "M9") == []


def test_the_first_run_times_what_its_questions_are_about():
    one_row = first_run._configs(first_run._problem(3, 1, "gpu"))
    assert {(c.tile_size_n, c.simdgroups) for c in one_row} >= set(product(metal.TILE_COLUMNS, (4, 8, 16)))
    for rows in (16, 64):
        configs = first_run._configs(first_run._problem(3, rows, "gpu"))
        assert {(c.kernel_variant, c.use_fp32_acc) for c in configs} == set(product(kernels.VARIANTS, (True, False)))


def test_the_first_run_times_matrices_beside_accelerators():
    problem = replace(first_run._problem(3, 256, "gpu"), accelerators=True)
    rows = {(c.kernel_variant, c.tile_size_m, c.use_fp32_acc) for c in first_run._configs(problem)}
    assert rows >= set(product(["base"], (16, 32), (True, False))) | set(
        product(["large_batch"], (48, 64), (True, False))
    )


def test_what_metals_validation_says_is_kept():
    load = "Invalid device load executing kernel function trellis_combine encoder: 0, dispatch: 1\n"
    load += "buffer: x, length:64, resident:Read\n* frame #0: trellis_combine() at /program_source:885:56\n"
    logged = "2026-11-21 10:00:0{}.5+0100 python3[12:3a] -[X y:]:1: failed assertion `z'\n1\n2\n"
    banner = "2026-11-21 10:00:00.1+0100 python3[12:3a] Metal GPU Validation Enabled\n"
    output = banner + load + logged.format(1) + load + logged.format(2) + "E assert Invalid device load\n2 passed\n"
    found = first_run.validation(output)
    assert found["validation on"] and found["reported"] == [load.strip(), "-[X y:]:1: failed assertion `z'\n1\n2"]
    assert first_run.validation("2 passed\n") == {"validation on": False, "reported": []}


def test_a_straight_line_has_an_intercept_and_a_slope():
    line = first_run.straight_line({1: 139.0, 2: 239.0, 4: 439.0, 8: 839.0}, 3)
    assert (line["intercept us"], line["slope us per row"], line["us per stage"]) == (39.0, 100.0, 13.0)
    assert line["us"]["8"] == 839.0


def test_the_first_run_begins_nothing_after_its_minutes():
    parts = dict(first_run.collect("cpu", True, minutes=0))
    assert list(parts) == ["machine", "what there was no time for"]
    assert parts["machine"]["no time for"] == ["self-tests", "intercept and slope", "beside predictions", "layer"]


def test_searches_stand_beside_their_prediction(monkeypatch):
    monkeypatch.setattr(search.ops, "viterbi_search", lambda tiles, bits, codebook: None)
    rows = search.times(40, "M4 Max")
    assert [row["bits"] for row in rows] == [2, 2.5, 3, 4] and all(row["tiles"] == 640 for row in rows)
    assert all(len(row["predicted weights/s"]) == 3 for row in rows)
    assert not any("predicted weights/s" in row for row in search.times(1, "M9"))


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
    (line,) = report["intercept and slope"]
    assert set(line["us"]) == {"1", "4"} and line["config"]["kernel_variant"] == "decode"
    assert list(report).index("self-tests") < list(report).index("intercept and slope") < list(report).index("layer")
