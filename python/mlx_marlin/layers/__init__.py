"""Modules over trellis weights, drop-ins for ``nn.Linear`` and mlx-lm's ``SwitchGLU``."""

from .experts import TrellisExperts, TrellisSwitchGLU
from .grid import GridLinear
from .linear import TrellisLinear
from .partial import PartlyQuantizedSwitchGLU

__all__ = [
    "GridLinear",
    "PartlyQuantizedSwitchGLU",
    "TrellisExperts",
    "TrellisLinear",
    "TrellisSwitchGLU",
]
