"""Modules over trellis weights, drop-ins for ``nn.Linear`` and mlx-lm's ``SwitchGLU``."""

from .experts import TrellisExperts, TrellisSwitchGLU
from .grid import GridLinear
from .linear import TrellisLinear

__all__ = [
    "GridLinear",
    "TrellisExperts",
    "TrellisLinear",
    "TrellisSwitchGLU",
]
