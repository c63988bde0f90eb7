"""Models whose experts have two matrices (mlx-lm's SwitchMLP), with the tensors and names of their originals."""

from __future__ import annotations

import mlx.core as mx

from tests.support.checkpoints import SIZES, Checkpoint, Sizes


def _mamba(c: Checkpoint, mixer: str) -> None:
    s, config = c.sizes, c.config
    heads, inner = config["mamba_num_heads"], config["mamba_num_heads"] * config["mamba_head_dim"]
    convolved = inner + 2 * config["n_groups"] * config["ssm_state_size"]
    c.linear(f"{mixer}.in_proj", s.hidden, inner + convolved + heads)
    c.plain(f"{mixer}.conv1d.weight", convolved, 1, config["conv_kernel"], spread=0.5)
    c.plain(f"{mixer}.conv1d.bias", convolved, spread=0.1)
    c.plain(f"{mixer}.A_log", heads, mean=0.5, spread=0.3)
    c.plain(f"{mixer}.D", heads, mean=1.0, spread=0.1)
    c.plain(f"{mixer}.dt_bias", heads, mean=1.0, spread=0.1)
    c.norm(f"{mixer}.norm", inner)
    c.linear(f"{mixer}.out_proj", inner, s.hidden)


def _two_matrices(
    c: Checkpoint, name: str, hidden: int, width: int, names=("up_proj", "down_proj"), bias=False
) -> None:
    c.linear(f"{name}.{names[0]}", hidden, width, bias=bias, zero_padding=True)
    c.linear(f"{name}.{names[1]}", width, hidden, bias=bias)


def nemotron_h(s: Sizes = SIZES, *, latent: int | None = None) -> Checkpoint:
    """A layer of each kind. latent: the experts' hidden size, between projections of the whole layer."""
    config = {
        "model_type": "nemotron_h",
        "hybrid_override_pattern": ["M", "E", "*", "-"],
        "num_hidden_layers": 4,
        "mamba_num_heads": 4,
        "mamba_head_dim": 32,
        "mamba_proj_bias": False,
        "ssm_state_size": 16,
        "conv_kernel": 4,
        "n_groups": 1,
        "mlp_bias": False,
        "layer_norm_epsilon": 1e-5,
        "use_bias": False,
        "use_conv_bias": True,
        "moe_intermediate_size": s.width,
        "moe_shared_expert_intermediate_size": 128,
        "moe_latent_size": latent,
        "n_group": 1,
        "topk_group": 1,
        "n_routed_experts": s.experts,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.5,
    }
    c = Checkpoint(s, config)
    c.plain("backbone.embeddings.weight", s.vocab, s.hidden)
    for i, kind in enumerate(config["hybrid_override_pattern"]):
        _nemotron_block(c, f"backbone.layers.{i}", kind)
    c.norm("backbone.norm_f", s.hidden)
    c.linear("lm_head", s.hidden, s.vocab, bits=6)
    return c


def _nemotron_block(c: Checkpoint, layer: str, kind: str) -> None:
    s, mixer, latent = c.sizes, f"{layer}.mixer", c.config["moe_latent_size"]
    c.norm(f"{layer}.norm", s.hidden)
    if kind == "M":
        _mamba(c, mixer)
    elif kind == "*":
        for name, (k, n) in attention_shapes(s).items():
            c.linear(f"{mixer}.{name}_proj", k, n)
    elif kind == "-":
        _two_matrices(c, mixer, s.hidden, s.dense_width)
    else:
        c.plain(f"{mixer}.gate.weight", s.experts, s.hidden, spread=s.hidden**-0.5, dtype=mx.float16)
        c.selection_bias(f"{mixer}.gate.e_score_correction_bias")
        for e in range(s.experts):
            _two_matrices(c, f"{mixer}.experts.{e}", latent or s.hidden, s.width)
        _two_matrices(c, f"{mixer}.shared_experts", s.hidden, 128)
        if latent:
            c.linear(f"{mixer}.fc1_latent_proj", s.hidden, latent)
            c.linear(f"{mixer}.fc2_latent_proj", latent, s.hidden)


def add_nemotron_h_drafter(c: Checkpoint) -> None:
    """Attention, then experts."""
    s, pattern = c.sizes, "*E"
    c.config.update({"num_nextn_predict_layers": 1, "mtp_hybrid_override_pattern": pattern})
    for i, kind in enumerate(pattern):
        _nemotron_block(c, f"mtp.layers.{i}", kind)
    for name in ("0.enorm", "0.hnorm", "1.final_layernorm"):
        c.norm(f"mtp.layers.{name}", s.hidden)
    c.linear("mtp.layers.0.eh_proj", 2 * s.hidden, s.hidden)


def attention_shapes(s: Sizes) -> dict[str, tuple[int, int]]:
    heads, shared = s.heads * s.head_dim, s.kv_heads * s.head_dim
    return {"q": (s.hidden, heads), "k": (s.hidden, shared), "v": (s.hidden, shared), "o": (heads, s.hidden)}


def nemotron_h_latent(s: Sizes = SIZES) -> Checkpoint:
    """As the larger ones have it."""
    return nemotron_h(s, latent=96)


def phixtral(s: Sizes = SIZES) -> Checkpoint:
    """With biases everywhere."""
    config = {
        "model_type": "phixtral",
        "num_vocab": s.vocab,
        "model_dim": s.hidden,
        "num_heads": s.hidden // s.head_dim,
        "num_layers": s.layers,
        "rotary_dim": 32,
        "num_local_experts": s.experts,
        "num_experts_per_tok": 2,
    }
    c = Checkpoint(s, config)
    c.plain("transformer.embd.wte.weight", s.vocab, s.hidden)
    for i in range(s.layers):
        layer = f"transformer.h.{i}"
        norm(c, f"{layer}.ln")
        c.linear(f"{layer}.mixer.Wqkv", s.hidden, 3 * s.hidden, bias=True)
        c.linear(f"{layer}.mixer.out_proj", s.hidden, s.hidden, bias=True)
        c.plain(f"{layer}.moe.gate.weight", s.experts, s.hidden, spread=s.hidden**-0.5, dtype=mx.float16)
        for e in range(s.experts):
            _two_matrices(c, f"{layer}.moe.mlp.{e}", s.hidden, 4 * s.hidden, ("fc1", "fc2"), bias=True)
    norm(c, "lm_head.ln")
    c.linear("lm_head.linear", s.hidden, s.vocab, bits=6, bias=True)
    return c


def norm(c: Checkpoint, name: str) -> None:
    c.norm(name, c.sizes.hidden)
    c.plain(f"{name}.bias", c.sizes.hidden, spread=0.1)
