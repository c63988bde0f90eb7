"""Building a host's models over EXL3 checkpoints.

The model is made by the host's own class. Its linears and experts that are quantized in the checkpoint are then
replaced, layer by layer, by :class:`TrellisLinear`, :class:`TrellisSwitchGLU` and :class:`TrellisSwitchMLP`.
Whatever can be wrong is found before the first weight is read.
"""

from __future__ import annotations

import gc
import json
import logging
import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .. import kernels, ops
from ..layers.experts import TrellisSwitch
from ..layers.partial import PartlyQuantizedSwitchGLU
from ..layers.state import TrellisModule
from ..layers.streamed import StreamedEmbedding
from ..loader.directory import Kind, TrellisModelLoader
from ..loader.scaling import up_divisor, without_folded_scales
from ..ops import DTYPE_NAMES
from ..storage.reads import read_all
from ..storage.safetensors import TensorInfo
from ..storage.untrusted import is_listed, unchanged
from . import dense_ops
from .embedding import EmbeddingWithHead, make_embedding
from .experts import experts_per_token, grouped_linear, joined_linear, make_head, whole_experts, whole_linear
from .host import GATED, MODEL_ERRORS, UNGATED, Host, UnknownArchitecture
from .mapping import WeightMap, map_weights
from .mlx_lm_host import MLX_LM
from .placeholders import LinearSource
from .shapes import check_call
from .tokenizer import check_keys

LayerProgress = Callable[[int, int], None]
"""Called with (layers done, layers) after each layer."""

MakeLinear = Callable[[str, nn.Module, LinearSource], nn.Module]
"""Makes what stands for the linear at a path, from the module there and its source."""

MakeExperts = Callable[[str, nn.Module, dict[str, list[LinearSource]]], nn.Module]
"""Makes what stands for the experts at a path, from the module there and its projections' sources."""

_log = logging.getLogger("mlx_marlin.lm")
_DTYPES = {"F16": mx.float16, "BF16": mx.bfloat16, "F32": mx.float32}
_LAYER = re.compile(r"(?:^|.*?\.)layers\.\d+(?=\.)")
_BLOCK = re.compile(r".*?\.blocks\.\d+(?=\.)")  # of vision towers
_LAYER_COUNTS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer")


def read_config(host: Host, model_path: Path, loader: TrellisModelLoader, model_config: dict | None) -> dict:
    """config.json as the host reads it, checked; the head of the checkpoint is not replaced by the embeddings."""
    for name in ("config.json", "generation_config.json"):
        if name == "config.json" or is_listed(model_path / name):
            check_keys(model_path / name)
    config = host.load_config(model_path)
    config.update(model_config or {})
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or not re.fullmatch(r"[\w-]+", model_type):
        raise ValueError(
            f"{model_path / 'config.json'}: model_type must name an architecture of {host.name}, got {model_type!r}"
        )
    if "model_file" in config:
        raise ValueError(
            f"{model_path / 'config.json'}: model_file, code inside the checkpoint, is not run for EXL3 checkpoints"
        )
    parts = [part for part in (config, config.get("text_config")) if isinstance(part, dict)]
    tensors = len(loader.quantized) + len(loader.unquantized)
    has_head = any(
        f".{name}".endswith((".lm_head", ".lm_head.weight")) for name in (*loader.quantized, *loader.unquantized)
    )
    for part in parts:
        for key in _LAYER_COUNTS:
            if isinstance(part.get(key), int) and part[key] > tensors:
                raise ValueError(
                    f"{model_path / 'config.json'}: {key} is {part[key]}, but the checkpoint has only {tensors} tensors"
                )
        if has_head:
            part["tie_word_embeddings"] = False
    return config


def build(model_path: Path, config: dict, host: Host = MLX_LM) -> nn.Module:
    """A host's model of a config, its parameters lazy and random."""
    config = json.loads(json.dumps(without_folded_scales(config)))  # model code may write into it
    try:
        return host.new_model(config).eval()
    except UnknownArchitecture as error:
        raise ValueError(f"{model_path / 'config.json'}: {error}") from error
    except MODEL_ERRORS as error:
        raise ValueError(
            f"{model_path / 'config.json'}: {host.name} cannot build a {config['model_type']} model from it: "
            f"{type(error).__name__}: {error}"
        ) from error


