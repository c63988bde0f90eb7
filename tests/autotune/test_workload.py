"""A problem made runnable for the tuner: inputs, bytes, comparison with the codec, memory."""

from dataclasses import replace
from itertools import product

import mlx.core as mx
import numpy as np
import pytest

from mlx_marlin import kernels
from mlx_marlin.autotune import workload
from mlx_marlin.autotune.workload import ConfigClock, Workload
from mlx_marlin.kernels import Problem
from mlx_marlin.layers.linear import TrellisLinear
from mlx_marlin.ops import reference
from mlx_marlin.weights.experts import ExpertBank
from tests.support import cases
from tests.support.tuning import linear, mixed_experts


@pytest.fixture(autouse=True)
def small_cache(monkeypatch):
    monkeypatch.setattr(workload, "last_level_cache", lambda: 1 << 16)


def problem(rows=3, dtype="float32", activation="silu", bits=((3, 3, 3),), **more):
    sizes = {"top_k": 2, "hidden": 256, "intermediate": 128, "experts": 4, "codebooks": ("mcg",)}
    return Problem.swiglu(rows=rows, bits=bits, activation=activation, dtype=dtype, **(sizes | more))


# Inputs


@pytest.mark.parametrize("layer", [linear(), TrellisLinear(linear()), mixed_experts()])
def test_inputs(layer):
    w = Workload.of_layer(layer, 5, top_k=2)
    assert w.x.shape == (5, 256) and w.x.dtype == mx.float32
    y = w.run(kernels.default(w.problem), w.x, 3)
    assert y.shape == ((5, 2, 256) if w.problem.kind == "swiglu" else (5, 256))
    assert np.isfinite(np.array(y)).all()


def test_tokens_are_routed_to_distinct_experts():
    w = Workload.of_layer(mixed_experts(), 50, top_k=2)
    for indices, _ in w._routings:
        assert (np.array(indices)[:, 0] != np.array(indices)[:, 1]).all()


def test_calls_rotate_over_more_than_the_cache():
    w = Workload.of_layer(linear(), 1)
    assert len(w.sets) * w.bytes_touched > 1 << 16
    assert mx.array_equal(w.sets[0][0].arrays[0], w.sets[1][0].arrays[0])
    assert w.sets[0][0].arrays[0] is not w.sets[1][0].arrays[0]


