"""Profiles: round trips, merging and places."""

import json
import math
import multiprocessing
import os
import time
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

from mlx_marlin import device, kernels, profile
from mlx_marlin.kernels import KernelConfig, Problem
from mlx_marlin.profile import files as profile_files
from mlx_marlin.profile import json as profile_json
from mlx_marlin.profile import schema
from mlx_marlin.profile.active import AutotuneConfig, ProfileError
from mlx_marlin.profile.schema import Entry, Measured, Rejected, Timing
from mlx_marlin.storage import atomic
from tests.support.tuning import DOCUMENT, cpu_profile
from tests.support.tuning import entry as any_entry

DECODE = KernelConfig("moe_trellis_swiglu_decode", 2, 128, 2, True, "decode")
NARROW = KernelConfig("moe_trellis_swiglu_decode", 1, 64, 1, True, "decode")


def problem(rows=1, hidden=256, bits=((2, 3, 4),), dtype="float32", on="cpu"):
    return Problem.swiglu(
        hidden, 128, rows=rows, experts=4, top_k=2, bits=bits, codebooks="3inst", dtype=dtype, device=on
    )


def entry(config=DECODE, ms=1.0, default=NARROW, baseline=2.0, **more):
    return any_entry(config, ms, default, baseline, **more)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_MARLIN_CACHE_DIR", str(tmp_path))
    profile.use_profile(None)
    yield tmp_path
    profile.use_profile(None)


# Written and read back


@st.composite
def profiles(draw, stamps=st.integers(1, 3)):
    configs = st.builds(
        KernelConfig,
        st.sampled_from(["moe_trellis_swiglu", "moe_trellis_swiglu_decode_6_2_3"]),
        st.integers(1, 64),
        st.integers(1, 256),
        st.integers(1, 16),
        st.booleans(),
        st.sampled_from(kernels.VARIANTS),
    )
    times = st.builds(Timing, st.integers(0, 50), st.floats(0, 1e6), st.floats(0, 1))
    made = AutotuneConfig.of_machine("cpu")
    for _ in range(draw(st.integers(0, 4))):
        p = problem(
            draw(st.sampled_from([1, 4, 64])),
            draw(st.sampled_from([128, 256])),
            draw(st.sampled_from([((2, 2, 2),), ((2, 3, 4), (3, 3, 3))])),
            draw(st.sampled_from(kernels.DTYPES)),
        )
        made.add(
            p,
            Entry(
                draw(configs),
                draw(times),
                draw(configs),
                draw(times),
                (0.5, 0.25, 1.5),
                "faster",
                "correct",
                float(draw(stamps)),
                (Measured(draw(configs), draw(times), 1e-6, 3.5),),
                (Rejected(draw(configs), "wrong"),),
            ),
        )
    made.benchmark_count = len(made.problems)
    return made


@given(profiles())
@settings(max_examples=50, deadline=None)
def test_round_trip(made):
    assert profile_json.decode(profile_json.encode(made)) == made


def test_document_schema_round_trip(tmp_path):
    path = tmp_path / "m4.json"
    path.write_text(json.dumps(DOCUMENT))
    loaded = profile.load(path)
    assert loaded.fingerprint is None and loaded.benchmark_count == 250
    assert loaded.lookup_table[4][4096][2, 4].tile_size_m == 64  # verbatim
    assert json.loads(profile_json.encode(loaded)) == DOCUMENT


def test_prefill_means_prefill4():
    text = json.dumps(DOCUMENT).replace('"decode"', '"prefill"').encode()
    assert profile_json.decode(text).lookup_table[4][4096][2, 4].kernel_variant == "prefill4"


def test_one_width_is_a_tuple_key():
    made = cpu_profile({problem(bits=((2, 2, 2),)): entry()})
    assert list(json.loads(profile_json.encode(made))["lookup_table"]["1"]["256"]) == ["(2,)"]


# Merging


@given(profiles(st.integers(1, 2)), profiles(st.integers(1, 2)), profiles(st.integers(1, 2)))
@settings(max_examples=50, deadline=None)
def test_merge_laws(a, b, c):
    merge = schema.merge
    assert merge(a, a).problems == a.problems
    assert merge(a, b).problems == merge(b, a).problems
    left, right = merge(merge(a, b), c), merge(a, merge(b, c))
    assert left.problems == right.problems and left.lookup_table == right.lookup_table
    assert set(merge(a, b).problems) == set(a.problems) | set(b.problems)


