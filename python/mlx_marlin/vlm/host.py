"""mlx-vlm as a :class:`~mlx_marlin.lm.host.Host`."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Collection
from pathlib import Path
from types import ModuleType
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_vlm import utils as mlx_vlm_utils
from mlx_vlm.models.cache import make_prompt_cache
from mlx_vlm.models.mla import MultiLinear
from mlx_vlm.models.switch_layers import SwitchGLU, SwitchLinear, SwitchMLP

from ..layers.experts import TrellisSwitchMLP
from ..lm.host import GATED, UNGATED, UNGATED_ACTIVATIONS, ExpertsKind, Host
from ..loader.contents import AUDIO, NGRAM, VISION
from . import rearranging, verifying
from .layers import (
    AllToShardedDescribedLinear,
    DescribedLinear,
    FusedExperts,
    LocalVlmExperts,
    PartlyQuantizedExperts,
    ShardedToAllDescribedLinear,
)

_log = logging.getLogger("mlx_marlin.lm")

# Parts of a model with a config of their own, and those with a sanitize of their own: in the order of mlx-vlm's loader.
_CONFIGURED = ("text", "vision", "perceiver", "projector", "audio")
_SANITIZED = {"vision": "VisionModel", "text": "LanguageModel", "audio": "AudioModel"}

FILES = ["*.json", "*.jsonl", "*.safetensors", "*.py", "*.model", "*.tiktoken", "*.txt", "*.jinja"]
"""What mlx_vlm.utils.get_model_path downloads of a repository: more than mlx-lm, n-gram tables among it."""


def _code_of(model: nn.Module) -> ModuleType:
    """The package of a model's code."""
    return importlib.import_module(type(model).__module__.rpartition(".")[0])


def _drop_absent(model: nn.Module, weights: Collection[str]) -> None:
    """Take towers, projectors and the like from a model, of which there are no weights; as mlx-vlm does, and lists of
    modules too."""
    present = {key.partition(".")[0] for key in weights}
    absent = [
        name
        for name, child in model.children().items()
        if name not in present and name != "language_model" and tree_flatten(child)
    ]
    for name in absent:
        setattr(model, name, None)
    if absent:
        _log.info("the checkpoint has nothing of %s: the model is without", ", ".join(absent))


class MlxVlm(Host):
    """Models of text, pictures and sound."""

    name = "mlx-vlm"
    loader = "mlx_vlm.load"
    model_code = "mlx_vlm.models."
    experts = (
        ExpertsKind(SwitchGLU, GATED, FusedExperts, PartlyQuantizedExperts, LocalVlmExperts),
        ExpertsKind(SwitchMLP, UNGATED, TrellisSwitchMLP),
    )
    projection = SwitchLinear
    grouped = MultiLinear
    activations = {
        **UNGATED_ACTIVATIONS,
        "mlx_vlm.models.switch_layers.SwiGLU": "silu",
        "mlx_vlm.models.gemma4.language.GeGLU": "gelu_tanh",
        "mlx_vlm.models.gemma4_text.language.GeGLU": "gelu_tanh",
        "mlx_vlm.models.muse_spark.language.PreciseSwiGLU": "silu",
        "mlx_vlm.models.deepseek_v4.language.LimitedSwiGLU": "swiglu_clamped",
        "mlx_vlm.models.glm5_next.language.LimitedSwiGLU": "swiglu_clamped",
        "mlx_vlm.models.gpt_oss.language.SwiGLU": "swiglu_oai",  # alpha 1.702, limit 7
        "mlx_vlm.models.kimi_k3.language.SiTU": "situ",
        "mlx_vlm.models.minimax_m3_vl.language.MiniMaxSwiGLUOAI": "swiglu_oai",
        "mlx_vlm.models.step3p5.language.ClampedSwiGLU": "swiglu_step",
        "mlx_vlm.models.step3p7.language.ClampedSwiGLU": "swiglu_step",
    }
    linear = DescribedLinear
    all_to_sharded = AllToShardedDescribedLinear
    sharded_to_all = ShardedToAllDescribedLinear

    def load_config(self, directory: Path) -> dict:
        return mlx_vlm_utils.load_config(directory)

    def new_model(self, config: dict) -> nn.Module:
        # As mlx_vlm.utils.load_model does it. What the file says of quantization is not meant for it.
        config.pop("quantization_config", None)
        config.setdefault("text_config", config.pop("llm_config", {}))
        config.setdefault("vision_config", {})
        config.setdefault("audio_config", {})
        rearranging.keep_shared_expert_apart(config)
        code, _ = mlx_vlm_utils.get_model_and_args(config)
        configured = code.ModelConfig.from_dict(config)
        configured = mlx_vlm_utils.update_module_configs(configured, code, config, _CONFIGURED)
        model = code.Model(mlx_vlm_utils.apply_generation_config_defaults(configured, config))
        rearranging.separate_gates(model)
        return model

    def sanitize(self, model: nn.Module, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        code = _code_of(model)
        weights = mlx_vlm_utils.sanitize_weights(model, rearranging.split_latents(model.config, weights))
        for part, name in _SANITIZED.items():
            if hasattr(code, name) and hasattr(model.config, f"{part}_config"):
                part_config = getattr(model.config, f"{part}_config")
                weights = mlx_vlm_utils.sanitize_weights(getattr(code, name), weights, part_config)
        _drop_absent(model, weights)
        return rearranging.split_gates(model, weights)

    def uses(self, part: str) -> bool:
        return part in (VISION, AUDIO, NGRAM)

    def make_cache(self, model: nn.Module) -> list[Any]:
        return make_prompt_cache(model.language_model)

    def logits(self, model: nn.Module, tokens: mx.array, cache: list[Any]) -> mx.array:
        return model.language_model(tokens, cache=cache).logits

    def layers(self, model: nn.Module) -> int:
        return len(model.language_model.layers)

    def splits(self, model: nn.Module) -> nn.Module | None:
        # Each rank of a MiniMax M3 would choose blocks of keys by some of the heads that choose them together.
        if any(getattr(module, "has_sparse_index", False) for module in model.modules()):
            return None
        parts = (model, getattr(model, "language_model", None))
        return next((part for part in parts if hasattr(part, "shard")), None)

    def pipelines(self, model: nn.Module) -> nn.Module | None:
        language_model = getattr(model, "language_model", None)
        inner = getattr(language_model, "model", language_model)
        if not hasattr(inner, "pipeline"):
            return None
        # Hy 4 inherits the method, but its own call hands nothing over to another rank.
        return inner if "pipeline_rank" in type(inner).__call__.__code__.co_names else None

    def finish(self, model: nn.Module, dtype: mx.Dtype) -> None:
        verifying.install()
        for module in model.modules():
            if isinstance(module, DescribedLinear):
                module.dtype = dtype


MLX_VLM = MlxVlm()
