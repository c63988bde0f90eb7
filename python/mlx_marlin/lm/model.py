"""Building mlx-lm models over EXL3 checkpoints.

The model is made by mlx-lm's own class. Its linears and ``SwitchGLU`` blocks that are quantized in the
checkpoint are then replaced, layer by layer, by :class:`TrellisLinear` and :class:`TrellisSwitchGLU`.
Whatever can be wrong is found before the first weight is read. Experts whose activation has no fused kernel keep
mlx-lm's ``SwitchGLU``, over one trellis product per projection.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm import utils as mlx_lm_utils

from ..layers.experts import TrellisExperts, TrellisSwitchGLU
from ..layers.linear import TrellisLinear
from ..loader import metal_marlin
from ..loader.directory import TrellisModelLoader, names_trellis
from ..ops import DTYPES, Activation
from ..storage.safetensors import parse_json
from ..weights.experts import ExpertStack
from ..weights.trellis import TrellisWeight
from .mapping import MODEL_ERRORS, PROJECTIONS, LinearSource, WeightMap, map_weights

LayerProgress = Callable[[int, int], None]
"""Called with (layers done, layers) after each layer."""

MakeLinear = Callable[[str, nn.Module, LinearSource], nn.Module]
"""Makes what stands for the linear at a path, from the module there and its source."""

MakeExperts = Callable[[str, nn.Module, dict[str, list[LinearSource]]], nn.Module]
"""Makes what stands for the ``SwitchGLU`` at a path, from the module there and its projections' sources."""

# mlx-lm's activations of SwitchGLU, by what the kernels call them.
_ACTIVATIONS = {
    "mlx_lm.models.switch_layers.SwiGLU": "silu",
    "mlx_lm.models.muse_spark.PreciseSwiGLU": "silu",
    "mlx_lm.models.gemma4_text.GeGLU": "gelu_tanh",
    "mlx_lm.models.activations.SwigluOAI": "swiglu_oai",
    "mlx_lm.models.gpt_oss.SwiGLU": "swiglu_oai",  # mlx-lm 0.31, the last one for Python 3.10: alpha 1.702, limit 7
}
_LAYER = re.compile(r"(?:^|.*?\.)layers\.\d+(?=\.)")
_LAYER_COUNTS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer")


class EmbeddingWithHead(nn.Embedding):
    """Embeddings of a model that has no head of its own, with the one of the checkpoint.

    Args:
        embedding: The embeddings.
        head: What :meth:`as_linear` applies instead of their transpose.
    """

    def __init__(self, embedding: nn.Embedding, head: TrellisLinear):
        nn.Module.__init__(self)
        self.weight = embedding.weight
        self.head = head

    def as_linear(self, x: mx.array) -> mx.array:
        return self.head(x)


def is_exl3(model_path: Path) -> bool:
    """Whether a directory is to be loaded here: its config says EXL3, or a tensor's name does, damaged or not.

    Directories of the older metal-marlin format count too, so that they are refused rather than taken for others.
    """
    try:
        config = parse_json((model_path / "config.json").read_bytes(), "config.json")
    except (FileNotFoundError, NotADirectoryError, ValueError):
        config = {}
    for part in (config, config.get("text_config")):
        quantization = part.get("quantization_config") if isinstance(part, dict) else None
        if isinstance(quantization, dict) and quantization.get("quant_method") == "exl3":
            return True
    return names_trellis(model_path) or metal_marlin.is_grid_directory(model_path)


