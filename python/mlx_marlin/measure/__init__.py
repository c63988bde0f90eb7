"""Timing of callables: a clock, comparisons, statistics. Knows nothing of kernels."""

from .clock import Chain, control, launch_floor

__all__ = [
    "Chain",
    "control",
    "launch_floor",
]
