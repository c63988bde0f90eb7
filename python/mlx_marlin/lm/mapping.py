"""Where the quantized linears of a checkpoint belong in an mlx-lm model.

Each model has its own ``sanitize`` that renames, drops, stacks and changes checkpoint tensors. It is shown a
placeholder ``<name>.weight`` for every quantized linear and the unquantized tensors as they are, both lazy.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.models.switch_layers import SwitchGLU, SwitchLinear

from ..codec import padded
from ..loader.contents import NGRAM, OTHER, LeftOut, parts_of, seems_to_be
from ..loader.directory import TrellisModelLoader
from ..loader.embedding import QuantizedEmbedding
from ..loader.exl3 import PlainLinear, QuantizedLinear
from ..storage.safetensors import TensorInfo
from .embedding import make_placeholders, take_embeddings
from .placeholders import EXPERT, LinearSource, Placeholders

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
# What model code raises on a config or a set of tensors that it was not written for.
MODEL_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)

# Mixtral's names for the projections.
_PROJECTION_ALIASES = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)$")
_ROUTER_BIAS = "e_score_correction_bias"


@dataclass
class WeightMap:
    """Where everything of a checkpoint goes.

    Attributes:
        linears: Source of each quantized ``nn.Linear``, by its path in the model.
        experts: Sources of each quantized ``SwitchGLU``: path -> projection -> one source per expert.
        heads: Source of the output head, by the path of the embeddings that the model would use instead.
        embeddings: Each quantized token embedding, by its path in the model.
        dense: All other parameters of the model, lazy, by path.
        stored: Where those of the dense parameters lie that the model takes as the checkpoint has them.
        left_out: What of the checkpoint the model does not use.
    """

    linears: dict[str, LinearSource] = field(default_factory=dict)
    experts: dict[str, dict[str, list[LinearSource]]] = field(default_factory=dict)
    heads: dict[str, LinearSource] = field(default_factory=dict)
    embeddings: dict[str, QuantizedEmbedding] = field(default_factory=dict)
    dense: dict[str, mx.array] = field(default_factory=dict)
    stored: dict[str, TensorInfo] = field(default_factory=dict)
    left_out: LeftOut = LeftOut({})


@dataclass(frozen=True)
class _Checkpoint:
    """What the steps of :func:`map_weights` know of the checkpoint and the model.

    Attributes:
        loader: The checkpoint.
        placeholders: What stands for its linears.
        modules: The model's modules, by path.
        layers: The model's layers.
        parts: Names that belong to something that a text model leaves out, and what.
    """

    loader: TrellisModelLoader
    placeholders: Placeholders
    modules: dict[str, nn.Module]
    layers: int
    parts: dict[str, str]

    @classmethod
    def of(cls, model: nn.Module, loader: TrellisModelLoader) -> _Checkpoint:
        modules = dict(model.named_modules())
        numbers = (int(match[1]) for match in map(_LAYER.search, modules) if match)
        layers = len(model.layers) if hasattr(model, "layers") else max(numbers, default=-1) + 1
        parts = parts_of((*loader.quantized, *loader.embeddings, *loader.unquantized), layers)
        return cls(loader, Placeholders(loader), modules, layers, parts)

    def seems_to_be(self, name: str) -> str:
        return seems_to_be(name, self.layers, self.loader.version)


def sanitize(
    model: nn.Module, directory: Path, unquantized: dict[str, mx.array], placeholders: Placeholders
) -> dict[str, mx.array]:
    """The checkpoint as the model's own ``sanitize`` leaves it, experts stacked and names adjusted."""
    weights = {**unquantized, **placeholders.make()}
    if hasattr(model, "sanitize"):
        try:
            weights = model.sanitize(weights)
        except KeyError as error:
            missing = str(error.args[0]) if error.args else "a tensor"
            raise ValueError(f"{directory}: mlx-lm looks for {missing}, which the checkpoint does not have") from error
        except MODEL_ERRORS as error:
            raise ValueError(
                f"{directory}: {type(model).__module__} cannot take these tensors: {type(error).__name__}: {error}"
            ) from error
    return _move_leftovers(model, _stack_experts(model, weights))


