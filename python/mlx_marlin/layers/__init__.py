"""Modules over trellis weights, drop-ins for ``nn.Linear`` and mlx-lm's ``SwitchGLU`` and ``SwitchMLP``."""

from .embedding import TrellisEmbedding
from .experts import TrellisExperts, TrellisSwitch, TrellisSwitchGLU, TrellisSwitchMLP
from .grid import GridLinear
from .linear import TrellisLinear
from .partial import PartlyQuantizedSwitchGLU

__all__ = [
    "TrellisEmbedding",
    "GridLinear",
    "PartlyQuantizedSwitchGLU",
    "TrellisExperts",
    "TrellisLinear",
    "TrellisSwitch",
    "TrellisSwitchGLU",
    "TrellisSwitchMLP",
]
