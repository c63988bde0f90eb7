"""Bit allocation against exhaustive search and its own bound."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from mlx_marlin.quantize.allocation import Item, as_given, expected_elsewhere, least_loss


def make_items(count, seed, candidates=(1, 2, 3, 4), group=lambda i: f"g{i}"):
    rng = np.random.default_rng(seed)
    items = []
    for i in range(count):
        weights = int(rng.choice([64, 128, 192]))
        scale = float(np.exp(rng.normal(0, 2)))
        loss = {k: scale * 4.0**-k * float(rng.uniform(0.8, 1.2)) for k in candidates}
        items.append(Item(f"w{i}", group(i), weights, {k: int(weights * k) + 16 for k in candidates}, loss))
    return items


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("bits", [1.6, 2.3, 3.1])
def test_against_all_allocations(seed, bits):
    """The bound is below the best allocation, the answer near it and within the budget."""
    items = make_items(6, seed)
    budget = bits * sum(i.weights for i in items)
    best = min(
        sum(i.loss[k] for i, k in zip(items, widths))
        for widths in itertools.product((1, 2, 3, 4), repeat=6)
        if sum(i.bits[k] for i, k in zip(items, widths)) <= budget
    )
    found = least_loss(items, bits)
    assert found.bits <= bits
    assert found.bound <= best * (1 + 1e-12)
    assert best <= found.loss * (1 + 1e-12)
    assert found.loss == pytest.approx(sum(i.loss[found.widths[i.name]] for i in items))


def test_many_items_meet_the_budget_with_a_small_gap():
    items = make_items(800, 1)
    found = least_loss(items, 2.5)
    assert 2.49 < found.bits <= 2.5
    assert found.loss <= 1.002 * found.bound


def test_per_layer_shares_widths_and_loses():
    items = make_items(64, 3, group=lambda i: f"layer{i // 16}")
    free, shared = least_loss(items, 2.6), least_loss(items, 2.6, "per-layer")
    for g in range(4):
        assert len({shared.widths[f"w{i}"] for i in range(16 * g, 16 * g + 16)}) == 1
    assert free.loss < shared.loss and shared.bits <= 2.6


def test_uniform_uses_two_neighbouring_widths():
    items = make_items(64, 3, group=lambda i: f"layer{i // 4}")
    widths = set(least_loss(items, 2.7, "uniform").widths.values())
    assert widths == {2, 3}


def test_half_rates_lower_the_loss_of_a_budget_between_two_whole_widths():
    halves = (1, 1.5, 2, 2.5, 3, 3.5, 4)
    items = make_items(64, 5, halves, group=lambda i: f"layer{i // 4}")
    whole = [
        replace(i, bits={k: i.bits[k] for k in range(1, 5)}, loss={k: i.loss[k] for k in range(1, 5)}) for i in items
    ]
    for mode in ("per-expert", "per-layer", "uniform"):
        found = least_loss(items, 2.6, mode)
        assert found.bits <= 2.6 and found.loss < least_loss(whole, 2.6, mode).loss
    assert set(found.widths.values()) == {2, 2.5, 3}


def test_widths_that_lose_are_never_taken():
    """Measurement noise may make a larger K look worse."""
    items = [Item("a", "a", 64, {1: 64, 2: 128, 3: 192}, {1: 1.0, 2: 2.0, 3: 0.9}) for _ in range(1)]
    assert least_loss(items, 2.0).widths == {"a": 1}
    assert least_loss(items, 3.0).widths == {"a": 3}


@pytest.mark.parametrize(
    "bits, mode, message", [(0.5, "per-expert", "cannot be met"), (2.0, "per-tensor", "per-tensor")]
)
def test_bad_input(bits, mode, message):
    with pytest.raises(ValueError, match=message):
        least_loss(make_items(3, 0), bits, mode)


def test_a_table_of_the_smallest_widths():
    """Bits per weight are a rounded quotient: times the weights they can be less than what was divided."""
    for weights in range(1000, 1400):
        item = Item("a", "a", weights, {1: weights + 17, 2: 2 * weights + 17}, {1: 1.0, 2: 0.5})
        found = as_given([item], {"a": 1})
        assert found.loss == 1.0 and 0.99 < found.bound <= 1.0


def test_losses_of_a_group_are_drawn_together():
    """To the fourth root of the ratio between two experts, at each width alike; sums are kept."""
    items = [
        Item(name, name[0], 64, {1: 64, 2: 128}, {1: loss, 2: loss / 5})
        for name, loss in (("a0", 1.0), ("a1", 81.0), ("a2", 0.0), ("b", 3.0), ("c", 0.0))
    ]
    found = {item.name: item for item in expected_elsewhere(items)}
    assert found["a0"].loss == pytest.approx({1: 20.5, 2: 4.1})
    assert found["a1"].loss == pytest.approx({1: 61.5, 2: 12.3})
    assert found["a2"].loss == {1: 0.0, 2: 0.0}
    assert found["b"].loss == pytest.approx({1: 3.0, 2: 0.6}) and found["c"].loss == {1: 0.0, 2: 0.0}
    assert all(found[item.name].bits == item.bits and found[item.name].group == item.group for item in items)