def activation_dtype(dtype: mx.Dtype | str | None) -> mx.Dtype | None:
    """A dtype that a model can run in, given itself or its name; ``None`` stays.

    Raises:
        ValueError: If it is another one.
    """
    if dtype is None or (isinstance(dtype, mx.Dtype) and dtype in DTYPE_NAMES):
        return dtype
    named = {name: value for value, name in DTYPE_NAMES.items()}
    if not isinstance(dtype, str) or dtype not in named:
        raise ValueError(f"dtype must be one of {', '.join(named)}, or None for the checkpoint's own, got {dtype!r}")
    return named[dtype]


def product_accuracy(accuracy: str | None, device: str | None = None) -> str:
    """What the products of a loaded model may round: one of ``kernels.ACCURACIES``.

    Args:
        accuracy: What the caller asks for. ``None``: ``"half"`` on the CPU, where every other program for quantized
            models rounds the activations; ``"float32"`` on a GPU.
        device: Where the model runs. Default: ``None``, on MLX's default device.

    Raises:
        ValueError: If there is no such accuracy.
    """
    if accuracy is None:
        return kernels.USUAL_ACCURACY[device or ops.device_of(None)]
    return kernels.checked_accuracy(accuracy)


# What is added to the scores that choose experts: mlx-lm's names. A choice is discrete, so the last bits matter.
_SELECTION_BIAS = re.compile(r"(?:^|\.)(?:e_score_correction_bias|expert_bias|router_bias)$")


def running_dtype(dense: dict[str, mx.array], dtype: mx.Dtype | None) -> mx.Dtype | None:
    """The dtype that the unquantized parameters and the embeddings run in, ``None`` where they stay as they are.

    With ``dtype=None`` that is float32 on the CPU. On a GPU it is the dtype of the embeddings, or where those are
    quantized that of the norms: EXL3 keeps both in the source's dtype but stores routers in half precision, and mixing
    both 16-bit kinds would make float32 of all.
    """
    if dtype is not None:
        return dtype
    if ops.device_of(None) == "cpu":
        return mx.float32
    for ending in ("embed_tokens.weight", "norm.weight"):
        for key, value in dense.items():
            if key.endswith(ending):
                return value.dtype if value.dtype in (mx.float16, mx.bfloat16) else None
    return None


def cast_dense(model: nn.Module, dense: dict[str, mx.array], dtype: mx.Dtype | None) -> dict[str, mx.array]:
    """The unquantized parameters in the dtype that they run in, lazily; see :func:`running_dtype`.

    The biases that choose experts are float32 always. Where no dtype is asked for, float32 parameters and those that
    the model wants left alone stay as they are, except that all is float32 on the CPU.
    """
    target = running_dtype(dense, dtype)
    try:
        casts = model.cast_predicate
    except MODEL_ERRORS:  # there is none, or it fails, as that of mlx-vlm's glm_moe_dsa does
        casts = lambda key: True
    all_floats = dtype is None and target == mx.float32
    wanted = (mx.float16, mx.bfloat16) if dtype is None else (mx.float16, mx.bfloat16, mx.float32)

    def cast(key: str, value: mx.array) -> mx.array:
        if _SELECTION_BIAS.search(key) and mx.issubdtype(value.dtype, mx.floating):
            return value.astype(mx.float32)
        if all_floats:
            return value.astype(mx.float32) if mx.issubdtype(value.dtype, mx.floating) else value
        return value.astype(target) if target is not None and value.dtype in wanted and casts(key) else value

    return {key: cast(key, value) for key, value in dense.items()}


def read_dense(stored: dict[str, TensorInfo], dense: dict[str, mx.array]) -> dict[str, mx.array]:
    """Dense parameters read straight into the dtype that they run in, where that loses nothing.

    MLX would hold a tensor twice to cast it, on one thread: a quarter of the time that a model takes to load.

    Args:
        stored: Where they lie in the checkpoint.
        dense: The same, lazy, in the dtype that they run in.
    """
    read, reads = {}, []
    for path, info in stored.items():
        dtype, stored_dtype = dense[path].dtype, _DTYPES.get(info.dtype)
        if stored_dtype is None or (dtype != stored_dtype and dtype != mx.float32):
            continue
        read[path] = ops.uninitialized(info.shape, dtype)
        # NumPy has no bfloat16; bytes do for what is not widened.
        shared = read[path] if dtype == mx.float32 else read[path].view(mx.uint16)
        widen = None if dtype == stored_dtype else partial(ops.widen, DTYPE_NAMES[stored_dtype])
        reads.append(info.into(np.array(shared, copy=False), widen))
    read_all(reads)
    return read