def test_bytes_touched_are_those_of_the_active_experts():
    w = Workload.of_layer(mixed_experts(), 1, top_k=1)
    # gate and up are 256 x 128, down 128 x 256: 32768 weights each, with 384 float16 scales.
    per_bits = {t: sum(32768 * b // 8 + 768 for b in t) for t in ((2, 3, 4), (3, 3, 3), (4, 2, 6))}
    chosen = [int(np.array(i)[0, 0]) for i, _ in w._routings]
    expected = np.mean([list(per_bits.values())[e] for e in chosen]) + 2 * 256 * 4
    assert w.bytes_touched == pytest.approx(expected)


def test_a_synthetic_workload_has_the_problem():
    mixed = problem(
        bits=((2, 3, 4), (3, 3, 3)),
        hidden=200,
        experts=6,
        codebooks=("3inst", "mul1"),
        activation="gelu_tanh",
        combine=True,
        bias=True,
    )
    w = Workload.synthetic(mixed)
    gate, up, down = (s.source for s in w.sets[0])
    assert sorted(set(zip(gate.bits, up.bits, down.bits))) == [(2, 3, 4), (3, 3, 3)]
    assert {c for s in (gate, up, down) for c in s.codebooks} == {"3inst", "mul1"}
    assert w.check(kernels.default(mixed)) < 2e-5


@pytest.mark.parametrize(
    "change, message",
    [({"rows": 0}, "a timing needs at least 1 row, got 0"), ({"top_k": 5}, "at most the number of experts 4, got 5")],
)
def test_what_cannot_be_timed(change, message):
    with pytest.raises(ValueError, match=message):
        Workload.synthetic(replace(problem(), **change))


# Checks


@pytest.mark.parametrize("dtype", kernels.DTYPES)
@pytest.mark.parametrize("activation", kernels.ACTIVATIONS)
def test_checks_agree_with_the_codec(activation, dtype):
    p = problem(7, dtype, activation)
    assert 0 <= Workload.synthetic(p).check(kernels.default(p)) < workload.TOLERANCE[dtype]


@pytest.mark.parametrize("activation", [name for name in cases.AXES["activation"] if name != "none"])
def test_the_reference_is_that_of_the_cases(activation):
    """Two independent ways through the codec."""
    case = cases.Case(3, "mul1", "float32", 5, "padded", activation, mix="both", bias=True, top_k=2, scores=True)
    x, indices, scores = case.inputs()
    bank = case.bank()
    ours = reference.experts_output(
        np.array(x).astype(np.float64),
        np.array(indices),
        bank.stacks,
        np.array(scores),
        case.function,
        case.alpha,
        case.limit,
    )
    np.testing.assert_allclose(ours, case.reference(x, indices, scores), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("activation", kernels.UNGATED)
def test_experts_without_a_gate(activation):
    bits = ((2, 3), (3.5, 1))
    asked = Problem.mlp(256, 128, rows=7, experts=4, top_k=2, bits=bits, activation=activation, combine=True, bias=True)
    made = Workload.synthetic(asked)
    up, down = (stack.source for stack in made.sets[0])
    assert sorted(set(zip(up.bits, down.bits))) == list(bits)
    assert 0 <= made.check(kernels.default(asked)) < workload.TOLERANCE["float32"]
    of_bank = Workload.of_layer(ExpertBank(None, up, down), 7, top_k=2)
    assert of_bank.problem.kind == "mlp" and of_bank.problem.bits == bits
    assert of_bank.check(kernels.default(of_bank.problem)) < workload.TOLERANCE["float32"]


@pytest.mark.parametrize("rows", [1, 2, 16, 20, 33, 500])
def test_a_check_runs_the_rows_of_its_class(rows, monkeypatch):
    """The largest number of rows with this usual variant, one less, and the fewest: not just those of the problem."""
    seen, call = [], Workload._call
    monkeypatch.setattr(Workload, "_call", lambda self, c, x, *rest: seen.append(len(x)) or call(self, c, x, *rest))
    w = Workload.of_layer(linear(), rows)
    w.check(kernels.default(w.problem))
    variant = kernels.default_variant(rows)
    assert seen == list(workload.CHECK_ROWS[variant])
    assert {kernels.default_variant(n) for n in seen} == {variant}
    assert workload.problem_class(w.problem).rows == max(seen)


@pytest.mark.parametrize("wrong_rows", [2, 15, 16])
def test_a_config_that_is_wrong_at_other_rows_of_its_class_is_found(wrong_rows, monkeypatch):
    call = Workload._call

    def sabotaged(self, config, x, *rest):
        y = call(self, config, x, *rest)
        return y + 0.01 if len(x) == wrong_rows else y

    monkeypatch.setattr(Workload, "_call", sabotaged)
    w = Workload.of_layer(linear(), 4)
    with pytest.raises(ValueError, match=f"wrong result: of {wrong_rows} rows one is off"):
        w.check(kernels.default(w.problem))


def test_wrong_results_are_found(monkeypatch):
    w = Workload.of_layer(mixed_experts(), 3, top_k=2)
    right = w._call
    for wrong in (lambda y: y * 1.001, lambda y: y.at[0, 0, 0].add(1.0), lambda y: y * mx.nan, lambda y: y[..., :-1]):
        monkeypatch.setattr(w, "_call", lambda *a, wrong=wrong: wrong(right(*a)))
        with pytest.raises(ValueError, match="wrong result|the result has shape"):
            w.check(kernels.default(w.problem))


def test_half_sums_may_be_off_by_their_roundings():
    on, off = (replace(kernels.default(problem(4)), use_fp32_acc=fp32) for fp32 in (True, False))
    for dtype, device in product(kernels.DTYPES, kernels.DEVICES):
        p = problem(4, dtype, codebooks="mul1", device=device, accuracy="half")
        assert workload.tolerance(p, on) == workload.TOLERANCE[dtype]
        assert 1.5e-3 < workload.tolerance(p, off) <= 4e-3
    # The CPU has no integers of other codebooks.
    assert workload.tolerance(problem(4), off) == workload.TOLERANCE["float32"]


# Memory


@pytest.fixture
def endless_cache(monkeypatch):
    """A cache so large that only the limit ends the copying."""
    monkeypatch.setattr(workload, "last_level_cache", lambda: 1 << 40)


BIG = Problem.linear(1024, 1024, rows=64, bits=3)  # 393 KB of codes


def used_by(w: Workload, call) -> int:
    """Peak bytes of MLX over what was active before the workload was made."""
    mx.eval(call())
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    mx.eval(call())
    return w.held_bytes + mx.get_peak_memory() - before


@pytest.mark.parametrize("copies", [0, 1, 3])
def test_copies_leave_room_for_a_call(endless_cache, copies):
    codes = 1024 * 1024 * 3 // 8
    limit = Workload.synthetic(BIG, memory_limit=2 << 20).weight_bytes + workload.call_bytes(BIG) + copies * codes
    w = Workload.synthetic(BIG, memory_limit=limit)
    assert len(w.sets) == 1 + copies
    config = kernels.default(BIG)
    assert used_by(w, lambda: w.run(config, w.x, 0)) <= limit
    ConfigClock(w, config, 1e-4, limit).warm_up(2)  # raises if a call does not fit


def test_what_a_workload_holds_is_what_mlx_counts(endless_cache):
    workload.release()  # what other tests left to the garbage collector
    before = mx.get_active_memory()
    w = Workload.synthetic(BIG, memory_limit=4 << 20)
    held = mx.get_active_memory() - before
    assert len(w.sets) > 3 and held == pytest.approx(w.held_bytes, rel=0.02)


def test_sizes_are_known_before_anything_is_allocated(monkeypatch):
    monkeypatch.setattr(workload.synthetic, "random_projection", lambda *a: pytest.fail("allocated"))
    with pytest.raises(MemoryError, match=r"the weights take 0\.4 MB and a call about .* the memory limit is 0\.1 MB"):
        Workload.synthetic(BIG, memory_limit=100_000)


def test_a_large_problem_is_refused_at_once():
    huge = problem(rows=64, hidden=1 << 14, intermediate=1 << 14, experts=512, top_k=8)
    with pytest.raises(MemoryError, match="the weights take 154618.8 MB"):
        Workload.synthetic(huge, memory_limit=1 << 30)


@pytest.mark.parametrize(
    "p",
    [
        BIG,
        problem(rows=64),
        problem(rows=64, combine=True),
        problem(rows=300, dtype="float16", hidden=1024, combine=True),
    ],
)
def test_the_estimate_of_a_call_covers_the_call(p):
    w = Workload.synthetic(p)
    clock = ConfigClock(w, kernels.default(p), 1e-4, None)
    clock.weigh()
    inputs = w.held_bytes - w.weight_bytes - (len(w.sets) - 1) * workload._code_bytes(w.sets[0])
    assert clock.memory_bytes + inputs <= workload.call_bytes(p)


def test_a_call_beyond_the_limit_says_so():
    w = Workload.synthetic(BIG)
    with pytest.raises(MemoryError, match=r"a call takes .* MB beside .* the memory limit is"):
        ConfigClock(w, kernels.default(BIG), 1e-4, w.held_bytes + 1000).weigh()


def test_copies_are_given_back_one_by_one(endless_cache):
    w = Workload.synthetic(BIG, memory_limit=2 << 20)
    held, count = w.held_bytes, len(w.sets)
    assert w.drop_copy() and len(w.sets) == count - 1 and w.held_bytes < held
    while w.drop_copy():
        pass
    assert len(w.sets) == 1


def test_a_gpus_scratch_is_that_of_the_plan():
    from mlx_marlin import ops

    on_gpu = problem(rows=64, device="gpu", dtype="float16")
    assert workload.call_bytes(on_gpu) > sum(ops.plan(on_gpu)["scratch"].values()) > 0
