"""EXL3 trellis-quantized mixture-of-experts models on MLX."""

import importlib
from typing import TYPE_CHECKING

from . import _abi  # first: explains a mismatch before anything else fails
from . import vlm as vlm
from .codec import CODEBOOKS, decode, decode_embedding, dequantize, hadamard, inner, pack, unpack, unpack_signs
from .dispatch import (
    Adaptation,
    MixedBpwMoEDispatcher,
    MixedBpwMoEDispatcherExample,
    adapt,
    analyze_expert_activation_pattern,
    estimate_gpu_memory_pressure,
    get_available_kernels,
    get_expert_bits,
)
from .kernels import KernelConfig, Problem, candidates, default, feasible
from .layers import GridLinear, TrellisEmbedding, TrellisLinear, TrellisSwitchGLU, TrellisSwitchMLP
from .lm import load
from .loader import TrellisModelLoader
from .ops import plan, set_num_threads, trellis_decode, trellis_linear, trellis_mlp, trellis_swiglu
from .profile import ProfileError, default_path, use_profile
from .selection import (
    Choice,
    MixedKernelSelector,
    get_mixed_kernel,
    get_statistics,
    record_kernel_latency,
    reset_history,
    set_exploration_rate,
)
from .weights import EmbeddingWeight, ExpertBank, GridWeight, TrellisWeight

if TYPE_CHECKING:
    from .autotune import AutotuneConfig, BenchmarkResult, MixedBPWAutoTuner, Objective
    from .quantize import convert, quantize_weight

__version__ = _abi.VERSION

__all__ = [
    "CODEBOOKS",
    "Adaptation",
    "AutotuneConfig",
    "BenchmarkResult",
    "Choice",
    "EmbeddingWeight",
    "ExpertBank",
    "GridLinear",
    "GridWeight",
    "KernelConfig",
    "MixedBPWAutoTuner",
    "MixedBpwMoEDispatcher",
    "MixedBpwMoEDispatcherExample",
    "MixedKernelSelector",
    "Objective",
    "Problem",
    "ProfileError",
    "TrellisEmbedding",
    "TrellisLinear",
    "TrellisModelLoader",
    "TrellisSwitchGLU",
    "TrellisSwitchMLP",
    "TrellisWeight",
    "adapt",
    "analyze_expert_activation_pattern",
    "candidates",
    "convert",
    "decode",
    "decode_embedding",
    "default",
    "default_path",
    "dequantize",
    "estimate_gpu_memory_pressure",
    "feasible",
    "get_available_kernels",
    "get_expert_bits",
    "get_mixed_kernel",
    "get_statistics",
    "hadamard",
    "inner",
    "load",
    "pack",
    "plan",
    "quantize_weight",
    "record_kernel_latency",
    "reset_history",
    "set_exploration_rate",
    "set_num_threads",
    "trellis_decode",
    "trellis_linear",
    "trellis_mlp",
    "trellis_swiglu",
    "unpack",
    "unpack_signs",
    "use_profile",
]

# Imported on first use: running a model needs neither the tuner nor the converter.
_LAZY = {
    "AutotuneConfig": "autotune",
    "BenchmarkResult": "autotune",
    "MixedBPWAutoTuner": "autotune",
    "Objective": "autotune",
    "convert": "quantize",
    "quantize_weight": "quantize",
}


if not TYPE_CHECKING:  # a type checker takes every name for one that it gives

    def __getattr__(name):
        if name in _LAZY:
            return getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
