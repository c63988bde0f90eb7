"""Modules over trellis weights, drop-ins for ``nn.Linear`` and mlx-lm's ``SwitchGLU``."""

from .embedding import TrellisEmbedding
from .experts import TrellisExperts, TrellisSwitchGLU
from .grid import GridLinear
from .linear import TrellisLinear

__all__ = [
    "TrellisEmbedding",
    "GridLinear",
    "TrellisExperts",
    "TrellisLinear",
    "TrellisSwitchGLU",
]
