"""What is asked (:class:`Problem`), how it runs (:class:`KernelConfig`), and which configs are legal, the same code, or
worth timing. No MLX.

The default config handles every legal problem; tuning only adds speed.
"""

from .catalogue import candidates, candidates_on, config_for, default, default_variant, effective, feasible, fitted
from .config import MAX_KERNEL_BITS, VARIANTS, KernelConfig, KernelName, make_name, parse_name
from .cpu import cpu_threads
from .problem import ACTIVATIONS, DEVICES, DTYPES, Problem
from .search_space import Hardware

__all__ = [
    "ACTIVATIONS",
    "DEVICES",
    "DTYPES",
    "MAX_KERNEL_BITS",
    "VARIANTS",
    "Hardware",
    "KernelConfig",
    "KernelName",
    "Problem",
    "candidates",
    "candidates_on",
    "config_for",
    "cpu_threads",
    "default",
    "default_variant",
    "effective",
    "feasible",
    "fitted",
    "make_name",
    "parse_name",
]
