"""Which config runs a call: what layers run (``choices``), and the documents' selector (``selector``)."""

from .choices import Choice
from .selector import (
    MixedKernelSelector,
    get_mixed_kernel,
    get_statistics,
    record_kernel_latency,
    reset_history,
    set_exploration_rate,
)

__all__ = [
    "Choice",
    "MixedKernelSelector",
    "get_mixed_kernel",
    "get_statistics",
    "record_kernel_latency",
    "reset_history",
    "set_exploration_rate",
]
