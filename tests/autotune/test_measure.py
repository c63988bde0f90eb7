"""The clock, against work of known length and a machine that only the test moves."""

import mlx.core as mx
import pytest

from mlx_marlin import measure, ops
from mlx_marlin.measure import clock
from tests.support import cases


def test_every_sample_is_evaluated_in_order():
    seen = []

    def step(x, i):
        seen.append(i)
        return x + i

    chain = measure.Chain(step, mx.zeros((4,)), floor=1.0)  # a huge floor: chains of two lengths
    chain.warm_up(3)
    assert chain() > 0 and chain() > 0
    assert seen == list(range(len(seen))) and len(seen) > 10


def test_each_call_of_a_chain_waits_for_the_one_before():
    """Only the last call's value is asked for, so that a failure of an earlier one shows that it is waited for."""
    case = cases.Case(3, "mul1", "float32", 1, "block", "silu", top_k=1)
    bank, far = case.bank(), mx.array([[90]], mx.uint32)

    def step(x, i):
        # Known only when it is evaluated: then the CPU refuses it.
        ids = far + (9 if i == 1 else 0) - 90
        return ops.trellis_swiglu(x, ids, bank, stream=mx.cpu)

    chain = measure.Chain(step, mx.ones((1, 128)), floor=1.0)
    chain._run(1)
    with pytest.raises(Exception, match="index 9"):
        chain._run(3)
    chain._run(3)


def test_slope_cancels_the_launch_floor(monkeypatch):
    # A machine where a call takes 1 ms and launching an evaluation 10 ms, on a clock that only the test moves.
    now = [0.0]
    pending = [0]
    monkeypatch.setattr(clock.time, "perf_counter", lambda: now[0])

    def evaluate(_):
        now[0] += 0.010 + 0.001 * pending[0]
        pending[0] = 0

    monkeypatch.setattr(clock.mx, "eval", evaluate)

    def step(x, i):
        pending[0] += 1
        return x

    chain = measure.Chain(step, mx.zeros((1,)), floor=0.010)
    chain.warm_up(5)
    assert chain() == pytest.approx(0.001)
    # Where the floor is below 1 % of a call, single calls are timed.
    chain = measure.Chain(step, mx.zeros((1,)), floor=0.0001)
    chain.warm_up(5)
    assert chain() == pytest.approx(0.011)


def test_a_control_is_a_clock_of_fixed_work(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(clock.time, "perf_counter", lambda: now[0])
    products = []
    matmul = mx.matmul
    monkeypatch.setattr(clock.mx, "matmul", lambda x, w, stream: products.append((x.shape, w.shape)) or matmul(x, w))

    def evaluate(*_):
        now[0] += 0.001

    monkeypatch.setattr(clock.mx, "eval", evaluate)
    control = measure.control(mx.cpu, 1e-9)
    control.warm_up(2)
    assert control() == pytest.approx(0.001) and set(products) == {((16, 1024), (1024, 1024))}


def test_a_slope_that_noise_turned_round_is_measured_again(monkeypatch):
    now, lengths = [0.0], []
    monkeypatch.setattr(clock.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(clock.mx, "eval", lambda _: None)
    chain = measure.Chain(lambda x, i: x, mx.zeros((1,)), floor=1.0)
    chain._length = 5
    times = iter([3.0, 2.0, 1.0, 9.0])  # short, long; short, long
    monkeypatch.setattr(chain, "_run", lambda length: lengths.append(length) or next(times))
    assert chain._once() == pytest.approx(8.0 / 4) and lengths == [1, 5, 1, 5]
