"""Quantize weights and whole models to EXL3."""

from .conversion import convert
from .measurement import allocate, measure
from .progress import Progress
from .weight import quantize_weight

__all__ = ["Progress", "allocate", "convert", "measure", "quantize_weight"]
