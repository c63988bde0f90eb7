"""Tiny checkpoints of models whose originals join linears that ExLlamaV3 quantizes one by one."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx

from tests.support.checkpoints import SIZES, Checkpoint, Sizes


def phi3(s: Sizes = SIZES) -> Checkpoint:
    """Its heads divide the hidden size."""
    s = replace(s, hidden=s.heads * s.head_dim)
    c = Checkpoint(s, {"model_type": "phi3", "architectures": ["Phi3ForCausalLM"]})
    c.ends()
    for i in range(s.layers):
        layer = f"model.layers.{i}"
        c.block_norms(layer)
        c.attention(layer)
        _join(c, f"{layer}.self_attn", ("q_proj", "k_proj", "v_proj"), "qkv_proj")
        c.gated_mlp(f"{layer}.mlp")
        _join(c, f"{layer}.mlp", ("gate_proj", "up_proj"), "gate_up_proj")
    return c


def glm4(s: Sizes = SIZES) -> Checkpoint:
    """An MLP that needs padding: 224 to 256."""
    s = replace(s, dense_width=224)
    config = {"attention_bias": True, "partial_rotary_factor": 0.5}
    c = Checkpoint(s, {"model_type": "glm4", "architectures": ["Glm4ForCausalLM"], **config})
    c.ends()
    for i in range(s.layers):
        layer = f"model.layers.{i}"
        c.block_norms(layer)
        c.block_norms(layer, names=("post_self_attn_layernorm", "post_mlp_layernorm"))
        c.attention(layer, bias=True)
        c.gated_mlp(f"{layer}.mlp")
        _join(c, f"{layer}.mlp", ("gate_proj", "up_proj"), "gate_up_proj")
    return c


def _join(c: Checkpoint, block: str, names: tuple[str, ...], joined: str) -> None:
    c.dense[f"{block}.{joined}.weight"] = mx.concatenate([c.dense.pop(f"{block}.{name}.weight") for name in names])


ARCHITECTURES = {make.__name__: make for make in (phi3, glm4)}