def _stack_experts(model: nn.Module, weights: dict[str, mx.array]) -> dict[str, mx.array]:
    """Stack experts that ``sanitize`` left single, because it knows them only fused (gpt_oss, qwen3_5_moe)."""
    banks = {path: module for path, module in model.named_modules() if isinstance(module, SwitchGLU)}
    result: dict[str, mx.array] = {}
    stacks: dict[str, dict[int, mx.array]] = {}
    for key, value in weights.items():
        match = EXPERT.fullmatch(key.removesuffix(".weight"))
        inside = [p for p in banks if match and p.startswith(f"{match['block']}.")]
        if match and key.endswith(".weight") and len(inside) == 1:
            projection = _PROJECTION_ALIASES.get(match["projection"], match["projection"])
            stacks.setdefault(f"{inside[0]}.{projection}.weight", {})[int(match["expert"])] = value
        else:
            result[key] = value
    for key, experts in stacks.items():
        result[key] = mx.stack([experts[e] for e in sorted(experts)])
    return result


def _move_leftovers(model: nn.Module, weights: dict[str, mx.array]) -> dict[str, mx.array]:
    """Rename what ExLlamaV3 calls otherwise.

    It keeps the router's selection bias inside ``gate``, which some models (minimax) have beside it, and the head
    outside of the language model (gemma4).
    """
    parameters = set(_parameters(model))
    heads = [key for key in parameters if key.endswith(".lm_head.weight")]
    moved = {}
    for key, value in weights.items():
        other = key.replace(f".gate.{_ROUTER_BIAS}", f".{_ROUTER_BIAS}")
        if key == "lm_head.weight" and len(heads) == 1:
            other = heads[0]
        moved[other if key not in parameters and other in parameters - weights.keys() else key] = value
    return moved


def map_weights(model: nn.Module, loader: TrellisModelLoader) -> WeightMap:
    """Find out where every tensor of a checkpoint goes, and that every parameter of the model gets one.

    Args:
        model: The mlx-lm model, its parameters not yet evaluated.
        loader: The checkpoint.

    Raises:
        ValueError: If a quantized linear ends where no trellis can stand, if a parameter of the model has no
            tensor, or if shapes do not fit. The message names the tensor.
    """
    checkpoint = _Checkpoint.of(model, loader)
    placeholders, modules = checkpoint.placeholders, checkpoint.modules
    of_experts = {f"{linear.name}.{suffix}" for linear in placeholders.plain for suffix in linear.parts}
    unquantized = {name: value for name, value in loader.load_unquantized().items() if name not in of_experts}
    weights = sanitize(model, loader.directory, {**unquantized, **make_placeholders(loader)}, placeholders)
    mapping = WeightMap(embeddings=take_embeddings(loader, modules, weights, checkpoint.parts))
    for key, value in weights.items():
        if not isinstance(value, mx.array):
            raise ValueError(f"{loader.directory}: mlx-lm makes a {type(value).__name__} of {key}")
        if value.dtype == mx.uint64 and not _is_head(key, modules):
            _place(mapping, checkpoint, key, np.array(value))
        elif value.dtype != mx.uint64 and not _is_head(key, modules):
            mapping.dense[key] = value
    _place_head(mapping, checkpoint)
    _check_complete(model, checkpoint, mapping)
    names = {id(value): name for name, value in unquantized.items()}
    taken = {key: names[id(value)] for key, value in mapping.dense.items() if id(value) in names}
    mapping.stored = {key: loader.unquantized[name] for key, name in taken.items()}
    mapping.left_out = _left_out(mapping, checkpoint, unquantized)
    return mapping


