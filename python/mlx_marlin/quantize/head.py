"""The output projection: quantized with its own width, and written even where it is tied to the embeddings."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from ..storage.safetensors import Tensor
from .hessian import Hessian
from .jobs import seed_of
from .layered import LayeredModel
from .source import Source, beyond_half, half
from .spill import States
from .stored import stored_tensors
from .weight import quantize_wide

_NAME = "lm_head"


def head_name(model: LayeredModel, source: Source) -> str:
    """What the head is called in the converted checkpoint; sees that it is the one of the source.

    Raises:
        ValueError: If the weight of the module that makes the logits is no tensor of the checkpoint, or is tied to the
            embeddings while the checkpoint has another head.
    """
    stored = model.names.origins.get(f"{model.head}.weight")
    if stored is None or not stored.endswith(".weight"):
        raise ValueError(
            f"{source.path}: the logits are made by {model.head}, whose weight is no tensor of the checkpoint, but "
            "computed from some; such a head is not converted"
        )
    if not isinstance(model.head_module(), nn.Embedding):
        return stored.removesuffix(".weight")
    heads = [n for n in source.tensors if f".{n}".endswith(f".{_NAME}.weight") and "mtp." not in n]
    for head in heads:
        if not source.same(head, stored):
            raise ValueError(
                f"{source.path}: by config.json the head is tied to {stored}, but {head} is another matrix; set "
                "tie_word_embeddings to false if that is the head, else remove it"
            )
    return heads[0].removesuffix(".weight") if heads else _untied_name(model, source, stored)


def _untied_name(model: LayeredModel, source: Source, embeddings: str) -> str:
    """What the model calls its head where that is not tied; else what EXL3 does."""
    from ..lm.model import build  # needs mlx-lm

    config = source.model_config
    for part in (config, config.get("text_config")):
        if isinstance(part, dict):
            part["tie_word_embeddings"] = False
    tied = dict(tree_flatten(model.model.parameters()))
    untied = dict(tree_flatten(build(source.path, config).parameters()))
    # The tied model's layers have been replaced: only what is outside of them tells.
    outside = [p for p in untied if p not in tied and not p.startswith(tuple(f"{path}." for path in model.paths))]
    if len(outside) == 1 and not f".{outside[0]}".endswith(f".{_NAME}.weight"):
        return outside[0].removesuffix(".weight")
    return f"language_model.{_NAME}" if embeddings.startswith("language_model.") else _NAME


def head_tensors(
    model: LayeredModel,
    name: str,
    hidden: States,
    *,
    bits: float,
    codebook: str,
    seed: int,
    threads: int,
) -> dict[str, Tensor]:
    """The head's tensors.

    Args:
        model: The model, all layers done.
        name: Of the head, from :func:`head_name`.
        hidden: Hidden states after the last layer.
        bits: Its width; 16 leaves it in half precision.
        codebook: Its codebook.
        seed: The conversion's.
        threads: Worker threads.

    Raises:
        ValueError: If a value is not finite or, with 16 bits, beyond half precision.
    """
    head = model.head_module()
    model.check_finite(f"{model.head}.weight", head.weight)
    bias = np.array(head.bias.astype(mx.float32)) if "bias" in head else None
    if bits == 16:
        rounded = np.array(head.weight.astype(mx.float16))
        if not np.isfinite(rounded).all():
            largest = np.abs(np.array(head.weight.astype(mx.float32))).max()
            raise beyond_half(f"{name}.weight", float(largest))
        tensors = {f"{name}.weight": Tensor.of(rounded)}
        return tensors if bias is None else {**tensors, f"{name}.bias": half(f"{name}.bias", bias)}
    seen = Hessian(head.weight.shape[1])
    model.head_inputs(hidden, seen.add)

    def read(columns: slice) -> np.ndarray:
        return np.array(head.weight[columns].astype(mx.float32)).T

    shape = (head.weight.shape[1], head.weight.shape[0])
    codes = quantize_wide(read, shape, bits, codebook, seen.mean(), seed_of(seed, name), threads)
    return stored_tensors(name, codes, bias)
