"""Validated weights: of one linear (:class:`TrellisWeight`, :class:`GridWeight`) and of a layer's experts
(:class:`ExpertBank`).
"""

from .embedding import EmbeddingWeight
from .experts import ExpertBank, ExpertStack, check_projections
from .grid import GridWeight
from .trellis import TrellisWeight

__all__ = [
    "EmbeddingWeight",
    "ExpertBank",
    "ExpertStack",
    "GridWeight",
    "TrellisWeight",
    "check_projections",
]
