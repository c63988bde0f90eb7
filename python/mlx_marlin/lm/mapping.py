"""Where the quantized linears of a checkpoint belong in a host's model, and that all of them, and all of it, fit."""

from __future__ import annotations

from dataclasses import dataclass, field

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..codec import padded
from ..loader.contents import NGRAM, OTHER, LeftOut, parts_of, seems_to_be
from ..loader.directory import TrellisModelLoader
from ..loader.embedding import QuantizedEmbedding
from ..loader.exl3 import PlainLinear, QuantizedLinear
from ..loader.ngrams import HASH_PARAMETERS, NgramTable, find_ngram_tables
from ..storage.safetensors import TensorInfo
from .embedding import make_placeholders, take_embeddings
from .graphs import changed, unread
from .host import Host
from .placeholders import LinearSource, Placeholders
from .sanitizing import parameters_of, sanitize


@dataclass
class WeightMap:
    """Where everything of a checkpoint goes.

    Attributes:
        host: Whose model it is.
        linears: Source of each quantized ``nn.Linear``, by its path in the model.
        joined: Sources of each ``nn.Linear`` that is quantized in parts, in the order of its outputs, and how many
            outputs each has.
        grouped: Sources of each quantized layer with a linear for each group of inputs.
        experts: Sources of each quantized block of experts: path -> projection -> one source per expert; what reads x
            first.
        heads: Source of the output head, by the path of the embeddings that the model would use instead.
        tables: Each n-gram table in a file of its own, by its path in the model.
        embeddings: Each quantized token embedding, by its path in the model.
        dense: All other parameters of the model, lazy, by path.
        stored: Where those of the dense parameters lie that the model takes as the checkpoint has them.
        left_out: What of the checkpoint the model does not use.
    """

    host: Host
    linears: dict[str, LinearSource] = field(default_factory=dict)
    joined: dict[str, list[tuple[LinearSource, int]]] = field(default_factory=dict)
    grouped: dict[str, list[LinearSource]] = field(default_factory=dict)
    experts: dict[str, dict[str, list[LinearSource]]] = field(default_factory=dict)
    heads: dict[str, LinearSource] = field(default_factory=dict)
    tables: dict[str, NgramTable] = field(default_factory=dict)
    embeddings: dict[str, QuantizedEmbedding] = field(default_factory=dict)
    dense: dict[str, mx.array] = field(default_factory=dict)
    stored: dict[str, TensorInfo] = field(default_factory=dict)
    left_out: LeftOut = LeftOut({})


@dataclass(frozen=True)
class _Checkpoint:
    """What the steps of :func:`map_weights` know of the checkpoint and the model.

    Attributes:
        host: Whose model it is.
        loader: The checkpoint.
        placeholders: What stands for its linears.
        modules: The model's modules, by path.
        layers: The model's layers.
        parts: Names that belong to something that text models leave out, and what.
        optional: Those of them that the host's models leave out too.
    """

    host: Host
    loader: TrellisModelLoader
    placeholders: Placeholders
    modules: dict[str, nn.Module]
    layers: int
    parts: dict[str, str]
    optional: set[str]

    @classmethod
    def of(cls, host: Host, model: nn.Module, loader: TrellisModelLoader) -> _Checkpoint:
        modules = dict(model.named_modules())
        layers = host.layers(model)
        names = (*loader.quantized, *loader.embeddings, *loader.unquantized)
        parts = parts_of(names, layers)
        optional = {name for name, part in parts.items() if not host.uses(part)}
        return cls(host, loader, Placeholders(loader, host.name), modules, layers, parts, optional)

    def seems_to_be(self, name: str) -> str:
        return seems_to_be(name, self.layers, self.loader.version)


