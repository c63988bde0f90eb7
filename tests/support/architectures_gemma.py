"""Tiny checkpoints of the Gemma family: heads beside the embeddings, several norms, a vision tower."""

from __future__ import annotations

from tests.support.checkpoints import SIZES, Checkpoint, Sizes


def gemma3(s: Sizes = SIZES) -> Checkpoint:
    text = {
        **s.config(),
        "model_type": "gemma3_text",
        "sliding_window": 16,
        "sliding_window_pattern": 2,
        "query_pre_attn_scalar": 64,
    }
    c = Checkpoint(s, {"model_type": "gemma3", "text_config": text, "tie_word_embeddings": True})
    model = "language_model.model"
    c.ends(model, "language_model.lm_head", norm_mean=0.0)
    norms = (
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    )
    for i in range(s.layers):
        layer = f"{model}.layers.{i}"
        c.block_norms(layer, 0.0, norms)
        c.attention(layer, norms="head", norm_mean=0.0)
        c.gated_mlp(f"{layer}.mlp")
    c.plain("vision_tower.vision_model.post_layernorm.weight", 8)
    return c


def gemma4(s: Sizes = SIZES) -> Checkpoint:
    text = {
        **s.config(),
        "model_type": "gemma4_text",
        "enable_moe_block": True,
        "num_experts": s.experts,
        "top_k_experts": 2,
        "moe_intermediate_size": s.width,
        "num_kv_shared_layers": 0,
        "hidden_size_per_layer_input": 0,
        "use_double_wide_mlp": False,
        "global_head_dim": s.head_dim,
        "num_global_key_value_heads": s.kv_heads,
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention"],
        "tie_word_embeddings": True,
    }
    c = Checkpoint(s, {"model_type": "gemma4", "text_config": text, "tie_word_embeddings": True})
    model = "model.language_model"
    c.ends(model)
    c.dense["language_model.lm_head.weight"] = c.dense.pop("lm_head.weight")
    norms = (
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
        "post_feedforward_layernorm_1",
        "post_feedforward_layernorm_2",
        "pre_feedforward_layernorm_2",
    )
    for i in range(s.layers):
        layer = f"{model}.layers.{i}"
        c.block_norms(layer, names=norms)
        c.attention(layer, norms="head")
        c.gated_mlp(f"{layer}.mlp")
        c.experts(layer, router="router.proj")
        c.fuse_experts(layer, interleaved=False)
        c.plain(f"{layer}.router.scale", s.hidden, mean=1.0, spread=0.1)
        c.plain(f"{layer}.router.per_expert_scale", s.experts, mean=1.0, spread=0.1)
        c.plain(f"{layer}.layer_scalar", 1, mean=1.0, spread=0.1)
    return c


def gemma2(s: Sizes = SIZES) -> Checkpoint:
    """A model without a head of its own: mlx-lm always uses the embeddings, EXL3 has a head all the same."""
    c = Checkpoint(
        s,
        {
            "model_type": "gemma2",
            "tie_word_embeddings": True,
            "query_pre_attn_scalar": 64,
            "final_logit_softcapping": 30.0,
            "attn_logit_softcapping": 50.0,
        },
    )
    c.ends(norm_mean=0.0)
    norms = (
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    )
    for i in range(s.layers):
        layer = f"model.layers.{i}"
        c.block_norms(layer, 0.0, norms)
        c.attention(layer)
        c.gated_mlp(f"{layer}.mlp")
    return c
