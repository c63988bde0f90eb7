"""Tiny checkpoints, one per architecture: EXL3 in exllamav3's tensor names, and the same weights dense in
the names of the original models, for mlx-lm's own loader. Any bit pattern is a valid trellis, so the
words are random."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_marlin import TrellisWeight, codec

HIDDEN = 192  # padded to 256 in the files
VOCAB = 160  # padded to 256
HEAD_DIM = 64
HEADS = 4
KV_HEADS = 2
EXPERTS = 4
WIDTH = 96  # of an expert: padded to 128, and the padded width flows
DENSE_WIDTH = 256
LAYERS = 2
MARKERS = {"mcg": -877912083, "mul1": -2082680531}

COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": DENSE_WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "torch_dtype": "bfloat16",
    "eos_token_id": 0,
}


def padded(size: int) -> int:
    return -(-size // 128) * 128


class Checkpoint:
    """Collects the tensors of one model in both forms."""

    def __init__(self, config: dict, seed: int = 0):
        self.config = {**COMMON, **config}
        self.rng = np.random.default_rng(seed)
        self.exl3: dict[str, mx.array] = {}
        self.dense: dict[str, mx.array] = {}
        self.bits: dict[str, int] = {}

    def weight(self, name: str, k: int, n: int, *, bits=None, bias=False, zero_padding=False) -> np.ndarray:
        """A quantized linear; returns its effective dense weight [n, k] (and stores only the EXL3 form)."""
        rng, (kp, np_) = self.rng, (padded(k), padded(n))
        bits = int(rng.integers(1, 7)) if bits is None else bits
        codebook = codec.CODEBOOKS[rng.integers(3)]
        trellis = rng.integers(-(2**15), 2**15, (kp // 16, np_ // 16, 16 * bits), dtype=np.int16)
        suh, svh = ((rng.choice([-1, 1], size) * rng.uniform(0.5, 1.5, size)).astype(np.float32) for size in (kp, np_))
        suh = (suh / np.sqrt(k)).astype(np.float16)
        svh = svh.astype(np.float16)
        if zero_padding:
            svh[n:] = 0
        self.bits[name] = bits
        self.exl3.update(
            {f"{name}.trellis": mx.array(trellis), f"{name}.suh": mx.array(suh), f"{name}.svh": mx.array(svh)}
        )
        if codebook in MARKERS:
            self.exl3[f"{name}.{codebook}"] = mx.array(MARKERS[codebook], mx.int32)
        if bias:
            values = np.zeros(np_, np.float16)
            values[:n] = rng.normal(0, 0.3, n)
            self.exl3[f"{name}.bias"] = mx.array(values)
            self.dense[f"{name}.bias"] = mx.array(values[:n].astype(np.float32))
        return codec.dequantize(TrellisWeight(trellis, suh, svh, codebook, in_features=k, out_features=n)).T

    def linear(self, name: str, k: int, n: int, **keywords) -> None:
        """A quantized linear, in both forms."""
        self.dense[f"{name}.weight"] = mx.array(self.weight(name, k, n, **keywords))

    def plain(self, name: str, *shape: int, mean=0.0, spread=1.0, dtype=mx.bfloat16) -> None:
        """An unquantized tensor."""
        values = mx.array(self.rng.normal(mean, spread, shape).astype(np.float32)).astype(dtype)
        self.exl3[name] = values
        self.dense[name] = values

    def norm(self, name: str, size: int, mean=1.0) -> None:
        self.plain(f"{name}.weight", size, mean=mean, spread=0.1)

    def ends(self, model="model", head="lm_head", norm_mean=1.0) -> None:
        self.plain(f"{model}.embed_tokens.weight", VOCAB, HIDDEN)
        self.norm(f"{model}.norm", HIDDEN, norm_mean)
        self.linear(head, HIDDEN, VOCAB, bits=6)

    def block_norms(self, layer: str, mean=1.0, names=("input_layernorm", "post_attention_layernorm")) -> None:
        for name in names:
            self.norm(f"{layer}.{name}", HIDDEN, mean)

    def attention(self, layer: str, *, bias=False, o_bias=False, norms=None, gated=False, norm_mean=1.0) -> None:
        attn = f"{layer}.self_attn"
        sizes = {"q": HEADS * HEAD_DIM, "k": KV_HEADS * HEAD_DIM, "v": KV_HEADS * HEAD_DIM}
        for name, size in sizes.items():
            self.linear(f"{attn}.{name}_proj", HIDDEN, size * (2 if gated and name == "q" else 1), bias=bias)
        self.linear(f"{attn}.o_proj", HEADS * HEAD_DIM, HIDDEN, bias=o_bias)
        for name in "qk" if norms else "":
            self.norm(f"{attn}.{name}_norm", HEAD_DIM if norms == "head" else sizes[name], norm_mean)

    def latent_attention(self, layer: str) -> None:
        attn, nope, rope, rank, q_rank, value = f"{layer}.self_attn", 64, 32, 128, 128, 64
        self.linear(f"{attn}.q_a_proj", HIDDEN, q_rank)
        self.norm(f"{attn}.q_a_layernorm", q_rank)
        self.linear(f"{attn}.q_b_proj", q_rank, HEADS * (nope + rope))
        self.linear(f"{attn}.kv_a_proj_with_mqa", HIDDEN, rank + rope)
        self.norm(f"{attn}.kv_a_layernorm", rank)
        self.plain(f"{attn}.kv_b_proj.weight", HEADS * (nope + value), rank, spread=rank**-0.5, dtype=mx.float16)
        self.linear(f"{attn}.o_proj", HEADS * value, HIDDEN)

    def gated_mlp(self, name: str, width: int = DENSE_WIDTH) -> None:
        self.linear(f"{name}.gate_proj", HIDDEN, width, zero_padding=True)
        self.linear(f"{name}.up_proj", HIDDEN, width, zero_padding=True)
        self.linear(f"{name}.down_proj", width, HIDDEN)

    def experts(self, block: str, names=("gate_proj", "up_proj", "down_proj"), *, router="gate", bias=False) -> None:
        self.plain(f"{block}.{router}.weight", EXPERTS, HIDDEN, spread=HIDDEN**-0.5, dtype=mx.float16)
        for e in range(EXPERTS):
            for projection, name in enumerate(names):
                k, n = (WIDTH, HIDDEN) if projection == 2 else (HIDDEN, WIDTH)
                self.linear(f"{block}.experts.{e}.{name}", k, n, bias=bias, zero_padding=projection != 2)

    def fuse_experts(self, block: str, *, interleaved: bool, bias=False) -> None:
        """Replace the dense form of the experts by the fused one of the original models."""
        leaf = "weight"

        def take(name: str, leaf: str) -> np.ndarray:
            return np.stack([np.array(self.dense.pop(f"{block}.experts.{e}.{name}.{leaf}")) for e in range(EXPERTS)])

        for leaf in ("weight", "bias") if bias else ("weight",):
            gate, up, down = (take(name, leaf) for name in ("gate_proj", "up_proj", "down_proj"))
            if interleaved:  # gate and up rows in turn
                gate_up = np.stack([gate, up], 2).reshape(EXPERTS, 2 * WIDTH, *gate.shape[2:])
            else:
                gate_up = np.concatenate([gate, up], 1)
            suffix = "_bias" if leaf == "bias" else ".weight" if interleaved else ""
            self.dense[f"{block}.experts.gate_up_proj{suffix}"] = mx.array(gate_up)
            self.dense[f"{block}.experts.down_proj{suffix}"] = mx.array(down)

    def selection_bias(self, name: str) -> None:
        self.plain(name, EXPERTS, spread=0.1, dtype=mx.float16)

    def write(self, directory: Path, *, shards: int = 1) -> Path:
        """The EXL3 directory."""
        quantization = {
            "quant_method": "exl3",
            "version": "1.4.1",
            "bits": 3.5,
            "head_bits": 6,
            "out_scales": "always",
        }
        config = {**self.config, "quantization_config": {**quantization, "codebook": "mul1"}}
        return write_directory(directory, config, self.exl3, shards)

    def write_dense(self, directory: Path) -> Path:
        """The same weights as the original model would hold them; the head is not tied, as EXL3 has its own."""
        config = json.loads(json.dumps(self.config))
        for part in (config, config.get("text_config", {})):
            part["tie_word_embeddings"] = False
        return write_directory(directory, config, self.dense, 1)


def write_directory(directory: Path, config: dict, tensors: dict[str, mx.array], shards: int) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    names = list(tensors)
    if shards == 1:
        mx.save_safetensors(str(directory / "model.safetensors"), tensors)
        return directory
    files = {
        name: f"model-{1 + i * shards // len(names):05}-of-{shards:05}.safetensors" for i, name in enumerate(names)
    }
    for file in sorted(set(files.values())):
        mx.save_safetensors(str(directory / file), {name: tensors[name] for name in names if files[name] == file})
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return directory


def qwen3_moe(**config) -> Checkpoint:
    moe = {
        "num_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": WIDTH,
        "norm_topk_prob": True,
    }
    # mlx-lm 0.31 (for Python 3.10) stacks no experts unless layer 0 has some.
    dense = [0] if sys.version_info >= (3, 11) else [1]
    c = Checkpoint({"model_type": "qwen3_moe", **moe, "decoder_sparse_step": 1, "mlp_only_layers": dense, **config})
    c.ends()
    for i in range(c.config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        c.block_norms(layer)
        c.attention(layer, norms="head")
        c.experts(f"{layer}.mlp") if i not in c.config["mlp_only_layers"] else c.gated_mlp(f"{layer}.mlp")
    return c


def mixtral() -> Checkpoint:
    c = Checkpoint(
        {
            "model_type": "mixtral",
            "num_local_experts": EXPERTS,
            "num_experts_per_tok": 2,
            "intermediate_size": WIDTH,
            "num_attention_heads": 3,
            "num_key_value_heads": 3,
        }
    )
    c.ends()
    for i in range(LAYERS):
        layer = f"model.layers.{i}"
        c.block_norms(layer)
        for name in "qkvo":  # mixtral's heads divide the hidden size
            c.linear(f"{layer}.self_attn.{name}_proj", HIDDEN, HIDDEN)
        c.experts(f"{layer}.block_sparse_moe", ("w1", "w3", "w2"))
    return c


def olmoe() -> Checkpoint:
    c = Checkpoint(
        {
            "model_type": "olmoe",
            "num_experts": EXPERTS,
            "num_experts_per_tok": 2,
            "intermediate_size": WIDTH,
            "tie_word_embeddings": True,
        }
    )
    c.ends()
    for i in range(LAYERS):
        layer = f"model.layers.{i}"
        c.block_norms(layer)
        c.attention(layer, norms="all")
        c.experts(f"{layer}.mlp")
    return c


def qwen2_moe() -> Checkpoint:
    c = Checkpoint(
        {
            "model_type": "qwen2_moe",
            "num_experts": EXPERTS,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": WIDTH,
            "shared_expert_intermediate_size": 128,
            "num_attention_heads": 3,
            "num_key_value_heads": 3,
        }
    )
    c.ends()
    for i in range(LAYERS):
        layer = f"model.layers.{i}"
        c.block_norms(layer)
        for name in "qkv":
            c.linear(f"{layer}.self_attn.{name}_proj", HIDDEN, HIDDEN, bias=True)
        c.linear(f"{layer}.self_attn.o_proj", HIDDEN, HIDDEN)
        c.experts(f"{layer}.mlp")
        c.gated_mlp(f"{layer}.mlp.shared_expert", 128)
        c.plain(f"{layer}.mlp.shared_expert_gate.weight", 1, HIDDEN, spread=0.1, dtype=mx.float16)
    return c


_DELTA = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 64,
    "linear_conv_kernel_dim": 4,
    "full_attention_interval": 2,
    "num_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": WIDTH,
    "shared_expert_intermediate_size": 128,
    "norm_topk_prob": True,
}


def _delta_layer(c: Checkpoint, layer: str, *, fused: bool) -> None:
    keys, values, heads = 2 * 32, 4 * 64, 4
    attn = f"{layer}.linear_attn"
    if fused:
        c.linear(f"{attn}.in_proj_qkvz", HIDDEN, 2 * keys + 2 * values)
        c.plain(f"{attn}.in_proj_ba.weight", 2 * heads, HIDDEN, spread=0.1)
    else:
        c.linear(f"{attn}.in_proj_qkv", HIDDEN, 2 * keys + values)
        c.linear(f"{attn}.in_proj_z", HIDDEN, values)
        c.plain(f"{attn}.in_proj_b.weight", heads, HIDDEN, spread=0.1)
        c.plain(f"{attn}.in_proj_a.weight", heads, HIDDEN, spread=0.1)
    c.plain(f"{attn}.conv1d.weight", 2 * keys + values, 1, 4, spread=0.5)
    c.plain(f"{attn}.dt_bias", heads, mean=1.0, spread=0.1)
    c.plain(f"{attn}.A_log", heads, mean=0.5, spread=0.3)
    c.norm(f"{attn}.norm", 64)
    c.linear(f"{attn}.out_proj", values, HIDDEN)


def _delta_model(c: Checkpoint, model: str, *, fused: bool) -> None:
    c.ends(model, norm_mean=0.0)
    for i in range(LAYERS):
        layer = f"{model}.layers.{i}"
        c.block_norms(layer, 0.0)
        if (i + 1) % 2:
            _delta_layer(c, layer, fused=fused)
        else:
            c.attention(layer, norms="head", gated=True, norm_mean=0.0)
        c.experts(f"{layer}.mlp")
        c.gated_mlp(f"{layer}.mlp.shared_expert", 128)
        c.plain(f"{layer}.mlp.shared_expert_gate.weight", 1, HIDDEN, spread=0.1, dtype=mx.float16)
    c.linear("mtp.fc", 2 * HIDDEN, HIDDEN)  # mlx-lm drops the prediction head


def qwen3_next() -> Checkpoint:
    c = Checkpoint(
        {
            "model_type": "qwen3_next",
            **_DELTA,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "partial_rotary_factor": 0.25,
        }
    )
    _delta_model(c, "model", fused=True)
    return c


def qwen3_5_moe() -> Checkpoint:
    text = {**COMMON, **_DELTA, "model_type": "qwen3_5_moe_text", "tie_word_embeddings": True}
    text["rope_parameters"] = {"type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25}
    c = Checkpoint({"model_type": "qwen3_5_moe", "text_config": text})
    _delta_model(c, "model.language_model", fused=False)
    for i in range(LAYERS):
        c.fuse_experts(f"model.language_model.layers.{i}.mlp", interleaved=False)
    c.plain("model.visual.patch_embed.proj.bias", 8)  # mlx-lm drops the vision tower
    return c


def _glm_moe(c: Checkpoint, attention) -> Checkpoint:
    c.ends()
    for i in range(LAYERS):
        layer = f"model.layers.{i}"
        c.block_norms(layer)
        attention(layer)
        if i < 1:
            c.gated_mlp(f"{layer}.mlp")
            continue
        c.experts(f"{layer}.mlp")
        c.selection_bias(f"{layer}.mlp.gate.e_score_correction_bias")
        c.gated_mlp(f"{layer}.mlp.shared_experts", WIDTH)
    return c


_GLM = {
    "moe_intermediate_size": WIDTH,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "n_routed_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.5,
    "partial_rotary_factor": 0.5,
}
_LATENT = {
    "kv_lora_rank": 128,
    "q_lora_rank": 128,
    "qk_rope_head_dim": 32,
    "qk_nope_head_dim": 64,
    "v_head_dim": 64,
    "num_key_value_heads": HEADS,
}


def glm4_moe() -> Checkpoint:
    c = Checkpoint({"model_type": "glm4_moe", **_GLM, "use_qk_norm": True, "attention_bias": True})
    return _glm_moe(c, lambda layer: c.attention(layer, bias=True, norms="head"))


def glm4_moe_lite() -> Checkpoint:
    c = Checkpoint({"model_type": "glm4_moe_lite", **_GLM, **_LATENT})
    return _glm_moe(c, c.latent_attention)


def deepseek_v3() -> Checkpoint:
    c = Checkpoint({"model_type": "deepseek_v3", **_GLM, **_LATENT, "moe_layer_freq": 1})
    return _glm_moe(c, c.latent_attention)


def gpt_oss() -> Checkpoint:
    c = Checkpoint(
        {
            "model_type": "gpt_oss",
            "num_local_experts": EXPERTS,
            "num_experts_per_tok": 2,
            "intermediate_size": WIDTH,
            "sliding_window": 16,
            "attention_bias": True,
            "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
        }
    )
    c.ends()
    for i in range(LAYERS):
        layer = f"model.layers.{i}"
        c.block_norms(layer)
        c.attention(layer, bias=True, o_bias=True)
        c.plain(f"{layer}.self_attn.sinks", HEADS)
        c.experts(f"{layer}.mlp", router="router", bias=True)
        c.plain(f"{layer}.mlp.router.bias", EXPERTS, spread=0.1)
        c.fuse_experts(f"{layer}.mlp", interleaved=True, bias=True)
    return c


def minimax() -> Checkpoint:
    c = Checkpoint(
        {
            "model_type": "minimax",
            "num_local_experts": EXPERTS,
            "num_experts_per_tok": 2,
            "intermediate_size": WIDTH,
            "shared_intermediate_size": 0,
            "rotary_dim": 32,
            "use_qk_norm": True,
        }
    )
    c.ends()
    for i in range(LAYERS):
        layer = f"model.layers.{i}"
        c.block_norms(layer)
        c.attention(layer, norms="all")
        c.experts(f"{layer}.block_sparse_moe", ("w1", "w3", "w2"))
        c.selection_bias(f"{layer}.block_sparse_moe.gate.e_score_correction_bias")
        # The original model has it beside the gate.
        bias = c.dense.pop(f"{layer}.block_sparse_moe.gate.e_score_correction_bias")
        c.dense[f"{layer}.block_sparse_moe.e_score_correction_bias"] = bias
    return c


def llama(**config) -> Checkpoint:
    c = Checkpoint({"model_type": "llama", "tie_word_embeddings": True, **config})
    c.ends()
    for i in range(c.config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        c.block_norms(layer)
        c.attention(layer)
        c.gated_mlp(f"{layer}.mlp")
    return c


def qwen3() -> Checkpoint:
    c = Checkpoint({"model_type": "qwen3", "tie_word_embeddings": True, "intermediate_size": 224})
    c.ends()
    for i in range(LAYERS):
        layer = f"model.layers.{i}"
        c.block_norms(layer)
        c.attention(layer, norms="head")
        c.gated_mlp(f"{layer}.mlp", 224)
    return c


def gemma3() -> Checkpoint:
    text = {
        **COMMON,
        "model_type": "gemma3_text",
        "sliding_window": 16,
        "sliding_window_pattern": 2,
        "query_pre_attn_scalar": 64,
    }
    c = Checkpoint({"model_type": "gemma3", "text_config": text, "tie_word_embeddings": True})
    model = "language_model.model"
    c.ends(model, "language_model.lm_head", norm_mean=0.0)
    norms = (
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    )
    for i in range(LAYERS):
        layer = f"{model}.layers.{i}"
        c.block_norms(layer, 0.0, norms)
        c.attention(layer, norms="head", norm_mean=0.0)
        c.gated_mlp(f"{layer}.mlp")
    c.plain("vision_tower.vision_model.post_layernorm.weight", 8)
    return c


def gemma4() -> Checkpoint:
    text = {
        **COMMON,
        "model_type": "gemma4_text",
        "enable_moe_block": True,
        "num_experts": EXPERTS,
        "top_k_experts": 2,
        "moe_intermediate_size": WIDTH,
        "num_kv_shared_layers": 0,
        "hidden_size_per_layer_input": 0,
        "use_double_wide_mlp": False,
        "global_head_dim": HEAD_DIM,
        "num_global_key_value_heads": KV_HEADS,
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention"],
        "tie_word_embeddings": True,
    }
    c = Checkpoint({"model_type": "gemma4", "text_config": text, "tie_word_embeddings": True})
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
    for i in range(LAYERS):
        layer = f"{model}.layers.{i}"
        c.block_norms(layer, names=norms)
        c.attention(layer, norms="head")
        c.gated_mlp(f"{layer}.mlp")
        c.experts(layer, router="router.proj")
        c.fuse_experts(layer, interleaved=False)
        c.plain(f"{layer}.router.scale", HIDDEN, mean=1.0, spread=0.1)
        c.plain(f"{layer}.router.per_expert_scale", EXPERTS, mean=1.0, spread=0.1)
        c.plain(f"{layer}.layer_scalar", 1, mean=1.0, spread=0.1)
    return c


def gemma2() -> Checkpoint:
    """A model without a head of its own: mlx-lm always uses the embeddings, EXL3 has a head all the same."""
    c = Checkpoint(
        {
            "model_type": "gemma2",
            "tie_word_embeddings": True,
            "query_pre_attn_scalar": 64,
            "final_logit_softcapping": 30.0,
            "attn_logit_softcapping": 50.0,
        }
    )
    c.ends(norm_mean=0.0)
    norms = (
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    )
    for i in range(LAYERS):
        layer = f"model.layers.{i}"
        c.block_norms(layer, 0.0, norms)
        c.attention(layer)
        c.gated_mlp(f"{layer}.mlp")
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
    )
}
