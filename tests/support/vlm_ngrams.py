"""A tiny checkpoint of qwen4_exp (Qwen3.8-Flash-Next): streams of hidden states, and tables of n-grams."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from mlx_marlin import codec
from tests.support import architectures
from tests.support.checkpoints import SIZES, Checkpoint, Sizes
from tests.support.vlm_checkpoints import TOWER, Case, qwen_picture, qwen_tower, special

_STREAMS, _RANK, _BITS = 2, 32, 3
# The first primes from 50 on, one per head; their sum is a multiple of 8, so that the table needs no padding.
_HEAD_SIZES = (53, 59)
_SHARDS = (38, 37, 37)


def _text(s: Sizes) -> dict:
    return {
        **s.config(),
        **architectures._delta(s),
        "model_type": "qwen4_exp_text",
        "layer_types": ["linear_attention", "full_attention"],
        "hc_count": _STREAMS,
        "hc_lowrank": _RANK,
        "ple_layer_ids": [1],
        "ple_embed_dim": len(_HEAD_SIZES) * codec.NGRAM_SIZE,
        "ngram_size": 3,
        "heads_per_ngram": 1,
        "ngram_vocab_size_base": 50,
        "make_ngram_vocab_size_divisible_by": 8,
        "split_ngram_parts": len(_SHARDS),
        "indexer_n_heads": 2,
        "indexer_head_dim": s.head_dim,
        "indexer_budget": 8,
        "rope_parameters": {
            "type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.25,
            "mrope_section": [3, 3, 2],
        },
    }


def qwen4_exp(s: Sizes = SIZES, *, quantized: bool = True) -> Case:
    """With its table quantized in a file of its own, or as the original has it."""
    c = Checkpoint(s, {"model_type": "qwen4_exp", "text_config": _text(s)})
    model = "model.language_model"
    c.plain(f"{model}.embed_tokens.weight", s.vocab, s.hidden)
    c.linear("lm_head", s.hidden, s.vocab, bits=6)
    for i in range(s.layers):
        layer = f"{model}.layers.{i}"
        for site in ("attn", "mlp"):
            _mixer(c, f"{layer}.{site}_hyper_connection", injects=True)
        if i == 0:
            architectures._delta_layer(c, layer, fused=False)
        else:
            _sparse_layer(c, layer)
        _experts(c, layer)
    _mixer(c, f"{model}.hyper_connection_mixer", injects=False)
    tables = _ngrams(c, f"{model}.layers.0.ple", quantized)
    c.config["vision_config"] = {"model_type": "qwen4_exp", **qwen_tower(c, "model.visual")}
    c.config.update({f"{name}_token_id": number for name, number in special(s).items()})
    return Case(c, qwen_picture(), TOWER.grid**2 // 4, tables=tables)


def add_qwen4_exp_drafter(c: Checkpoint) -> None:
    s, layer = c.sizes, "mtp.layers.0"
    c.norm("mtp.pre_fc_norm_embedding", s.hidden, 0.0)
    c.norm("mtp.pre_fc_norm_hidden", _STREAMS * s.hidden, 0.0)
    for name in ("fc_embedding", "fc_hidden"):
        c.linear(f"mtp.{name}", s.hidden, s.hidden)
    for site in ("attn", "mlp"):
        _mixer(c, f"{layer}.{site}_hyper_connection", injects=True)
    _sparse_layer(c, layer)
    _experts(c, layer)
    _mixer(c, "mtp.hyper_connection_mixer", injects=False)


def _sparse_layer(c: Checkpoint, layer: str) -> None:
    s = c.sizes
    c.attention(layer, norms="head", gated=True, norm_mean=0.0)
    c.linear(f"{layer}.self_attn.indexer.index_qk_proj", s.hidden, 3 * s.head_dim)
    for name in "qk":
        c.norm(f"{layer}.self_attn.indexer.{name}_layernorm", s.head_dim, 0.0)


def _experts(c: Checkpoint, layer: str) -> None:
    c.experts(f"{layer}.mlp")
    c.fuse_experts(f"{layer}.mlp", interleaved=False)
    c.gated_mlp(f"{layer}.mlp.shared_expert", 128)
    c.plain(f"{layer}.mlp.shared_expert_gate.weight", 1, c.sizes.hidden, spread=0.1, dtype=mx.float16)


def _mixer(c: Checkpoint, name: str, *, injects: bool) -> None:
    width = _STREAMS * c.sizes.hidden
    c.norm(f"{name}.hc_norm", width, 0.0)
    for leaf, n, k in (("input_mix_weight_down", _RANK, width), ("input_mix_weight_up", width, _RANK)):
        c.plain(f"{name}.{leaf}.weight", n, k, spread=0.1, dtype=mx.float16)
    if injects:
        c.plain(f"{name}.block_inject_weight.weight", _STREAMS, width, spread=0.1, dtype=mx.float16)


def _ngrams(c: Checkpoint, layer: str, quantized: bool) -> dict[str, mx.array]:
    width, heads = _STREAMS * c.sizes.hidden, len(_HEAD_SIZES)
    c.linear(f"{layer}.key_proj", heads * codec.NGRAM_SIZE, width)
    c.linear(f"{layer}.value_proj", heads * codec.NGRAM_SIZE, c.sizes.hidden)
    for name in ("norm_key", "norm_query", "norm_conv"):
        c.norm(f"{layer}.{name}", width, 0.0)
    c.plain(f"{layer}.conv1d.weight", width, 1, 4, spread=0.5)
    offsets = np.cumsum([0, *_HEAD_SIZES[:-1]])
    hashes = {
        "head_offsets": ("ngram_heads_offsets", offsets),
        "head_vocab_sizes": ("ngram_heads_vocab_sizes", np.array(_HEAD_SIZES)),
        "layer_multipliers": ("layer_multipliers", np.array([100003, 200003, 300007])),
    }
    hashes = {ours: (theirs, mx.array(values.astype(np.int64))) for ours, (theirs, values) in hashes.items()}
    parent, rows = f"{layer}.ple_embedding", sum(_HEAD_SIZES)
    table = f"{parent}.ngram_embedding"
    ends = np.cumsum(_SHARDS)
    c.dense.update({f"{parent}.{theirs}": values for theirs, values in hashes.values()})
    if not quantized:
        for i, size in enumerate(_SHARDS):
            c.plain(f"{table}.shard_{i}.weight", size, codec.NGRAM_SIZE)
        c.exl3.update({f"{parent}.{theirs}": values for theirs, values in hashes.values()})
        return {}
    rings = c.rng.integers(0, 1 << 16, (rows, 1 + 10 * _BITS), np.uint16)
    rings[:, 0] = c.rng.uniform(0.5, 1.5, rows).astype(np.float16).view(np.uint16)
    bias = c.rng.normal(0, 0.3, (heads, codec.NGRAM_SIZE)).astype(np.float16)
    of_rows = bias[np.searchsorted(offsets, np.arange(rows), side="right") - 1]
    weights = codec.decode_ngrams(rings, of_rows)
    for i, end in enumerate(ends):
        c.dense[f"{table}.shard_{i}.weight"] = mx.array(weights[end - _SHARDS[i] : end])
    # ExLlamaV3 splits it otherwise than the original.
    parts = {f"{table}.shard_{i}.trellis": part for i, part in enumerate(np.split(rings.view(np.int16), [100]))}
    tensors = {**{name: mx.array(part) for name, part in parts.items()}, f"{table}.head_bias": mx.array(bias)}
    return {**tensors, **{f"{table}.{ours}": values for ours, (_, values) in hashes.items()}}


def qwen4_exp_plain() -> Case:
    return qwen4_exp(quantized=False)


CASES = {make.__name__: make for make in (qwen4_exp, qwen4_exp_plain)}
