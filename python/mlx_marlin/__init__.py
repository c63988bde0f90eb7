"""EXL3 trellis-quantized mixture-of-experts models on MLX."""

from . import _abi  # first: explains a mismatch before anything else fails  # noqa: F401
from .kernels import KernelConfig, Problem
from .layers import TrellisLinear, TrellisSwitchGLU
from .ops import set_num_threads, trellis_decode, trellis_linear, trellis_swiglu
from .weights import ExpertBank, TrellisWeight

__version__ = _abi.VERSION

__all__ = [
    "ExpertBank",
    "KernelConfig",
    "Problem",
    "TrellisLinear",
    "TrellisSwitchGLU",
    "TrellisWeight",
    "set_num_threads",
    "trellis_decode",
    "trellis_linear",
    "trellis_swiglu",
]
