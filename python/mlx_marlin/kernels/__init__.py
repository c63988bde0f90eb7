"""What is asked (:class:`Problem`), how it runs (:class:`KernelConfig`), and which configs are legal, the same code, or
worth timing. No MLX.

The default config handles every legal problem; tuning only adds speed.
"""

from .catalogue import (
    KernelRules,
    accelerated,
    candidates,
    candidates_on,
    config_for,
    default,
    effective,
    feasible,
    fitted,
    rules_of,
)
from .config import VARIANTS, KernelConfig, KernelName, Triple, default_variant, make_name, parse_name
from .cpu import cpu_threads
from .problem import (
    ACCURACIES,
    ACTIVATIONS,
    DEVICES,
    DTYPES,
    PROJECTIONS,
    UNGATED,
    USUAL_ACCURACY,
    USUAL_DTYPE,
    Problem,
    checked_accuracy,
    rows_label,
)
from .search_space import Hardware

__all__ = [
    "ACCURACIES",
    "ACTIVATIONS",
    "DEVICES",
    "DTYPES",
    "PROJECTIONS",
    "UNGATED",
    "USUAL_ACCURACY",
    "USUAL_DTYPE",
    "VARIANTS",
    "Hardware",
    "KernelConfig",
    "KernelName",
    "KernelRules",
    "Problem",
    "Triple",
    "accelerated",
    "candidates",
    "candidates_on",
    "checked_accuracy",
    "config_for",
    "cpu_threads",
    "default",
    "default_variant",
    "effective",
    "feasible",
    "fitted",
    "make_name",
    "parse_name",
    "rows_label",
    "rules_of",
]