def map_weights(host: Host, model: nn.Module, loader: TrellisModelLoader) -> WeightMap:
    """Find out where every tensor of a checkpoint goes, and that every parameter of the model gets one.

    Args:
        host: Whose model it is.
        model: The model, its parameters not yet evaluated.
        loader: The checkpoint.

    Raises:
        ValueError: If a quantized linear ends where no trellis can stand, if a parameter of the model has no
            tensor, or if shapes do not fit. The message names the tensor.
    """
    checkpoint = _Checkpoint.of(host, model, loader)
    placeholders, modules = checkpoint.placeholders, checkpoint.modules
    of_experts = {f"{linear.name}.{suffix}" for linear in placeholders.plain for suffix in linear.parts}
    unquantized = {name: value for name, value in loader.load_unquantized().items() if name not in of_experts}
    weights = sanitize(host, model, loader.directory, {**unquantized, **make_placeholders(loader)}, placeholders)
    mapping = WeightMap(host, embeddings=take_embeddings(host, loader, modules, weights, checkpoint.optional))
    for key, value in weights.items():
        if not isinstance(value, mx.array):
            raise ValueError(f"{loader.directory}: {host.name} makes a {type(value).__name__} of {key}")
        if value.dtype == mx.uint64 and not _is_head(key, modules):
            _place(mapping, checkpoint, key, np.array(value))
        elif value.dtype != mx.uint64 and not _is_head(key, modules):
            mapping.dense[key] = value
    if host.whole:
        _place_head(mapping, checkpoint)
    if host.uses(NGRAM):
        _place_tables(mapping, checkpoint)
    _check_complete(model, checkpoint, mapping)
    names = {id(value): name for name, value in unquantized.items()}
    touched = changed(unquantized)
    taken = {key: names[id(value)] for key, value in mapping.dense.items() if id(value) in names}
    taken = {key: name for key, name in taken.items() if name not in touched}
    mapping.stored = {key: loader.unquantized[name] for key, name in taken.items()}
    mapping.left_out = _left_out(mapping, checkpoint, unquantized)
    return mapping


def _left_out(mapping: WeightMap, checkpoint: _Checkpoint, unquantized: dict[str, mx.array]) -> LeftOut:
    banks = (sources for projections in mapping.experts.values() for sources in projections.values())
    sources = [*mapping.linears.values(), *mapping.heads.values(), *(source for bank in banks for source in bank)]
    sources += [source for parts in mapping.joined.values() for source, _ in parts]
    sources += [source for groups in mapping.grouped.values() for source in groups]
    used = {source.linear.name for source in sources}
    found: dict[str, dict[str, int]] = {}
    used.update(embedding.name for embedding in mapping.embeddings.values())
    for module in (*checkpoint.placeholders.linears, *checkpoint.loader.embeddings.values()):
        if module.name not in used:
            sizes = found.setdefault(checkpoint.parts.get(module.name, OTHER), {})
            sizes.update({f"{module.name}.{suffix}": info.nbytes for suffix, info in module.parts.items()})
    for name in unread(unquantized, mapping.dense.values()):
        if name.removesuffix(".weight") in used:
            continue
        part = checkpoint.parts.get(name, OTHER)
        found.setdefault(part, {})[name] = checkpoint.loader.unquantized[name].nbytes
    if checkpoint.loader.tables and not mapping.tables:
        found[NGRAM] = {name: info.nbytes for name, info in checkpoint.loader.tables.items()}
    return LeftOut(found)


