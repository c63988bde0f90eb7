"""Tiny checkpoints of mixtures with linear, latent, sparse or sliding attention, in the names of their originals."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx

from mlx_marlin.loader.scaling import UP_DIVISOR
from tests.support.checkpoints import SIZES, Checkpoint, Sizes, mixture
from tests.support.generic_configs import DEEPSEEK, LATENT, MOE
from tests.support.hybrid_configs import INDEXER

_WINDOW = 8  # tokens; shorter than the prompts of the tests
_VALUE_SIZE = 32  # of MiMo's heads; smaller than that of its keys


def kimi_linear(s: Sizes = SIZES) -> Checkpoint:
    """Without positions; mlx-lm counts its layers from 1."""
    delta = {"kda_layers": [1], "full_attn_layers": [2], "num_heads": s.heads, "head_dim": s.head_dim}
    config = {
        **LATENT,
        "model_type": "kimi_linear",
        "architectures": ["KimiLinearForCausalLM"],
        "q_lora_rank": None,
        "mla_use_nope": True,
        "linear_attn_config": {**delta, "short_conv_kernel_size": 4},
        "model_max_length": 512,
        "num_experts": s.experts,
        "num_experts_per_token": 2,
        "num_shared_experts": 1,
        "moe_intermediate_size": s.width,
        "moe_renormalize": True,
        "moe_router_activation_func": "sigmoid",
        "moe_layer_freq": 1,
        "num_expert_group": 1,
        "topk_group": 1,
        "use_grouped_topk": True,
        "first_k_dense_replace": 1,
        "routed_scaling_factor": 1.5,
        "num_nextn_predict_layers": 0,
    }
    c = Checkpoint(s, config)
    c.ends()
    for i in range(s.layers):
        layer = f"model.layers.{i}"
        c.block_norms(layer)
        if i == 0:
            delta_attention(c, f"{layer}.self_attn", s.heads, s.head_dim)
            a_log = f"{layer}.self_attn.A_log"
            c.dense[a_log] = c.dense[a_log].reshape(1, 1, -1, 1)  # which ExLlamaV3 writes flat
            c.gated_mlp(f"{layer}.mlp")
            continue
        c.latent_attention(layer, q_rank=None)
        block = f"{layer}.block_sparse_moe"
        c.experts(block, ("w1", "w3", "w2"))
        c.selection_bias(f"{block}.gate.e_score_correction_bias")
        c.gated_mlp(f"{block}.shared_experts", s.width)
    return c


def bailing_moe_v3(s: Sizes = SIZES) -> Checkpoint:
    """Ling 3 Flash, which mlx-lm tells by the name of its class."""
    config = {
        **MOE,
        **LATENT,
        "model_type": "bailing_hybrid",
        "architectures": ["BailingMoeV3ForCausalLM"],
        "q_lora_rank": None,
        "moe_shared_expert_intermediate_size": s.width,
        "num_shared_experts": 1,
        "first_k_dense_replace": 1,
        "n_group": 2,
        "topk_group": 1,
        "routed_scaling_factor": 1.5,
        "score_function": "sigmoid",
        "layer_group_size": 2,
        "short_conv_kernel_size": 4,
        "no_kda_lora": True,
        "kda_safe_gate": True,
        "kda_lower_bound": -5.0,
        "gated_attention_proj_granularity_type": "head_wise",
        "rope_interleave": True,
        "num_nextn_predict_layers": 1,
    }
    c = Checkpoint(s, config)
    c.ends(embeddings="word_embeddings")
    for i in range(s.layers):
        layer = f"model.layers.{i}"
        if i == 0:
            c.block_norms(layer)
            delta_attention(c, f"{layer}.attention", s.heads, s.head_dim, low_rank=False)
            c.gated_mlp(f"{layer}.mlp")
        else:
            ling_layer(c, layer)
    return c


def ling_layer(c: Checkpoint, layer: str) -> None:
    """One with latent attention and experts; its prediction layer is one too."""
    s = c.sizes
    c.block_norms(layer)
    c.latent_attention(layer, "attention", "dense", q_rank=None)
    c.plain(f"{layer}.attention.g_proj.weight", s.heads, s.hidden, spread=0.1, dtype=mx.float16)
    c.experts(f"{layer}.mlp")
    c.selection_bias(f"{layer}.mlp.gate.expert_bias")
    c.gated_mlp(f"{layer}.mlp.shared_experts", s.width)


def delta_attention(c: Checkpoint, attn: str, heads: int, head_dim: int, *, low_rank: bool = True) -> None:
    """Kimi's, its gates of low rank or not. ExLlamaV3 quantizes the original's three linears as one, and joins the
    convolutions.
    """
    width, hidden = heads * head_dim, c.sizes.hidden
    c.linear(f"{attn}.qkv_proj", hidden, 3 * width)
    for name, part in zip("qkv", mx.split(c.dense.pop(f"{attn}.qkv_proj.weight"), 3)):
        c.dense[f"{attn}.{name}_proj.weight"] = part
    c.plain(f"{attn}.conv1d.weight", 3 * width, 1, 4, spread=0.5)
    for name, part in zip("qkv", mx.split(c.dense.pop(f"{attn}.conv1d.weight"), 3)):
        c.dense[f"{attn}.{name}_conv1d.weight"] = part
    c.plain(f"{attn}.b_proj.weight", heads, hidden, spread=0.1, dtype=mx.float16)
    for gate in "fg":
        if low_rank:
            c.plain(f"{attn}.{gate}_a_proj.weight", head_dim, hidden, spread=0.1, dtype=mx.float16)
            c.plain(f"{attn}.{gate}_b_proj.weight", width, head_dim, spread=0.1, dtype=mx.float16)
        else:
            c.linear(f"{attn}.{gate}_proj", hidden, width)
    c.plain(f"{attn}.A_log", heads, mean=0.5, spread=0.3, dtype=mx.float32)
    c.plain(f"{attn}.dt_bias", width, spread=0.1, dtype=mx.float32)
    c.norm(f"{attn}.o_norm", head_dim)
    c.linear(f"{attn}.o_proj", width, hidden)


def glm_moe_dsa(s: Sizes = SIZES) -> Checkpoint:
    """GLM-5."""
    config = {
        **DEEPSEEK,
        **LATENT,
        "model_type": "glm_moe_dsa",
        "architectures": ["GlmMoeDsaForCausalLM"],
        **INDEXER,
        "indexer_rope_interleave": True,
        "indexer_types": ["full"] * s.layers,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "moe_layer_freq": 1,
        "mlp_layer_types": ["dense", *["sparse"] * (s.layers - 1)],
        "rope_interleave": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "num_nextn_predict_layers": 1,
    }
    c = Checkpoint(s, config)

    def attention(layer: str) -> None:
        c.latent_attention(layer)
        indexer(c, f"{layer}.self_attn.indexer")

    return mixture(c, attention)


def indexer(c: Checkpoint, name: str, heads: int = INDEXER["index_n_heads"]) -> None:
    """What chooses the tokens of sparse attention."""
    size, hidden = INDEXER["index_head_dim"], c.sizes.hidden
    c.linear(f"{name}.wq_b", LATENT["q_lora_rank"], heads * size)
    c.plain(f"{name}.wk.weight", size, hidden, spread=0.1, dtype=mx.float16)
    c.norm(f"{name}.k_norm", size)
    c.plain(f"{name}.k_norm.bias", size, spread=0.1)
    c.plain(f"{name}.weights_proj.weight", heads, hidden, spread=0.1, dtype=mx.float16)


def mimo_v2_flash(s: Sizes = SIZES) -> Checkpoint:
    """Which ExLlamaV3 does not convert, mlx_marlin-convert does."""
    config = {
        "model_type": "mimo_v2_flash",
        "architectures": ["MiMoV2FlashForCausalLM"],
        "hybrid_layer_pattern": [0, 1],
        "moe_layer_freq": [0, 1],
        "moe_intermediate_size": s.width,
        "n_routed_experts": s.experts,
        "n_shared_experts": None,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": None,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "layernorm_epsilon": 1e-6,
        "partial_rotary_factor": 0.5,
        "attention_value_scale": 0.7,
        "add_full_attention_sink_bias": False,
        "add_swa_attention_sink_bias": True,
        "sliding_window": _WINDOW,
        "sliding_window_size": _WINDOW,
        "swa_rope_theta": 1000.0,
        "v_head_dim": _VALUE_SIZE,
        "swa_head_dim": s.head_dim,
        "swa_v_head_dim": _VALUE_SIZE,
        "swa_num_attention_heads": s.heads,
        "swa_num_key_value_heads": s.heads,
    }
    c = Checkpoint(s, config)
    c.ends()
    for i in range(s.layers):
        layer = f"model.layers.{i}"
        c.block_norms(layer)
        if i == 0:
            grouped_attention(c, f"{layer}.self_attn", s.heads, s.kv_heads, _VALUE_SIZE)
            c.gated_mlp(f"{layer}.mlp")
            continue
        mimo_window(c, f"{layer}.self_attn")
        c.experts(f"{layer}.mlp")
        c.selection_bias(f"{layer}.mlp.gate.e_score_correction_bias")
    return c


def mimo_window(c: Checkpoint, attn: str) -> None:
    """Sliding attention, which its prediction layers have too."""
    grouped_attention(c, attn, c.sizes.heads, c.sizes.heads, _VALUE_SIZE)
    c.plain(f"{attn}.attention_sink_bias", c.sizes.heads)


def laguna(s: Sizes = SIZES) -> Checkpoint:
    """More heads where attention slides; ExLlamaV3 divides its experts' ``up``."""
    heads = [s.heads, s.heads + s.kv_heads]
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "partial_rotary_factor": 0.5}
    config = {
        **MOE,
        "model_type": "laguna",
        "architectures": ["LagunaForCausalLM"],
        "gating": "per-head",
        "layer_types": ["full_attention", "sliding_attention"],
        "sliding_window": _WINDOW,
        "num_attention_heads_per_layer": heads,
        "mlp_layer_types": ["dense", "sparse"],
        "mlp_only_layers": [0],
        "shared_expert_intermediate_size": s.width,
        "moe_routed_scaling_factor": 2.5,
        "moe_router_logit_softcapping": 0.0,
        "rope_parameters": {
            "full_attention": {**yarn, "rope_theta": 10000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1000.0, "partial_rotary_factor": 1.0},
        },
    }
    c = Checkpoint(s, config)
    c.ends()
    for i in range(s.layers):
        layer = f"model.layers.{i}"
        attn = f"{layer}.self_attn"
        c.block_norms(layer)
        grouped_attention(c, attn, heads[i], s.kv_heads, s.head_dim)
        c.plain(f"{attn}.g_proj.weight", heads[i], s.hidden, spread=0.1, dtype=mx.float16)
        for name in "qk":
            c.norm(f"{attn}.{name}_norm", s.head_dim)
        if i == 0:
            c.gated_mlp(f"{layer}.mlp")
            continue
        c.experts(f"{layer}.mlp")
        c.divide_ups(f"{layer}.mlp", UP_DIVISOR)
        c.selection_bias(f"{layer}.mlp.experts.e_score_correction_bias")
        c.gated_mlp(f"{layer}.mlp.shared_expert", s.width)
    return c


