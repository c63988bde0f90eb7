"""What a model takes at which widths, from shapes alone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from .. import codec
from ..loader.exl3 import MARKERS
from .allocation import Item
from .layered import LayeredModel

# Candidate widths reach this far below and above the budget.
_BELOW, _ABOVE = 2, 3


def stored_bits(shape: tuple[int, int], k: float, codebook: str, bias: bool) -> int:
    """Everything that EXL3 stores for a linear, in bits: codes, scales, marker, bias."""
    rows, columns = map(codec.padded, shape)
    marker = 32 if codebook in MARKERS else 0
    return rows * columns * codec.half_bits(k) // 2 + 16 * (rows + columns) + marker + (16 * columns if bias else 0)


@dataclass(frozen=True)
class Linear:
    """A linear that is to be quantized.

    Attributes:
        name: Its name in the checkpoint.
        group: What shares its K when experts may not differ.
        shape: ``(in, out)``.
        bias: Whether it has one.
    """

    name: str
    group: str
    shape: tuple[int, int]
    bias: bool


def linears(model: LayeredModel) -> Iterator[Linear]:
    """All linears that are to be quantized, if the model uses them."""
    for layer, path in zip(model.layers, model.paths):
        modules = dict(layer.named_modules())
        for inside, name in model.names.linears(path).items():
            n, k = modules[inside].weight.shape
            yield Linear(name, name, (k, n), "bias" in modules[inside])
        for inside, names in model.names.experts(path).items():
            for part in names.parts:
                module = getattr(modules[inside], part)
                experts, n, k = module.weight.shape
                group, of_part = names.group(part), (names.name(e, part) for e in range(experts))
                yield from (Linear(name, group, (k, n), "bias" in module) for name in of_part)


def model_sizes(model: LayeredModel, codebook: str, widths: Sequence[float]) -> dict[float, float]:
    """Stored bits per weight of a model all of whose linears have one width, for each of some widths.

    Raises:
        ValueError: If the model has nothing to quantize.
    """
    found = list(linears(model))
    weights = sum(math.prod(linear.shape) for linear in found)
    if not weights:
        raise ValueError(f"{model.source.path}: no linear of the model is one that EXL3 quantizes")
    return {k: sum(stored_bits(linear.shape, k, codebook, linear.bias) for linear in found) / weights for k in widths}


def measured_sizes(items: Sequence[Item]) -> dict[float, float]:
    """The same of a model that was measured, for each measured width."""
    weights = sum(item.weights for item in items)
    return {k: sum(item.bits[k] for item in items) / weights for k in items[0].bits}


def candidate_widths(sizes: Mapping[float, float], bits: float, allowed: Sequence[float]) -> tuple[float, ...]:
    """The widths that are worth looking at for a budget.

    Args:
        sizes: From :func:`model_sizes` or :func:`measured_sizes`.
        bits: Budget in stored bits per weight.
        allowed: The widths that a linear may have.

    Raises:
        ValueError: If the model takes more than the budget even at the smallest width.
    """
    smallest = sizes[min(allowed)]
    if smallest > bits:
        raise ValueError(
            f"{bits} bits per weight cannot be met: the smallest widths take {smallest:.4f}, scales and padding "
            "included"
        )
    # Where much is padding, all budgets buy less: a width that all linears could have, at least to half a bit.
    affordable = max(k for k in allowed if sizes[k] <= bits)
    low = max(1, math.floor(min(bits, affordable + 0.5)) - _BELOW)
    high = min(codec.MAX_BITS, math.ceil(bits) + _ABOVE)
    return tuple(k for k in allowed if low <= k <= high)