def _place(mapping: WeightMap, checkpoint: _Checkpoint, key: str, codes: np.ndarray) -> None:
    path, _, leaf = key.rpartition(".")
    placeholders, modules = checkpoint.placeholders, checkpoint.modules
    module = modules.get(path)
    name = placeholders.linears[int(codes.flat[0] >> 32)].name
    where = f"{placeholders.directory}: {name} is quantized, but {checkpoint.host.name} puts it at {key}"
    if module is None and name in checkpoint.optional:
        return
    if leaf != "weight" or module is None:
        raise ValueError(f"{where}, which the model does not have; {checkpoint.seems_to_be(name)}")
    if isinstance(module, checkpoint.host.projection) and codes.ndim == 3 and codes.shape[2] == 1:
        parent, _, projection = path.rpartition(".")
        kind = checkpoint.host.kind_of(modules[parent])
        if kind is None or projection not in kind.projections:
            known = " or a ".join(kind.module.__name__ for kind in checkpoint.host.experts)
            raise ValueError(
                f"{where}; experts can be quantized in a {known} only, not in a {type(modules[parent]).__name__}"
            )
        if len(codes) != module.weight.shape[0]:
            raise ValueError(
                f"{where}, where the model has {module.weight.shape[0]} experts; the checkpoint has {len(codes)}"
            )
        sources = placeholders.read_experts(key, codes[..., 0], module.weight.shape[1])
        # In the order of the kind, whatever that of the checkpoint is.
        found = {**mapping.experts.get(parent, {}), projection: sources}
        mapping.experts[parent] = {name: found[name] for name in kind.projections if name in found}
    elif checkpoint.host.grouped is not None and type(module) is checkpoint.host.grouped and codes.ndim == 3:
        sources = [placeholders.read(f"{key}[{g}]", c[:, 0], module.weight.shape[1]) for g, c in enumerate(codes)]
        mapping.grouped[path] = sources
    elif isinstance(module, nn.Linear) and codes.ndim == 2 and codes.shape[1] == 1:
        if (codes >> 32 != codes[0] >> 32).any():
            mapping.joined[path] = placeholders.read_joined(key, codes[:, 0], module.weight.shape[0])
            sources = [source for source, _ in mapping.joined[path]]
        else:
            mapping.linears[path] = placeholders.read(key, codes[:, 0], module.weight.shape[0])
            sources = [mapping.linears[path]]
    else:
        raise ValueError(f"{where}, a {type(module).__name__} that needs a dense weight")
    _check_inputs_and_bias(placeholders, sources, module, key)


def _is_head(key: str, modules: dict) -> bool:
    """Whether this is a head that the model does not have, because it always uses its embeddings."""
    path = key.removesuffix(".weight")
    return f".{path}".endswith(".lm_head") and path not in modules


def _place_head(mapping: WeightMap, checkpoint: _Checkpoint) -> None:
    """EXL3 has a head even where the model ties it to the embeddings; it must not be dropped."""
    directory, modules = checkpoint.loader.directory, checkpoint.modules
    used = {source.linear.name for source in mapping.linears.values()}
    heads: list[QuantizedLinear | PlainLinear] = [
        linear
        for linear in checkpoint.loader.linears.values()
        if f".{linear.name}".endswith(".lm_head") and linear.name not in used
    ]
    for name, info in checkpoint.loader.unquantized.items():
        stem = name.removesuffix(".weight")
        is_head = name.endswith(".weight") and _is_head(name, modules) and name not in checkpoint.optional
        if is_head and not any(f".{path}".endswith(".lm_head") for path in modules):
            heads.append(PlainLinear(stem, {"weight": info}))
            heads[-1].check()
    if not heads:
        return
    head = heads[0]
    embeddings = {path: module.weight.shape for path, module in modules.items() if isinstance(module, nn.Embedding)}
    named = [path for path in embeddings if f".{path}".endswith(".embed_tokens")]
    paths = named or list(embeddings)
    if len(heads) > 1 or len(paths) != 1:
        raise ValueError(
            f"{directory}: {head.name} is a head, but the model has neither a head nor one table of embeddings"
        )
    vocabulary, hidden = embeddings[paths[0]]
    if head.padded_shape != (padded(hidden), padded(vocabulary)):
        raise ValueError(
            f"{directory}: {head.name} is a {list(head.padded_shape)} matrix, but the model wants "
            f"[{hidden}, {vocabulary}]"
        )
    mapping.heads[paths[0]] = LinearSource(head, None)


