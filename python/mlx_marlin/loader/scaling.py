"""Factors that ExLlamaV3 folds into stored weights, and that no file states."""

from __future__ import annotations

import re

# Architectures of which the routed experts' `up` is stored divided, so that fp16 activations do not overflow; the
# factor comes back in ExLlamaV3's routing weights (interm_div in exllamav3/architecture/*.py, 1.6.5).
UP_DIVISOR = 128
_EVERY_LAYER = frozenset({"mistral4", "laguna"})
# One layer of one model, since 1.6.0.
_MIMO, _MIMO_LAYER, _MIMO_SINCE = "mimo_v2", 47, (1, 6, 0)


def _text_config(config: dict) -> dict:
    text = config.get("text_config")
    return text if isinstance(text, dict) and isinstance(text.get("model_type"), str) else config


def _version(config: dict) -> tuple[int, ...] | None:
    quantization = config.get("quantization_config")
    version = quantization.get("version") if isinstance(quantization, dict) else None
    match = re.match(r"(\d+)\.(\d+)\.(\d+)", version) if isinstance(version, str) else None
    return tuple(map(int, match.groups())) if match else None


def up_divisor(config: dict, layer: int) -> int:
    """What the routed experts' ``up`` of a layer is divided by in EXL3 files.

    Args:
        config: config.json.
        layer: The layer.
    """
    model_type = _text_config(config).get("model_type")
    if model_type in _EVERY_LAYER:
        return UP_DIVISOR
    if (model_type, layer) == (_MIMO, _MIMO_LAYER):
        version = _version(config)
        return UP_DIVISOR if version is None or version >= _MIMO_SINCE else 1
    return 1


def without_folded_scales(config: dict) -> dict:
    """A config for model code: what EXL3 files hold inside of a weight is not to be applied once more.

    mimo_v2's ``o_proj`` carries the scale of the attention's values.
    """
    text = _text_config(config)
    if text.get("model_type") != _MIMO or text.get("attention_value_scale") is None:
        return config
    changed = {**text, "attention_value_scale": None}
    return changed if text is config else {**config, "text_config": changed}
