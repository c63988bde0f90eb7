"""The selector: its rules, its reasons, and what it learns from timings."""

import random
import sys
import threading
from itertools import product

import pytest

from mlx_marlin import kernels, selection
from mlx_marlin.kernels import Problem
from mlx_marlin.selection.selector import MixedKernelSelector

DECODE, PREFILL4 = "moe_trellis_swiglu_decode", "moe_trellis_swiglu_prefill4"
BASE, LARGE = "moe_trellis_swiglu", "moe_trellis_swiglu_large_batch"
MIXED = [2, 2, 3, 4]


def problem(rows=1, top_k=2, hidden=128):
    return Problem.swiglu(hidden, 128, rows=rows, experts=4, top_k=top_k, bits=((2, 2, 2), (3, 3, 3)))


@pytest.fixture
def selector():
    return MixedKernelSelector(exploration_rate=0.0)


def record(selector, name, latencies, batch_size=1, problem=None):
    for latency in latencies:
        selector.record_latency(name, batch_size, latency, problem)


def noisy(mean, n, seed, spread=0.03):
    rng = random.Random(seed)
    return [mean * (1 + spread * rng.gauss(0, 1)) for _ in range(n)]


# The rules.


@pytest.mark.parametrize(
    "rows, name",
    [(1, DECODE), (2, PREFILL4), (16, PREFILL4), (17, BASE), (32, BASE), (33, LARGE), (100_000, LARGE)],
)
def test_rows_decide_the_variant(selector, rows, name):
    chosen, metadata = selector.select_kernel(rows, MIXED)
    assert chosen == metadata["kernel_name"] == name
    assert metadata["reason"].startswith(f"batch_size: {rows} row") and not metadata["explored"]
    with_fp32 = selector.select_kernel(rows, MIXED, use_fp32_acc=True)
    assert with_fp32[0] == name + "_fp32acc"


def test_a_triple_takes_its_own_decode_kernel_at_one_row(selector):
    widths = dict(gate_bits=6, up_bits=2, down_bits=3)
    name, metadata = selector.select_kernel(1, MIXED, **widths)
    assert name == "moe_trellis_swiglu_decode_6_2_3" and metadata["reason"].startswith("specialized_decode")
    assert selector.select_kernel(1, MIXED, **widths, use_fp32_acc=True)[0] == "moe_trellis_swiglu_decode_6_2_3_fp32acc"
    assert selector.select_kernel(2, MIXED, **widths)[0] == PREFILL4
    assert selector.select_kernel(1, MIXED, gate_bits=6, up_bits=2)[0] == DECODE


@pytest.mark.parametrize(
    "bits, family",
    [
        ([2, 2, 3], "fast_2bit"),
        ([2, 2, 3, 4], "mixed_bpw"),
        ([2, 2, 2, 3, 4], "fast_2bit"),
        ([2, 3, 4, 6], "mixed_bpw"),
        ([2, 4], "standard"),
        ([4, 4], "standard"),
        ([], "standard"),
    ],
)
def test_the_mix_names_the_family_only(selector, bits, family):
    for rows, name in ((1, DECODE), (20, BASE)):
        chosen, metadata = selector.select_kernel(rows, bits)
        assert (chosen, metadata["family"]) == (name, family)


def test_memory_pressure_takes_the_base_kernel(selector):
    record(selector, PREFILL4, [2.0] * 40, 4)
    record(selector, DECODE, [1.0] * 40, 4)
    name, metadata = selector.select_kernel(4, MIXED, gpu_memory_pressure=0.91)
    assert name == BASE and metadata["reason"].startswith("memory_pressure: 0.91")
    assert selector.select_kernel(4, MIXED, gpu_memory_pressure=0.9)[0] == DECODE
    exploring = MixedKernelSelector(exploration_rate=1.0)
    assert exploring.select_kernel(4, MIXED, gpu_memory_pressure=0.95)[0] == BASE
    assert MixedKernelSelector(memory_pressure_threshold=0.5).select_kernel(4, MIXED, 0.6)[0] == BASE


