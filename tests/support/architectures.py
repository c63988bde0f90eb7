"""One tiny checkpoint per architecture, with the tensors and names of its original."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from importlib import metadata

import mlx.core as mx
import pytest

from tests.support.architectures_gemma import gemma3, gemma4
from tests.support.architectures_mlp import nemotron_h, nemotron_h_latent, phixtral
from tests.support.checkpoints import SIZES, Checkpoint, Sizes, mixture, mixture_config

OLD_MLX_LM = metadata.version("mlx-lm").startswith("0.31.")
"""The last one for Python 3.10."""

# It stacks no experts unless layer 0 has some.
MOE_LAYER, DENSE_LAYER = (0, 1) if OLD_MLX_LM else (1, 0)
"""Of :func:`qwen3_moe`."""


def qwen3_moe(s: Sizes = SIZES, *, dense_layers=(DENSE_LAYER,), dense: bool = True) -> Checkpoint:
    """Experts in all layers but ``dense_layers``; dense: whether the dense form is made too."""
    config = {
        "model_type": "qwen3_moe",
        "num_experts": s.experts,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": s.width,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": list(dense_layers),
    }
    c = Checkpoint(s, config, dense=dense)
    c.ends()
    for i in range(s.layers):
        layer = f"model.layers.{i}"
        c.block_norms(layer)
        c.attention(layer, norms="head")
        c.gated_mlp(f"{layer}.mlp") if i in dense_layers else c.experts(f"{layer}.mlp")
    return c


def mixtral(s: Sizes = SIZES) -> Checkpoint:
    c = Checkpoint(
        s,
        {
            "model_type": "mixtral",
            "num_local_experts": s.experts,
            "num_experts_per_tok": 2,
            "intermediate_size": s.width,
            "num_attention_heads": 3,
            "num_key_value_heads": 3,
        },
    )
    c.ends()
    for i in range(s.layers):
        layer = f"model.layers.{i}"
        c.block_norms(layer)
        for name in "qkvo":  # mixtral's heads divide the hidden size
            c.linear(f"{layer}.self_attn.{name}_proj", s.hidden, s.hidden)
        c.experts(f"{layer}.block_sparse_moe", ("w1", "w3", "w2"))
    return c


def olmoe(s: Sizes = SIZES) -> Checkpoint:
    c = Checkpoint(
        s,
        {
            "model_type": "olmoe",
            "num_experts": s.experts,
            "num_experts_per_tok": 2,
            "intermediate_size": s.width,
            "tie_word_embeddings": True,
        },
    )
    c.ends()
    for i in range(s.layers):
        layer = f"model.layers.{i}"
        c.block_norms(layer)
        c.attention(layer, norms="all")
        c.experts(f"{layer}.mlp")
    return c


def qwen2_moe(s: Sizes = SIZES) -> Checkpoint:
    c = Checkpoint(
        s,
        {
            "model_type": "qwen2_moe",
            "num_experts": s.experts,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": s.width,
            "shared_expert_intermediate_size": 128,
            "num_attention_heads": 3,
            "num_key_value_heads": 3,
        },
    )
    c.ends()
    for i in range(s.layers):
        layer = f"model.layers.{i}"
        c.block_norms(layer)
        for name in "qkv":
            c.linear(f"{layer}.self_attn.{name}_proj", s.hidden, s.hidden, bias=True)
        c.linear(f"{layer}.self_attn.o_proj", s.hidden, s.hidden)
        c.experts(f"{layer}.mlp")
        c.gated_mlp(f"{layer}.mlp.shared_expert", 128)
        c.plain(f"{layer}.mlp.shared_expert_gate.weight", 1, s.hidden, spread=0.1, dtype=mx.float16)
    return c


def _delta(s: Sizes) -> dict:
    return {
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 32,
        "linear_value_head_dim": 64,
        "linear_conv_kernel_dim": 4,
        "full_attention_interval": 2,
        "num_experts": s.experts,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": s.width,
        "shared_expert_intermediate_size": 128,
        "norm_topk_prob": True,
    }


def _delta_layer(c: Checkpoint, layer: str, *, fused: bool) -> None:
    s = c.sizes
    keys, values, heads = 2 * 32, 4 * 64, 4
    attn = f"{layer}.linear_attn"
    if fused:
        c.linear(f"{attn}.in_proj_qkvz", s.hidden, 2 * keys + 2 * values)
        c.plain(f"{attn}.in_proj_ba.weight", 2 * heads, s.hidden, spread=0.1)
    else:
        c.linear(f"{attn}.in_proj_qkv", s.hidden, 2 * keys + values)
        c.linear(f"{attn}.in_proj_z", s.hidden, values)
        c.plain(f"{attn}.in_proj_b.weight", heads, s.hidden, spread=0.1)
        c.plain(f"{attn}.in_proj_a.weight", heads, s.hidden, spread=0.1)
    c.plain(f"{attn}.conv1d.weight", 2 * keys + values, 1, 4, spread=0.5)
    c.plain(f"{attn}.dt_bias", heads, mean=1.0, spread=0.1)
    c.plain(f"{attn}.A_log", heads, mean=0.5, spread=0.3)
    c.norm(f"{attn}.norm", 64)
    c.linear(f"{attn}.out_proj", values, s.hidden)


def _delta_model(c: Checkpoint, model: str, *, fused: bool) -> None:
    s = c.sizes
    c.ends(model, norm_mean=0.0)
    for i in range(s.layers):
        layer = f"{model}.layers.{i}"
        c.block_norms(layer, 0.0)
        if (i + 1) % 2:
            _delta_layer(c, layer, fused=fused)
        else:
            c.attention(layer, norms="head", gated=True, norm_mean=0.0)
        c.experts(f"{layer}.mlp")
        c.gated_mlp(f"{layer}.mlp.shared_expert", 128)
        c.plain(f"{layer}.mlp.shared_expert_gate.weight", 1, s.hidden, spread=0.1, dtype=mx.float16)
    c.linear("mtp.fc", 2 * s.hidden, s.hidden)  # mlx-lm drops the prediction head


def qwen3_next(s: Sizes = SIZES) -> Checkpoint:
    c = Checkpoint(
        s,
        {
            "model_type": "qwen3_next",
            **_delta(s),
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "partial_rotary_factor": 0.25,
        },
    )
    _delta_model(c, "model", fused=True)
    return c


def qwen3_5_moe(s: Sizes = SIZES) -> Checkpoint:
    text = {**s.config(), **_delta(s), "model_type": "qwen3_5_moe_text", "tie_word_embeddings": True}
    text["rope_parameters"] = {"type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25}
    c = Checkpoint(s, {"model_type": "qwen3_5_moe", "text_config": text})
    _delta_model(c, "model.language_model", fused=False)
    for i in range(s.layers):
        c.fuse_experts(f"model.language_model.layers.{i}.mlp", interleaved=False)
    c.plain("model.visual.patch_embed.proj.bias", 8)  # mlx-lm drops the vision tower
    return c


def _latent(s: Sizes) -> dict:
    return {
        "kv_lora_rank": 128,
        "q_lora_rank": 128,
        "qk_rope_head_dim": 32,
        "qk_nope_head_dim": 64,
        "v_head_dim": 64,
        "num_key_value_heads": s.heads,
        "partial_rotary_factor": 0.5,
    }


def glm4_moe(s: Sizes = SIZES) -> Checkpoint:
    of_attention = {"use_qk_norm": True, "attention_bias": True, "partial_rotary_factor": 0.5}
    c = Checkpoint(s, {"model_type": "glm4_moe", **mixture_config(s), **of_attention})
    return mixture(c, lambda layer: c.attention(layer, bias=True, norms="head"))


def glm4_moe_lite(s: Sizes = SIZES) -> Checkpoint:
    c = Checkpoint(s, {"model_type": "glm4_moe_lite", **mixture_config(s), **_latent(s)})
    return mixture(c, c.latent_attention)


def deepseek_v3(s: Sizes = SIZES) -> Checkpoint:
    c = Checkpoint(s, {"model_type": "deepseek_v3", **mixture_config(s), **_latent(s), "moe_layer_freq": 1})
    return mixture(c, c.latent_attention)


def gpt_oss(s: Sizes = SIZES) -> Checkpoint:
    c = Checkpoint(
        s,
        {
            "model_type": "gpt_oss",
            "num_local_experts": s.experts,
            "num_experts_per_tok": 2,
            "intermediate_size": s.width,
            "sliding_window": 16,
            "attention_bias": True,
            "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
        },
    )
    c.ends()
    for i in range(s.layers):
        layer = f"model.layers.{i}"
        c.block_norms(layer)
        c.attention(layer, bias=True, o_bias=True)
        c.plain(f"{layer}.self_attn.sinks", s.heads)
        c.experts(f"{layer}.mlp", router="router", bias=True)
        c.plain(f"{layer}.mlp.router.bias", s.experts, spread=0.1)
        c.fuse_experts(f"{layer}.mlp", interleaved=True, bias=True)
    return c


def minimax(s: Sizes = SIZES) -> Checkpoint:
    c = Checkpoint(
        s,
        {
            "model_type": "minimax",
            "num_local_experts": s.experts,
            "num_experts_per_tok": 2,
            "intermediate_size": s.width,
            "shared_intermediate_size": 0,
            "rotary_dim": 32,
            "use_qk_norm": True,
        },
    )
    c.ends()
    for i in range(s.layers):
        layer = f"model.layers.{i}"
        c.block_norms(layer)
        c.attention(layer, norms="all")
        c.experts(f"{layer}.block_sparse_moe", ("w1", "w3", "w2"))
        c.selection_bias(f"{layer}.block_sparse_moe.gate.e_score_correction_bias")
        # The original model has it beside the gate.
        bias = c.dense.pop(f"{layer}.block_sparse_moe.gate.e_score_correction_bias")
        c.dense[f"{layer}.block_sparse_moe.e_score_correction_bias"] = bias
    return c


def llama(s: Sizes = SIZES) -> Checkpoint:
    c = Checkpoint(s, {"model_type": "llama", "tie_word_embeddings": True})
    c.ends()
    for i in range(s.layers):
        layer = f"model.layers.{i}"
        c.block_norms(layer)
        c.attention(layer)
        c.gated_mlp(f"{layer}.mlp")
    return c


def qwen3(s: Sizes = SIZES) -> Checkpoint:
    c = Checkpoint(s, {"model_type": "qwen3", "tie_word_embeddings": True, "intermediate_size": 224})
    c.ends()
    for i in range(s.layers):
        layer = f"model.layers.{i}"
        c.block_norms(layer)
        c.attention(layer, norms="head")
        c.gated_mlp(f"{layer}.mlp", 224)
    return c


ARCHITECTURES = {
    make.__name__: make
    for make in (
        qwen3_moe,
        mixtral,
        olmoe,
        qwen2_moe,
        qwen3_next,
        qwen3_5_moe,
        glm4_moe,
        glm4_moe_lite,
        deepseek_v3,
        gpt_oss,
        minimax,
        llama,
        qwen3,
        gemma3,
        gemma4,
        nemotron_h,
        nemotron_h_latent,
        phixtral,
    )
}


def known_to_mlx_lm(names: Iterable[str]) -> list:
    """Names of architectures as values of a test, which is skipped for those that this mlx-lm does not have."""
    lacking = pytest.mark.skip(reason=f"mlx-lm {metadata.version('mlx-lm')} does not have this architecture")
    is_there = lambda name: importlib.util.find_spec(f"mlx_lm.models.{name}") is not None
    return [pytest.param(name, marks=[] if is_there(name) else [lacking]) for name in names]


def needs_new_mlx_lm(lacks: str):
    """Skips a test, or a value of it, where mlx-lm is 0.31.

    Args:
        lacks: What that version cannot do.
    """
    return pytest.mark.skipif(OLD_MLX_LM, reason=f"mlx-lm 0.31 (Python 3.10) {lacks}")
