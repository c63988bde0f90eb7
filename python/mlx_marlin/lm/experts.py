"""Trellis layers in the place of mlx-lm's linears and ``SwitchGLU`` blocks, from the sources of their weights.

Experts whose activation has no fused kernel keep mlx-lm's ``SwitchGLU``, over one trellis product per projection.
"""

from __future__ import annotations

import copy

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .. import codec
from ..layers.experts import TrellisExperts, TrellisSwitchGLU
from ..layers.linear import TrellisLinear
from ..layers.partial import PartlyQuantizedSwitchGLU
from ..loader.exl3 import PlainLinear
from ..ops import Activation
from ..weights.experts import ExpertStack
from ..weights.trellis import TrellisWeight
from .mapping import PROJECTIONS
from .placeholders import LinearSource

# mlx-lm's activations of SwitchGLU, by what the kernels call them.
_ACTIVATIONS = {
    "mlx_lm.models.switch_layers.SwiGLU": "silu",
    "mlx_lm.models.muse_spark.PreciseSwiGLU": "silu",
    "mlx_lm.models.gemma4_text.GeGLU": "gelu_tanh",
    "mlx_lm.models.activations.SwigluOAI": "swiglu_oai",
    "mlx_lm.models.gpt_oss.SwiGLU": "swiglu_oai",  # mlx-lm 0.31, the last one for Python 3.10: alpha 1.702, limit 7
}

TOP_K_KEYS = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "moe_topk",
    "top_k_experts",
    "moe_top_k",
    "experts_per_token",
    "moe_k",
)
"""How mlx-lm's model configs call the experts per token."""


def experts_per_token(config: dict, experts: int) -> int | None:
    """The top-k that a model's config names, if one in [1, experts]."""
    for part in (config, config.get("text_config") or {}):
        for key in TOP_K_KEYS:
            if isinstance(part.get(key), int) and 1 <= part[key] <= experts:
                return part[key]
    return None


def activation_of(module: nn.Module) -> Activation | None:
    """The activation of a ``SwitchGLU`` as the fused kernels know it; ``None`` if they do not."""
    activation = module.activation
    name = _ACTIVATIONS.get(f"{type(activation).__module__}.{type(activation).__qualname__}")
    if name is None:
        return None
    if hasattr(activation, "_alpha"):
        return Activation(name, float(activation._alpha), float(activation._limit))
    return Activation(name)


def make_glu(module: nn.Module, gate: list, up: list, down: list) -> nn.Module:
    """What stands for a ``SwitchGLU``: a fused layer, or the module itself over trellis projections.

    Args:
        module: The ``SwitchGLU``.
        gate, up, down: One :class:`TrellisWeight` per expert.
    """
    activation = activation_of(module)
    if activation is not None:
        return TrellisSwitchGLU(gate, up, down, *activation)
    # As in the fused kernels, the padded width flows from gate and up into down.
    wide = [[TrellisWeight(w.trellis, w.suh, w.svh, w.codebook, w.bias, w.in_features) for w in p] for p in (gate, up)]
    narrow = [TrellisWeight(w.trellis, w.suh, w.svh, w.codebook, w.bias, None, w.out_features) for w in down]
    for name, weights in zip(PROJECTIONS, (*wide, narrow)):
        module[name] = TrellisExperts(ExpertStack.of(name, weights))
    return module


def load_source(
    source: LinearSource,
    in_features: int,
    out_features: int,
    rows: tuple[int, ...] | None = None,
    columns: tuple[int, ...] | None = None,
) -> TrellisWeight:
    """Read a weight, or the 128-blocks ``rows`` of its inputs and ``columns`` of its outputs."""
    if source.blocks is not None:
        columns = source.blocks if columns is None else tuple(source.blocks[c] for c in columns)
    w = source.quantized.load(rows, columns, in_features=in_features, out_features=out_features)
    if source.factor != 1:
        w.svh = w.svh * source.factor
        if not mx.isfinite(w.svh).all().item():
            raise ValueError(f"{source.linear.name}.svh times {source.factor} is beyond half precision")
    return w


def whole_linear(_path: str, module: nn.Module, source: LinearSource) -> TrellisLinear:
    """What stands for an ``nn.Linear``."""
    out_features, in_features = module.weight.shape
    return TrellisLinear(load_source(source, in_features, out_features))


def make_head(embeddings: nn.Embedding, source: LinearSource, dtype: mx.Dtype | None) -> nn.Module:
    """The head of a model that has none of its own.

    Args:
        embeddings: What the model would use instead.
        source: Its weight.
        dtype: Of an unquantized one. ``None``: as it is stored.
    """
    vocabulary, hidden = embeddings.weight.shape
    if not isinstance(source.linear, PlainLinear):
        return TrellisLinear(load_source(source, hidden, vocabulary))
    head = nn.Linear(1, 1, bias=False)
    head.weight = source.linear.load()
    if dtype is not None:
        head.set_dtype(dtype)
    return head


def unquantized_experts(sources: dict[str, list[LinearSource]]) -> list[bool]:
    """Whether any projection of each expert was left unquantized."""
    rows = zip(*(sources[projection] for projection in PROJECTIONS))
    return [any(isinstance(source.linear, PlainLinear) for source in row) for row in rows]


def whole_experts(_path: str, module: nn.Module, sources: dict[str, list[LinearSource]]) -> nn.Module:
    """What stands for a ``SwitchGLU``. Experts of which a projection was left unquantized are dense ones."""
    is_dense = unquantized_experts(sources)
    shapes = {projection: module[projection].weight.shape[1:] for projection in PROJECTIONS}
    dense: nn.Module | None = None
    if any(is_dense):
        dense = copy.copy(module)
        for projection, (out_features, in_features) in shapes.items():
            dense[projection] = copy.copy(module[projection])
            chosen = [source for source, kind in zip(sources[projection], is_dense) if kind]
            dense[projection].weight = mx.stack([_dense_weight(s, in_features, out_features) for s in chosen])
            if "bias" in dense[projection]:
                # map_weights: the model has a bias where the checkpoint has one.
                biases = [bias for bias in (s.linear.load_bias() for s in chosen) if bias is not None]
                dense[projection].bias = mx.stack([bias[:out_features] for bias in biases])
    if dense is not None and all(is_dense):
        return dense
    weights = [
        [load_source(s, *reversed(shapes[projection])) for s, kind in zip(sources[projection], is_dense) if not kind]
        for projection in PROJECTIONS
    ]
    quantized = make_glu(module, *weights)
    return quantized if dense is None else PartlyQuantizedSwitchGLU(quantized, dense, is_dense)


def _dense_weight(source: LinearSource, in_features: int, out_features: int) -> mx.array:
    """``[out, in]``: as stored, or decoded where only another projection of the expert was left unquantized."""
    if isinstance(source.linear, PlainLinear):
        return source.linear.load() * source.factor
    return mx.array(np.ascontiguousarray(codec.dequantize(load_source(source, in_features, out_features)).T))