def _left_out(mapping: WeightMap, checkpoint: _Checkpoint, unquantized: dict[str, mx.array]) -> LeftOut:
    banks = (sources for projections in mapping.experts.values() for sources in projections.values())
    sources = [*mapping.linears.values(), *mapping.heads.values(), *(source for bank in banks for source in bank)]
    used = {source.linear.name for source in sources}
    found: dict[str, dict[str, int]] = {}
    used.update(embedding.name for embedding in mapping.embeddings.values())
    for module in (*checkpoint.placeholders.linears, *checkpoint.loader.embeddings.values()):
        if module.name not in used:
            sizes = found.setdefault(checkpoint.parts.get(module.name, OTHER), {})
            sizes.update({f"{module.name}.{suffix}": info.nbytes for suffix, info in module.parts.items()})
    for name in _unread(unquantized, mapping.dense.values()):
        if name.removesuffix(".weight") in used:
            continue
        part = checkpoint.parts.get(name, OTHER)
        found.setdefault(part, {})[name] = checkpoint.loader.unquantized[name].nbytes
    if checkpoint.loader.tables:
        found[NGRAM] = {name: info.nbytes for name, info in checkpoint.loader.tables.items()}
    return LeftOut(found)


def _unread(inputs: dict[str, mx.array], outputs: Iterable[mx.array]) -> list[str]:
    """Names of the lazy arrays that nothing in the outputs is computed from, by MLX's drawing of the graph."""
    labels = {f"input{i}": name for i, name in enumerate(inputs)}
    graph = io.StringIO()
    # Another step behind each output, so that an array that is passed through has a reader as well.
    ends = [mx.expand_dims(value, 0) for value in outputs]
    mx.export_to_dot(graph, *ends, **dict(zip(labels, inputs.values())))
    read = set(re.findall(r'^"(input\d+)" ->', graph.getvalue(), re.MULTILINE))
    return [name for label, name in labels.items() if label not in read]


def _place(mapping: WeightMap, checkpoint: _Checkpoint, key: str, codes: np.ndarray) -> None:
    path, _, leaf = key.rpartition(".")
    placeholders, modules = checkpoint.placeholders, checkpoint.modules
    module = modules.get(path)
    name = placeholders.linears[int(codes.flat[0] >> 32)].name
    where = f"{placeholders.directory}: {name} is quantized, but mlx-lm puts it at {key}"
    if module is None and name in checkpoint.parts:
        return
    if leaf != "weight" or module is None:
        raise ValueError(f"{where}, which the model does not have; {checkpoint.seems_to_be(name)}")
    if isinstance(module, SwitchLinear) and codes.ndim == 3 and codes.shape[2] == 1:
        parent, _, projection = path.rpartition(".")
        if not isinstance(modules[parent], SwitchGLU) or projection not in PROJECTIONS:
            raise ValueError(
                f"{where}; experts can be quantized in a SwitchGLU only, not in a {type(modules[parent]).__name__}"
            )
        if len(codes) != module.weight.shape[0]:
            raise ValueError(
                f"{where}, where the model has {module.weight.shape[0]} experts; the checkpoint has {len(codes)}"
            )
        sources = [placeholders.read(f"{key}[{e}]", c[:, 0], module.weight.shape[1]) for e, c in enumerate(codes)]
        mapping.experts.setdefault(parent, {})[projection] = sources
    elif isinstance(module, nn.Linear) and codes.ndim == 2 and codes.shape[1] == 1:
        mapping.linears[path] = placeholders.read(key, codes[:, 0], module.weight.shape[0])
        sources = [mapping.linears[path]]
    else:
        raise ValueError(f"{where}, a {type(module).__name__} that needs a dense weight")
    _check_inputs_and_bias(placeholders, sources, module, key)


def _is_head(key: str, modules: dict) -> bool:
    """Whether this is a head that the model does not have, because it always uses its embeddings."""
    path = key.removesuffix(".weight")
    return f".{path}".endswith(".lm_head") and path not in modules