@pytest.mark.parametrize(
    "rows, share, name", [(40, 0.9, LARGE), (34, 0.88, BASE), (18, 0.86, PREFILL4), (34, 0.84, LARGE)]
)
def test_a_lopsided_pattern_takes_the_kernel_of_the_top_experts_rows(selector, rows, share, name):
    pattern = {"top_expert_share": share, "tokens_per_expert_avg": rows * 2 / 5, "num_activated_experts": 5}
    chosen, metadata = selector.select_kernel(rows, MIXED, pattern=pattern)
    assert chosen == name
    assert metadata["reason"].startswith("activation_pattern" if share >= 0.85 else "batch_size")
    one_expert_each = pattern | {"tokens_per_expert_avg": rows / 5}
    assert selector.select_kernel(rows, MIXED, pattern=one_expert_each)[1]["reason"].startswith("batch_size")
    assert selector.select_kernel(1, MIXED, pattern=pattern)[1]["reason"].startswith("batch_size")


def test_top_k_of_the_problem_counts_for_the_pattern(selector):
    pattern = {"top_expert_share": 0.88}
    assert selector.select_kernel(34, MIXED, pattern=pattern, problem=problem(34, 2))[0] == BASE
    assert selector.select_kernel(34, MIXED, pattern=pattern, problem=problem(34, 1))[0] == LARGE


def test_a_kernel_that_is_not_available_is_replaced(selector):
    name, metadata = selector.select_kernel(1, MIXED, available_kernels={BASE})
    assert name == BASE
    assert metadata["reason"] == f"fallback_availability: Selected kernel {DECODE} not available, using {BASE} instead"
    assert selector.select_kernel(1, MIXED, available_kernels={DECODE, BASE})[0] == DECODE


@pytest.mark.parametrize("only", [DECODE, LARGE, PREFILL4 + "_fp32acc", "moe_trellis_mixed_swiglu_decode_1_2_3"])
def test_the_only_available_kernel_is_taken(only):
    for exploration, rows, pressure, fp32 in product((0.0, 1.0), (1, 4, 20, 64), (0.0, 0.99), (False, True)):
        selector = MixedKernelSelector(exploration_rate=exploration, seed=1)
        name, metadata = selector.select_kernel(rows, MIXED, pressure, use_fp32_acc=fp32, available_kernels={only})
        assert name == only == metadata["kernel_name"]


def test_the_nearest_available_kernel_is_taken(selector):
    other_triple = "moe_trellis_swiglu_decode_6_3_4"
    widths = dict(gate_bits=6, up_bits=2, down_bits=3)
    assert selector.select_kernel(1, [2], **widths, available_kernels={other_triple, DECODE, BASE})[0] == DECODE
    assert selector.select_kernel(1, [2], **widths, available_kernels={other_triple, LARGE})[0] == LARGE
    twin = "moe_trellis_mixed_swiglu_prefill4"
    assert selector.select_kernel(4, [2], available_kernels={twin, DECODE, BASE})[0] == twin
    assert selector.select_kernel(4, [2], available_kernels={LARGE, BASE, DECODE})[0] == BASE


# Evidence.


def test_significantly_faster_replaces_the_rules(selector):
    record(selector, DECODE, noisy(1.0, 10, 0))
    record(selector, BASE, noisy(0.8, 10, 1))
    name, metadata = selector.select_kernel(1, MIXED)
    assert name == BASE and metadata["reason"] == f"evidence: {BASE} is significantly faster than {DECODE}"
    assert metadata["candidates"][BASE]["samples"] == 10
    assert metadata["candidates"][BASE]["mean_ms"] == pytest.approx(0.8, rel=0.05)
    assert metadata["candidates"][LARGE] == {"samples": 0}
    statistics = selector.get_statistics()
    assert (
        statistics["switches"] == 1 and statistics["selection_accuracy"] == 1.0 and statistics["tracked_kernels"] == 2
    )


def test_evidence_also_replaces_a_specialised_kernel_and_a_pattern(selector):
    triple = "moe_trellis_swiglu_decode_6_2_3"
    record(selector, triple, noisy(1.0, 20, 0))
    record(selector, DECODE, noisy(0.7, 20, 1))
    assert selector.select_kernel(1, MIXED, gate_bits=6, up_bits=2, down_bits=3)[0] == DECODE
    record(selector, BASE, noisy(1.0, 20, 0), 34)
    record(selector, LARGE, noisy(0.7, 20, 1), 34)
    assert selector.select_kernel(34, MIXED, pattern={"top_expert_share": 0.9})[0] == LARGE


