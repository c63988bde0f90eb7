"""Trellis layers in the place of a host's linears and gated experts, from the sources of their weights.

Experts whose activation has no fused kernel keep the host's class, over one trellis product per projection.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .. import codec, ops
from ..layers.experts import TrellisExperts
from ..layers.joined import GroupedTrellisLinear, JoinedTrellisLinear
from ..layers.linear import TrellisLinear
from ..loader.exl3 import PlainLinear
from ..ops import Activation
from ..storage.reads import read_all
from ..storage.untrusted import is_whole
from ..weights.experts import ExpertStack, stacked_biases
from ..weights.trellis import TrellisWeight
from .host import ExpertsKind, Host
from .placeholders import LinearSource

# What the hosts' classes call the numbers of an activation.
_NUMBERS = {
    "swiglu_oai": {"_alpha": "alpha", "_limit": "limit", "alpha": "alpha", "limit": "limit"},
    "swiglu_clamped": {"limit": "limit"},
    "swiglu_step": {"limit": "limit"},
    "situ": {"beta": "alpha", "linear_beta": "limit"},
}

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")

TOP_K_KEYS = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "moe_topk",
    "top_k_experts",
    "moe_top_k",
    "experts_per_token",
    "moe_k",
)
"""How models' configs call the experts per token."""


def experts_per_token(config: dict, experts: int, path: str) -> int | None:
    """The top-k that a model's config names for a layer, if one in [1, experts].

    Args:
        config: The model's.
        experts: Of the layer.
        path: Of the experts. Some configs name a number for each layer (hunyuan).
    """
    layer = _LAYER.search(path)
    for part in (config, config.get("text_config") or {}):
        for key in TOP_K_KEYS:
            value = part.get(key)
            if isinstance(value, list) and layer is not None and int(layer[1]) < len(value):
                value = value[int(layer[1])]
            if is_whole(value) and 1 <= value <= experts:
                return value
    return None


def activation_of(host: Host, module: nn.Module) -> Activation | None:
    """The activation of experts as the fused kernels know it; ``None`` if they do not.

    Nor do they know what a class derived from the host's computes beside it, such as Inkling's scales of each expert.
    """
    if all(type(module) is not kind.module for kind in host.experts):
        return None
    activation = module.activation
    variant = f":{activation._approx}" if isinstance(activation, nn.GELU) else ""
    name = host.activations.get(f"{type(activation).__module__}.{type(activation).__qualname__}{variant}")
    if name is None:
        return None
    if name == "swiglu_oai" and getattr(activation, "beta", 1) != 1:  # MiniMax: what is added to up
        return None
    kept = _NUMBERS.get(name, {})
    numbers = {number: getattr(activation, own) for own, number in kept.items() if hasattr(activation, own)}
    try:
        return Activation.checked(name, **numbers)
    except ValueError:  # no bound, which hosts write as 0 or None
        return None


def make_experts(host: Host, module: nn.Module, stacks: dict[str, ExpertStack]) -> nn.Module:
    """What stands for experts: a fused layer, or the module itself over trellis projections.

    Args:
        host: Whose module it is.
        module: The experts.
        stacks: The experts' weights by projection, those that read x first.
    """
    kind, activation = kind_of(host, module), activation_of(host, module)
    if activation is not None:
        return kind.fused(*stacks.values(), *(activation if len(stacks) == 3 else activation[:1]))
    # As in the fused kernels, the padded width flows from what reads x into down.
    for name, stack in stacks.items():
        is_down = name == kind.projections[-1]
        in_features, out_features = (None, stack.out_features) if is_down else (stack.in_features, None)
        arrays = stack.codes, stack.formats, stack.suh, stack.svh, stack.bias
        module[name] = TrellisExperts(ExpertStack(*arrays, in_features, out_features))
    return module


def kind_of(host: Host, module: nn.Module) -> ExpertsKind:
    """Which of the host's experts a module is that was mapped as experts."""
    kind = host.kind_of(module)
    assert kind is not None, type(module)  # map_weights: experts are of a kind
    return kind