def module_at(model: nn.Module, path: str) -> Any:
    """The module at a path, or None where it is gone (layers of other pipeline ranks)."""
    module: Any = model
    for part in path.split("."):
        if isinstance(module, (list, tuple)):
            module = module[int(part)] if int(part) < len(module) else None
        else:
            module = module.get(part) if module is not None else None
    return module


def replace_module(model: nn.Module, path: str, new: nn.Module) -> None:
    """Put a module in the place of another; children that only the old one has are kept."""
    parent_path, _, leaf = path.rpartition(".")
    parent = module_at(model, parent_path) if parent_path else model
    for name, child in module_at(model, path).children().items():
        if name not in new and name not in ("activation", *GATED, *UNGATED):
            new[name] = child
    if isinstance(parent, list):
        parent[int(leaf)] = new
    else:
        setattr(parent, leaf, new)


def groups_of(paths: Iterable[str]) -> list[list[str]]:
    """Paths by layer, in the order of the model; what is in no layer comes first."""
    groups: dict[str, list[str]] = {"": []}
    for path in paths:
        match = _LAYER.match(path) or _BLOCK.match(path)
        groups.setdefault(match[0] if match else "", []).append(path)
    return [group for group in groups.values() if group]


def _fill_embeddings(model: nn.Module, mapping: WeightMap, dtype: mx.Dtype | None) -> None:
    for path in dict.fromkeys((*mapping.embeddings, *mapping.heads)):
        module = module_at(model, path)
        if module is None:
            continue
        made = make_embedding(module, mapping.embeddings[path], dtype) if path in mapping.embeddings else module
        if path in mapping.heads:
            made = EmbeddingWithHead(made, make_head(module, mapping.heads[path], dtype))
        replace_module(model, path, made)


def fill(
    model: nn.Module,
    mapping: WeightMap,
    config: dict,
    dtype: mx.Dtype | None,
    accuracy: str,
    *,
    lazy: bool = False,
    progress: LayerProgress | None = None,
    make_linear: MakeLinear | None = None,
    make_experts: MakeExperts | None = None,
) -> None:
    """Read the weights into a model, layer by layer, so that at most one layer is held twice.

    Args:
        model: The model that ``mapping`` was made for.
        mapping: Where everything goes. Its dense arrays are taken out, so that nothing holds on to them.
        config: Of the model; says how many experts a token takes.
        dtype: See :func:`cast_dense`.
        accuracy: Of the products, one of ``kernels.ACCURACIES``.
        lazy: Leave the unquantized parameters unevaluated.
        progress: Called with (layers done, layers) after each layer.
        make_linear: Called with the path, the module to replace and its source. Default: ``None``, whole ones.
        make_experts: Called with the path, the module to replace and its sources. Default: ``None``, whole ones.
    """
    dense_ops.install()
    make_linear = make_linear or partial(whole_linear, mapping.host)
    make_experts = make_experts or partial(whole_experts, mapping.host)
    present = {k: v for k, v in mapping.dense.items() if module_at(model, k) is not None}
    mapping.dense.clear()
    target = running_dtype(present, dtype)
    dense = cast_dense(model, present, dtype)
    del present
    model.load_weights(list(dense.items()), strict=False)
    _fill_embeddings(model, mapping, target)
    for path, table in mapping.tables.items():
        parent, _, leaf = path.rpartition(".")
        setattr(module_at(model, parent), leaf, StreamedEmbedding(table.gather, target or mx.float16))
    stored = {} if lazy else {key: info for key, info in mapping.stored.items() if key in dense}
    groups = groups_of((*dense, *mapping.linears, *mapping.joined, *mapping.grouped, *mapping.experts))
    for done, group in enumerate(groups, 1):
        for path in group:
            module = None if path in dense else module_at(model, path)
            if module is None:
                continue
            if path in mapping.linears:
                replace_module(model, path, make_linear(path, module, mapping.linears[path]))
            elif path in mapping.joined:
                replace_module(model, path, joined_linear(module, mapping.joined[path]))
            elif path in mapping.grouped:
                replace_module(model, path, grouped_linear(module, mapping.grouped[path]))
            else:
                made = make_experts(path, module, mapping.experts[path])
                if target is not None:
                    for partly in (m for m in made.modules() if isinstance(m, PartlyQuantizedSwitchGLU)):
                        partly.dense.set_dtype(target)
                replace_module(model, path, made)
        if not lazy:
            read = read_dense({path: stored[path] for path in group if path in stored}, dense)
            model.load_weights(list(read.items()), strict=False)
            dense.update(read)
            mx.eval([dense[path] for path in group if path in dense])
        mx.clear_cache()  # the buffers that this layer was read into are of no use to the next
        if progress is not None:
            progress(done, len(groups))
    for path, module in model.named_modules():
        if isinstance(module, TrellisModule):
            module.accuracy = accuracy
        if isinstance(module, TrellisSwitch):
            module.top_k = experts_per_token(config, module.num_experts, path)
    mapping.host.finish(model, target or next((v.dtype for v in dense.values() if v.dtype in DTYPE_NAMES), mx.float16))
    model.eval()


