"""Tiny checkpoints of models that mlx-vlm has, with towers of their own: GLM-4.5V and MiniMax M3."""

from __future__ import annotations

import mlx.core as mx

from tests.support.checkpoints import SIZES, Checkpoint, Sizes, mixture, mixture_config
from tests.support.vlm_checkpoints import TOWER, Case, Tower, qwen_picture, special


def glm4v_moe(s: Sizes = SIZES, t: Tower = TOWER) -> Case:
    """GLM-4.5V."""
    text = {
        **s.config(),
        "model_type": "glm4v_moe_text",
        **mixture_config(s),
        "use_qk_norm": False,
        "attention_bias": True,
        "partial_rotary_factor": 0.5,
        "rope_scaling": {"rope_type": "default", "mrope_section": [8, 4, 4]},
    }
    c = Checkpoint(s, {"model_type": "glm4v_moe", "text_config": text})
    mixture(c, lambda layer: c.attention(layer, bias=True), "model.language_model")
    c.config["vision_config"] = _glm_tower(c, t)
    names = {"image": "image_token_id", "video": "video_token_id", "vision_start": "vision_start_token_id"}
    c.config.update({key: special(s)[name] for name, key in names.items()})
    return Case(c, qwen_picture(t), t.grid**2 // 4)


def _glm_tower(c: Checkpoint, t: Tower) -> dict:
    """Its attention, without biases, is quantized in parts; the blocks are as wide as what they are merged to."""
    tower, out = "model.visual", c.sizes.hidden
    c.plain(f"{tower}.patch_embed.proj.weight", t.hidden, 3, 2, t.patch, t.patch, spread=0.1)
    c.plain(f"{tower}.patch_embed.proj.bias", t.hidden, spread=0.1)
    c.plain(f"{tower}.embeddings.position_embedding.weight", t.grid**2, t.hidden, spread=0.3)
    for norm in ("post_conv_layernorm", "post_layernorm"):
        c.norm(f"{tower}.{norm}", t.hidden)
    for i in range(t.depth):
        block = f"{tower}.blocks.{i}"
        for norm in ("norm1", "norm2"):
            c.norm(f"{block}.{norm}", t.hidden)
        for letter in "qkv":
            c.linear(f"{block}.attn.{letter}_proj", t.hidden, t.hidden)
        fused = mx.concatenate([c.dense.pop(f"{block}.attn.{letter}_proj.weight") for letter in "qkv"])
        c.dense[f"{block}.attn.qkv.weight"] = c.exl3[f"{block}.attn.qkv.weight"] = fused
        c.linear(f"{block}.attn.proj", t.hidden, t.hidden)
        for name, k, n in (("gate", t.hidden, out), ("up", t.hidden, out), ("down", out, t.hidden)):
            c.linear(f"{block}.mlp.{name}_proj", k, n, zero_padding=name != "down")
    c.plain(f"{tower}.downsample.weight", out, t.hidden, 2, 2, spread=0.05)
    c.plain(f"{tower}.downsample.bias", out, spread=0.1)
    c.linear(f"{tower}.merger.proj", out, out)
    c.norm(f"{tower}.merger.post_projection_norm", out)
    c.plain(f"{tower}.merger.post_projection_norm.bias", out, spread=0.1)
    for name, k, n in (("gate", out, t.width), ("up", out, t.width), ("down", t.width, out)):
        c.linear(f"{tower}.merger.{name}_proj", k, n, zero_padding=name != "down")
    return {
        "model_type": "glm4v_moe",
        "depth": t.depth,
        "hidden_size": t.hidden,
        "intermediate_size": t.width,
        "num_heads": t.heads,
        "patch_size": t.patch,
        "image_size": t.patch * t.grid,
        "out_hidden_size": out,
    }


def minimax_m3_vl(s: Sizes = SIZES, t: Tower = TOWER) -> Case:
    """MiniMax M3: its shared expert is as wide as the others, and mlx-vlm's class then has it among them."""
    sparse = {
        "use_sparse_attention": True,
        "sparse_index_dim": s.head_dim,
        "sparse_num_index_heads": s.heads,
        "sparse_topk_blocks": 2,
        "sparse_block_size": 4,
        "sparse_attention_freq": [0, 1],
    }
    text = {
        **s.config(),
        "model_type": "minimax_m3",
        "intermediate_size": s.width,
        "shared_intermediate_size": s.width,
        "dense_intermediate_size": s.dense_width,
        "num_local_experts": s.experts,
        "num_experts_per_tok": 2,
        "rotary_dim": 32,
        "moe_layer_freq": [0, 1],
        "sparse_attention_config": sparse,
    }
    c = Checkpoint(s, {"model_type": "minimax_m3_vl", "text_config": text})
    model = "language_model.model"
    c.ends(model, "language_model.lm_head", norm_mean=0.0)
    for i in range(s.layers):
        layer = f"{model}.layers.{i}"
        c.block_norms(layer, 0.0)
        c.attention(layer, norms="head", norm_mean=0.0)
        if i == 0:
            c.gated_mlp(f"{layer}.mlp")
            continue
        attn, block = f"{layer}.self_attn", f"{layer}.block_sparse_moe"
        c.linear(f"{attn}.index_q_proj", s.hidden, s.heads * s.head_dim)
        c.plain(f"{attn}.index_k_proj.weight", s.head_dim, s.hidden, spread=0.1, dtype=mx.float16)
        for name in "qk":
            c.norm(f"{attn}.index_{name}_norm", s.head_dim, 0.0)
        c.experts(block, ("w1", "w3", "w2"))
        c.selection_bias(f"{block}.e_score_correction_bias")
        c.gated_mlp(f"{block}.shared_experts", s.width)
    c.config["vision_config"] = _clip_tower(c, t)
    c.config.update({f"{name}_token_index": special(s)[name] for name in ("image", "video")})
    c.config["projector_hidden_size"] = t.width
    return Case(c, qwen_picture(t), t.grid**2 // 4)


def _clip_tower(c: Checkpoint, t: Tower) -> dict:
    tower, out = "vision_tower.vision_model", c.sizes.hidden
    c.plain(f"{tower}.embeddings.patch_embedding.weight", t.hidden, 3, 2, t.patch, t.patch, spread=0.1)
    norms = [f"encoder.layers.{i}.layer_norm{n}" for i in range(t.depth) for n in (1, 2)]
    for norm in ("pre_layrnorm", *norms):
        c.norm(f"{tower}.{norm}", t.hidden)
        c.plain(f"{tower}.{norm}.bias", t.hidden, spread=0.1)
    for i in range(t.depth):
        layer = f"{tower}.encoder.layers.{i}"
        for name in ("q", "k", "v", "out"):
            c.linear(f"{layer}.self_attn.{name}_proj", t.hidden, t.hidden, bias=True)
        c.linear(f"{layer}.mlp.fc1", t.hidden, t.width, bias=True, zero_padding=True)
        c.linear(f"{layer}.mlp.fc2", t.width, t.hidden, bias=True)
    for projector, k, width in (("multi_modal_projector", t.hidden, t.width), ("patch_merge_mlp", 4 * out, out)):
        c.linear(f"{projector}.linear_1", k, width, bias=True)
        c.linear(f"{projector}.linear_2", width, out, bias=True)
    return {
        "hidden_size": t.hidden,
        "intermediate_size": t.width,
        "num_attention_heads": t.heads,
        "num_hidden_layers": t.depth,
        "image_size": t.patch * t.grid,
        "patch_size": t.patch,
        "projection_dim": out,
        "img_token_compression_config": {"spatial_merge_size": 2, "temporal_patch_size": 2},
    }


CASES = {make.__name__: make for make in (glm4v_moe, minimax_m3_vl)}
