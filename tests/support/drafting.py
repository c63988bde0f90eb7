"""A tiny model whose prediction layers say what it says: planted, as nothing here is trained."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from tests.support.checkpoints import Checkpoint, Sizes
from tests.support.left_out_parts import draft_in_front
from tests.support.vlm_checkpoints import qwen3_5_moe

# Of what the layers add to the embeddings of the token before: enough to be seen, too little to say something else.
_SHARE = 0.02


def add_drafter(c: Checkpoint) -> None:
    """Qwen3.6's prediction layers."""
    c.config["text_config"]["mtp_num_hidden_layers"] = 1
    draft_in_front(c)
    c.norm("mtp.pre_fc_norm_embedding", c.sizes.hidden, 0.0)
    c.gated_mlp("mtp.layers.0.mlp.shared_expert", 128)
    c.plain("mtp.layers.0.mlp.shared_expert_gate.weight", 1, c.sizes.hidden, spread=0.1, dtype=mx.float16)


def agreeing(s: Sizes) -> Checkpoint:
    """Qwen3.6 with one of its prediction layers: both say of each token which one follows it."""
    c = qwen3_5_moe(s).checkpoint
    add_drafter(c)
    for name in [name for name in c.exl3 if name.endswith((".o_proj.svh", ".out_proj.svh", ".down_proj.svh"))]:
        c.exl3[name] = c.exl3[name] * _SHARE
    for name in [name for name in c.exl3 if name.startswith("mtp.fc.")]:
        del c.exl3[name]
    # Of the embedding and the hidden state, the former.
    c.exl3["mtp.fc.weight"] = mx.array(np.eye(s.hidden, 2 * s.hidden).astype(np.float16))
    c.exl3["mtp.pre_fc_norm_embedding.weight"] = mx.zeros(s.hidden)
    c.exl3["mtp.norm.weight"] = next(v for k, v in c.exl3.items() if k.endswith("language_model.norm.weight"))
    return c
