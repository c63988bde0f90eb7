"""How much a layer's error changes the model's output."""

from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest

from mlx_marlin.quantize.allocation import Item
from mlx_marlin.quantize.measurement import measured_items
from mlx_marlin.quantize.plan import items_value
from mlx_marlin.quantize.sensitivity import disturbed, sensitivities


class Head:
    """The part of a layered model that sensitivities use: states to logits."""

    def __init__(self, weight):
        self.weight = weight

    def logits(self, hidden):
        for h in hidden:
            yield np.array(mx.array(h @ self.weight))


@pytest.fixture
def states():
    rng = np.random.default_rng(0)
    before = rng.standard_normal((3, 32, 48)).astype(np.float32)
    return before, before + rng.standard_normal(before.shape).astype(np.float32) * np.linspace(
        0, 2, 48, dtype=np.float32
    )


def test_noise_follows_what_the_layer_adds(states):
    before, after = states
    stream, energy = disturbed(before, after, [0, 1])
    noise = stream - after
    assert not noise[..., 0].any()
    np.testing.assert_allclose(energy, np.mean(np.sum(np.square(noise), -1)), rtol=1e-4)
    ratio = np.sqrt(np.mean(np.square(noise), (0, 1))[1:] / np.mean(np.square(after - before), (0, 1))[1:])
    np.testing.assert_allclose(ratio, 0.1, rtol=0.35)
    again, _ = disturbed(before, after, [0, 1])
    np.testing.assert_array_equal(stream, again)


def test_small_disturbances_count_by_the_curvature_of_the_divergence(states):
    """KL divergence is half the variance of the logits' change under the original distribution."""
    before, after = states
    head = Head(np.random.default_rng(1).standard_normal((48, 20)).astype(np.float32) * 0.1)
    pairs = [disturbed(before, after, seed) for seed in range(2)]
    streams, energies = zip(*pairs)
    found = sensitivities(head, after, list(streams), list(energies))
    p = np.exp(after @ head.weight)
    p /= p.sum(-1, keepdims=True)
    for value, stream, energy in zip(found, streams, energies):
        change = (stream - after) @ head.weight
        curvature = 0.5 * np.mean(np.sum(p * np.square(change), -1) - np.square(np.sum(p * change, -1)))
        assert value == pytest.approx(curvature / energy, rel=0.3)


def test_a_layer_that_adds_nothing_does_not_count(states):
    before, _ = states
    stream, energy = disturbed(before, before, 0)
    assert sensitivities(Head(np.eye(48, dtype=np.float32)), before, [stream], [energy]) == [0.0]


def test_a_divergence_below_zero_is_none():
    """Rounding can leave one of a layer that hardly matters."""
    item = Item("a", "a", 64, {1: 64, 2: 128}, {1: 3.0, 2: 0.5})
    stored = {"sensitivity.json": [(-1e-18).hex()], "measured-0000.json": items_value([item], 1.0)}
    seal = SimpleNamespace(made_from={}, after="")
    state = SimpleNamespace(read_json=stored.get, seal=lambda *_: seal)
    ((found,),) = measured_items(state)
    assert found.loss == {1: 0.0, 2: 0.0}
