"""Tiny checkpoints of models that mlx-vlm has, with latent attention: Hy 4 and Mistral Small 4."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from mlx_marlin.loader.scaling import UP_DIVISOR
from tests.support.architectures_hybrid import indexer
from tests.support.checkpoints import SIZES, Checkpoint, Sizes, mixture_config
from tests.support.generic_configs import LATENT
from tests.support.hybrid_configs import INDEXER
from tests.support.vlm_checkpoints import TOWER, Case, Tower, special
from tests.support.vlm_originals import streams


def hy_v4(s: Sizes = SIZES) -> Case:
    """Streams of hidden states, sparse attention whose choice the next layer shares; its class joins gate and up."""
    config = {
        **LATENT,
        "model_type": "hy_v4",
        "num_hidden_layers": 3,
        "num_key_value_heads": 1,
        "moe_intermediate_size": s.width,
        "n_routed_experts": s.experts,
        "num_experts_per_tok": 2,
        **INDEXER,
        "indexer_types": ["full", "full", "shared"],
        "hc_mult": 2,
    }
    c = Checkpoint(s, config)
    c.ends()
    streams(c, "model.hc_head.hc_head", 2, 1)
    for i, kind in enumerate(config["indexer_types"]):
        layer = f"model.layers.{i}"
        attn = f"{layer}.self_attn"
        c.block_norms(layer)
        for site in ("attn", "mlp"):
            streams(c, f"{layer}.hc_{site}_layer.hc_pre.hc", 4, 2)
        c.latent_attention(layer)
        _split_latents(c, attn)
        c.linear(f"{attn}.linear_gate", s.hidden, s.heads * LATENT["v_head_dim"])
        c.plain(f"{attn}.learnable_sink_param", s.heads, dtype=mx.float32)
        if kind == "full":
            indexer(c, f"{attn}.indexer")
        if i == 0:
            c.gated_mlp(f"{layer}.mlp")
        else:
            _experts(c, f"{layer}.mlp")
    return Case(c, {}, 0)


def add_hy_v4_drafter(c: Checkpoint) -> None:
    """Without streams, and beside the layers."""
    s, layer = c.sizes, "model.mtp_layers.0"
    c.config["num_nextn_predict_layers"] = 1
    _drafter(c, layer, "final_layernorm")
    attn, mlp = f"{layer}.self_attn", f"{layer}.mlp"
    _split_latents(c, attn)
    c.linear(f"{attn}.linear_gate", s.hidden, s.heads * LATENT["v_head_dim"])
    c.plain(f"{attn}.learnable_sink_param", s.heads, dtype=mx.float32)
    indexer(c, f"{attn}.indexer")
    for name in ("gate_proj", "up_proj", "down_proj"):  # mlx-vlm's own loader takes the original's in MXFP8 only
        parts = [c.dense.pop(f"{mlp}.experts.{e}.{name}.weight") for e in range(s.experts)]
        c.dense[f"{mlp}.switch_mlp.{name}.weight"] = mx.stack(parts)


def add_glm_moe_dsa_drafter(c: Checkpoint) -> None:
    """GLM-5's: the layer behind the last."""
    layer = f"model.layers.{c.sizes.layers}"
    c.config["num_nextn_predict_layers"] = 1
    _drafter(c, layer, "shared_head.norm")
    indexer(c, f"{layer}.self_attn.indexer")


def _drafter(c: Checkpoint, layer: str, last_norm: str) -> None:
    s = c.sizes
    for name in ("enorm", "hnorm", last_norm):
        c.norm(f"{layer}.{name}", s.hidden)
    c.linear(f"{layer}.eh_proj", 2 * s.hidden, s.hidden)
    c.block_norms(layer)
    c.latent_attention(layer)
    _experts(c, f"{layer}.mlp")


def _experts(c: Checkpoint, block: str) -> None:
    c.experts(block)
    c.selection_bias(f"{block}.gate.e_score_correction_bias")
    c.gated_mlp(f"{block}.shared_experts", c.sizes.width)


