"""Bit allocation: the widths that give the least loss under a budget, with a proven gap."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from ..codec import is_half_rate

MODES = ("per-expert", "per-layer", "uniform")

# Of what the experts of a group lose, by the divergence on held-out text (bench/NOTES.md): with 1, the losses as they
# are measured, widths per expert are worse than widths per layer at 2 bits, with 1/4 they are better at 2 and 2.5.
_POWER = 0.25


@dataclass(frozen=True)
class Item:
    """One linear to be quantized.

    Attributes:
        name: Its name in the checkpoint.
        group: Linears of one group share K in the modes ``per-layer`` and ``uniform``: all experts of a layer and
            projection, or a linear alone.
        weights: Number of logical weights.
        bits: Stored bits at each candidate K, one of :data:`codec.WIDTHS`.
        loss: Effect on the layer's output at each candidate K.
    """

    name: str
    group: str
    weights: int
    bits: Mapping[float, int]
    loss: Mapping[float, float]


@dataclass(frozen=True)
class Allocation:
    """A solution.

    Attributes:
        items: The linears.
        widths: K of each item, by name.
        bits: Stored bits per weight.
        loss: Summed loss.
        bound: No allocation within the budget has a lower loss than this (linear relaxation).
    """

    items: Sequence[Item] = field(repr=False)
    widths: dict[str, float]
    bits: float
    loss: float
    bound: float


def expected_elsewhere(items: Sequence[Item]) -> list[Item]:
    """The linears with losses as they are to be expected on other text than that of the calibration.

    How often an expert is chosen there, and what it sees, is not what was measured: losses of experts that were rarely
    chosen are understated, up to 2.5 times on models/docs-moe, the others hardly. So those of a group are drawn
    together: raised to a power below 1, their sum kept.
    """
    groups: dict[str, list[Item]] = {}
    for item in items:
        groups.setdefault(item.group, []).append(item)
    factors = {}
    for name, group in groups.items():
        for k in group[0].loss:
            total = sum(item.loss[k] for item in group)
            factors[name, k] = total / sum(item.loss[k] ** _POWER for item in group) if total else 0.0
    return [
        replace(item, loss={k: factors[item.group, k] * loss**_POWER for k, loss in item.loss.items()})
        for item in items
    ]


@dataclass
class _Group:
    names: list[str]
    bits: dict[float, int]
    loss: dict[float, float]
    width: float = 0


def _grouped(items: Sequence[Item], mode: str) -> list[_Group]:
    groups: dict[str, _Group] = {}
    for item in items:
        key = item.name if mode == "per-expert" else item.group
        group = groups.setdefault(key, _Group([], dict.fromkeys(item.bits, 0), dict.fromkeys(item.bits, 0.0)))
        group.names.append(item.name)
        for k in item.bits:
            group.bits[k] += item.bits[k]
            group.loss[k] += item.loss[k]
    return [groups[key] for key in sorted(groups)]


def _hull(group: _Group) -> list[float]:
    """The widths on the lower convex hull of (bits, loss), ascending."""
    hull: list[float] = []
    for k in sorted(group.bits):
        if hull and group.loss[k] >= group.loss[hull[-1]]:
            continue
        while len(hull) > 1 and _slope(group, hull[-2], hull[-1]) <= _slope(group, hull[-1], k):
            hull.pop()
        hull.append(k)
    return hull


def _slope(group: _Group, low: float, high: float) -> float:
    """Loss saved per bit spent between two widths."""
    return (group.loss[low] - group.loss[high]) / (group.bits[high] - group.bits[low])


def least_loss(items: Sequence[Item], bits: float, mode: str = "per-expert") -> Allocation:
    """Choose K for every item so that the summed loss is least within ``bits`` stored bits per weight.

    Steps along every group's convex hull are taken in the order of loss saved per bit, which is optimal at each
    point where it stops; the first step that does not fit gives the bound, and smaller steps fill what is left.

    Args:
        items: The linears, with candidates.
        bits: Budget in stored bits per logical weight.
        mode: One of :data:`MODES`. ``uniform`` allows two neighbouring whole widths and what lies between them.

    Raises:
        ValueError: If the mode is unknown or even the smallest widths exceed the budget.
    """
    if mode not in MODES:
        raise ValueError(f"mixed must be one of {', '.join(MODES)}, got {mode!r}")
    total = sum(item.weights for item in items)
    budget = bits * total
    groups = _grouped(items, mode)
    if mode == "uniform":
        groups = _two_widths(groups, budget)
    for group in groups:
        group.width = min(group.bits)
    spent = sum(group.bits[group.width] for group in groups)
    if spent > budget:
        raise ValueError(
            f"{bits} bits per weight cannot be met: the smallest widths take {spent / total:.4f}, scales included"
        )
    bound = _climb(groups, budget, spent)
    _fill(groups, budget)
    spent = sum(group.bits[group.width] for group in groups)
    loss = sum(group.loss[group.width] for group in groups)
    widths = {name: group.width for group in groups for name in group.names}
    return Allocation(items, widths, spent / total, loss, min(bound, loss))


def as_given(items: Sequence[Item], widths: Mapping[str, float]) -> Allocation:
    """The allocation of these widths; its bound is that of the best one of the same size.

    Args:
        items: The linears, measured at all widths.
        widths: K of each, by name; others are of no concern.
    """
    chosen = {item.name: widths[item.name] for item in items}
    bits = sum(item.bits[chosen[item.name]] for item in items) / sum(item.weights for item in items)
    loss = sum(item.loss[chosen[item.name]] for item in items)
    budget = math.nextafter(bits, math.inf)  # times the weights it must not be less than what they take
    return Allocation(items, chosen, bits, loss, min(loss, least_loss(items, budget).bound))


def _two_widths(groups: list[_Group], budget: float) -> list[_Group]:
    common = sorted(set.intersection(*(set(group.bits) for group in groups)))
    whole = [k for k in common if not is_half_rate(k)]
    low = max((k for k in whole if sum(group.bits[k] for group in groups) <= budget), default=common[0])
    for group in groups:
        group.bits = {k: group.bits[k] for k in common if low <= k <= low + 1}
    return groups


def _climb(groups: list[_Group], budget: float, spent: float) -> float:
    """Take hull steps while they fit; returns the loss of the linear relaxation."""
    steps = []
    for index, group in enumerate(groups):
        hull = _hull(group)
        group.width = hull[0]
        steps += [(-_slope(group, a, b), index, a, b) for a, b in zip(hull, hull[1:])]
    loss = sum(group.loss[group.width] for group in groups)
    for slope, index, low, high in sorted(steps):
        group = groups[index]
        cost = group.bits[high] - group.bits[low]
        if spent + cost > budget:
            return loss + slope * (budget - spent)
        group.width = high
        spent += cost
        loss += group.loss[high] - group.loss[low]
    return loss


def _fill(groups: list[_Group], budget: float) -> None:
    """Spend what is left on the best step that fits, again and again; each saves loss, so this ends."""
    spent = sum(group.bits[group.width] for group in groups)
    while True:
        best = None
        for group in groups:
            for k in group.bits:
                cost, saved = group.bits[k] - group.bits[group.width], group.loss[group.width] - group.loss[k]
                if 0 < cost <= budget - spent and saved > 0 and (best is None or saved > best[0]):
                    best = saved, cost, group, k
        if best is None:
            return
        _, cost, group, k = best
        group.width = k
        spent += cost
