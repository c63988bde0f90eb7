"""Checkpoints of any model of a host, written in the names of its own parameters.

architectures.py has the originals' names; here only the mapping of linears and experts is at stake.
"""

from __future__ import annotations

import json

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm import utils as mlx_lm_utils

from mlx_marlin.lm.host import Host
from mlx_marlin.lm.mlx_lm_host import MLX_LM
from tests.support import generic_configs, hybrid_configs
from tests.support.checkpoints import SIZES, Checkpoint, Sizes

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
# model_type -> what its config.json holds beside the sizes.
CONFIGS = {**generic_configs.CONFIGS, **hybrid_configs.CONFIGS}
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


def left_unquantized(path: str, linear: nn.Linear) -> bool:
    """Routers, what MLA takes apart, and vectors that score."""
    return path.rpartition(".")[2] in ("gate", "router", "kv_b_proj") or linear.weight.shape[0] == 1


def make(
    model_type: str,
    sizes: Sizes = SIZES,
    *,
    embedding_bits: int | None = None,
    host: Host = MLX_LM,
    config: dict | None = None,
) -> tuple[Checkpoint, nn.Module]:
    """A checkpoint, its token embedding quantized if bits are given, and the model with the same weights, dense and
    in float32; of a model with towers the text model alone."""
    config = (CONFIGS | HEADS)[model_type] if config is None else config
    c = Checkpoint(sizes, {"model_type": model_type, **config})
    model, done, dense = host.new_model(json.loads(json.dumps(c.config))), set(), {}
    for name in model.children():
        if "language_model" in model and name != "language_model" and host is not MLX_LM:
            setattr(model, name, None)
    for path, module in model.named_modules():
        kind = host.kind_of(module)
        if kind is not None:
            block = path.rpartition(".")[0]
            for p in kind.projections:
                experts, n, k = module[p].weight.shape
                names = [f"{block}.experts.{e}.{p}" for e in range(experts)]
                for name in names:
                    c.linear(name, k, n, zero_padding=p != kind.projections[-1], bias="bias" in module[p])
                    if p == "up_proj":
                        c.exl3[f"{name}.svh"] = c.exl3[f"{name}.svh"] / UP_DIVISORS.get(model_type, 1)
                for leaf in ("weight", "bias") if "bias" in module[p] else ("weight",):
                    dense[f"{path}.{p}.{leaf}"] = mx.stack([c.dense[f"{name}.{leaf}"] for name in names])
                done.add(f"{path}.{p}")
        elif type(module) is nn.Linear and not left_unquantized(path, module):
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
