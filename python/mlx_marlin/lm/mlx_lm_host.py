"""mlx-lm as a :class:`~mlx_marlin.lm.host.Host`."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm import utils as mlx_lm_utils
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.models.switch_layers import SwitchGLU, SwitchLinear, SwitchMLP

from ..layers.experts import TrellisSwitchGLU, TrellisSwitchMLP
from ..layers.linear import TrellisLinear
from .host import GATED, UNGATED, UNGATED_ACTIVATIONS, ExpertsKind, Host, UnknownArchitecture

_VLM = "mlx_vlm"
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)$")


def _only_in_mlx_vlm(model_type: object) -> bool:
    """Whether mlx-vlm, if it is installed, has a model of this name. Nothing of it is imported."""
    spec = importlib.util.find_spec(_VLM)
    if spec is None or not isinstance(model_type, str) or not model_type.isidentifier():
        return False
    folders = spec.submodule_search_locations or ()
    return any((Path(folder) / "models" / model_type.lower() / "__init__.py").is_file() for folder in folders)


class MlxLm(Host):
    """Text models."""

    name = "mlx-lm"
    loader = "mlx_lm.load"
    model_code = "mlx_lm.models."
    experts = (
        ExpertsKind(SwitchGLU, GATED, TrellisSwitchGLU),
        ExpertsKind(SwitchMLP, UNGATED, TrellisSwitchMLP),
    )
    projection = SwitchLinear
    grouped = None  # its MultiLinear takes matrices apart that EXL3 keeps whole
    activations = {
        **UNGATED_ACTIVATIONS,
        "mlx_lm.models.switch_layers.SwiGLU": "silu",
        "mlx_lm.models.muse_spark.PreciseSwiGLU": "silu",
        "mlx_lm.models.gemma4_text.GeGLU": "gelu_tanh",
        "mlx_lm.models.activations.SwigluOAI": "swiglu_oai",
        # mlx-lm 0.31, the last one for Python 3.10: alpha 1.702, limit 7.
        "mlx_lm.models.gpt_oss.SwiGLU": "swiglu_oai",
        "mlx_lm.models.deepseek_v41.DeepseekV41SwiGLU": "swiglu_clamped",
        "mlx_lm.models.step3p5.ClampedSwiGLU": "swiglu_step",
        "mlx_lm.models.kimi_k3.SiTU": "situ",
    }
    linear = TrellisLinear

    def load_config(self, directory: Path) -> dict:
        return mlx_lm_utils.load_config(directory)

    def new_model(self, config: dict) -> nn.Module:
        try:
            model_class, args_class = mlx_lm_utils._get_classes(config)
        except ValueError as error:
            model_type = config.get("model_type")
            if not _only_in_mlx_vlm(model_type):
                raise
            raise UnknownArchitecture(
                f"mlx-lm has no {model_type} model, mlx-vlm has: load it with mlx_marlin.vlm.load, or run mlx_marlin "
                "vlm generate, chat or server"
            ) from error
        return model_class(args_class.from_dict(config))

    def sanitize(self, model: nn.Module, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        return model.sanitize(weights) if hasattr(model, "sanitize") else weights

    def uses(self, part: str) -> bool:
        return False

    def make_cache(self, model: nn.Module) -> list[Any]:
        return make_prompt_cache(model)

    def logits(self, model: nn.Module, tokens: mx.array, cache: list[Any]) -> mx.array:
        return model(tokens, cache=cache)

    def layers(self, model: nn.Module) -> int:
        if hasattr(model, "layers"):
            return len(model.layers)
        numbers = (int(match[1]) for path, _ in model.named_modules() if (match := _LAYER.search(path)))
        return max(numbers, default=-1) + 1

    def splits(self, model: nn.Module) -> nn.Module | None:
        return model if hasattr(model, "shard") else None

    def pipelines(self, model: nn.Module) -> nn.Module | None:
        inner = getattr(model, "model", None)
        return inner if hasattr(inner, "pipeline") else None

    def finish(self, model: nn.Module, dtype: mx.Dtype) -> None:
        pass


MLX_LM = MlxLm()