def grouped_attention(c: Checkpoint, attn: str, heads: int, kv_heads: int, value_size: int) -> None:
    """Linears of heads whose number and values differ from layer to layer."""
    s = c.sizes
    for name, width in {"q": heads * s.head_dim, "k": kv_heads * s.head_dim, "v": kv_heads * value_size}.items():
        c.linear(f"{attn}.{name}_proj", s.hidden, width)
    c.linear(f"{attn}.o_proj", heads * value_size, s.hidden)


def step3p5(s: Sizes = SIZES) -> Checkpoint:
    """Step 3.5 Flash. Its experts lie beside the layer's MLP, not inside; those of one layer clamp."""
    s = replace(s, layers=3)
    c = Checkpoint(s, {**step_config(s), "architectures": ["Step3p5ForCausalLM"]})
    step_layers(c)
    return c


def step_config(s: Sizes) -> dict:
    return {
        "model_type": "step3p5",
        "num_attention_groups": s.kv_heads,
        "moe_intermediate_size": s.width,
        "moe_num_experts": s.experts,
        "moe_top_k": 2,
        "share_expert_dim": s.width,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        "num_hidden_layers": 3,
        "rope_theta": [10000.0, 1000.0, 10000.0],
        "partial_rotary_factors": [0.5, 1.0, 0.5],
        "sliding_window": 8,
        "attention_other_setting": {
            "num_attention_heads": 6,
            "num_attention_groups": s.kv_heads,
            "head_dim": s.head_dim,
        },
        "use_head_wise_attn_gate": True,
        "use_moe_router_bias": True,
        "moe_router_scaling_factor": 3.0,
        "moe_layers_enum": "1,2",
        "swiglu_limits": [0, 0, 0.5],
        "swiglu_limits_shared": [0, 0, 0.5],
    }