def open_checkpoint(
    model_path: Path, model_config: dict | None = None, host: Host = MLX_LM
) -> tuple[nn.Module, dict, WeightMap]:
    """The model of an EXL3 directory, its config and where its weights go: all checked, nothing read."""
    loader = TrellisModelLoader(model_path)
    if loader.kind is Kind.METAL_MARLIN:
        raise ValueError(
            f"{model_path} is of the metal-marlin format, of which TrellisModelLoader loads single weights, but no "
            "whole models; convert the original model with mlx_marlin-convert"
        )
    if not loader.quantized:
        raise ValueError(f"{model_path} holds no EXL3 tensors; load it with {host.loader}")
    config = read_config(host, model_path, loader, model_config)
    model = build(model_path, config, host)
    mapping = map_weights(host, model, loader)
    if host.whole:
        check_call(build(model_path, config, host), model_path, config, host)
    _restore_up(mapping, config)
    return model, config, mapping


def _restore_up(mapping: WeightMap, config: dict) -> None:
    """Undo the division of the experts' ``up``, but behind ``down``: activations stay as small as they are meant."""
    for path, projections in mapping.experts.items():
        layer = _LAYER.match(path)
        divisor = up_divisor(config, int(layer[0].rpartition(".")[2])) if layer else 1
        if divisor != 1:
            projections["down_proj"] = [replace(source, factor=divisor) for source in projections["down_proj"]]


def report(model: nn.Module, mapping: WeightMap) -> None:
    """Say once what was left out of the checkpoint, in the log and as the model's attribute ``left_out``."""
    model.left_out = mapping.left_out
    if mapping.left_out:
        level = logging.INFO if mapping.left_out.expected else logging.WARNING
        _log.log(level, "the model leaves out of the checkpoint: %s", mapping.left_out)


def load_exl3_model(
    model_path: Path,
    lazy: bool = False,
    model_config: dict | None = None,
    *,
    dtype: mx.Dtype | None = None,
    accuracy: str = "float32",
    progress: LayerProgress | None = None,
    host: Host = MLX_LM,
) -> tuple[nn.Module, dict]:
    """An EXL3 directory as a host's model.

    Args:
        model_path: The directory.
        lazy: Leave the unquantized parameters unevaluated. Default: ``False``.
        model_config: Values that replace those of config.json. Default: ``None``.
        dtype: Of the unquantized parameters, see :func:`cast_dense`. Default: ``None``.
        accuracy: Of the products, one of ``kernels.ACCURACIES``. Default: ``"float32"``.
        progress: Called with (layers done, layers) after each layer. Default: ``None``.
        host: Whose model. Default: mlx-lm's.

    Returns:
        The model and its config. The model's attribute ``left_out`` is a :class:`LeftOut`.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If the directory cannot be loaded; the message names file and tensor.
    """
    dtype, accuracy = activation_dtype(dtype), kernels.checked_accuracy(accuracy)
    gc.collect()  # a model that nothing refers to any more may be in a cycle, and two would be in memory
    with unchanged(Path(model_path)):
        model, config, mapping = open_checkpoint(Path(model_path), model_config, host)
        fill(model, mapping, config, dtype, accuracy, lazy=lazy, progress=progress)
    report(model, mapping)
    return model, config