def _split_latents(c: Checkpoint, attn: str) -> None:
    """mlx-vlm's own loader takes the original's ``kv_b_proj`` in MXFP8 only."""
    nope, rank = LATENT["qk_nope_head_dim"], LATENT["kv_lora_rank"]
    both = c.dense.pop(f"{attn}.kv_b_proj.weight").reshape(c.sizes.heads, -1, rank)
    c.dense[f"{attn}.embed_q.weight"] = both[:, :nope].swapaxes(-1, -2)
    c.dense[f"{attn}.unembed_out.weight"] = both[:, nope:]


def mistral4(s: Sizes = SIZES, t: Tower = TOWER) -> Case:
    """Mistral Small 4: mistral3 with a text model of its own."""
    text = {
        **s.config(),
        **LATENT,
        **mixture_config(s),
        "model_type": "mistral4",
        "routed_scaling_factor": 1.0,
        "rope_interleave": True,
        "rope_parameters": {
            "type": "default",
            "rope_theta": 10000.0,
            "llama_4_scaling_beta": 0.1,
            "original_max_position_embeddings": 16,
        },
    }
    c = Checkpoint(s, {"model_type": "mistral3", "text_config": text, "spatial_merge_size": 2})
    model = "model.language_model"
    c.ends(model)
    for i in range(s.layers):
        layer = f"{model}.layers.{i}"
        c.block_norms(layer)
        c.latent_attention(layer)
        if i == 0:
            c.gated_mlp(f"{layer}.mlp")
            continue
        c.experts(f"{layer}.mlp")
        c.divide_ups(f"{layer}.mlp", UP_DIVISOR)
        c.fuse_experts(f"{layer}.mlp", interleaved=False)
        c.gated_mlp(f"{layer}.mlp.shared_experts", s.width)
    c.config["vision_config"] = _pixtral(c, t)
    c.config["image_token_index"] = special(s)["image"]
    side = t.patch * t.grid
    pixels = np.random.default_rng(3).normal(size=(1, 3, side, side)).astype(np.float32)
    inputs = {"pixel_values": mx.array(pixels), "image_sizes": mx.array([[side, side]]), "mask": None}
    return Case(c, inputs, (t.grid // 2) ** 2)


def _pixtral(c: Checkpoint, t: Tower) -> dict:
    tower, projector = "model.vision_tower", "model.multi_modal_projector"
    c.plain(f"{tower}.patch_conv.weight", t.hidden, 3, t.patch, t.patch, spread=0.1)
    c.norm(f"{tower}.ln_pre", t.hidden)
    for i in range(t.depth):
        layer = f"{tower}.transformer.layers.{i}"
        for norm in ("attention_norm", "ffn_norm"):
            c.norm(f"{layer}.{norm}", t.hidden)
        for name in "qkvo":
            c.linear(f"{layer}.attention.{name}_proj", t.hidden, t.hidden)
        for name, k, n in (("gate", t.hidden, t.width), ("up", t.hidden, t.width), ("down", t.width, t.hidden)):
            c.linear(f"{layer}.feed_forward.{name}_proj", k, n, zero_padding=name != "down")
    c.norm(f"{projector}.norm", t.hidden)
    merged = f"{projector}.patch_merger.merging_layer.weight"
    c.plain(merged, t.hidden, 4 * t.hidden, spread=0.1, dtype=mx.float16)  # ExLlamaV3 does not quantize it
    c.linear(f"{projector}.linear_1", t.hidden, c.sizes.hidden)
    c.linear(f"{projector}.linear_2", c.sizes.hidden, c.sizes.hidden)
    return {
        "model_type": "pixtral",
        "hidden_size": t.hidden,
        "intermediate_size": t.width,
        "num_hidden_layers": t.depth,
        "num_attention_heads": t.heads,
        "head_dim": t.hidden // t.heads,
        "image_size": t.patch * t.grid,
        "patch_size": t.patch,
    }


CASES = {make.__name__: make for make in (hy_v4, mistral4)}
