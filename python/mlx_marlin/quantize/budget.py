"""What a model takes at which widths, from shapes alone."""

from __future__ import annotations

import math
from collections.abc import Iterator

from .. import codec
from ..loader.exl3 import MARKERS
from .layered import LayeredModel
from .names import PARTS
from .settings import Settings

# Candidate widths reach this far below and above the budget.
_BELOW, _ABOVE = 2, 3


def stored_bits(shape: tuple[int, int], k: float, codebook: str, bias: bool) -> int:
    """Everything that EXL3 stores for a linear, in bits: codes, scales, marker, bias."""
    rows, columns = map(codec.padded, shape)
    marker = 32 if codebook in MARKERS else 0
    return rows * columns * codec.half_bits(k) // 2 + 16 * (rows + columns) + marker + (16 * columns if bias else 0)


def _linears(model: LayeredModel) -> Iterator[tuple[tuple[int, int], bool, int]]:
    """Shape ``(in, out)``, whether there is a bias, and number, of all linears that are to be quantized."""
    for layer, path in zip(model.layers, model.paths):
        modules = dict(layer.named_modules())
        for name in model.names.linears(path):
            n, k = modules[name].weight.shape
            yield (k, n), "bias" in modules[name], 1
        for name in model.names.experts(path):
            for part in PARTS:
                module = getattr(modules[name], part)
                experts, n, k = module.weight.shape
                yield (k, n), "bias" in module, experts


def candidate_widths(model: LayeredModel, settings: Settings) -> tuple[float, ...]:
    """The widths that are worth measuring for a budget.

    Raises:
        ValueError: If the model has nothing to quantize, or takes more than the budget even at the smallest width.
    """
    linears = list(_linears(model))
    weights = sum(count * k * n for (k, n), _, count in linears)
    if not weights:
        raise ValueError(f"{model.source.path}: no linear of the model is one that EXL3 quantizes")

    def size(width: float) -> float:
        return sum(count * stored_bits(shape, width, settings.codebook, bias) for shape, bias, count in linears)

    smallest = size(min(settings.widths)) / weights
    if smallest > settings.bits:
        raise ValueError(
            f"{settings.bits} bits per weight cannot be met: the smallest widths take {smallest:.4f}, scales and "
            "padding included"
        )
    # Where much is padding, all budgets buy less: a width that all linears could have, at least to half a bit.
    affordable = max(k for k in settings.widths if size(k) <= settings.bits * weights)
    low = max(1, math.floor(min(settings.bits, affordable + 0.5)) - _BELOW)
    high = min(codec.MAX_BITS, math.ceil(settings.bits) + _ABOVE)
    return tuple(k for k in settings.widths if low <= k <= high)
