"""Tiny checkpoints of models that mlx-vlm has, with the tensors and names of their originals, and pictures for them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_vlm.models.cache import make_prompt_cache

from tests.support import architectures
from tests.support.checkpoints import SIZES, Checkpoint, Sizes
from tests.support.paths import MODELS

# The last of the vocabulary.
SPECIAL = {
    "vision_end": "<|vision_end|>",
    "vision_start": "<|vision_start|>",
    "video": "<|video_pad|>",
    "image": "<|image_pad|>",
}
# As many as the tokenizer of models/random-qwen3_moe has, and those.
PROCESSED = Sizes(vocab=512 + len(SPECIAL))
# Its pictures are of one size, whatever is sent; a message has pictures before text.
_PROCESSOR = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2, "min_pixels": 256, "max_pixels": 256}
_CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def special(s: Sizes) -> dict[str, int]:
    """Their numbers by what they are for."""
    return {name: s.vocab - len(SPECIAL) + i for i, name in enumerate(SPECIAL)}


def write_processor(directory: Path, more: Sequence[str] = ()) -> Path:
    """What a Qwen3-VL processor is made of, for models of sizes :data:`PROCESSED`.

    Args:
        directory: Of the model.
        more: Tokens of text in front of :data:`SPECIAL`, for models of so many more. Default: none.
    """
    tokenizer = json.loads((MODELS / "random-qwen3_moe" / "tokenizer.json").read_text())
    known = tokenizer["added_tokens"]
    added = [*((text, False) for text in more), *((text, True) for text in SPECIAL.values())]
    for number, (text, is_special) in enumerate(added, PROCESSED.vocab - len(SPECIAL)):
        known.append({**known[0], "id": number, "content": text, "special": is_special})
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    config = json.loads((MODELS / "random-qwen3_moe" / "tokenizer_config.json").read_text())
    (directory / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": _CHAT_TEMPLATE}))
    (directory / "preprocessor_config.json").write_text(json.dumps(_PROCESSOR))
    return directory


class Tower(NamedTuple):
    """Sizes of a vision tower. They need padding: 96 to 128, 160 to 256."""

    hidden: int = 96
    heads: int = 2
    width: int = 160
    patch: int = 4
    grid: int = 4  # patches along each side of the picture
    depth: int = 2


TOWER = Tower()


class Case(NamedTuple):
    """A model and an input.

    Attributes:
        checkpoint: The model.
        inputs: Keywords of its call beside the tokens: the picture.
        image_tokens: How many tokens of the picture the text holds.
        tables: Tensors of n-gram tables, which ExLlamaV3 keeps in a file of their own.
        ties: Whether mlx-vlm's model always uses its embeddings as its head.
    """

    checkpoint: Checkpoint
    inputs: dict[str, mx.array]
    image_tokens: int
    ties: bool = False
    tables: dict[str, mx.array] | None = None


def tokens(case: Case, length: int = 24) -> mx.array:
    """A text with a picture in it."""
    numbers = special(case.checkpoint.sizes)
    ids = np.random.default_rng(7).integers(0, numbers["vision_end"], (1, length))
    if case.image_tokens:
        picture = [numbers["vision_start"], *[numbers["image"]] * case.image_tokens, numbers["vision_end"]]
        ids[0, 5 : 5 + len(picture)] = picture
    return mx.array(ids)


def logits(model: nn.Module, case: Case) -> np.ndarray:
    """Of the text with the picture, then of a token more with what is cached of it."""
    cache = make_prompt_cache(model.language_model)
    first = model(tokens(case), cache=cache, **case.inputs).logits
    second = model.language_model(mx.array([[3]]), cache=cache).logits
    return np.array(mx.concatenate([first, second], axis=1).astype(mx.float32))


def split_attention(
    c: Checkpoint, attn: str, hidden: int, widths: Sequence[int] | None = None, name: str = "qkv.{}"
) -> None:
    """Fused attention as ExLlamaV3 writes it: split, and the source beside it.

    Args:
        c: The checkpoint.
        attn: Where the parts are.
        hidden: Their inputs.
        widths: Their outputs. Default: ``None``, as many.
        name: Of the source, for ``weight`` and ``bias``.
    """
    for letter, width in zip("qkv", widths or [hidden] * 3):
        c.linear(f"{attn}.{letter}_proj", hidden, width, bias=True)
    for leaf in ("weight", "bias"):
        parts = [c.dense.pop(f"{attn}.{letter}_proj.{leaf}") for letter in "qkv"]
        key = f"{attn}.{name.format(leaf)}"
        c.dense[key] = c.exl3[key] = mx.concatenate(parts)


def qwen_tower(c: Checkpoint, prefix: str, t: Tower = TOWER, *, deepstack: tuple[int, ...] = ()) -> dict:
    """Qwen3-VL's vision tower, quantized; returns its config."""
    c.plain(f"{prefix}.patch_embed.proj.weight", t.hidden, 3, 2, t.patch, t.patch, spread=0.1)
    c.plain(f"{prefix}.patch_embed.proj.bias", t.hidden, spread=0.1)
    c.plain(f"{prefix}.pos_embed.weight", t.grid**2, t.hidden, spread=0.3)
    for i in range(t.depth):
        block = f"{prefix}.blocks.{i}"
        for norm in ("norm1", "norm2"):
            c.norm(f"{block}.{norm}", t.hidden)
            c.plain(f"{block}.{norm}.bias", t.hidden, spread=0.1)
        split_attention(c, f"{block}.attn", t.hidden)
        c.linear(f"{block}.attn.proj", t.hidden, t.hidden, bias=True)
        c.linear(f"{block}.mlp.linear_fc1", t.hidden, t.width, bias=True, zero_padding=True)
        c.linear(f"{block}.mlp.linear_fc2", t.width, t.hidden, bias=True)
    for merger in ("merger", *(f"deepstack_merger_list.{i}" for i in range(len(deepstack)))):
        joined = 4 * t.hidden
        size = t.hidden if merger == "merger" else joined
        c.norm(f"{prefix}.{merger}.norm", size)
        c.plain(f"{prefix}.{merger}.norm.bias", size, spread=0.1)
        c.linear(f"{prefix}.{merger}.linear_fc1", joined, joined, bias=True)
        c.linear(f"{prefix}.{merger}.linear_fc2", joined, c.sizes.hidden, bias=True)
    return {
        "depth": t.depth,
        "hidden_size": t.hidden,
        "intermediate_size": t.width,
        "out_hidden_size": c.sizes.hidden,
        "num_heads": t.heads,
        "patch_size": t.patch,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "in_channels": 3,
        "num_position_embeddings": t.grid**2,
        "deepstack_visual_indexes": list(deepstack),
    }


