"""What mlx_marlin-tune prints: names that tell problems apart, one metric of gain, tables of 100 columns."""

from dataclasses import replace

import pytest
from msgspec import structs

from mlx_marlin import kernels
from mlx_marlin.autotune import labels, report
from mlx_marlin.autotune.check import Finding
from mlx_marlin.kernels import KernelConfig, Problem
from tests.support.tuning import BASE, entry

LINEAR = Problem.linear(7168, 16384, bits=3)
WIDE = Problem.swiglu(7168, 2048, rows=1024, experts=256, top_k=8, bits=[(a, b, 4) for a in (2, 3) for b in (2, 3, 6)])
# The longest label that a config can have.
LONGEST = KernelConfig("moe_trellis_swiglu_large_batch", 128, 256, 16, False, "large_batch")


def entries():
    """An entry per decision; the fastest takes 0.8 (0.75 to 0.9) of the default's time."""
    saved = entry(LONGEST, 98.7654, BASE, 123.4567)
    return {
        WIDE: structs.replace(saved, ratio=(0.8, 0.75, 0.9)),
        LINEAR: structs.replace(saved, config=BASE, ratio=(1.0, 1.0, 1.0), decision="default"),
        replace(LINEAR, rows=4): structs.replace(saved, config=BASE, ratio=(1.0, 1.0, 1.0), decision="undecided"),
    }


def test_names_tell_problems_apart():
    other = Problem.linear(7168, 16384, rows=4, bits=3, codebooks="mcg")
    names = labels.names([LINEAR, replace(LINEAR, rows=4), other, WIDE, replace(WIDE, bits=WIDE.bits[:-1])])
    assert list(names.values()) == [
        "linear 7168x16384 3 #1",
        "linear 7168x16384 3 #1",
        "linear 7168x16384 3 #2",
        "swiglu 7168x2048 256/8 2..6 #1",
        "swiglu 7168x2048 256/8 2..6 #2",
    ]
    two_matrices = Problem.mlp(2688, 1856, experts=128, top_k=6, bits=((2, 3),))
    assert labels.problem_label(two_matrices) == "mlp 2688x1920 128/6 2_3"
    assert labels.names([LINEAR]) == {LINEAR: "linear 7168x16384 3"}
    assert (kernels.rows_label(1), kernels.rows_label(4)) == ("1 row", "4 rows")


def test_the_table_says_what_is_saved_and_what_undecided_means():
    found = entries()
    text = report.tuned_text(found, labels.names(found))
    head, saves, nothing, undecided, *legend = text.splitlines()
    assert head.split("  ")[0] == "problem" and head.split()[-1] == "config"
    assert saves.split(maxsplit=4)[4] == "1024  98.8  20.0 % (10.0 to 25.0)  large_batch 128x256 s16 half"
    assert nothing.split()[-4:] == ["nothing", "base", "16x64", "s1"] and undecided.split()[-4] == "undecided"
    assert legend[0] == "" and legend[1].startswith("time saved: of the default's") and legend[2] == report.UNDECIDED
    assert report.UNDECIDED not in report.tuned_text({WIDE: found[WIDE]}, labels.names(found))


def test_tables_fit_100_columns():
    found = entries()
    numbered = {p: f"{name} #99" for p, name in labels.names(found).items()}
    text = report.tuned_text(found, numbered)
    findings = [Finding(p, e, 12345.6, 23456.7, "slower than it was") for p, e in found.items()]
    checked = report.checked_text([*findings, Finding(WIDE, found[WIDE], note="nothing was stored")], numbered)
    assert max(map(len, f"{text}\n{checked}".splitlines())) <= 100


def test_json_has_the_same_metric():
    found = entries()
    first, *_, failed = report.tuned_json(found, {LINEAR: "no memory"}, labels.names(found))
    assert first["saved_percent"] == pytest.approx(20.0)
    assert first["saved_percent_interval"] == pytest.approx([10.0, 25.0])
    assert (first["label"], failed["label"], failed["failed"]) == (
        "swiglu 7168x2048 256/8 2..6",
        "linear 7168x16384 3",
        "no memory",
    )


def test_a_check_says_what_is_saved_now_and_what_was():
    found = entries()
    names = labels.names(found)
    findings = [
        Finding(WIDE, found[WIDE], 90.0, 100.0, "slower than it was"),
        Finding(LINEAR, found[LINEAR], 5.0, 5.0),
        Finding(WIDE, found[WIDE], note="not measured: no memory"),
        Finding(LINEAR, found[LINEAR], regression="infeasible: no thread left"),
    ]
    _, slower, ok, unmeasured, fails, _, *details = report.checked_text(findings, names).splitlines()
    assert slower.endswith("1024  slower         90.0  10.0 %          20.0 %")
    assert ok.endswith("ok            5.000  is the default  is the default")
    assert "not measured" in unmeasured and unmeasured.endswith("20.0 %") and " fails " in fails
    assert details == [
        "swiglu 7168x2048 256/8 2..6, 1024 rows: slower than it was",
        "swiglu 7168x2048 256/8 2..6, 1024 rows: not measured: no memory",
        "linear 7168x16384 3, 1 row: infeasible: no thread left",
    ]
    rows = report.checked_json(findings, names)
    assert rows[0]["saved_percent"] == pytest.approx(10.0) and rows[2]["saved_percent"] is None
    assert rows[0]["stored_saved_percent"] == pytest.approx(20.0)


def test_the_longest_label_is_the_longest():
    problem = Problem.swiglu(4096, 4096, rows=256, experts=8, top_k=2, bits=2, accuracy="half")
    assert all(len(labels.config_label(c)) <= len(labels.config_label(LONGEST)) for c in kernels.candidates(problem))
