"""More tiny checkpoints of models that mlx-vlm has: those that mlx-lm has no class for, or another one."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from tests.support.checkpoints import SIZES, Checkpoint, Sizes
from tests.support.vlm_checkpoints import TOWER, Case, Tower, qwen_picture, special, split_attention

_MIMO_SCALE = 0.7


def _experts(c: Checkpoint, block: str) -> None:
    """With the router's selection bias beside its weight."""
    c.experts(block)
    c.selection_bias(f"{block}.gate.e_score_correction_bias")


def mimo_v2(s: Sizes = SIZES, t: Tower = TOWER) -> Case:
    """Its file holds no audio: ExLlamaV3 does not copy it."""
    c = Checkpoint(
        s,
        {
            "model_type": "mimo_v2",
            "moe_intermediate_size": s.width,
            "v_head_dim": 32,
            "swa_head_dim": s.head_dim,
            "swa_v_head_dim": 32,
            "swa_num_attention_heads": s.heads,
            "swa_num_key_value_heads": s.heads,
            "partial_rotary_factor": 0.5,
            "swa_rope_theta": 1000.0,
            "layernorm_epsilon": 1e-6,
            "sliding_window": 8,
            "sliding_window_size": 8,
            "hybrid_layer_pattern": [0, 1],
            "moe_layer_freq": [0, 1],
            "n_routed_experts": s.experts,
            "num_experts_per_tok": 2,
            "attention_value_scale": _MIMO_SCALE,
            "vision_config": {
                "depth": t.depth,
                "hidden_size": t.hidden,
                "intermediate_size": t.width,
                "out_hidden_size": s.hidden,
                "num_heads": 4,
                "num_key_value_heads": 2,
                "qk_channels": 64,
                "patch_size": t.patch,
                "spatial_merge_size": 2,
                "temporal_patch_size": 2,
                "visual_token_window_size": 3,
                "fullatt_block_indexes": [0],
                "vit_window_attn_types": [-1, 1],
            },
            "audio_config": {"input_local_layers": 1, "input_local_dim": 64, "audio_channels": 1},
        },
    )
    c.ends()
    for i in range(s.layers):
        layer, kv_heads = f"model.layers.{i}", s.heads if i else s.kv_heads
        attn = f"{layer}.self_attn"
        c.block_norms(layer)
        widths = {"q": s.heads * s.head_dim, "k": kv_heads * s.head_dim, "v": kv_heads * 32}
        for name, width in widths.items():
            c.linear(f"{attn}.{name}_proj", s.hidden, width)
        c.dense[f"{attn}.qkv_proj.weight"] = mx.concatenate([c.dense.pop(f"{attn}.{n}_proj.weight") for n in widths])
        c.linear(f"{attn}.o_proj", s.heads * 32, s.hidden)  # carries the scale of the values
        c.dense[f"{attn}.o_proj.weight"] = c.dense[f"{attn}.o_proj.weight"] / _MIMO_SCALE
        if i:
            c.plain(f"{attn}.attention_sink_bias", s.heads)
            _experts(c, f"{layer}.mlp")
        else:
            c.gated_mlp(f"{layer}.mlp")
    _mimo_tower(c, t)
    c.dense["speech_embeddings.0.weight"] = mx.zeros((1280, 64))  # mlx-vlm's own loader insists
    c.config.update({f"{name}_token_id": number for name, number in special(s).items()})
    return Case(c, qwen_picture(t), t.grid**2 // 4)


def _mimo_tower(c: Checkpoint, t: Tower) -> None:
    c.plain("visual.patch_embed.proj.weight", t.hidden, 3, 2, t.patch, t.patch, spread=0.1)
    for i in range(t.depth):
        block = f"visual.blocks.{i}"
        for norm in ("norm1", "norm2"):
            c.norm(f"{block}.{norm}", t.hidden)
        split_attention(c, f"{block}.attn", t.hidden, (256, 128, 128))
        c.linear(f"{block}.attn.proj", 256, t.hidden, bias=True)
        if i:
            c.plain(f"{block}.attn.sinks", 4)
        for name, k, n in (("gate", t.hidden, t.width), ("up", t.hidden, t.width), ("down", t.width, t.hidden)):
            c.linear(f"{block}.mlp.{name}_proj", k, n, bias=True, zero_padding=name != "down")
    c.norm("visual.merger.ln_q", t.hidden)
    c.linear("visual.merger.mlp.0", 4 * t.hidden, 4 * t.hidden)
    c.linear("visual.merger.mlp.2", 4 * t.hidden, c.sizes.hidden)


def step3p7(s: Sizes = SIZES, t: Tower = TOWER) -> Case:
    """Its experts lie beside the layer's MLP, not inside; one layer clamps, which no fused kernel does."""
    text = {
        **s.config(),
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
    tower = {
        "width": t.hidden,
        "layers": t.depth,
        "heads": t.heads,
        "image_size": t.patch * t.grid,
        "patch_size": t.patch,
        "mlp_ratio": t.width / t.hidden,
        "hidden_act": "quick_gelu",
    }
    c = Checkpoint(s, {"model_type": "step3p7", "text_config": text, "vision_config": tower})
    c.ends(norm_mean=0.0)
    for i in range(3):
        layer, heads = f"model.layers.{i}", 6 if i == 1 else s.heads
        attn = f"{layer}.self_attn"
        c.block_norms(layer, 0.0)
        for name, count in {"q": heads, "k": s.kv_heads, "v": s.kv_heads}.items():
            c.linear(f"{attn}.{name}_proj", s.hidden, count * s.head_dim)
        c.linear(f"{attn}.o_proj", heads * s.head_dim, s.hidden)
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
    _step_tower(c, t)
    c.config["image_token_id"] = special(s)["image"]
    side = t.patch * t.grid
    pixels = np.random.default_rng(3).normal(size=(1, 3, side, side)).astype(np.float32)
    return Case(c, {"pixel_values": mx.array(pixels)}, (t.grid // 4) ** 2)


def _step_tower(c: Checkpoint, t: Tower) -> None:
    tower = "model.vision_model"
    c.plain(f"{tower}.conv1.weight", t.hidden, 3, t.patch, t.patch, spread=0.1)
    c.plain(f"{tower}.positional_embedding", t.grid**2, t.hidden, spread=0.3)
    for norm in ("ln_pre", *(f"transformer.resblocks.{i}.ln_{n}" for i in range(t.depth) for n in (1, 2))):
        c.plain(f"{tower}.{norm}.weight", t.hidden, mean=1.0, spread=0.1)
        c.plain(f"{tower}.{norm}.bias", t.hidden, spread=0.1)
    for i in range(t.depth):
        block = f"{tower}.transformer.resblocks.{i}"
        split_attention(c, f"{block}.attn", t.hidden, name="in_proj_{}")
        c.linear(f"{block}.attn.out_proj", t.hidden, t.hidden, bias=True)
        c.linear(f"{block}.mlp.c_fc", t.hidden, t.width, bias=True, zero_padding=True)
        c.linear(f"{block}.mlp.c_proj", t.width, t.hidden, bias=True)
        for n in (1, 2):
            c.plain(f"{block}.ls_{n}.gamma", t.hidden, mean=0.5, spread=0.1)
    for n, (k, width) in enumerate(((t.hidden, 2 * t.hidden), (2 * t.hidden, 4 * t.hidden)), 1):
        c.plain(f"{tower}.vit_downsampler{n}.weight", width, k, 3, 3, spread=0.05)
        c.plain(f"{tower}.vit_downsampler{n}.bias", width, spread=0.1)
    c.linear("model.vit_large_projector", 4 * t.hidden, c.sizes.hidden)


_HEADS, _HEAD_DIM = 2, 64  # of glm5_next's delta attention


def glm5_next(s: Sizes = SIZES, t: Tower = TOWER) -> Case:
    """Streams of hidden states, delta attention and sparse latent attention in turn."""
    text = {
        **s.config(),
        "model_type": "glm5_next_text",
        "moe_intermediate_size": s.width,
        "num_key_value_heads": s.heads,
        "n_routed_experts": s.experts,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "routed_scaling_factor": 1.5,
        "kv_lora_rank": 128,
        "q_lora_rank": 128,
        "qk_nope_head_dim": 64,
        "v_head_dim": 64,
        "mlp_layer_types": ["dense", "sparse"],
        "layer_types": ["linear_attention", "deepseek_sparse_attention"],
        "indexer_types": ["full", "full"],
        "index_topk": 8,
        "index_head_dim": 64,
        "index_n_heads": 4,
        "index_kpool": 2,
        "swiglu_limit": 1.0,
        "linear_attn_config": {"head_dim": _HEAD_DIM, "num_heads": _HEADS, "short_conv_kernel_size": 4},
        "hc_mult": 2,
        "hc_sinkhorn_iters": 3,
    }
    c = Checkpoint(s, {"model_type": "glm5_next", "text_config": text})
    model = "model.language_model"
    c.ends(model)
    for i in range(s.layers):
        layer = f"{model}.layers.{i}"
        c.block_norms(layer)
        for site in ("attn", "ffn"):
            streams(c, f"{layer}.hc_{site}", 8, 3)
        if i == 0:
            _delta_attention(c, f"{layer}.self_attn")
            c.gated_mlp(f"{layer}.mlp")
        else:
            _sparse_attention(c, f"{layer}.self_attn")
            _experts(c, f"{layer}.mlp")
            c.gated_mlp(f"{layer}.mlp.shared_experts", s.width)
    c.config["vision_config"] = _glm_tower(c, t)
    c.config["image_token_id"] = special(s)["image"]
    return Case(c, qwen_picture(t), t.grid**2 // 4)


def add_glm5_next_drafter(c: Checkpoint) -> None:
    """The layer behind the last, without streams."""
    s = c.sizes
    layer = f"model.language_model.layers.{s.layers}"
    c.config["text_config"]["num_nextn_predict_layers"] = 1
    for name in ("enorm", "hnorm", "shared_head.norm"):
        c.norm(f"{layer}.{name}", s.hidden)
    c.linear(f"{layer}.eh_proj", 2 * s.hidden, s.hidden)
    c.block_norms(layer)
    _sparse_attention(c, f"{layer}.self_attn")
    _experts(c, f"{layer}.mlp")
    c.gated_mlp(f"{layer}.mlp.shared_experts", s.width)


def _delta_attention(c: Checkpoint, attn: str) -> None:
    """ExLlamaV3 quantizes the original's three linears as one, and joins the convolutions."""
    width, hidden = _HEADS * _HEAD_DIM, c.sizes.hidden
    c.linear(f"{attn}.qkv_proj", hidden, 3 * width)
    for name, part in zip("qkv", mx.split(c.dense.pop(f"{attn}.qkv_proj.weight"), 3)):
        c.dense[f"{attn}.{name}_proj.weight"] = part
    c.plain(f"{attn}.conv1d.weight", 3 * width, 1, 4, spread=0.5)
    for name, part in zip("qkv", mx.split(c.dense.pop(f"{attn}.conv1d.weight"), 3)):
        c.dense[f"{attn}.{name}_conv1d.weight"] = part
    for name, n, k in (("b", _HEADS, hidden), ("f_a", _HEAD_DIM, hidden), ("g_a", _HEAD_DIM, hidden)):
        c.plain(f"{attn}.{name}_proj.weight", n, k, spread=0.1, dtype=mx.float16)
    for name in ("f_b", "g_b"):
        c.plain(f"{attn}.{name}_proj.weight", width, _HEAD_DIM, spread=0.1, dtype=mx.float16)
    c.plain(f"{attn}.A_log", _HEADS, mean=0.5, spread=0.3, dtype=mx.float32)
    c.plain(f"{attn}.dt_bias", width, spread=0.1, dtype=mx.float32)
    c.norm(f"{attn}.o_norm", _HEAD_DIM)
    c.linear(f"{attn}.o_proj", width, hidden)


def _sparse_attention(c: Checkpoint, attn: str) -> None:
    s = c.sizes
    c.linear(f"{attn}.q_a_proj", s.hidden, 128)
    c.norm(f"{attn}.q_a_layernorm", 128)
    c.linear(f"{attn}.q_b_proj", 128, s.heads * 64)
    c.linear(f"{attn}.kv_a_proj_with_mqa", s.hidden, 128)
    c.norm(f"{attn}.kv_a_layernorm", 128)
    c.plain(f"{attn}.kv_b_proj.weight", s.heads * 128, 128, spread=0.1, dtype=mx.float16)
    c.linear(f"{attn}.o_proj", s.heads * 64, s.hidden)
    indexer = f"{attn}.indexer"
    c.linear(f"{indexer}.wq_b", 128, 4 * 64)
    c.plain(f"{indexer}.wk.weight", 64, s.hidden, spread=0.1, dtype=mx.float16)
    c.norm(f"{indexer}.k_norm", 64)
    c.plain(f"{indexer}.k_norm.bias", 64, spread=0.1)
    c.plain(f"{indexer}.weights_proj.weight", 4, s.hidden, spread=0.1, dtype=mx.float16)
    c.plain(f"{indexer}.index_kpool_compress_ape", 2, 64, spread=0.1, dtype=mx.float32)
    c.plain(f"{indexer}.index_kpool_compress_gate", 64, s.hidden, spread=0.1, dtype=mx.float32)


def _glm_tower(c: Checkpoint, t: Tower) -> dict:
    tower, head_dim, out = "model.visual", t.hidden // t.heads, c.sizes.hidden
    c.plain(f"{tower}.patch_embed.proj.weight", t.hidden, 3, 2, t.patch, t.patch, spread=0.1)
    c.plain(f"{tower}.patch_embed.proj.bias", t.hidden, spread=0.1)
    for i in range(t.depth):
        block = f"{tower}.blocks.{i}"
        for norm in ("norm1", "norm2"):
            c.norm(f"{block}.{norm}", t.hidden)
        split_attention(c, f"{block}.attn", t.hidden)
        c.linear(f"{block}.attn.proj", t.hidden, t.hidden, bias=True)
        for norm in ("q_norm", "k_norm"):
            c.norm(f"{block}.attn.{norm}", head_dim)
        for name, k, n in (("gate", t.hidden, t.width), ("up", t.hidden, t.width), ("down", t.width, t.hidden)):
            c.linear(f"{block}.mlp.{name}_proj", k, n, bias=True, zero_padding=name != "down")
    c.norm(f"{tower}.post_layernorm", t.hidden)
    c.plain(f"{tower}.downsample.weight", out, t.hidden, 2, 2, spread=0.05)
    c.plain(f"{tower}.downsample.bias", out, spread=0.1)
    c.linear(f"{tower}.merger.proj", out, out)
    c.plain(f"{tower}.merger.post_projection_norm.weight", out, mean=1.0, spread=0.1)
    c.plain(f"{tower}.merger.post_projection_norm.bias", out, spread=0.1)
    for name, k, n in (("gate", out, t.width), ("up", out, t.width), ("down", t.width, out)):
        c.linear(f"{tower}.merger.{name}_proj", k, n, zero_padding=name != "down")
    return {
        "depth": t.depth,
        "hidden_size": t.hidden,
        "num_heads": t.heads,
        "patch_size": t.patch,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "out_hidden_size": out,
        "intermediate_size": t.width,
        "projection_intermediate_size": t.width,
    }


def deepseek_v4(s: Sizes = SIZES) -> Case:
    """Every kind of attention, a router by hash, outputs in groups; a text model."""
    config = {
        "model_type": "deepseek_v4",
        "moe_intermediate_size": s.width,
        "num_hidden_layers": 3,
        "num_key_value_heads": 1,
        "n_shared_experts": 1,
        "n_routed_experts": s.experts,
        "num_experts_per_tok": 2,
        "q_lora_rank": 128,
        "qk_rope_head_dim": 32,
        "head_dim": 64,
        "compress_ratios": [0, 4, 128],
        "hc_mult": 2,
        "hc_sinkhorn_iters": 3,
        "num_hash_layers": 1,
        "swiglu_limit": 1.0,
        "sliding_window": 8,
        "o_groups": 2,
        "o_lora_rank": 128,
        "index_n_heads": 2,
        "index_head_dim": 64,
        "index_topk": 4,
        "num_nextn_predict_layers": 0,
    }
    c = Checkpoint(s, config)
    c.plain("embed.weight", s.vocab, s.hidden)
    c.norm("norm", s.hidden)
    c.linear("head", s.hidden, s.vocab, bits=6)
    streams(c, "hc_head", 2, 1)
    for i, ratio in enumerate(config["compress_ratios"]):
        layer = f"layers.{i}"
        for site in ("attn", "ffn"):
            c.norm(f"{layer}.{site}_norm", s.hidden)
            streams(c, f"{layer}.hc_{site}", 8, 3)
        _grouped_attention(c, f"{layer}.attn", ratio)
        c.experts(f"{layer}.ffn", ("w1", "w3", "w2"))
        if i:
            c.plain(f"{layer}.ffn.gate.bias", s.experts, spread=0.1, dtype=mx.float32)
        else:
            chosen = mx.array(np.argsort(c.rng.random((s.vocab, s.experts)))[:, :2].astype(np.int32))
            c.exl3[f"{layer}.ffn.gate.tid2eid"] = c.dense[f"{layer}.ffn.gate.tid2eid"] = chosen
        for name, k, n in (("w1", s.hidden, s.width), ("w3", s.hidden, s.width), ("w2", s.width, s.hidden)):
            c.linear(f"{layer}.ffn.shared_experts.{name}", k, n, zero_padding=name != "w2")
    return Case(c, {}, 0)


def streams(c: Checkpoint, name: str, mix: int, scales: int) -> None:
    """What mixes two streams of hidden states."""
    c.plain(f"{name}_fn", mix, 2 * c.sizes.hidden, spread=0.05, dtype=mx.float32)
    c.plain(f"{name}_base", mix, spread=0.1, dtype=mx.float32)
    c.plain(f"{name}_scale", scales, mean=1.0, spread=0.1, dtype=mx.float32)


def _grouped_attention(c: Checkpoint, attn: str, ratio: int) -> None:
    s, groups, rank = c.sizes, 2, 128
    c.linear(f"{attn}.wq_a", s.hidden, 128)
    c.norm(f"{attn}.q_norm", 128)
    c.linear(f"{attn}.wq_b", 128, s.heads * 64)
    c.linear(f"{attn}.wkv", s.hidden, 64)
    c.norm(f"{attn}.kv_norm", 64)
    for g in range(groups):
        c.linear(f"{attn}.wo_a.slice.{g}", s.heads * 64 // groups, rank)
    parts = [c.dense.pop(f"{attn}.wo_a.slice.{g}.weight") for g in range(groups)]
    c.dense[f"{attn}.wo_a.weight"] = mx.concatenate(parts)
    c.linear(f"{attn}.wo_b", groups * rank, s.hidden)
    c.plain(f"{attn}.attn_sink", s.heads, dtype=mx.float32)
    if not ratio:
        return
    overlap = 2 if ratio == 4 else 1
    compressors = {f"{attn}.compressor": 64}
    if ratio == 4:
        c.linear(f"{attn}.indexer.wq_b", 128, 2 * 64)
        c.plain(f"{attn}.indexer.weights_proj.weight", 2, s.hidden, spread=0.1, dtype=mx.float16)
        compressors[f"{attn}.indexer.compressor"] = 64
    for name, width in compressors.items():
        c.linear(f"{name}.wkv", s.hidden, overlap * width)
        c.linear(f"{name}.wgate", s.hidden, overlap * width)
        c.plain(f"{name}.ape", ratio, overlap * width, spread=0.1, dtype=mx.float32)
        c.norm(f"{name}.norm", width)


CASES = {make.__name__: make for make in (mimo_v2, step3p7, glm5_next, deepseek_v4)}
