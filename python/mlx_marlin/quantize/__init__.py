"""Quantize weights and whole models to EXL3."""

from .weight import quantize_weight

__all__ = ["quantize_weight"]