def load_stack(sources: Sequence[LinearSource], in_features: int, out_features: int) -> ExpertStack:
    """Read the weights of a projection of experts, each to its place among the others.

    Args:
        sources: One for each expert, all quantized.
        in_features: Logical inputs of each.
        out_features: Logical outputs of each.

    Raises:
        ValueError: If a source was left unquantized, or its outputs times its factor are beyond half precision.
    """
    linears, experts = [source.quantized for source in sources], len(sources)
    k, n = codec.padded(in_features), codec.padded(out_features)
    tiles = k // codec.TILE, n // codec.TILE
    sizes = [tiles[0] * tiles[1] * codec.words_per_tile(linear.bits) for linear in linears]
    codes = ops.uninitialized((sum(sizes) // 2,), mx.uint32)  # a tile has an even number of words
    inputs, outputs = (ops.uninitialized((experts, size), mx.float16) for size in (k, n))
    words, suh, svh = (np.array(array, copy=False) for array in (codes, inputs, outputs))
    reads, start = [], 0
    for e, (source, linear, size) in enumerate(zip(sources, linears, sizes)):
        trellis = words.view(np.int16)[start : start + size].reshape(*tiles, -1)
        reads += linear.fill(trellis, suh[e], svh[e], columns=source.blocks)
        start += size
    read_all(reads)
    for source, scales in zip(sources, svh):
        if source.factor != 1:
            with np.errstate(over="ignore"):  # told below
                scales *= np.float16(source.factor)
            _check_finite(source, bool(np.isfinite(scales).all()))
    formats = mx.array([codec.format_word(linear.bits, linear.codebook) for linear in linears], mx.uint32)
    biases = stacked_biases([linear.load_bias(source.blocks) for source, linear in zip(sources, linears)], n)
    return ExpertStack(codes, formats, inputs, outputs, biases, in_features, out_features)


def _check_finite(source: LinearSource, finite: bool) -> None:
    if not finite:
        raise ValueError(f"{source.linear.name}.svh times {source.factor} is beyond half precision")


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
        _check_finite(source, bool(mx.isfinite(w.svh).all().item()))
    return w


def whole_linear(host: Host, _path: str, module: nn.Module, source: LinearSource) -> TrellisLinear:
    """What stands for an ``nn.Linear``."""
    out_features, in_features = module.weight.shape
    return host.linear(load_source(source, in_features, out_features))


def joined_linear(module: nn.Module, parts: list[tuple[LinearSource, int]]) -> JoinedTrellisLinear:
    """What stands for an ``nn.Linear`` that is quantized in parts, each with the number of its outputs."""
    in_features = module.weight.shape[1]
    return JoinedTrellisLinear([TrellisLinear(load_source(source, in_features, rows)) for source, rows in parts])


def grouped_linear(module: nn.Module, sources: list[LinearSource]) -> GroupedTrellisLinear:
    """What stands for a layer with a linear for each group of inputs."""
    _, out_features, in_features = module.weight.shape
    return GroupedTrellisLinear([TrellisLinear(load_source(source, in_features, out_features)) for source in sources])


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
    rows = zip(*sources.values())
    return [any(isinstance(source.linear, PlainLinear) for source in row) for row in rows]


def whole_experts(host: Host, _path: str, module: nn.Module, sources: dict[str, list[LinearSource]]) -> nn.Module:
    """What stands for experts. Those of which a projection was left unquantized are dense ones."""
    is_dense = unquantized_experts(sources)
    shapes = {projection: module[projection].weight.shape[1:] for projection in sources}
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
    stacks = {
        p: load_stack([s for s, kind in zip(listed, is_dense) if not kind], *reversed(shapes[p]))
        for p, listed in sources.items()
    }
    quantized = make_experts(host, module, stacks)
    return quantized if dense is None else kind_of(host, module).partly(quantized, dense, is_dense)


def _dense_weight(source: LinearSource, in_features: int, out_features: int) -> mx.array:
    """``[out, in]``: as stored, or decoded where only another projection of the expert was left unquantized."""
    if isinstance(source.linear, PlainLinear):
        return source.linear.load() * source.factor
    return mx.array(np.ascontiguousarray(codec.dequantize(load_source(source, in_features, out_features)).T))