def test_another_triples_kernel_never_competes(selector):
    record(selector, DECODE, [1.0] * 40)
    record(selector, "moe_trellis_swiglu_decode_6_2_3", [0.1] * 40)
    assert selector.select_kernel(1, MIXED)[0] == DECODE
    assert "moe_trellis_swiglu_decode_6_2_3" not in selector.select_kernel(1, MIXED)[1]["candidates"]


def test_slower_equal_or_too_few_change_nothing(selector):
    record(selector, DECODE, noisy(1.0, 100, 0))
    record(selector, BASE, noisy(1.2, 100, 1))
    record(selector, PREFILL4, noisy(0.5, 4, 2))
    assert selector.select_kernel(1, MIXED)[0] == DECODE


def test_evidence_stays_within_its_bucket_problem_and_accumulation(selector):
    one, other = problem(1), problem(1, hidden=256)
    for p in (None, one):
        record(selector, DECODE, noisy(1.0, 20, 0), problem=p)
    record(selector, BASE, noisy(0.5, 20, 1), problem=one)
    assert selector.select_kernel(1, MIXED, problem=one)[0] == BASE
    assert selector.select_kernel(1, MIXED, problem=other)[0] == DECODE
    assert selector.select_kernel(1, MIXED)[0] == DECODE
    assert selector.select_kernel(1, MIXED, problem=one, use_fp32_acc=True)[0] == DECODE + "_fp32acc"
    record(selector, PREFILL4, noisy(1.0, 20, 0), 2)
    record(selector, BASE, noisy(0.5, 20, 1), 16)
    assert (
        selector.select_kernel(9, MIXED)[0] == BASE
        and selector.select_kernel(17, MIXED)[1]["reason"] == "batch_size: 17 rows"
    )


def test_it_switches_back_when_the_world_changes(selector):
    record(selector, DECODE, noisy(1.0, 20, 0))
    record(selector, BASE, noisy(0.8, 20, 1))
    assert selector.select_kernel(1, MIXED)[0] == BASE
    assert selector.select_kernel(1, MIXED)[1]["candidates"][BASE] == {"samples": 0}
    record(selector, DECODE, noisy(1.0, 20, 2))
    record(selector, BASE, noisy(1.5, 20, 3))
    assert selector.select_kernel(1, MIXED)[0] == DECODE
    assert selector.get_statistics()["switches"] == 2


def test_a_change_after_the_last_look_is_still_noticed(selector):
    for i, (a, b) in enumerate(zip(noisy(1.0, 500, 0), noisy(1.0, 500, 1))):
        selector.record_latency(DECODE, 1, a)
        selector.record_latency(BASE, 1, b)
        assert selector.select_kernel(1, MIXED)[0] == DECODE, i
    record(selector, BASE, noisy(0.8, 100, 2))
    record(selector, DECODE, noisy(1.0, 100, 3))
    assert selector.select_kernel(1, MIXED)[0] == BASE


def test_evidence_respects_what_is_available(selector):
    record(selector, DECODE, noisy(1.0, 20, 0))
    record(selector, BASE, noisy(0.8, 20, 1))
    assert selector.select_kernel(1, MIXED, available_kernels={DECODE, LARGE})[0] == DECODE
    assert selector.select_kernel(1, MIXED, available_kernels={DECODE, BASE})[0] == BASE


def test_history_length_bounds_what_is_kept():
    selector = MixedKernelSelector(history_len=7, exploration_rate=0.0)
    record(selector, DECODE, [8.0] * 5 + [2.0] * 7)
    evidence = selector.select_kernel(1, MIXED)[1]["candidates"][DECODE]
    assert evidence["samples"] == 7 and evidence["mean_ms"] == pytest.approx(2.0)
    assert 2.0 < evidence["ema_ms"] < 8.0


def test_reset_forgets(selector):
    record(selector, DECODE, noisy(1.0, 20, 0))
    record(selector, BASE, noisy(0.8, 20, 1))
    assert selector.select_kernel(1, MIXED)[0] == BASE
    selector.reset_history()
    assert selector.select_kernel(1, MIXED)[0] == DECODE
    assert selector.get_statistics() == {
        "selection_accuracy": 0.0,
        "total_selections": 1,
        "explorations": 0,
        "exploration_rate": 0.0,
        "switches": 0,
        "tracked_kernels": 0,
    }


# Exploration and accuracy.


