"""Where the quantized linears of a checkpoint belong in an mlx-lm model.

Each model has its own ``sanitize`` that renames, drops, stacks and changes checkpoint tensors. It is shown a
placeholder ``<name>.weight`` for every quantized linear and the unquantized tensors as they are, both lazy.
A placeholder has one column, and row r of linear number j holds ``j << 32 | r``, so that what comes out of
``sanitize`` tells which rows of which linear ended where. Nothing of the weights is read meanwhile.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.models.switch_layers import SwitchGLU, SwitchLinear

from ..codec import HADAMARD_SIZE, padded
from ..loader.directory import TrellisModelLoader
from ..loader.exl3 import QuantizedLinear

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

_EXPERT = re.compile(r"(?P<block>.+)\.experts\.(?P<expert>\d{1,9})\.(?P<projection>\w+)")
# Mixtral's names for the projections.
_PROJECTION_ALIASES = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
_ROUTER_BIAS = "e_score_correction_bias"


@dataclass(frozen=True)
class LinearSource:
    """The rows (outputs) of a quantized linear that make a weight of the model.

    Attributes:
        linear: The linear.
        blocks: Blocks of 128 outputs to take, or ``None`` for all.
    """

    linear: QuantizedLinear
    blocks: tuple[int, ...] | None


@dataclass(frozen=True)
class WeightMap:
    """Where everything of a checkpoint goes.

    Attributes:
        linears: Source of each quantized ``nn.Linear``, by its path in the model.
        experts: Sources of each quantized ``SwitchGLU``: path -> projection -> one source per expert.
        heads: Source of the output head, by the path of the embeddings that the model would use instead.
        dense: All other parameters of the model, lazy, by path.
    """

    linears: dict[str, LinearSource] = field(default_factory=dict)
    experts: dict[str, dict[str, list[LinearSource]]] = field(default_factory=dict)
    heads: dict[str, LinearSource] = field(default_factory=dict)
    dense: dict[str, mx.array] = field(default_factory=dict)


class _Placeholders:
    """Makes the placeholders and reads them back."""

    def __init__(self, loader: TrellisModelLoader):
        self.directory = loader.directory
        self.linears = list(loader.linears.values())

    def make(self) -> dict[str, mx.array]:
        weights = {}
        for number, linear in enumerate(self.linears):
            rows = mx.arange(linear.padded_shape[1], dtype=mx.uint64)
            weights[f"{linear.name}.weight"] = (rows + mx.array(number << 32, mx.uint64))[:, None]
        return weights

    def read(self, path: str, codes: np.ndarray, logical: int) -> LinearSource:
        """The source of a weight with these codes that has ``logical`` rows in the model."""
        numbers, rows = codes >> 32, (codes & 0xFFFFFFFF).astype(np.int64)
        names = [self.linears[n].name for n in np.unique(numbers)]
        if len(names) > 1:
            raise ValueError(
                f"{self.directory}: mlx-lm joins {names[0]} and {names[1]} into {path}; linears that are quantized "
                "separately cannot be joined"
            )
        linear = self.linears[int(numbers[0])]
        where = f"{self.directory}: {linear.name}, which mlx-lm puts at {path},"
        start, count = int(rows[0]), len(rows)
        if not np.array_equal(rows, np.arange(start, start + count)):
            raise ValueError(f"{where} has its outputs reordered there; a trellis cannot be reordered")
        stored = linear.padded_shape[1]
        if start == 0 and count == stored == padded(logical):
            return LinearSource(linear, None)
        if start % HADAMARD_SIZE or count != logical or (count % HADAMARD_SIZE and start + count != stored):
            raise ValueError(
                f"{where} gives outputs {start} to {start + count} of {stored} where the model wants {logical}; "
                f"EXL3 pads a model's size to the next multiple of {HADAMARD_SIZE} and can be cut there only"
            )
        first = start // HADAMARD_SIZE
        return LinearSource(linear, tuple(range(first, first + padded(count) // HADAMARD_SIZE)))


def check_experts(loader: TrellisModelLoader) -> None:
    """Raise ValueError where experts of a layer are missing, differ in size, or are only partly quantized."""
    groups: dict[tuple[str, str], set[int]] = {}
    sizes: dict[tuple[str, str], QuantizedLinear] = {}
    for name, linear in loader.linears.items():
        match = _EXPERT.fullmatch(name)
        if match:
            group = (match["block"], match["projection"])
            groups.setdefault(group, set()).add(int(match["expert"]))
            first = sizes.setdefault(group, linear)
            if linear.padded_shape != first.padded_shape:
                raise ValueError(
                    f"{loader.directory}: {name} is a {list(linear.padded_shape)} matrix, but {first.name} is "
                    f"{list(first.padded_shape)}; the experts of a layer have one size"
                )
    blocks: dict[str, set[int]] = {}
    for (block, _), experts in groups.items():
        blocks.setdefault(block, set()).update(experts)
    for (block, projection), experts in groups.items():
        missing = set(range(max(blocks[block]) + 1)) - experts
        if not missing:
            continue
        name = f"{block}.experts.{min(missing)}.{projection}"
        if f"{name}.weight" in loader.unquantized:
            raise ValueError(f"{loader.directory}: {name} is not quantized, but other experts of the layer are")
        raise ValueError(f"{loader.directory}: {name}.trellis is missing, but other experts of the layer are there")


def sanitize(model: nn.Module, loader: TrellisModelLoader, placeholders: _Placeholders) -> dict[str, mx.array]:
    """The checkpoint as the model's own ``sanitize`` leaves it, experts stacked and names adjusted."""
    weights = {**loader.load_unquantized(), **placeholders.make()}
    if hasattr(model, "sanitize"):
        try:
            weights = model.sanitize(weights)
        except KeyError as error:
            missing = str(error.args[0]) if error.args else "a tensor"
            raise ValueError(
                f"{loader.directory}: mlx-lm looks for {missing}, which the checkpoint does not have"
            ) from error
        except MODEL_ERRORS as error:
            raise ValueError(
                f"{loader.directory}: {type(model).__module__} cannot take these tensors: "
                f"{type(error).__name__}: {error}"
            ) from error
    return _move_leftovers(model, _stack_experts(model, weights))


