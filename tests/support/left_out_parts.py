"""Quantized parts of checkpoints that text models leave out, in the names that ExLlamaV3 gives them."""

from __future__ import annotations

from collections.abc import Callable

from mlx_marlin.loader.contents import DRAFT, VISION
from tests.support.architectures_hybrid import ling_layer, mimo_window
from tests.support.checkpoints import Checkpoint

Add = Callable[[Checkpoint], None]
"""Adds a part to a checkpoint."""


def draft_in_front(c: Checkpoint) -> None:
    """Prediction layers in Qwen3.5's names."""
    s = c.sizes
    if "mtp.fc.trellis" not in c.exl3:
        c.linear("mtp.fc", 2 * s.hidden, s.hidden)
    c.norm("mtp.pre_fc_norm_hidden", s.hidden)
    c.norm("mtp.norm", s.hidden)
    c.block_norms("mtp.layers.0")
    c.attention("mtp.layers.0", norms="head", gated=True)
    c.experts("mtp.layers.0.mlp")


def draft_behind(c: Checkpoint) -> None:
    """DeepSeek's: a layer past the last one."""
    s, layer = c.sizes, f"model.layers.{c.sizes.layers}"
    c.linear(f"{layer}.eh_proj", 2 * s.hidden, s.hidden)
    for name in ("enorm", "hnorm", "shared_head.norm"):
        c.norm(f"{layer}.{name}", s.hidden)
    c.block_norms(layer)
    c.latent_attention(layer)
    c.experts(f"{layer}.mlp")
    c.selection_bias(f"{layer}.mlp.gate.e_score_correction_bias")


def draft_of_ling(c: Checkpoint) -> None:
    """Ling 3's: one more layer with latent attention."""
    s, layer = c.sizes, f"model.layers.{c.sizes.layers}"
    c.linear(f"{layer}.eh_proj", 2 * s.hidden, s.hidden)
    for name in ("enorm", "hnorm", "final_layernorm"):
        c.norm(f"{layer}.{name}", s.hidden)
    ling_layer(c, layer)


def draft_of_mimo(c: Checkpoint) -> None:
    """MiMo-V2-Flash's, each with a window and without experts."""
    s = c.sizes
    for i in range(2):
        layer = f"model.mtp.layers.{i}"
        c.linear(f"{layer}.eh_proj", 2 * s.hidden, s.hidden)
        for name in ("enorm", "hnorm", "input_layernorm", "pre_mlp_layernorm", "final_layernorm"):
            c.norm(f"{layer}.{name}", s.hidden)
        mimo_window(c, f"{layer}.self_attn")
        c.gated_mlp(f"{layer}.mlp")


def tower(prefix: str) -> Add:
    """A vision tower, padded, its fused source beside it."""

    def add(c: Checkpoint) -> None:
        block = f"{prefix}.blocks.0"
        for name in "qkv":
            c.linear(f"{block}.attn.{name}_proj", 128, 128, bias=True)
        c.plain(f"{block}.attn.qkv.weight", 384, 128)
        c.plain(f"{block}.attn.qkv.bias", 384)
        c.linear(f"{block}.mlp.linear_fc1", 128, 160, bias=True, zero_padding=True)
        c.linear(f"{prefix}.merger.linear_fc2", 128, c.sizes.hidden, bias=True)
        c.plain(f"{prefix}.patch_embed.proj.bias", 128)

    return add


PARTS: dict[str, dict[str, Add]] = {
    "qwen3_next": {DRAFT: draft_in_front},
    "qwen3_5_moe": {DRAFT: draft_in_front, VISION: tower("model.visual")},
    "glm4_moe": {DRAFT: draft_behind},
    "glm4_moe_lite": {DRAFT: draft_behind},
    "deepseek_v3": {DRAFT: draft_behind},
    "bailing_moe": {DRAFT: draft_behind},
    "exaone_moe": {DRAFT: draft_in_front},
    "step3p5": {DRAFT: draft_behind},
    "bailing_hybrid": {DRAFT: draft_behind},
    "bailing_moe_v3": {DRAFT: draft_of_ling},
    "deepseek_v32": {DRAFT: draft_behind},
    "glm_moe_dsa": {DRAFT: draft_behind},
    "mimo_v2_flash": {DRAFT: draft_of_mimo},
    "llama4": {VISION: tower("vision_model")},
    "minimax_m3_vl": {VISION: tower("vision_tower")},
    "gemma3": {VISION: tower("vision_tower")},
    "gemma4": {VISION: tower("model.vision_tower")},
}
"""What the originals of these architectures have beside the text model."""


def extend(checkpoint: Checkpoint, *additions: Add) -> set[str]:
    """Add parts to a checkpoint; returns the names of their tensors in EXL3."""
    before = set(checkpoint.exl3)
    for add in additions:
        add(checkpoint)
    return set(checkpoint.exl3) - before
