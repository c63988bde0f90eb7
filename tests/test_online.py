"""Layers that learn from their own latencies, against a planted clock."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from cases import expert_formats, random_experts, random_weight

import mlx_marlin
from mlx_marlin import TrellisLinear, TrellisSwitchGLU, kernels, online, profile


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
    """A clock that calls advance by what their variant is said to cost, with noise; everything else takes no
    time.
    """

    def __init__(self, monkeypatch):
        self.now, self.cost, self.rng = 0.0, dict.fromkeys(kernels.VARIANTS, 1.0), np.random.default_rng(0)
        self.noise = 0.03
        monkeypatch.setattr(online.time, "perf_counter", lambda: self.now)
        for cls in (TrellisLinear, TrellisSwitchGLU):
            monkeypatch.setattr(cls, "run", self.spend(cls.run))

    def spend(self, run):
        def spending(layer, *inputs, config=None):
            if config is not None:
                self.now += 1e-3 * self.cost[config.kernel_variant] * (1 + self.noise * self.rng.standard_normal())
            return run(layer, *inputs, config=config)

        return spending


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def test_a_faster_config_takes_over_and_gives_way_again(model, clock):
    x = mx.ones((4, 128))
    expected = np.array(model(x))
    with mlx_marlin.adapt(model, exploration=0.5, max_overhead=1.0, seed=0) as adaptation:
        clock.cost["base"] = 0.8
        for _ in range(400):
            y = model(x)
        choice = model.experts.explain(4)
        assert choice.config.kernel_variant == "base" and "measured in use" in str(choice)
        assert model.out.explain(4).config.kernel_variant == "base"
        report = adaptation.report()
        assert report["switches"] == len(report["changed"]) == report["problems"] == 2
        np.testing.assert_allclose(np.array(y), expected, rtol=1e-4, atol=1e-3)
        clock.cost["base"] = 1.6
        for _ in range(800):
            model(x)
        assert model.experts.explain(4).config.kernel_variant != "base"  # the others are equally fast
    assert adaptation.stop(forget=True)["calls"] == 2400


def test_equal_configs_stay(model, clock):
    base = model.experts.explain(4).config
    adaptation = mlx_marlin.adapt(model, exploration=1.0, max_overhead=1.0, seed=1)
    for _ in range(300):
        model(mx.ones((4, 128)))
    report = adaptation.stop(forget=True)
    assert report["switches"] == 0 and report["timed_calls"] == 600 and model.experts.explain(4).config == base


def test_the_overhead_is_bounded_and_reported(model, clock):
    clock.cost |= {"decode": 20.0, "base": 5.0, "large_batch": 10.0}
    adaptation = mlx_marlin.adapt(model, exploration=0.5, max_overhead=0.05, seed=2)
    for _ in range(5000):
        model(mx.ones((4, 128)))
    report = adaptation.stop(forget=True)
    slowest = 20.0 / report["layer_ms"]  # the bound is checked before a call, so one call may exceed it
    assert 0.01 < report["overhead"] <= 0.05 + slowest
    assert report["layer_ms"] == pytest.approx(10_000, rel=0.02)
    assert report["overhead_ms"] == pytest.approx(report["overhead"] * report["layer_ms"])


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
    assert 40 <= report["timed_calls"] <= 80 and report["layer_ms"] > 0 and report["problems"] == 2


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