def test_merge_keeps_the_later_entry():
    old, new = (cpu_profile({problem(): entry(c, stamp=t)}) for c, t in ((DECODE, 1.0), (NARROW, 2.0)))
    for merged in (schema.merge(old, new), schema.merge(new, old)):
        assert merged.problems[problem()].config == NARROW
        assert merged.lookup_table[1][256][2, 3, 4] == NARROW


def test_projection_takes_the_lowest_geometric_mean():
    def measured(decode_ms, narrow_ms):
        return tuple(Measured(c, Timing(20, ms, 0.0)) for c, ms in ((DECODE, decode_ms), (NARROW, narrow_ms)))

    # DECODE wins one problem by 10 % and loses the other by 100 %: over both NARROW is faster.
    first = entry(DECODE, 1.0, NARROW, 1.1, timings=measured(1.0, 1.1))
    second = entry(NARROW, 1.0, DECODE, 2.0, timings=measured(2.0, 1.0))
    made = cpu_profile({problem(): first, problem(dtype="float16"): second})
    assert made.lookup_table == {1: {256: {(2, 3, 4): NARROW}}}
    assert math.sqrt(1.1 * 1.0) < math.sqrt(1.0 * 2.0)


def test_projection_does_not_mix_kinds():
    """A layer of experts and a single product may have the same key; each way round the experts have it."""
    one = Problem.linear(256, 128, bits=3)
    experts = problem(bits=((3, 3, 3),))
    assert schema.table_key(one) == schema.table_key(experts)
    both = {one: entry(NARROW, 0.1), experts: entry(DECODE, 9.0)}
    for order in (both, dict(reversed(both.items()))):
        assert cpu_profile(order).lookup_table == {1: {256: {(3,): DECODE}}}
    assert cpu_profile({one: entry(NARROW)}).lookup_table == {1: {256: {(3,): NARROW}}}
    merged = schema.merge(cpu_profile({experts: entry(DECODE)}), cpu_profile({one: entry(NARROW)}))
    assert merged.lookup_table == {1: {256: {(3,): DECODE}}}


def test_projection_of_one_problem_is_its_decision():
    kept = entry(NARROW, 1.01, NARROW, 1.01, timings=(Measured(DECODE, Timing(20, 1.0, 0.0)),))
    assert cpu_profile({problem(): kept}).lookup_table[1][256][2, 3, 4] == NARROW


def _save_one(path, rows):
    profile.save(cpu_profile({problem(rows): entry()}), path)


