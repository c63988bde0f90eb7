"""Checkpoint directories: which linears they hold, and single weights from them."""

from .directory import INDEX_NAME, TrellisModelLoader, names_trellis
from .embedding import QuantizedEmbedding
from .exl3 import QuantizedLinear

__all__ = [
    "INDEX_NAME",
    "QuantizedEmbedding",
    "QuantizedLinear",
    "TrellisModelLoader",
    "names_trellis",
]
