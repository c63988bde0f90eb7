"""Profiles that nobody should trust: the field that is wrong is named."""

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_marlin import profile
from mlx_marlin.kernels import KernelConfig, Problem
from mlx_marlin.profile import files as profile_files
from mlx_marlin.profile import json as profile_json
from mlx_marlin.profile.active import ProfileError
from mlx_marlin.profile.schema import Measured, Timing
from tests.support.tuning import DOCUMENT, cpu_profile, entry

DECODE = KernelConfig("moe_trellis_swiglu_decode", 2, 128, 2, True, "decode")
NARROW = KernelConfig("moe_trellis_swiglu_decode", 1, 64, 1, True, "decode")
PROBLEM = Problem.swiglu(256, 128, experts=4, top_k=2, bits=((2, 3, 4),), codebooks="3inst")


def _edited(path, value):
    made = cpu_profile({PROBLEM: entry(DECODE, 1.0, NARROW, 2.0, timings=(Measured(DECODE, Timing(20, 1.0, 0.0)),))})
    root = node = json.loads(profile_json.encode(made))
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    return json.dumps(root).encode()


@pytest.mark.parametrize(
    "path, value, where",
    [
        (["device_family"], "M9", "$.device_family"),
        (["tile_size_mapping", "2"], 0, '$.tile_size_mapping["2"]'),
        (["tile_size_mapping", "nine"], 64, "$.tile_size_mapping"),
        (["simdgroup_mapping", "3"], "12", '$.simdgroup_mapping["3"]'),
        (["lookup_table"], [], "$.lookup_table"),
        (["lookup_table", "1", "256"], None, '$.lookup_table["1"]["256"]'),
        (["lookup_table", "1", "256", "(4, 2)"], {}, '$.lookup_table["1"]["256"]["(4, 2)"]'),
        (["lookup_table", "1", "256", "__import__('os')"], {}, '$.lookup_table["1"]["256"]'),
        (["lookup_table", "9" * 5000], {}, "$.lookup_table"),
        (["lookup_table", "\u0664"], {}, "$.lookup_table"),  # an Arabic 4
        (["lookup_table", "01"], {}, "$.lookup_table"),
        (["lookup_table", "0"], {}, "$.lookup_table"),
        (["lookup_table", "1", "25\u0666"], {}, '$.lookup_table["1"]'),
        (
            ["lookup_table", "1", "256", "(2, 3, 4)", "kernel_name"],
            "moe_trellis_swiglu\n",
            '$.lookup_table["1"]["256"]["(2, 3, 4)"].kernel_name',
        ),
        (["fingerprint", "kernel_hash"], "abc\n", "$.fingerprint.kernel_hash"),
        (["problems", 0, "problem", "top_k"], 5, "$.problems[0].problem"),  # of 4 experts
        (["problems", 0, "objective"], [1.0, 0.0], "$.problems[0].objective"),
        (
            ["lookup_table", "1", "256", "(2, 3, 4)", "tile_size_m"],
            1 << 40,
            '$.lookup_table["1"]["256"]["(2, 3, 4)"].tile_size_m',
        ),
        (
            ["lookup_table", "1", "256", "(2, 3, 4)", "kernel_name"],
            "../x",
            '$.lookup_table["1"]["256"]["(2, 3, 4)"].kernel_name',
        ),
        (["adaptation_history_len"], 0, "$.adaptation_history_len"),
        (["benchmark_count"], -1, "$.benchmark_count"),
        (["fingerprint", "cores"], 1.5, "$.fingerprint.cores"),
        (["fingerprint", "kernel_hash"], "xyz", "$.fingerprint.kernel_hash"),
        (["source"], "guessed", "$.source"),
        (["extra"], 1, "$"),
        (["problems", 0, "problem", "rows"], -1, "$.problems[0].problem.rows"),
        (["problems", 0, "problem", "bits"], [[2, 3]], "$.problems[0].problem"),
        (["problems", 0, "problem", "bits"], [[2, 3, 99]], "$.problems[0].problem.bits[0][2]"),
        (["problems", 0, "problem", "codebooks"], ["mul1", "mcg"], "$.problems[0].problem"),
        (["problems", 0, "config", "kernel_name"], "moe_rm_rf", "$.problems[0]"),
        (["problems", 0, "samples", "median_ms"], "fast", "$.problems[0].samples.median_ms"),
        (["problems", 0, "ratio"], [1.0], "$.problems[0].ratio"),
        (["problems", 0, "ratio"], [1.0, 0.0, 1.0], "$.problems[0].ratio[1]"),  # whose logarithm a check takes
        (["problems", 0, "over_control"], [1.0, 1.0, 0], "$.problems[0].over_control[2]"),
        (["problems", 0, "timings", 0, "config", "simdgroups"], True, "$.problems[0].timings[0].config.simdgroups"),
    ],
)
def test_bad_field_is_named_by_its_path(path, value, where):
    with pytest.raises(ProfileError, match=re.escape(f" at {where}. Correct")):
        profile_json.decode(_edited(path, value))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"device_name": NaN}',
        b"1e999",
        json.dumps({k: v for k, v in DOCUMENT.items() if k != "lookup_table"}).encode(),
    ],
)
def test_not_a_profile(data):
    with pytest.raises(ProfileError, match=r" at \$"):
        profile_json.decode(data)


def test_duplicate_problem():
    made = json.loads(profile_json.encode(cpu_profile({PROBLEM: entry(DECODE, 1.0, NARROW, 2.0)})))
    made["problems"] *= 2
    with pytest.raises(ProfileError, match=re.escape("$.problems[1].problem")):
        profile_json.decode(json.dumps(made).encode())


@given(st.binary(max_size=200))
@settings(max_examples=100, deadline=None)
def test_noise_is_refused(data):
    with pytest.raises(ProfileError):
        profile_json.decode(data)


def test_oversized_file(tmp_path, monkeypatch):
    monkeypatch.setattr(profile_files, "MAX_FILE_BYTES", 10)
    path = tmp_path / "big.json"
    path.write_text(json.dumps(DOCUMENT))
    with pytest.raises(ProfileError, match="larger than"):
        profile.load(path)
