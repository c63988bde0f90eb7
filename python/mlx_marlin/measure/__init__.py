"""Time measured, compared and told apart from noise. Knows callables, nothing of kernels."""

from .clock import Chain, control, launch_floor

__all__ = [
    "Chain",
    "control",
    "launch_floor",
]
