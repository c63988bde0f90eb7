"""Checkpoint directories: which linears they hold, and single weights from them."""

from .directory import INDEX_NAME, TrellisModelLoader, names_trellis
from .exl3 import QuantizedLinear

__all__ = [
    "INDEX_NAME",
    "QuantizedLinear",
    "TrellisModelLoader",
    "names_trellis",
]
