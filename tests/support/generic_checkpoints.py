"""Checkpoints of any mlx-lm model, written in the names of its own parameters.

architectures.py has the originals' names; here only the mapping of linears and experts is at stake.
"""

from __future__ import annotations

import json

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm import utils as mlx_lm_utils
from mlx_lm.models.switch_layers import SwitchGLU

from tests.support.checkpoints import SIZES, Checkpoint, Sizes

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": SIZES.width, "norm_topk_prob": True}
_DEEPSEEK = {
    "moe_intermediate_size": SIZES.width,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "n_routed_experts": 4,
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
    "num_key_value_heads": 4,
}

_LLAMA4_ROPE = {
    "type": "default",
    "rope_theta": 10000.0,
    "llama_4_scaling_beta": 0.1,
    "original_max_position_embeddings": 16,
}

# model_type -> what its config.json holds beside the sizes.
CONFIGS = {
    "qwen2": {},
    "olmo2": {},
    "olmo3": {"sliding_window": 16, "layer_types": ["full_attention", "sliding_attention"]},
    "granite": {
        "logits_scaling": 1.0,
        "attention_multiplier": 0.1,
        "embedding_multiplier": 1.0,
        "residual_multiplier": 1.0,
        "mlp_bias": False,
    },
    "phi3": {},
    "glm4": {"partial_rotary_factor": 0.5},
    "smollm3": {},
    "seed_oss": {},
    "starcoder2": {"norm_epsilon": 1e-5, "use_bias": True},
    "internlm3": {"bias": False, "qkv_bias": False},
    "exaone4": {
        "sliding_window": 16,
        "sliding_window_pattern": "LG",
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "hunyuan_v1_dense": {"use_qk_norm": True, "rope_scaling": {"type": "dynamic", "alpha": 1.0, "factor": 1.0}},
    "deepseek_v2": {
        **_DEEPSEEK,
        **_LATENT,
        "moe_layer_freq": 1,
        "topk_method": "gready",
        "rope_scaling": {
            "type": "yarn",
            "factor": 1.0,
            "original_max_position_embeddings": 128,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "beta_fast": 32,
            "beta_slow": 1,
        },
    },
    "dots1": {**_DEEPSEEK, "scoring_func": "noaux_tc"},
    "solar_open": _DEEPSEEK,
    "mistral4": {**_DEEPSEEK, **_LATENT, "rope_parameters": _LLAMA4_ROPE},
    "laguna": {**_MOE, "shared_expert_intermediate_size": 128},
    "ernie4_5_moe": {
        "moe_num_experts": 4,
        "moe_k": 2,
        "moe_intermediate_size": SIZES.width,
        "moe_layer_start_index": 1,
        "moe_layer_interval": 1,
        "use_bias": False,
        "moe_num_shared_experts": 1,
    },
    "bailing_moe": {
        **_MOE,
        "num_shared_experts": 1,
        "first_k_dense_replace": 1,
        "use_bias": False,
        "use_qkv_bias": False,
        "norm_head": False,
        "norm_softmax": False,
    },
    "phimoe": {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": SIZES.width},
    "granitemoe": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "intermediate_size": SIZES.width,
        "logits_scaling": 1.0,
        "attention_multiplier": 0.1,
        "embedding_multiplier": 1.0,
        "residual_multiplier": 1.0,
    },
    "lfm2_moe": {
        **_MOE,
        "num_dense_layers": 1,
        "norm_eps": 1e-5,
        "conv_bias": False,
        "conv_L_cache": 3,
        "layer_types": ["full_attention", "conv"],
        "use_expert_bias": False,
    },
    "Klear": {
        **_MOE,
        "n_shared_experts": 1,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "routed_scaling_factor": 1.0,
    },
    "afmoe": {
        **_MOE,
        "num_shared_experts": 1,
        "num_dense_layers": 1,
        "sliding_window": 16,
        "layer_types": ["full_attention", "sliding_attention"],
    },
    "exaone_moe": {
        **_MOE,
        "num_shared_experts": 1,
        "first_last_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 1.0,
        "sliding_window": 16,
        "layer_types": ["full_attention", "sliding_attention"],
        "is_moe_layer": [False, True],
    },
    # A limit in the activation of its experts, for which there is no fused kernel.
    "step3p5": {
        "num_attention_groups": 2,
        "moe_num_experts": 4,
        "moe_top_k": 2,
        "moe_intermediate_size": SIZES.width,
        "share_expert_dim": 128,
        "swiglu_limits": [0.0, 0.02],
        "sliding_window": 16,
    },
}


# The same, of models whose logits are made otherwise than by `lm_head`: for conversions.
HEADS = {
    "gemma": {},
    "cohere": {"layer_norm_eps": 1e-5, "logit_scale": 0.5},
    "internlm2": {"bias": False},
}

# What ExLlamaV3 divides `up` of their experts by before it quantizes.
UP_DIVISORS = {"mistral4": 128, "laguna": 128}


def new_model(config: dict) -> nn.Module:
    """mlx-lm's model of a config, its weights random."""
    config = json.loads(json.dumps(config))
    model_class, args_class = mlx_lm_utils._get_classes(config)
    return model_class(args_class.from_dict(config))


def make(model_type: str, sizes: Sizes = SIZES, *, embedding_bits: int | None = None) -> tuple[Checkpoint, nn.Module]:
    """A checkpoint, its token embedding quantized if bits are given, and the model with the same weights, dense and
    in float32."""
    c = Checkpoint(sizes, {"model_type": model_type, **(CONFIGS | HEADS)[model_type]})
    model, done, dense = new_model(c.config), set(), {}
    for path, module in model.named_modules():
        if isinstance(module, SwitchGLU):
            block = path.rpartition(".")[0]
            for p in PROJECTIONS:
                experts, n, k = module[p].weight.shape
                names = [f"{block}.experts.{e}.{p}" for e in range(experts)]
                for name in names:
                    c.linear(name, k, n, zero_padding=p != "down_proj")
                    if p == "up_proj":
                        c.exl3[f"{name}.svh"] = c.exl3[f"{name}.svh"] / UP_DIVISORS.get(model_type, 1)
                dense[f"{path}.{p}.weight"] = mx.stack([c.dense[f"{name}.weight"] for name in names])
                done.add(f"{path}.{p}")
        elif type(module) is nn.Linear and path.rpartition(".")[2] not in ("gate", "router", "kv_b_proj"):
            n, k = module.weight.shape
            c.linear(path, k, n, bias="bias" in module)
            dense.update({key: c.dense[key] for key in (f"{path}.weight", f"{path}.bias") if key in c.dense})
            done.add(path)
    for key, value in tree_flatten(model.parameters()):
        if key.rpartition(".")[0] not in done:
            norm = "norm" in key
            spread = 0.1 if norm else 1.0 if "embed" in key else value.shape[-1] ** -0.5
            c.plain(key, *value.shape, mean=float(norm), spread=spread)
            dense[key] = c.dense[key]
    if embedding_bits is not None:
        name = c.quantize_embedding(embedding_bits)
        dense[f"{name}.weight"] = c.dense[f"{name}.weight"]
    model.load_weights([(key, value.astype(mx.float32)) for key, value in dense.items()])
    return c, model.eval()


def logits(model: nn.Module, tokens: int = 24) -> np.ndarray:
    ids = np.random.default_rng(7).integers(0, SIZES.vocab, (2, tokens))
    return np.array(model(mx.array(ids)).astype(mx.float32))