def read_config(model_path: Path, loader: TrellisModelLoader, model_config: dict | None) -> dict:
    """config.json as mlx-lm reads it, checked; the head of the checkpoint is not replaced by the embeddings."""
    for name in ("config.json", "generation_config.json"):
        if name == "config.json" or (model_path / name).exists():
            parse_json((model_path / name).read_bytes(), str(model_path / name), finite=False)
    config = mlx_lm_utils.load_config(model_path)
    config.update(model_config or {})
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or not re.fullmatch(r"[\w-]+", model_type):
        raise ValueError(
            f"{model_path / 'config.json'}: model_type must name an architecture of mlx-lm, got {model_type!r}"
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


def build(model_path: Path, config: dict) -> nn.Module:
    """The mlx-lm model of a config, its parameters lazy and random."""
    config = json.loads(json.dumps(config))  # model code may write into it
    try:
        model_class, args_class = mlx_lm_utils._get_classes(config)
        return model_class(args_class.from_dict(config)).eval()
    except MODEL_ERRORS as error:
        raise ValueError(
            f"{model_path / 'config.json'}: mlx-lm cannot build a {config['model_type']} model from it: "
            f"{type(error).__name__}: {error}"
        ) from error


def activation_of(module: nn.Module) -> Activation | None:
    """The activation of a ``SwitchGLU`` as the fused kernels know it; ``None`` if they do not."""
    activation = module.activation
    name = _ACTIVATIONS.get(f"{type(activation).__module__}.{type(activation).__qualname__}")
    if name is None:
        return None
    if hasattr(activation, "_alpha"):
        return Activation(name, float(activation._alpha), float(activation._limit))
    return Activation(name)


def make_glu(module: nn.Module, gate: list, up: list, down: list) -> nn.Module:
    """What stands for a ``SwitchGLU``: a fused layer, or the module itself over trellis projections.

    Args:
        module: The ``SwitchGLU``.
        gate, up, down: One :class:`TrellisWeight` per expert.
    """
    activation = activation_of(module)
    if activation is not None:
        return TrellisSwitchGLU(gate, up, down, *activation)
    # As in the fused kernels, the padded width flows from gate and up into down.
    wide = [[TrellisWeight(w.trellis, w.suh, w.svh, w.codebook, w.bias, w.in_features) for w in p] for p in (gate, up)]
    narrow = [TrellisWeight(w.trellis, w.suh, w.svh, w.codebook, w.bias, None, w.out_features) for w in down]
    for name, weights in zip(PROJECTIONS, (*wide, narrow)):
        module[name] = TrellisExperts(ExpertStack.of(name, weights))
    return module


def activation_dtype(dtype: mx.Dtype | str | None) -> mx.Dtype | None:
    """A dtype that a model can run in, given itself or its name; ``None`` stays.

    Raises:
        ValueError: If it is another one.
    """
    if dtype is None or (isinstance(dtype, mx.Dtype) and dtype in DTYPES):
        return dtype
    named = {name: value for value, name in DTYPES.items()}
    if not isinstance(dtype, str) or dtype not in named:
        raise ValueError(f"dtype must be one of {', '.join(named)}, or None for the checkpoint's own, got {dtype!r}")
    return named[dtype]


def cast_dense(model: nn.Module, dense: dict[str, mx.array], dtype: mx.Dtype | None) -> dict[str, mx.array]:
    """The unquantized parameters in the dtype that they run in, lazily.

    With ``dtype=None`` that is float32 on the CPU. On a GPU it is the dtype of the embeddings: EXL3 keeps them
    in the source's dtype but stores routers in half precision, and mixing both 16-bit kinds would make float32
    of all.
    """
    if dtype is None and mx.default_device() == mx.cpu:
        return {k: v.astype(mx.float32) if mx.issubdtype(v.dtype, mx.floating) else v for k, v in dense.items()}
    casts = getattr(model, "cast_predicate", lambda key: True)
    if dtype is None:
        embeddings = [v.dtype for k, v in dense.items() if k.endswith("embed_tokens.weight")]
        halves: tuple[mx.Dtype, ...] = (mx.float16, mx.bfloat16)
        dtype = embeddings[0] if embeddings and embeddings[0] in halves else None
        wanted = halves
    else:
        wanted = (mx.float16, mx.bfloat16, mx.float32)
    return {k: v.astype(dtype) if dtype and v.dtype in wanted and casts(k) else v for k, v in dense.items()}


def load_source(
    source: LinearSource,
    in_features: int,
    out_features: int,
    rows: tuple[int, ...] | None = None,
    columns: tuple[int, ...] | None = None,
) -> TrellisWeight:
    """Read a weight, or the 128-blocks ``rows`` of its inputs and ``columns`` of its outputs."""
    if source.blocks is not None:
        columns = source.blocks if columns is None else tuple(source.blocks[c] for c in columns)
    return source.linear.load(rows, columns, in_features=in_features, out_features=out_features)


def _whole_linear(_path: str, module: nn.Module, source: LinearSource) -> TrellisLinear:
    out_features, in_features = module.weight.shape
    return TrellisLinear(load_source(source, in_features, out_features))


def _whole_experts(_path: str, module: nn.Module, sources: dict[str, list[LinearSource]]) -> nn.Module:
    weights = []
    for projection in PROJECTIONS:
        _, out_features, in_features = module[projection].weight.shape
        weights.append([load_source(source, in_features, out_features) for source in sources[projection]])
    return make_glu(module, *weights)


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
        if name not in new and name != "activation":
            new[name] = child
    if isinstance(parent, list):
        parent[int(leaf)] = new
    else:
        setattr(parent, leaf, new)


def groups_of(paths: Iterable[str]) -> list[list[str]]:
    """Paths by layer, in the order of the model; what is in no layer comes first."""
    groups: dict[str, list[str]] = {"": []}
    for path in paths:
        match = _LAYER.match(path)
        groups.setdefault(match[0] if match else "", []).append(path)
    return [group for group in groups.values() if group]


def fill(
    model: nn.Module,
    mapping: WeightMap,
    dtype: mx.Dtype | None,
    *,
    lazy: bool = False,
    progress: LayerProgress | None = None,
    make_linear: MakeLinear = _whole_linear,
    make_experts: MakeExperts = _whole_experts,
) -> None:
    """Read the weights into a model, layer by layer, so that at most one layer is held twice.

    Args:
        model: The model that ``mapping`` was made for.
        mapping: Where everything goes. Its dense arrays are taken out, so that nothing holds on to them.
        dtype: See :func:`cast_dense`.
        lazy: Leave the unquantized parameters unevaluated.
        progress: Called with (layers done, layers) after each layer.
        make_linear: Called with the path, the module to replace and its source.
        make_experts: Called with the path, the module to replace and its sources.
    """
    present = {k: v for k, v in mapping.dense.items() if module_at(model, k) is not None}
    mapping.dense.clear()
    dense = cast_dense(model, present, dtype)
    del present
    model.load_weights(list(dense.items()), strict=False)
    for path, source in mapping.heads.items():
        embedding = module_at(model, path)
        head = TrellisLinear(load_source(source, *reversed(embedding.weight.shape)))
        replace_module(model, path, EmbeddingWithHead(embedding, head))
    groups = groups_of((*dense, *mapping.linears, *mapping.experts))
    for done, group in enumerate(groups, 1):
        for path in group:
            module = None if path in dense else module_at(model, path)
            if module is None:
                continue
            if path in mapping.linears:
                replace_module(model, path, make_linear(path, module, mapping.linears[path]))
            else:
                replace_module(model, path, make_experts(path, module, mapping.experts[path]))
        if not lazy:
            mx.eval([dense[path] for path in group if path in dense])
        mx.clear_cache()  # the buffers that this layer was read into are of no use to the next
        if progress is not None:
            progress(done, len(groups))
    model.eval()


def open_checkpoint(model_path: Path, model_config: dict | None = None) -> tuple[nn.Module, dict, WeightMap]:
    """The model of an EXL3 directory, its config and where its weights go: all checked, nothing read."""
    loader = TrellisModelLoader(model_path)
    if not loader.quantized:
        raise ValueError(f"{model_path} holds no EXL3 tensors; load it with mlx_lm.load")
    if metal_marlin.is_grid_directory(model_path):
        raise ValueError(
            f"{model_path} is of the metal-marlin format, of which TrellisModelLoader loads single weights, but no "
            "whole models; convert the original model with mlx_marlin-convert"
        )
    config = read_config(model_path, loader, model_config)
    model = build(model_path, config)
    return model, config, map_weights(model, loader)


def load_exl3_model(
    model_path: Path,
    lazy: bool = False,
    model_config: dict | None = None,
    *,
    dtype: mx.Dtype | None = None,
    progress: LayerProgress | None = None,
) -> tuple[nn.Module, dict]:
    """An EXL3 directory as an mlx-lm model.

    Args:
        model_path: The directory.
        lazy: Leave the unquantized parameters unevaluated. Default: ``False``.
        model_config: Values that replace those of config.json. Default: ``None``.
        dtype: Of the unquantized parameters, see :func:`cast_dense`. Default: ``None``.
        progress: Called with (layers done, layers) after each layer. Default: ``None``.

    Returns:
        The model and its config.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If the directory cannot be loaded; the message names file and tensor.
    """
    dtype = activation_dtype(dtype)
    model, config, mapping = open_checkpoint(Path(model_path), model_config)
    fill(model, mapping, dtype, lazy=lazy, progress=progress)
    return model, config