def _stack_experts(model: nn.Module, weights: dict[str, mx.array]) -> dict[str, mx.array]:
    """Stack experts that ``sanitize`` left single, because it knows them only fused (gpt_oss, qwen3_5_moe)."""
    banks = {path: module for path, module in model.named_modules() if isinstance(module, SwitchGLU)}
    result: dict[str, mx.array] = {}
    stacks: dict[str, dict[int, mx.array]] = {}
    for key, value in weights.items():
        match = _EXPERT.fullmatch(key.removesuffix(".weight"))
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
    check_experts(loader)
    placeholders = _Placeholders(loader)
    weights = sanitize(model, loader, placeholders)
    modules = dict(model.named_modules())
    mapping = WeightMap()
    for key, value in weights.items():
        if not isinstance(value, mx.array):
            raise ValueError(f"{loader.directory}: mlx-lm makes a {type(value).__name__} of {key}")
        if value.dtype == mx.uint64 and not _is_head(key, modules):
            _place(mapping, placeholders, modules, key, np.array(value))
        elif value.dtype != mx.uint64:
            mapping.dense[key] = value
    _place_head(mapping, placeholders, modules)
    _check_complete(model, loader, mapping)
    return mapping


def _place(mapping: WeightMap, placeholders: _Placeholders, modules: dict, key: str, codes: np.ndarray) -> None:
    path, _, leaf = key.rpartition(".")
    module = modules.get(path)
    name = placeholders.linears[int(codes.flat[0] >> 32)].name
    where = f"{placeholders.directory}: {name} is quantized, but mlx-lm puts it at {key}"
    if leaf != "weight" or module is None:
        raise ValueError(f"{where}, which the model does not have")
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


def _place_head(mapping: WeightMap, placeholders: _Placeholders, modules: dict) -> None:
    """EXL3 has a quantized head even where the model ties it to the embeddings; it must not be dropped."""
    used = {source.linear.name for source in mapping.linears.values()}
    heads = [
        linear for linear in placeholders.linears if f".{linear.name}".endswith(".lm_head") and linear.name not in used
    ]
    if not heads:
        return
    head = heads[0]
    paths = [p for p, m in modules.items() if f".{p}".endswith(".embed_tokens") and isinstance(m, nn.Embedding)]
    if len(heads) > 1 or len(paths) != 1:
        raise ValueError(
            f"{placeholders.directory}: {head.name} is quantized, but the model has neither a head nor tied embeddings"
        )
    vocabulary, hidden = modules[paths[0]].weight.shape
    if head.padded_shape != (padded(hidden), padded(vocabulary)):
        raise ValueError(
            f"{placeholders.directory}: {head.name} is a {list(head.padded_shape)} matrix, but the model wants "
            f"[{hidden}, {vocabulary}]"
        )
    mapping.heads[paths[0]] = LinearSource(head, None)


def _check_inputs_and_bias(
    placeholders: _Placeholders, sources: list[LinearSource], module: nn.Module, key: str
) -> None:
    logical = module.weight.shape[-1]
    for source in sources:
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


def _check_complete(model: nn.Module, loader: TrellisModelLoader, mapping: WeightMap) -> None:
    for path, projections in mapping.experts.items():
        for projection in PROJECTIONS:
            if projection not in projections:
                raise ValueError(
                    f"{loader.directory}: {path} is quantized, but its {projection} is not in the checkpoint"
                )
    replaced = {
        *mapping.linears,
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
    for key in mapping.dense:
        if key not in parameters:
            raise ValueError(
                f"{loader.directory}: the checkpoint has {key}, which is no parameter of {type(model).__module__}"
            )