def test_concurrent_saves_lose_nothing(tmp_path):
    path = tmp_path / "profile.json"
    workers = [
        multiprocessing.get_context("spawn").Process(target=_save_one, args=(path, rows)) for rows in range(1, 5)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    assert {p.rows for p in profile.load(path).problems} == {1, 2, 3, 4}
    assert not list(tmp_path.glob("*.tmp"))


def test_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "profile.json"
    _save_one(path, 1)
    before = path.read_bytes()

    def full(_):
        raise OSError("No space left on device")

    monkeypatch.setattr(atomic.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        _save_one(path, 2)
    assert path.read_bytes() == before and not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize(
    "change", [{"chip": "M4 Max"}, {"cores": 999}, {"kernel_hash": "0123"}, {"instruction_set": "neon"}]
)
def test_foreign_file_is_never_overwritten(tmp_path, change):
    path = tmp_path / "profile.json"
    other = cpu_profile({problem(): entry()})
    other.fingerprint = structs.replace(other.fingerprint, **change)
    profile.save(other, path)
    before = path.read_bytes()
    with pytest.raises(ProfileError, match="not overwritten"):
        profile.save(cpu_profile({problem(4): entry()}), path)
    assert path.read_bytes() == before


def test_a_profile_that_would_not_read_back_is_not_written(tmp_path):
    path = tmp_path / "profile.json"
    _save_one(path, 1)
    before = path.read_bytes()
    for bad in (
        entry(rejected=(Rejected(DECODE, "x" * (schema.MAX_REASON + 1)),)),
        entry(rejected=(Rejected(replace(DECODE, tile_size_m=0), "infeasible"),)),
        entry(ms=math.nan),
        entry(config=replace(DECODE, kernel_name="their_kernel")),
    ):
        with pytest.raises(ProfileError, match=r"the profile for .*profile.json: .* at \$.problems\[1\]"):
            profile.save(cpu_profile({problem(4): bad}), path)
        assert path.read_bytes() == before and not list(tmp_path.glob("*.tmp"))


def test_reasons_are_cut_and_cleaned():
    rejected = Rejected.because(DECODE, "\ud800" + "x" * 10_000)
    made = cpu_profile({problem(): entry(rejected=(rejected,))})
    assert rejected.reason.startswith("?xx") and profile_json.decode(profile_json.encode(made)) == made


@pytest.mark.parametrize(
    "config, can",
    [
        (DECODE, True),
        (replace(DECODE, kernel_name="their_kernel"), True),
        (replace(DECODE, kernel_name="a b"), False),
        (replace(DECODE, simdgroups=0), False),
        (replace(DECODE, tile_size_m=2.5), False),
        (replace(DECODE, kernel_variant="prefill"), False),  # would come back as prefill4
    ],
)
def test_storable(config, can):
    assert profile_json.storable(config) is can


# Clocks that were wrong


def test_entries_from_the_future_do_not_win(tmp_path):
    """They would win every merge until their time comes."""
    path, later = tmp_path / "profile.json", time.time() + 1e6
    path.write_bytes(profile_json.encode(cpu_profile({problem(): entry(NARROW, stamp=later), problem(4): entry()})))
    assert [e.timestamp for e in profile.load(path).problems.values()] == [0.0, 1.0]
    written = profile.save(cpu_profile({problem(): entry(DECODE, stamp=time.time())}), path)
    assert written.problems[problem()].config == DECODE and profile.load(path) == written


def test_a_clock_that_is_set_back_while_tuning(tmp_path):
    made = cpu_profile({problem(): entry(stamp=time.time() + 1e6)})
    written = profile.save(made, tmp_path / "profile.json")
    assert written.problems[problem()].timestamp == 0.0 and profile.load(tmp_path / "profile.json") == written


# Places


def test_a_profile_without_accuracies_is_about_float32():
    made = cpu_profile({problem(): entry()})
    stored = json.loads(profile_json.encode(made))
    for one in stored["problems"]:
        assert one["problem"].pop("accuracy") == "float32"
    assert profile_json.decode(json.dumps(stored).encode()).problems == made.problems
    stored["problems"][0]["problem"]["accuracy"] = "quarter"
    with pytest.raises(ProfileError, match="accuracy"):
        profile_json.decode(json.dumps(stored).encode())


def test_the_accuracies_are_tuned_apart(cache):
    """Each has its entry; the table is that of float32, and says nothing about where halves are allowed."""
    half = replace(problem(), accuracy="half")
    rounding = replace(DECODE, tile_size_n=256, use_fp32_acc=False)
    made = cpu_profile({problem(): entry(), half: entry(rounding)})
    assert made.lookup_table[1][256][(2, 3, 4)] == DECODE
    (cache / "profile.json").write_bytes(profile_json.encode(made))
    profile.use_profile(cache / "profile.json", allow_foreign=True)
    assert profile.find(problem()).config.use_fp32_acc and not profile.find(half).config.use_fp32_acc
    assert profile.find(replace(problem(), hidden=384)).config.use_fp32_acc
    assert profile.find(replace(half, hidden=384)) is None


def test_default_path_tells_machines_apart(cache, monkeypatch):
    here = profile.default_path("cpu")
    assert here.parent == cache / "profiles"
    other = structs.replace(device.fingerprint("cpu"), cores=999)
    monkeypatch.setattr(profile_files, "fingerprint", lambda _: other)
    assert profile.default_path("cpu") != here


def test_the_newest_build_of_this_machine_is_found(cache, monkeypatch):
    mine = profile.default_path("cpu")
    assert profile_files.latest_path("cpu") == mine
    mine.parent.mkdir()
    others = [mine.with_name(f"{mine.stem[:-8]}{digest}.json") for digest in ("0" * 8, "f" * 8)]
    for age, path in enumerate(
        [*others, mine.with_name("cpu-another_chip-00000000.json"), mine.with_suffix(".x.json")]
    ):
        path.write_text("{}")
        os.utime(path, (1000 - age, 1000 - age))
    assert profile_files.latest_path("cpu") == others[0]
    mine.write_text("{}")
    assert profile_files.latest_path("cpu") == mine


def test_unknown_device():
    with pytest.raises(ValueError, match='"cpu" or "gpu"'):
        profile.default_path("tpu")
