"""What a host makes of a checkpoint's tensors, before any of them is read.

Each model has its own ``sanitize`` that renames, drops, stacks and changes checkpoint tensors. It is shown a
placeholder ``<name>.weight`` for every quantized linear and the unquantized tensors as they are, both lazy.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from .graphs import unread
from .host import MODEL_ERRORS, Host
from .placeholders import EXPERT, Placeholders

# Mixtral's names for the projections.
_PROJECTION_ALIASES = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
_SLICE = re.compile(r"(?P<name>.+\.wo_a)\.slice\.(?P<slice>\d{1,9})\.weight")
_ROUTER_BIAS = "e_score_correction_bias"


def sanitize(
    host: Host, model: nn.Module, directory: Path, unquantized: dict[str, mx.array], placeholders: Placeholders
) -> dict[str, mx.array]:
    """The checkpoint as the model's own ``sanitize`` leaves it, experts stacked and names adjusted."""
    stand_ins = placeholders.make()
    weights = {**unquantized, **stand_ins}
    try:
        weights = host.sanitize(model, _join_slices(_split_delta_attention(weights)))
    except KeyError as error:
        missing = str(error.args[0]) if error.args else "a tensor"
        raise ValueError(f"{directory}: {host.name} looks for {missing}, which the checkpoint does not have") from error
    except MODEL_ERRORS as error:
        raise ValueError(
            f"{directory}: {type(model).__module__} cannot take these tensors: {type(error).__name__}: {error}"
        ) from error
    _check_untouched(host, directory, stand_ins, weights)
    weights = _join_linears(model, directory, _stack_experts(host, model, weights))
    return _move_leftovers(model, _reshape_decays(model, weights))


def _check_untouched(host: Host, directory: Path, stand_ins: dict[str, mx.array], weights: dict[str, mx.array]) -> None:
    """No model code has computed with what stands for a quantized linear.

    MLX makes floats of a placeholder that is joined with some, and a weight that is none would follow.
    """
    floats = [v for v in weights.values() if isinstance(v, mx.array) and mx.issubdtype(v.dtype, mx.floating)]
    read = stand_ins.keys() - set(unread(stand_ins, floats))
    if read:
        raise ValueError(
            f"{directory}: {min(read).removesuffix('.weight')} is quantized, but {host.name} computes with its weight, "
            "or joins it with one that is not quantized"
        )


def _stack_experts(host: Host, model: nn.Module, weights: dict[str, mx.array]) -> dict[str, mx.array]:
    """Stack experts that ``sanitize`` left single, because it knows them only fused (gpt_oss, qwen3_5_moe)."""
    banks = {path: module for path, module in model.named_modules() if host.kind_of(module)}
    result: dict[str, mx.array] = {}
    stacks: dict[str, dict[int, mx.array]] = {}
    for key, value in weights.items():
        match = EXPERT.fullmatch(key.removesuffix(".weight"))
        inside = _inside(banks, match["layer"]) if match else []
        if match and key.endswith(".weight") and len(inside) == 1:
            projection = _PROJECTION_ALIASES.get(match["projection"], match["projection"])
            stacks.setdefault(f"{inside[0]}.{projection}.weight", {})[int(match["expert"])] = value
        else:
            result[key] = value
    for key, experts in stacks.items():
        result[key] = mx.stack([experts[e] for e in sorted(experts)])
    return result


def _inside(banks: Iterable[str], block: str) -> list[str]:
    """Which of the experts' paths are those of a block of a checkpoint, which the host may call otherwise (step3p7)."""
    banks = list(banks)
    layer = block.rpartition(".")[0]
    return [p for p in banks if p.startswith(f"{block}.")] or [p for p in banks if p.startswith(f"{layer}.")]


_OF_ATTENTION, _OF_MLP = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")
# How models call what they have of ExLlamaV3's linears together: vision towers, phi3, glm4.
_JOINED = {"qkv": _OF_ATTENTION, "in_proj": _OF_ATTENTION, "qkv_proj": _OF_ATTENTION, "gate_up_proj": _OF_MLP}


