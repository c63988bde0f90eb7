"""Quantize weights and whole models to EXL3."""

from .conversion import convert
from .progress import Progress
from .weight import quantize_weight

__all__ = ["Progress", "convert", "quantize_weight"]
