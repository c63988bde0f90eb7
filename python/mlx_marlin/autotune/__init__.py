"""The tuner: candidates, checked and timed, and what is kept of them."""

from ..profile import use_profile
from .trial import Objective
from .tuner import AutotuneConfig, BenchmarkResult, MixedBPWAutoTuner

__all__ = [
    "AutotuneConfig",
    "BenchmarkResult",
    "MixedBPWAutoTuner",
    "Objective",
    "use_profile",
]