def _join_linears(model: nn.Module, directory: Path, weights: dict[str, mx.array]) -> dict[str, mx.array]:
    """Join what ExLlamaV3 splits before it quantizes it: attention, and the gates of an MLP.

    Of towers it keeps the unquantized weights as well, which are dropped here.

    Raises:
        ValueError: If some of the parts are quantized and others are not.
    """
    result = dict(weights)
    for path, module in model.named_modules():
        parent, _, leaf = path.rpartition(".")
        names = [f"{parent}.{name}.weight" for name in _JOINED.get(leaf, ())]
        if not names or type(module) is not nn.Linear or not all(n in weights for n in names):
            continue
        parts = [result.pop(name) for name in names]
        if len({part.dtype == mx.uint64 for part in parts}) > 1:  # of the placeholders
            plain = next(name for name, part in zip(names, parts) if part.dtype != mx.uint64)
            raise ValueError(
                f"{directory}: {plain} is not quantized, but others of {', '.join(_JOINED[leaf])} are, which the model "
                f"has in one linear, {path}; such a linear is quantized in all its parts or in none"
            )
        rows, total = [len(part) for part in parts], module.weight.shape[0]
        if sum(rows) != total and len(set(rows)) == 1:
            rows = [total // len(parts)] * len(parts)  # padding belongs to each part
        result[f"{path}.weight"] = mx.concatenate([part[:count] for part, count in zip(parts, rows)])
        result.pop(f"{path}.bias", None)
    return result


# Of the forget gate of Kimi's delta attention, of low rank or not.
_FORGET_GATES = ("f_a_proj", "f_proj")


def _split_delta_attention(weights: dict[str, mx.array]) -> dict[str, mx.array]:
    """Split what ExLlamaV3 joins of Kimi's delta attention: its linears, and its convolutions.

    Models that have them joined (glm5_next) join them again.
    """
    result = dict(weights)
    gates = [f".{gate}.weight" for gate in _FORGET_GATES]
    for layer in [key.removesuffix(gate) for gate in gates for key in weights if key.endswith(gate)]:
        for joined, single in (("qkv_proj", "{}_proj"), ("conv1d", "{}_conv1d")):
            whole = result.pop(f"{layer}.{joined}.weight", None)
            if whole is not None:
                parts = mx.split(whole, 3)
                result.update({f"{layer}.{single.format(n)}.weight": part for n, part in zip("qkv", parts)})
    return result


def _reshape_decays(model: nn.Module, weights: dict[str, mx.array]) -> dict[str, mx.array]:
    """Give the decays of Kimi's delta attention, which ExLlamaV3 writes flat, the shape that the model has them in."""
    result = dict(weights)
    for key, value in parameters_of(model).items():
        if key.endswith(".A_log") and key in weights and weights[key].shape == (value.size,):
            result[key] = weights[key].reshape(value.shape)
    return result


def _join_slices(weights: dict[str, mx.array]) -> dict[str, mx.array]:
    """Join the groups of DeepSeek V4's ``wo_a``, which ExLlamaV3 quantizes one by one."""
    result: dict[str, mx.array] = {}
    slices: dict[str, dict[int, mx.array]] = {}
    for key, value in weights.items():
        match = _SLICE.fullmatch(key)
        if match:
            slices.setdefault(match["name"], {})[int(match["slice"])] = value
        else:
            result[key] = value
    for name, parts in slices.items():
        result[f"{name}.weight"] = mx.concatenate([parts[i] for i in sorted(parts)])
    return result


def _move_leftovers(model: nn.Module, weights: dict[str, mx.array]) -> dict[str, mx.array]:
    """Rename what ExLlamaV3 calls otherwise.

    It keeps the router's selection bias inside ``gate``, which some models (minimax) have beside it, and the head
    outside of the language model (gemma4).
    """
    parameters = set(parameters_of(model))
    heads = [key for key in parameters if key.endswith(".lm_head.weight")]
    moved = {}
    for key, value in weights.items():
        other = key.replace(f".gate.{_ROUTER_BIAS}", f".{_ROUTER_BIAS}")
        if key == "lm_head.weight" and len(heads) == 1:
            other = heads[0]
        moved[other if key not in parameters and other in parameters - weights.keys() else key] = value
    return moved


def parameters_of(model: nn.Module) -> dict[str, mx.array]:
    """The parameters of a model by path."""
    return dict(tree_flatten(model.parameters()))
