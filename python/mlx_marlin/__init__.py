"""EXL3 trellis-quantized mixture-of-experts models on MLX."""

import importlib

from . import _abi  # first: explains a mismatch before anything else fails
from .dispatch import (
    MixedBpwMoEDispatcher,
    MixedBpwMoEDispatcherExample,
    analyze_expert_activation_pattern,
    estimate_gpu_memory_pressure,
    get_available_kernels,
    get_expert_bits,
)
from .grid import GridWeight
from .kernels import KernelConfig, Problem
from .layers import TrellisLinear, TrellisSwitchGLU
from .loader import TrellisModelLoader
from .online import adapt
from .ops import plan, set_num_threads, trellis_decode, trellis_linear, trellis_swiglu
from .profile import use_profile
from .selection import (
    MixedKernelSelector,
    get_mixed_kernel,
    get_statistics,
    record_kernel_latency,
    reset_history,
    set_exploration_rate,
)
from .weights import ExpertBank, TrellisWeight

__version__ = _abi.VERSION

__all__ = [
    "AutotuneConfig",
    "BenchmarkResult",
    "ExpertBank",
    "GridWeight",
    "KernelConfig",
    "MixedBPWAutoTuner",
    "MixedBpwMoEDispatcher",
    "MixedBpwMoEDispatcherExample",
    "MixedKernelSelector",
    "Problem",
    "TrellisLinear",
    "TrellisModelLoader",
    "TrellisSwitchGLU",
    "TrellisWeight",
    "adapt",
    "analyze_expert_activation_pattern",
    "estimate_gpu_memory_pressure",
    "get_available_kernels",
    "get_expert_bits",
    "get_mixed_kernel",
    "get_statistics",
    "load",
    "plan",
    "record_kernel_latency",
    "reset_history",
    "set_exploration_rate",
    "set_num_threads",
    "trellis_decode",
    "trellis_linear",
    "trellis_swiglu",
    "use_profile",
]

# Imported on first use: mlx-lm is optional, and running a model needs no tuner.
_LAZY = {"load": "lm", "MixedBPWAutoTuner": "autotune", "AutotuneConfig": "autotune", "BenchmarkResult": "autotune"}


def __getattr__(name: str):
    if name in _LAZY:
        return getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
