"""Dispatch by what was routed, and adaptation in use."""

from .adaptation import Adaptation, adapt
from .dispatcher import (
    MixedBpwMoEDispatcher,
    MixedBpwMoEDispatcherExample,
    estimate_gpu_memory_pressure,
    get_available_kernels,
)
from .pattern import analyze_expert_activation_pattern, get_expert_bits

__all__ = [
    "Adaptation",
    "MixedBpwMoEDispatcher",
    "MixedBpwMoEDispatcherExample",
    "adapt",
    "analyze_expert_activation_pattern",
    "estimate_gpu_memory_pressure",
    "get_available_kernels",
    "get_expert_bits",
]