def step_layers(c: Checkpoint) -> None:
    """Three, with their ends."""
    s = c.sizes
    c.ends(norm_mean=0.0)
    for i in range(3):
        layer, heads = f"model.layers.{i}", 6 if i == 1 else s.heads
        attn = f"{layer}.self_attn"
        c.block_norms(layer, 0.0)
        grouped_attention(c, attn, heads, s.kv_heads, s.head_dim)
        c.plain(f"{attn}.g_proj.weight", heads, s.hidden, spread=0.1, dtype=mx.float16)
        for name in "qk":
            c.norm(f"{attn}.{name}_norm", s.head_dim, 0.0)
        if i == 0:
            c.gated_mlp(f"{layer}.mlp")
            continue
        c.experts(f"{layer}.moe")
        c.selection_bias(f"{layer}.moe.router_bias")
        c.gated_mlp(f"{layer}.share_expert", s.width)
        for name in ("gate_proj", "up_proj", "down_proj"):
            parts = [c.dense.pop(f"{layer}.moe.experts.{e}.{name}.weight") for e in range(s.experts)]
            c.dense[f"{layer}.moe.{name}.weight"] = mx.stack(parts)


def lfm2_moe(s: Sizes = SIZES) -> Checkpoint:
    """Without a head of its own in mlx-lm; convolutions and attention in turn."""
    config = {
        **MOE,
        "model_type": "lfm2_moe",
        "architectures": ["Lfm2MoeForCausalLM"],
        "num_attention_heads": s.hidden // s.head_dim,
        "num_key_value_heads": 1,
        "num_dense_layers": 1,
        "norm_eps": 1e-6,
        "conv_bias": False,
        "conv_L_cache": 3,
        "layer_types": ["conv", "full_attention"],
        "use_expert_bias": True,
        "tie_word_embeddings": True,
    }
    c = Checkpoint(s, config)
    c.plain("model.embed_tokens.weight", s.vocab, s.hidden)
    c.norm("model.embedding_norm", s.hidden)
    c.linear("lm_head", s.hidden, s.vocab, bits=6)
    for i in range(s.layers):
        layer = f"model.layers.{i}"
        block = f"{layer}.feed_forward"
        c.block_norms(layer, names=("operator_norm", "ffn_norm"))
        if i == 0:
            c.linear(f"{layer}.conv.in_proj", s.hidden, 3 * s.hidden)
            c.plain(f"{layer}.conv.conv.weight", s.hidden, 1, 3, spread=0.5)
            c.linear(f"{layer}.conv.out_proj", s.hidden, s.hidden)
            for name in ("w1", "w3"):
                c.linear(f"{block}.{name}", s.hidden, s.dense_width, zero_padding=True)
            c.linear(f"{block}.w2", s.dense_width, s.hidden)
            continue
        for name, width in {"q": s.hidden, "k": s.head_dim, "v": s.head_dim}.items():
            c.linear(f"{layer}.self_attn.{name}_proj", s.hidden, width)
        c.linear(f"{layer}.self_attn.out_proj", s.hidden, s.hidden)
        for name in "qk":
            c.norm(f"{layer}.self_attn.{name}_layernorm", s.head_dim)
        c.experts(block, ("w1", "w3", "w2"))
        c.selection_bias(f"{block}.expert_bias")
    return c


ARCHITECTURES = {
    make.__name__: make for make in (kimi_linear, bailing_moe_v3, glm_moe_dsa, mimo_v2_flash, laguna, step3p5)
}
"""Those that not every version of mlx-lm has."""
