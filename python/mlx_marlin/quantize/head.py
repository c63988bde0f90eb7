"""The output projection: quantized with its own width, and written even where it is tied to the embeddings."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..storage.safetensors import Tensor
from .hessian import Hessian
from .jobs import seed_of
from .layered import LayeredModel
from .source import Source, half
from .weight import prepare, quantize_prepared
from .writer import stored_tensors

NAME = "lm_head"


def head_tensors(
    model: LayeredModel,
    source: Source,
    hidden: list[np.ndarray],
    *,
    bits: float,
    codebook: str,
    seed: int,
    threads: int,
) -> dict[str, Tensor]:
    """The head's tensors.

    Args:
        model: The model, all layers done.
        source: The checkpoint.
        hidden: Hidden states after the last layer.
        bits: Its width; 16 leaves it in half precision.
        codebook: Its codebook.
        seed: The conversion's.
        threads: Worker threads.
    """
    head = getattr(model.model, "lm_head", None)
    if head is None:
        head = next(m for m in model.model.modules() if isinstance(m, nn.Embedding))
    weight = np.array(head.weight.astype(mx.float32))
    bias = np.array(head.bias.astype(mx.float32)) if "bias" in head else None
    if bits == 16:
        tensors = {f"{NAME}.weight": half(f"{NAME}.weight", weight)}
        return tensors if bias is None else {**tensors, f"{NAME}.bias": half(f"{NAME}.bias", bias)}
    seen = Hessian(weight.shape[1])
    for x in model.head_inputs(hidden):
        seen.add(x.reshape(-1, x.shape[-1]))
    prepared = prepare(weight.T, seen.mean(), seed_of(seed, NAME))
    codes = quantize_prepared(prepared, bits, codebook, threads)
    return stored_tensors(NAME, codes, bias)
