"""What some of mlx-vlm's models have in one piece that a checkpoint has in several, or the other way round.

Their experts are built with gate and up as two matrices, whatever their class has: those are quantized one by one, and
all that stands for experts is made for them. Tensors are taken apart as the model's ``sanitize`` has joined them.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_vlm.models.switch_layers import SwitchGLU

# Experts whose gate and up are one matrix, the rows of gate first.
_JOINED = {
    "mlx_vlm.models.hy_v4.fused_switch_glu.FusedSwitchGLU",
    "mlx_vlm.models.laguna.language.LagunaPackedSwitchGLU",
}
_GATE_AND_UP = ("gate_proj", "up_proj")


def keep_shared_expert_apart(config: dict) -> None:
    """Let MiniMax M3 have its shared expert as three linears, not as the last of its experts, whatever its width.

    So it may be unquantized, or split over ranks as other linears are.
    """
    if config.get("model_type") in ("minimax_m3", "minimax_m3_vl"):
        for part in (config, config["text_config"]):
            part["pack_shared_expert"] = False


def separate_gates(model: nn.Module) -> None:
    """Replace experts whose gate and up are one matrix by ``SwitchGLU``; the parameters are lazy and random."""
    for _, parent in model.named_modules():
        for name, child in parent.children().items():
            if isinstance(child, nn.Module) and f"{type(child).__module__}.{type(child).__qualname__}" in _JOINED:
                experts, both, inputs = child.gate_up_proj.weight.shape
                bias = "bias" in child.gate_up_proj
                setattr(parent, name, SwitchGLU(inputs, both // 2, experts, child.activation, bias))


def split_gates(model: nn.Module, weights: dict[str, mx.array]) -> dict[str, mx.array]:
    """Tensors of a model with those of gate and up apart, as :func:`separate_gates` has made it."""
    result = dict(weights)
    for path, module in model.named_modules():
        if type(module) is SwitchGLU:
            for leaf in ("weight", "bias"):
                joined = result.pop(f"{path}.gate_up_proj.{leaf}", None)
                if joined is not None:
                    halves = mx.split(joined, 2, axis=1)  # of quantized linears each has its own padding
                    result.update({f"{path}.{name}.{leaf}": half for name, half in zip(_GATE_AND_UP, halves)})
    return result


def split_latents(config: Any, weights: dict[str, mx.array]) -> dict[str, mx.array]:
    """Tensors of a checkpoint with ``kv_b_proj`` taken apart for Hy 4, which does that with MXFP8 alone.

    Args:
        config: Of the model.
        weights: The tensors, as the checkpoint calls them.
    """
    if config.model_type != "hy_v4":
        return weights
    result = dict(weights)
    for key in [key for key in weights if key.endswith(".kv_b_proj.weight")]:
        if mx.issubdtype(weights[key].dtype, mx.floating):
            attention, both = key.removesuffix(".kv_b_proj.weight"), config.qk_nope_head_dim + config.v_head_dim
            parts = result.pop(key).reshape(config.num_attention_heads, both, config.kv_lora_rank)
            keys, values = mx.split(parts, [config.qk_nope_head_dim], axis=1)
            result[f"{attention}.embed_q.weight"] = keys.swapaxes(-1, -2)
            result[f"{attention}.unembed_out.weight"] = values
    return result