def _place_tables(mapping: WeightMap, checkpoint: _Checkpoint) -> None:
    """A table takes the place of the module that its name ends as; the parameters of its hashes lie beside that."""
    for name, table in find_ngram_tables(checkpoint.loader.tables).items():
        ending = name[name.find(".layers.") :]
        paths = [path for path in checkpoint.modules if f".{path}".endswith(ending)]
        if len(paths) != 1:
            raise ValueError(f"{checkpoint.loader.directory}: the model has no place for the n-gram table {name}")
        mapping.tables[paths[0]] = table
        parent = paths[0].rpartition(".")[0]
        for suffix, leaf in HASH_PARAMETERS.items():
            if suffix in table.parts:
                mapping.dense[f"{parent}.{leaf}"] = mx.array(table.parts[suffix].array())


def _check_inputs_and_bias(
    placeholders: Placeholders, sources: list[LinearSource], module: nn.Module, key: str
) -> None:
    logical = module.weight.shape[-1]
    for source in sources:
        if isinstance(source.linear, PlainLinear) and source.linear.parts["weight"].shape != module.weight.shape[-2:]:
            raise ValueError(
                f"{placeholders.directory}: {source.linear.name}.weight has shape "
                f"{list(source.linear.parts['weight'].shape)}, but {key} wants {list(module.weight.shape[-2:])}"
            )
        stored = source.linear.padded_shape[0]
        if stored != padded(logical):
            raise ValueError(
                f"{placeholders.directory}: {source.linear.name} has {stored} inputs, but {key} wants {logical}"
            )
        if ("bias" in source.linear.parts) != ("bias" in module):
            has, wants = ("has a", "none") if "bias" in source.linear.parts else ("has no", "one")
            raise ValueError(
                f"{placeholders.directory}: {source.linear.name} {has} bias, but the model wants {wants} at {key}"
            )


def _check_complete(model: nn.Module, checkpoint: _Checkpoint, mapping: WeightMap) -> None:
    """Every parameter has a tensor that fits; what is left over belongs to a part that text models leave out."""
    loader = checkpoint.loader
    for path, projections in mapping.experts.items():
        kind = checkpoint.host.kind_of(checkpoint.modules[path])
        for projection in kind.projections if kind else ():
            if projection not in projections:
                raise ValueError(
                    f"{loader.directory}: {path} is quantized, but its {projection} is not in the checkpoint"
                )
    replaced = {
        *mapping.linears,
        *mapping.joined,
        *mapping.grouped,
        *mapping.embeddings,
        *(f"{path}.{projection}" for path, projections in mapping.experts.items() for projection in projections),
    }
    parameters = {key: value for key, value in parameters_of(model).items() if key.rpartition(".")[0] not in replaced}
    of_tables = tuple(f"{path}." for path in mapping.tables)
    parameters = {key: value for key, value in parameters.items() if not key.startswith(of_tables)}
    for key, value in parameters.items():
        if key not in mapping.dense:
            raise ValueError(
                f"{loader.directory}: the checkpoint has no tensor for {key}, a parameter of {type(model).__module__}"
            )
        if mapping.dense[key].shape != value.shape:
            raise ValueError(
                f"{loader.directory}: {key} has shape {list(mapping.dense[key].shape)}, "
                f"but the model wants {list(value.shape)}"
            )
        if mx.issubdtype(value.dtype, mx.floating) and not mx.issubdtype(mapping.dense[key].dtype, mx.floating):
            raise ValueError(
                f"{loader.directory}: {key} is {mapping.dense[key].dtype}, but the model wants floating point"
            )
    extra = [key for key in mapping.dense if key not in parameters]
    if not extra:
        return
    parts = parts_of((*extra, *loader.quantized, *loader.unquantized), checkpoint.layers)
    for key in extra:
        if key not in parts or checkpoint.host.uses(parts[key]):
            raise ValueError(
                f"{loader.directory}: the checkpoint has {key}, which is no parameter of {type(model).__module__}; "
                f"{checkpoint.seems_to_be(key)}"
            )
        del mapping.dense[key]