def _place_head(mapping: WeightMap, checkpoint: _Checkpoint) -> None:
    """EXL3 has a head even where the model ties it to the embeddings; it must not be dropped."""
    directory, modules = checkpoint.loader.directory, checkpoint.modules
    used = {source.linear.name for source in mapping.linears.values()}
    heads: list[QuantizedLinear | PlainLinear] = [
        linear
        for linear in checkpoint.loader.linears.values()
        if f".{linear.name}".endswith(".lm_head") and linear.name not in used
    ]
    for name, info in checkpoint.loader.unquantized.items():
        stem = name.removesuffix(".weight")
        is_head = name.endswith(".weight") and _is_head(name, modules) and name not in checkpoint.parts
        if is_head and not any(f".{path}".endswith(".lm_head") for path in modules):
            heads.append(PlainLinear(stem, {"weight": info}))
            heads[-1].check()
    if not heads:
        return
    head = heads[0]
    embeddings = {path: module.weight.shape for path, module in modules.items() if isinstance(module, nn.Embedding)}
    named = [path for path in embeddings if f".{path}".endswith(".embed_tokens")]
    paths = named or list(embeddings)
    if len(heads) > 1 or len(paths) != 1:
        raise ValueError(
            f"{directory}: {head.name} is a head, but the model has neither a head nor one table of embeddings"
        )
    vocabulary, hidden = embeddings[paths[0]]
    if head.padded_shape != (padded(hidden), padded(vocabulary)):
        raise ValueError(
            f"{directory}: {head.name} is a {list(head.padded_shape)} matrix, but the model wants "
            f"[{hidden}, {vocabulary}]"
        )
    mapping.heads[paths[0]] = LinearSource(head, None)


def _check_inputs_and_bias(
    placeholders: Placeholders, sources: list[LinearSource], module: nn.Module, key: str
) -> None:
    logical = module.weight.shape[-1]
    for source in sources:
        if isinstance(source.linear, PlainLinear) and source.linear.parts["weight"].shape != module.weight.shape[-2:]:
            raise ValueError(
                f"{placeholders.directory}: {source.linear.name}.weight has shape "
                f"{list(source.linear.parts['weight'].shape)}, but {key} wants {list(module.weight.shape[-2:])}"
            )
        stored = source.linear.padded_shape[0]
        if stored != padded(logical):
            raise ValueError(
                f"{placeholders.directory}: {source.linear.name} has {stored} inputs, but {key} wants {logical}"
            )
        if ("bias" in source.linear.parts) != ("bias" in module):
            has, wants = ("has a", "none") if "bias" in source.linear.parts else ("has no", "one")
            raise ValueError(
                f"{placeholders.directory}: {source.linear.name} {has} bias, but the model wants {wants} at {key}"
            )


def _parameters(model: nn.Module) -> dict[str, mx.array]:
    """The parameters of a model by path."""
    return dict(tree_flatten(model.parameters()))


def _check_complete(model: nn.Module, checkpoint: _Checkpoint, mapping: WeightMap) -> None:
    """Every parameter has a tensor that fits; what is left over belongs to a part that text models leave out."""
    loader = checkpoint.loader
    for path, projections in mapping.experts.items():
        for projection in PROJECTIONS:
            if projection not in projections:
                raise ValueError(
                    f"{loader.directory}: {path} is quantized, but its {projection} is not in the checkpoint"
                )
    replaced = {
        *mapping.linears,
        *mapping.embeddings,
        *(f"{path}.{projection}" for path in mapping.experts for projection in PROJECTIONS),
    }
    parameters = {key: value for key, value in _parameters(model).items() if key.rpartition(".")[0] not in replaced}
    for key, value in parameters.items():
        if key not in mapping.dense:
            raise ValueError(
                f"{loader.directory}: the checkpoint has no tensor for {key}, a parameter of {type(model).__module__}"
            )
        if mapping.dense[key].shape != value.shape:
            raise ValueError(
                f"{loader.directory}: {key} has shape {list(mapping.dense[key].shape)}, "
                f"but the model wants {list(value.shape)}"
            )
    extra = [key for key in mapping.dense if key not in parameters]
    parts = parts_of((*extra, *loader.quantized, *loader.unquantized), checkpoint.layers)
    for key in extra:
        if key not in parts:
            raise ValueError(
                f"{loader.directory}: the checkpoint has {key}, which is no parameter of {type(model).__module__}; "
                f"{checkpoint.seems_to_be(key)}"
            )
        del mapping.dense[key]
