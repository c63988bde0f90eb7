"""Checkpoint directories: which linears they hold, and single weights from them."""

from .contents import LeftOut
from .directory import INDEX_NAME, Kind, TrellisModelLoader, kind_of
from .embedding import QuantizedEmbedding
from .exl3 import QuantizedLinear

__all__ = [
    "INDEX_NAME",
    "Kind",
    "LeftOut",
    "QuantizedEmbedding",
    "QuantizedLinear",
    "TrellisModelLoader",
    "kind_of",
]
