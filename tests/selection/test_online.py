"""Layers that learn from their own latencies, against a planted clock."""

import re

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

import mlx_marlin
from mlx_marlin import TrellisLinear, TrellisSwitchGLU, kernels, profile
from mlx_marlin.dispatch import adaptation as online
from mlx_marlin.weights.synthetic import random_weight
from tests.support.cases import expert_formats, random_experts


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        rng = np.random.default_rng(0)
        self.experts = TrellisSwitchGLU(**random_experts(rng, 128, 128, expert_formats(2, "mul1", "bits")))
        self.out = TrellisLinear(random_weight(rng, 128, 128, 4))

    def __call__(self, x):
        ids = mx.broadcast_to(mx.array([[0, 3]], mx.uint32), (x.shape[0], 2))
        return self.out(self.experts(x, ids, scores=mx.full(ids.shape, 0.5)))


@pytest.fixture
def model(tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_MARLIN_CACHE_DIR", str(tmp_path))
    profile.refresh()
    yield Model()
    profile.refresh()


class Clock:
    """A clock that timed calls advance by what their variant is said to cost, with noise, and a config's first call by
    more; everything else takes no time.
    """

    def __init__(self, monkeypatch):
        self.now, self.cost, self.rng = 0.0, dict.fromkeys(kernels.VARIANTS, 1.0), np.random.default_rng(0)
        self.noise, self.first_ms, self.seen = 0.03, 0.0, set()
        monkeypatch.setattr(online.time, "perf_counter", lambda: self.now)
        for cls in (TrellisLinear, TrellisSwitchGLU):
            monkeypatch.setattr(cls, "run", self.spend(cls.run))

    def spend(self, run):
        def spending(layer, *inputs, config=None):
            if config is not None:
                self.now += 1e-3 * self.cost[config.kernel_variant] * (1 + self.noise * self.rng.standard_normal())
                if (type(layer), config) not in self.seen:  # what compiling costs
                    self.seen.add((type(layer), config))
                    self.now += 1e-3 * self.first_ms
            return run(layer, *inputs, config=config)

        return spending


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def test_a_faster_config_takes_over_and_gives_way_again(model, clock):
    x = mx.ones((20, 128))
    expected = np.array(model(x))
    with mlx_marlin.adapt(model, exploration=0.5, max_overhead=1.0, seed=0) as adaptation:
        clock.cost["prefill4"] = 0.8
        for _ in range(400):
            y = model(x)
        choice = model.experts.explain(20)
        assert choice.config.kernel_variant == "prefill4"
        (saved,) = re.findall(r"measured in use: saved (\d+)% of the time of moe_trellis_swiglu ", str(choice))
        assert 15 <= int(saved) <= 25
        assert model.out.explain(20).config.kernel_variant == "prefill4"
        report = adaptation.report()
        assert report["switches"] == len(report["changed"]) == report["problems"] == 2
        np.testing.assert_allclose(np.array(y), expected, rtol=1e-4, atol=1e-3)
        clock.cost["prefill4"] = 1.6
        for _ in range(800):
            model(x)
        assert model.experts.explain(20).config.kernel_variant != "prefill4"  # the others are equally fast
    assert adaptation.stop(forget=True)["calls"] == 2400


def test_configs_that_run_the_same_code_do_not_compete(model, clock):
    """At one row every panel is the same on the CPU: there is nothing to try."""
    clock.cost |= {"prefill4": 0.1, "base": 0.1, "large_batch": 0.1}
    adaptation = mlx_marlin.adapt(model, exploration=1.0, max_overhead=1.0)
    for _ in range(50):
        model(mx.ones((1, 128)))
    assert {c.kernel_variant for _, c in clock.seen} == {"decode"}
    assert adaptation.stop(forget=True)["switches"] == 0


def test_equal_configs_stay(model, clock):
    base = model.experts.explain(4).config
    adaptation = mlx_marlin.adapt(model, exploration=1.0, max_overhead=1.0, seed=1)
    for _ in range(300):
        model(mx.ones((4, 128)))
    report = adaptation.stop(forget=True)
    assert report["switches"] == 0 and report["timed_calls"] == 600 and model.experts.explain(4).config == base


def test_the_overhead_is_bounded_and_reported(model, clock):
    clock.cost |= {"decode": 20.0, "prefill4": 5.0, "large_batch": 10.0}
    adaptation = mlx_marlin.adapt(model, exploration=0.5, max_overhead=0.05, seed=2)
    for _ in range(5000):
        model(mx.ones((20, 128)))
    report = adaptation.stop(forget=True)
    slowest = 20.0 / report["layer_ms"]  # the bound is checked before a call, so one call may exceed it
    assert 0.01 < report["overhead"] <= 0.05 + slowest
    assert report["layer_ms"] == pytest.approx(10_000, rel=0.02)
    assert report["overhead_ms"] == pytest.approx(report["overhead"] * report["layer_ms"])


@pytest.mark.parametrize("first_ms", [50.0, 500.0])
def test_first_calls_are_overhead_and_no_measure_of_a_call(model, clock, first_ms):
    """Compiling counts in full; it was taken for what a call costs once, and hid itself."""
    clock.first_ms, bound, calls = first_ms, 0.05, 3000
    adaptation = mlx_marlin.adapt(model, exploration=0.5, max_overhead=bound, seed=4)
    reports = []
    for _ in range(calls):
        model(mx.ones((20, 128)))
        reports.append(adaptation.report())
    report = adaptation.stop(forget=True)
    assert report["layer_ms"] == pytest.approx(2 * calls * 1.0, rel=0.02)
    # The clock moves for timed calls alone, each of which replaces one that would have taken 1 ms.
    true = 1e3 * clock.now - report["timed_calls"] * 1.0
    assert report["overhead_ms"] == pytest.approx(true, rel=0.05)
    # The first calls of the configs in charge cannot be foreseen; no other goes where it could exceed the bound.
    unforeseen = 2 * (first_ms + 1.0)
    assert all(r["overhead_ms"] <= max(unforeseen, bound * r["layer_ms"]) * 1.05 for r in reports)
    # 300 ms may be spent by the end: four first calls of 50 ms beside the two, and none of 500 ms.
    assert {c.kernel_variant for _, c in clock.seen} > {"base"} or first_ms == 500.0
    assert len(clock.seen) == (2 if first_ms == 500.0 else 5)


def test_calls_are_priced_once_their_cost_is_known(model, clock):
    clock.noise = 0.0
    adaptation = mlx_marlin.adapt(model, exploration=0.02, max_overhead=1.0, seed=5)
    for _ in range(300):
        model(mx.ones((4, 128)))
    assert adaptation.stop(forget=True)["layer_ms"] == pytest.approx(600.0)


def test_new_numbers_of_rows_are_not_compiled_anew(model, clock):
    clock.noise, clock.first_ms = 0.0, 100.0
    adaptation = mlx_marlin.adapt(model, exploration=1.0, max_overhead=0.01, seed=6)
    for rows in (17, 18, 19, 20, 21):  # of one default config
        for _ in range(20):
            model(mx.ones((rows, 128)))
    report = adaptation.stop(forget=True)
    assert report["problems"] == 10 and report["layer_ms"] == pytest.approx(200.0)
    assert report["overhead_ms"] == pytest.approx(202.0)  # a first call of each of two layers


def test_it_samples_the_given_fraction(model, clock):
    clock.noise = 0.0
    adaptation = mlx_marlin.adapt(model, exploration=0.05, seed=3)
    for _ in range(1000):
        model(mx.ones((1, 128)))
    report = adaptation.stop()
    assert report["calls"] == 2000 and 60 < report["timed_calls"] < 140
    model(mx.ones((1, 128)))
    assert adaptation.report()["calls"] == 2000


def test_compiled_calls_are_not_timed(model):
    adaptation = mlx_marlin.adapt(model, exploration=1.0, max_overhead=1.0)
    x = mx.ones((2, 128))
    compiled = mx.compile(model)
    compiled(x), compiled(x)
    assert adaptation.report()["timed_calls"] == 0
    plain = model(x)
    assert adaptation.report()["timed_calls"] > 0
    np.testing.assert_allclose(np.array(plain), np.array(compiled(x)), rtol=1e-4, atol=1e-3)
    adaptation.stop(forget=True)


def test_gradients_pass_through(model):
    x = mx.random.normal((2, 128), key=mx.random.key(0))
    loss = mx.grad(lambda x: model(x).sum())
    expected = np.array(loss(x))
    with mlx_marlin.adapt(model, exploration=1.0, max_overhead=1.0):
        np.testing.assert_allclose(np.array(loss(x)), expected, rtol=1e-3, atol=1e-3)


def test_real_timings(model):
    with mlx_marlin.adapt(model, exploration=1.0, max_overhead=1.0, seed=0) as adaptation:
        for _ in range(40):
            mx.eval(model(mx.ones((1, 128))))
        report = adaptation.report()
    adaptation.stop(forget=True)
    # On a busy machine a slow call uses the bound up; the first call of each layer is timed in any case.
    assert 2 <= report["timed_calls"] <= 80 and report["layer_ms"] > 0 and report["problems"] == 2


def test_off_by_default_and_bad_arguments(model):
    assert model.experts._adaptation is None and model.out._adaptation is None
    for bad in (
        dict(exploration=1.5),
        dict(exploration=float("nan")),
        dict(max_overhead=-1),
        dict(exploration=True),
    ):
        with pytest.raises(ValueError, match="must be a number in"):
            mlx_marlin.adapt(model, **bad)
    with pytest.raises(ValueError, match="no TrellisLinear or TrellisSwitchGLU"):
        mlx_marlin.adapt(nn.Linear(4, 4))
    with mlx_marlin.adapt(model):
        with pytest.raises(ValueError, match="already"):
            mlx_marlin.adapt(model)
    assert model.experts._adaptation is None
