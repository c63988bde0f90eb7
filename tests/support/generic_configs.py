"""What config.json of an mlx-lm model holds beside the sizes: linears and experts with ordinary attention."""

from __future__ import annotations

from tests.support.checkpoints import SIZES

MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": SIZES.width, "norm_topk_prob": True}
DEEPSEEK = {
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
LATENT = {
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
        **DEEPSEEK,
        **LATENT,
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
    "dots1": {**DEEPSEEK, "scoring_func": "noaux_tc"},
    "solar_open": DEEPSEEK,
    "mistral4": {**DEEPSEEK, **LATENT, "rope_parameters": _LLAMA4_ROPE},
    "laguna": {**MOE, "shared_expert_intermediate_size": 128},
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
        **MOE,
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
        **MOE,
        "num_dense_layers": 1,
        "norm_eps": 1e-5,
        "conv_bias": False,
        "conv_L_cache": 3,
        "layer_types": ["full_attention", "conv"],
        "use_expert_bias": False,
    },
    "Klear": {
        **MOE,
        "n_shared_experts": 1,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "routed_scaling_factor": 1.0,
    },
    "afmoe": {
        **MOE,
        "num_shared_experts": 1,
        "num_dense_layers": 1,
        "sliding_window": 16,
        "layer_types": ["full_attention", "sliding_attention"],
    },
    "exaone_moe": {
        **MOE,
        "num_shared_experts": 1,
        "first_last_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 1.0,
        "sliding_window": 16,
        "layer_types": ["full_attention", "sliding_attention"],
        "is_moe_layer": [False, True],
    },
    # Limits that its experts reach.
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
