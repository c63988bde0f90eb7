"""What mlx-lm's commands lack where they meet EXL3 models: replaced in their modules before they run."""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from huggingface_hub.errors import CacheNotFound
from mlx.utils import tree_flatten
from mlx_lm import utils as mlx_lm_utils
from mlx_lm.models.switch_layers import SwitchLinear

# The roles that mlx_lm.server falls back to (convert_chat).
_PLAIN_ROLES = (
    "{% for message in messages %}"
    "{{ {'system': \"ASSISTANT's RULE: \", 'user': 'USER: ', 'assistant': 'ASSISTANT: '}[message.role] }}"
    "{{ message.content }}\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


class ArgumentError(ValueError):
    """An argument that a command cannot work with."""


def _say(message: str) -> None:
    if mx.distributed.init().rank() == 0:
        print(f"mlx_marlin: {message}", file=sys.stderr)


def run_experts_here(model: nn.Module) -> None:
    """Put a model with unquantized experts into float32 on the CPU, where MLX multiplies those in nothing else."""
    if mx.default_device() == mx.cpu and any(type(m) is SwitchLinear for m in model.modules()):
        model.set_dtype(mx.float32)


def count_weights() -> None:
    """Let mlx-lm count the weights of quantized layers, where it would count packed words."""
    count_others = mlx_lm_utils.get_total_parameters

    def count_one(leaf: nn.Module) -> int:
        parent = nn.Module()  # a module counts its leaves, of which a leaf has none
        parent.leaf = leaf
        return count_others(parent)

    def count(model: nn.Module) -> int:
        leaves = dict(tree_flatten(model.leaf_modules(), is_leaf=lambda m: isinstance(m, nn.Module))).values()
        return sum(int(getattr(m, "weight_count", 0)) or count_one(m) for m in leaves)

    vars(mlx_lm_utils)["get_total_parameters"] = count


def _with_roles(load: Callable[..., tuple]) -> Callable[..., tuple]:
    """A loader whose tokenizers always have a chat template."""

    @functools.wraps(load)
    def load_with_roles(*args: Any, **keywords: Any) -> tuple:
        loaded = load(*args, **keywords)
        tokenizer = loaded[1]
        if not tokenizer.has_chat_template:
            tokenizer._tokenizer.chat_template = _PLAIN_ROLES
            _say("this model has no chat template; it sees plain roles (USER: and ASSISTANT:), as in mlx_lm.server")
        return loaded

    return load_with_roles


def chat() -> None:
    """Let ``chat`` talk to models without a chat template."""
    from mlx_lm import chat

    vars(chat).update(load=_with_roles(chat.load), sharded_load=_with_roles(chat.sharded_load))


def server() -> None:
    """Let the server list its models where nothing was ever downloaded."""
    from mlx_lm import server

    scan = server.scan_cache_dir

    def scan_cache_dir(*args: Any) -> Any:
        try:
            return scan(*args)
        except CacheNotFound:
            return SimpleNamespace(repos=())

    vars(server)["scan_cache_dir"] = scan_cache_dir


def perplexity() -> None:
    """Let ``perplexity --data-path`` be a text file."""
    from mlx_lm import perplexity

    load_data = perplexity.load_data

    def load_text(tokenizer: Any, data_path: str, num_samples: int, sequence_length: int) -> mx.array:
        path = Path(data_path)
        if not path.is_file():
            return load_data(tokenizer, data_path, num_samples, sequence_length)
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ArgumentError(f"--data-path {path} is no UTF-8 text: {error}") from None
        tokens = tokenizer.encode(text)
        rows = len(tokens) // sequence_length
        if rows == 0:
            raise ArgumentError(
                f"--data-path {path} has {len(tokens)} tokens, fewer than one sequence of {sequence_length}; give a "
                "longer text or a smaller --sequence-length"
            )
        if num_samples > 0:
            rows = min(rows, num_samples)
        return mx.array(tokens[: rows * sequence_length]).reshape(rows, sequence_length)

    vars(perplexity)["load_data"] = load_text


def generate() -> None:
    """Say on stderr what generation runs on."""
    generate = importlib.import_module("mlx_lm.generate")  # of the package the function has this name
    load = generate.load

    @functools.wraps(load)
    def load_and_say(*args: Any, **keywords: Any) -> tuple:
        loaded = load(*args, **keywords)
        if not said:
            from ..device.machine import default_device, device_name

            device = default_device()
            _say(f"running on the {device.upper()}, {device_name(device)}")
            said.append(True)
        return loaded

    said: list[bool] = []
    vars(generate)["load"] = load_and_say