def test_exploration_is_repeatable_and_has_its_rate():
    runs = []
    for seed in (7, 7, 8):
        selector = MixedKernelSelector(exploration_rate=0.05, seed=seed)
        runs.append([selector.select_kernel(4, MIXED)[0] for _ in range(4000)])
        explored = sum(name != PREFILL4 for name in runs[-1])
        assert explored == selector.get_statistics()["explorations"] and 140 < explored < 260
        assert set(runs[-1]) == {DECODE, PREFILL4, BASE, LARGE}
    assert runs[0] == runs[1] != runs[2]


def test_exploration_says_so():
    selector = MixedKernelSelector(exploration_rate=1.0, seed=0)
    name, metadata = selector.select_kernel(4, MIXED)
    assert (
        name != PREFILL4
        and metadata["explored"]
        and metadata["reason"] == f"exploration: trying {name} instead of {PREFILL4}"
    )
    assert selector.select_kernel(4, MIXED, available_kernels={PREFILL4})[0] == PREFILL4
    selector.set_exploration_rate(0.0)
    assert selector.exploration_rate == 0.0 and selector.select_kernel(4, MIXED)[0] == PREFILL4


def test_selection_accuracy_counts_exploiting_choices_only():
    selector = MixedKernelSelector(exploration_rate=0.0)
    selector.select_kernel(1, MIXED)
    assert selector.get_statistics()["selection_accuracy"] == 0.0
    record(selector, DECODE, [1.0, 1.1] * 4)
    selector.select_kernel(1, MIXED)
    assert selector.get_statistics()["selection_accuracy"] == 1.0
    record(selector, BASE, [1.0, 1.05] * 4)  # faster, but not significantly
    selector.select_kernel(1, MIXED)
    assert selector.get_statistics()["selection_accuracy"] == 0.5
    selector.set_exploration_rate(1.0)
    for _ in range(10):
        selector.select_kernel(1, MIXED)
    assert selector.get_statistics()["selection_accuracy"] == 0.5


def test_the_shared_instance():
    selection.reset_history()
    selection.set_exploration_rate(0.0)
    try:
        assert selection.get_mixed_kernel(1, MIXED, 0.3, 6, 2, 3, False, None)[0] == "moe_trellis_swiglu_decode_6_2_3"
        for name, latency in ((PREFILL4, 1.0), (BASE, 0.5)):
            for _ in range(20):
                selection.record_kernel_latency(name, 8, latency)
        assert selection.get_mixed_kernel(batch_size=8, active_expert_bits=MIXED)[0] == BASE
        assert selection.get_statistics()["total_selections"] == 2
    finally:
        selection.reset_history()
        selection.set_exploration_rate(0.05)


def test_threads_lose_nothing():
    """Selections, latencies and switches of several threads are those of one, whatever their order."""
    selector, names = MixedKernelSelector(history_len=5000, exploration_rate=0.3, seed=0), (PREFILL4, BASE)
    failures, seen, gate = [], [], threading.Barrier(4)

    def work():
        try:
            gate.wait()
            for i in range(300):
                seen.append(selector.select_kernel(8, MIXED)[1]["explored"])
                selector.record_latency(names[i % 2], 8, 1.25)  # with noise, chance would switch now and then
        except Exception as error:
            failures.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # as many interruptions as possible
    try:
        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not failures
    statistics = selector.get_statistics()
    assert statistics["total_selections"] == len(seen) == 1200
    assert statistics["explorations"] == sum(seen) > 200
    assert statistics["switches"] == 0 and statistics["tracked_kernels"] == 2
    selector.set_exploration_rate(0.0)
    evidence = selector.select_kernel(8, MIXED)[1]["candidates"]
    for name in names:
        assert evidence[name]["samples"] == 600
        assert evidence[name]["mean_ms"] == pytest.approx(1.25, rel=1e-12)


def test_every_name_that_can_be_selected_is_a_kernel_name():
    selector = MixedKernelSelector(exploration_rate=0.5, seed=3)
    for rows, fp32, triple in product((1, 2, 17, 33), (False, True), (None, (6, 2, 3), (1, 8, 5))):
        widths = dict(zip(("gate_bits", "up_bits", "down_bits"), triple or ()))
        for _ in range(20):
            name, _ = selector.select_kernel(rows, MIXED, use_fp32_acc=fp32, **widths)
            parts = kernels.parse_name(name)
            assert parts.fp32acc == fp32 and parts.triple in (None, triple)