def qwen_picture(t: Tower = TOWER) -> dict[str, mx.array]:
    rng = np.random.default_rng(3)
    pixels = rng.normal(size=(t.grid**2, 3 * 2 * t.patch**2)).astype(np.float32)
    return {"pixel_values": mx.array(pixels), "image_grid_thw": mx.array([[1, t.grid, t.grid]])}


def _qwen(c: Checkpoint, tower: dict, model_type: str) -> Case:
    c.config["vision_config"] = {"model_type": model_type, **tower}
    c.config.update({f"{name}_token_id": number for name, number in special(c.sizes).items()})
    return Case(c, qwen_picture(), TOWER.grid**2 // 4)


def qwen3_vl_moe(s: Sizes = SIZES) -> Case:
    text = {
        **s.config(),
        "model_type": "qwen3_vl_moe_text",
        "num_experts": s.experts,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": s.width,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [1],
        "rope_scaling": {"rope_type": "default", "mrope_interleaved": True, "mrope_section": [12, 10, 10]},
    }
    c = Checkpoint(s, {"model_type": "qwen3_vl_moe", "text_config": text})
    model = "model.language_model"
    c.ends(model)
    for i in range(s.layers):
        layer = f"{model}.layers.{i}"
        c.block_norms(layer)
        c.attention(layer, norms="head")
        if i == 1:
            c.gated_mlp(f"{layer}.mlp")
            continue
        c.experts(f"{layer}.mlp")
        c.fuse_experts(f"{layer}.mlp", interleaved=False)
        for name in ("gate_up_proj", "down_proj"):  # the original has inputs first
            key = f"{layer}.mlp.experts.{name}"
            c.dense[key] = c.dense[key].swapaxes(-1, -2)
    return _qwen(c, qwen_tower(c, "model.visual", deepstack=(0,)), "qwen3_vl_moe")


def qwen3_5_moe(s: Sizes = SIZES) -> Case:
    c = architectures.qwen3_5_moe(s)
    c.config["text_config"]["rope_parameters"]["mrope_section"] = [3, 3, 2]
    for form in (c.exl3, c.dense):
        form.pop("model.visual.patch_embed.proj.bias")
    return _qwen(c, qwen_tower(c, "model.visual"), "qwen3_5_moe")


def gemma4(s: Sizes = SIZES, t: Tower = TOWER) -> Case:
    """Its tower is all linears, of which the first is quantized too: nothing else tells mlx-vlm its dtype."""
    c = architectures.gemma4(s)
    c.dense["lm_head.weight"] = c.dense.pop("language_model.lm_head.weight")
    tower, head_dim = "model.vision_tower", t.hidden // t.heads
    c.linear(f"{tower}.patch_embedder.input_proj", 3 * t.patch**2, t.hidden)
    c.plain(f"{tower}.patch_embedder.position_embedding_table", 2, 16, t.hidden, spread=0.3)
    norms = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")
    for i in range(t.depth):
        layer = f"{tower}.encoder.layers.{i}"
        for norm in norms:
            c.norm(f"{layer}.{norm}", t.hidden)
        for name in ("q_norm", "k_norm"):
            c.norm(f"{layer}.self_attn.{name}", head_dim)
        for name in "qkvo":
            c.linear(f"{layer}.self_attn.{name}_proj.linear", t.hidden, t.hidden)
        for name, k, n in (("gate", t.hidden, t.width), ("up", t.hidden, t.width), ("down", t.width, t.hidden)):
            c.linear(f"{layer}.mlp.{name}_proj.linear", k, n, zero_padding=name != "down")
    c.linear("model.embed_vision.embedding_projection", t.hidden, s.hidden)
    c.config["vision_config"] = {
        "model_type": "gemma4_vision",
        "hidden_size": t.hidden,
        "intermediate_size": t.width,
        "num_hidden_layers": t.depth,
        "num_attention_heads": t.heads,
        "num_key_value_heads": t.heads,
        "head_dim": head_dim,
        "global_head_dim": head_dim,
        "patch_size": t.patch,
        "position_embedding_size": 16,
        "pooling_kernel_size": 2,
        "default_output_length": t.grid**2 // 4,
    }
    c.config["image_token_id"] = special(s)["image"]
    side = t.patch * t.grid
    pixels = np.random.default_rng(3).uniform(size=(1, 3, side, side)).astype(np.float32)
    return Case(c, {"pixel_values": mx.array(pixels)}, t.grid**2 // 4, ties=True)


CASES: dict[str, Callable[[], Case]] = {make.__name__: make for make in (qwen3_vl_moe, qwen3_5_moe, gemma4)}
