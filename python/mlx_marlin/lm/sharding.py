"""Tensor, expert and pipeline parallel loading of EXL3 checkpoints, with a host's own ``shard`` and ``pipeline``.

A host splits dense weights. It is shown index arrays instead: first lazy weights of the true shapes, of
which only the shapes afterwards are looked at, to learn which axis of each weight it splits; then arrays
that hold the index along that axis, to learn which indices this rank keeps. The trellis tensors are then cut
at the same places. An output split takes trellis columns and svh, an input split trellis rows and suh; both
must fall on 128-blocks, because the Hadamard transforms mix inside those.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict, TypeVar

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.nn.layers.distributed import AllToShardedLinear, ShardedToAllLinear
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..codec import HADAMARD_SIZE
from ..layers.linear import TrellisLinear
from ..storage.untrusted import unchanged
from ..weights.experts import ExpertStack
from ..weights.trellis import TrellisWeight
from .expert_parallel import check_summed, check_ways, make_local_experts
from .experts import load_source, make_experts
from .host import MODEL_ERRORS, Host
from .hub import fetch
from .mapping import WeightMap
from .mlx_lm_host import MLX_LM
from .model import (
    LayerProgress,
    MakeExperts,
    MakeLinear,
    build,
    fill,
    module_at,
    open_checkpoint,
    product_accuracy,
    report,
)
from .placeholders import LinearSource
from .tokenizer import check_tokenizer, load_tokenizer

Result = TypeVar("Result")


class Makers(TypedDict, total=False):
    """Keywords for :func:`fill`."""

    make_linear: MakeLinear
    make_experts: MakeExperts


@dataclass
class Cut:
    """What a rank keeps of a weight.

    Attributes:
        in_features: Its logical inputs.
        out_features: Its logical outputs.
        rows: Blocks of 128 inputs, or ``None`` for all.
        columns: Blocks of 128 outputs, or ``None`` for all.
    """

    in_features: int
    out_features: int
    rows: tuple[int, ...] | None = None
    columns: tuple[int, ...] | None = None

    def load(self, source: LinearSource, bias: mx.array | None) -> TrellisWeight:
        w = load_source(source, self.in_features, self.out_features, self.rows, self.columns)
        return TrellisWeight(w.trellis, w.suh, w.svh, w.codebook, bias, self.in_features, self.out_features)


def _targets(mapping: WeightMap) -> dict[str, LinearSource]:
    """A source of every quantized weight, by its path; of experts the first one."""
    experts = {f"{path}.{p}": listed[0] for path, sources in mapping.experts.items() for p, listed in sources.items()}
    return {**mapping.linears, **experts}


def _shard(host: Host, model: nn.Module, group: mx.distributed.Group) -> None:
    part = host.splits(model)
    assert part is not None, "open_sharded has looked"
    try:
        part.shard(group)
    except MODEL_ERRORS as error:
        raise ValueError(
            f"{type(model).__module__} cannot be split over {group.size()} ranks: {type(error).__name__}: {error}"
        ) from error


def _blocks(path: str, indices: np.ndarray, total: int) -> tuple[int, ...]:
    """The 128-blocks that a list of indices is made of, in its order."""
    blocks = []
    for start in range(0, len(indices), HADAMARD_SIZE):
        part = indices[start : start + HADAMARD_SIZE]
        first, size = int(part[0]), min(HADAMARD_SIZE, total - int(part[0]))
        if first % HADAMARD_SIZE or len(part) != size or not np.array_equal(part, np.arange(first, first + size)):
            raise ValueError(
                f"{path}: {total} is split into {len(indices)} per rank here; a trellis can be split at multiples of "
                f"{HADAMARD_SIZE} only. Use fewer ranks or pipeline parallelism"
            )
        blocks.append(first // HADAMARD_SIZE)
    return tuple(blocks)


def _split_axes(
    mapping: WeightMap, model: nn.Module, targets: dict[str, LinearSource], group: mx.distributed.Group
) -> dict[str, int]:
    """Split the untouched model and see which axis of each weight got shorter: -2 (outputs) or -1 (inputs)."""
    before = {path: module_at(model, path).weight.shape for path in targets}
    whole = {path: module_at(model, path).weight.shape for path in (*mapping.joined, *mapping.grouped)}
    _shard(mapping.host, model, group)
    for path, shape in whole.items():
        if module_at(model, path).weight.shape != shape:
            raise ValueError(f"{path} is quantized in parts, and such a linear cannot be split over ranks")
    axes = {}
    for path, shape in before.items():
        after = module_at(model, path).weight.shape
        changed = [axis - len(shape) for axis in range(len(shape)) if after[axis] != shape[axis]]
        if changed not in ([], [-1], [-2]):
            raise ValueError(
                f"{path}: {list(shape)} becomes {list(after)} on this rank; a trellis is split along one axis"
            )
        if changed:
            axes[path] = changed[0]
    return axes


def _put_indices(module: nn.Module, axis: int) -> None:
    shape = module.weight.shape
    index = mx.arange(shape[axis], dtype=mx.uint32)
    index = index[:, None] if axis == -2 else index[None]
    module.weight = mx.broadcast_to(index, (*shape[:-2], *index.shape))


def split(
    model: nn.Module, probe: nn.Module, mapping: WeightMap, group: mx.distributed.Group, parallel: str = "tensor"
) -> dict[str, Cut]:
    """Split a model for this rank, without reading a weight.

    Args:
        model: The model that ``mapping`` was made for; its ``shard`` is applied to it.
        probe: Another instance of it, which is used up.
        mapping: Where everything goes. Its dense arrays are replaced by this rank's.
        group: The ranks.
        parallel: One of ``expert_parallel.PARALLEL``. Default: ``"tensor"``.

    Returns:
        What this rank keeps of every quantized weight, by path of the linear or of the experts' projection; of whole
        experts nothing.

    Raises:
        ValueError: If the model cannot be split this way, or a trellis cannot be cut where it is split.
    """
    check_ways(mapping, group, parallel)
    targets = _targets(mapping)
    experts = {path for path in targets if path not in mapping.linears}
    axes = _split_axes(mapping, probe, targets, group)
    model.load_weights(list(mapping.dense.items()), strict=False)
    shapes = {path: module_at(model, path).weight.shape[-2:] for path in targets}
    whole = {path: dict(module_at(model, path)) for path in experts if parallel == "experts"}
    for path in targets:
        module = module_at(model, path)
        if path in axes and path not in whole:
            _put_indices(module, axes[path])
        if "bias" in module and path not in whole:
            module.bias = _stored_bias(mapping, path, module.bias.shape)
    _shard(mapping.host, model, group)
    cuts = {
        path: _cut(path, module_at(model, path).weight, axes.get(path), shapes[path])
        for path in targets
        if path not in whole
    }
    if parallel == "tensor":
        _check_experts(mapping, cuts)
    elif group.size() > 1:
        check_summed(mapping, axes)
    for path, parameters in whole.items():
        module_at(model, path).update(parameters)
    mapping.dense.update({key: module_at(model, key) for key in mapping.dense})
    mapping.stored.clear()  # parts of tensors
    return cuts


def _cut(path: str, weight: mx.array, axis: int | None, shape: tuple[int, int]) -> Cut:
    """What a rank keeps of a weight of this shape, ``[out, in]``, of which it holds these indices along an axis."""
    out_features, in_features = shape
    if axis is None:
        return Cut(in_features, out_features)
    kept = np.array(weight)
    kept = kept.reshape(-1, max(kept.shape[-2:]))
    if (kept != kept[0]).any():
        raise ValueError(f"{path}: experts are split differently from each other")
    blocks = _blocks(path, kept[0], in_features if axis == -1 else out_features)
    if axis == -1:
        return Cut(kept.shape[1], out_features, rows=blocks)
    return Cut(in_features, kept.shape[1], columns=blocks)


def _stored_bias(mapping: WeightMap, path: str, shape: tuple[int, ...]) -> mx.array:
    """The bias of a linear, or of the experts' projection, as the checkpoint has it, in logical sizes."""
    if path in mapping.linears:
        return load_bias(mapping.linears[path], shape[-1])
    parent, _, projection = path.rpartition(".")
    return mx.stack([load_bias(source, shape[-1]) for source in mapping.experts[parent][projection]])


def load_bias(source: LinearSource, size: int) -> mx.array:
    """The bias of a source in float32, cut to its logical size."""
    values = source.quantized.load_bias(source.blocks)
    assert values is not None, source.linear.name  # map_weights: the model has a bias where the checkpoint has one
    return values[:size].astype(mx.float32)


def _check_experts(mapping: WeightMap, cuts: dict[str, Cut]) -> None:
    for path, projections in mapping.experts.items():
        *reading, down = (cuts[f"{path}.{projection}"] for projection in projections)
        if any(cut.rows or cut.columns != down.rows for cut in reading) or down.columns:
            *names, last = projections
            raise ValueError(
                f"{path}: {' and '.join(names)} must be split along outputs and {last} along its inputs, all alike"
            )


def _make_linear(host: Host, cuts: dict[str, Cut], group: mx.distributed.Group) -> MakeLinear:
    def make(path: str, module: nn.Module, source: LinearSource) -> TrellisLinear:
        w = cuts[path].load(source, module.get("bias"))
        if isinstance(module, AllToShardedLinear):
            return host.all_to_sharded(w, group)
        if isinstance(module, ShardedToAllLinear):
            return host.sharded_to_all(w, group)
        return host.linear(w)

    return make


def _make_experts(host: Host, cuts: dict[str, Cut]) -> MakeExperts:
    def make(path: str, module: nn.Module, sources: dict[str, list[LinearSource]]) -> nn.Module:
        stacks: dict[str, ExpertStack] = {}
        for projection, listed in sources.items():
            cut, bias = cuts[f"{path}.{projection}"], module[projection].get("bias")
            weights = [cut.load(s, None if bias is None else bias[e]) for e, s in enumerate(listed)]
            stacks[projection] = ExpertStack.of(projection, weights)
        return make_experts(host, module, stacks)

    return make


def open_sharded(
    model_path: Path,
    pipeline_group: mx.distributed.Group | None,
    tensor_group: mx.distributed.Group | None,
    parallel: str = "tensor",
    host: Host = MLX_LM,
) -> tuple[nn.Module, dict, WeightMap, Makers]:
    """This rank's part of a model: everything checked, nothing read.

    Without a group, the tensor parallelism of the model is used, or else its pipeline, as mlx-lm does.

    Args:
        model_path: The checkpoint's directory.
        pipeline_group: Ranks of which each has some of the layers.
        tensor_group: Ranks of which each has a part of each layer.
        parallel: How the latter share the experts, one of ``expert_parallel.PARALLEL``. Default: ``"tensor"``.
        host: Whose model. Default: mlx-lm's.

    Returns:
        The model, its config, where its weights go, and keywords for :func:`fill`.

    Raises:
        ValueError: If the model cannot be loaded, or not split this way.
    """
    model, config, mapping = open_checkpoint(model_path, host=host)
    staged, can_shard = host.pipelines(model), host.splits(model) is not None
    if pipeline_group is tensor_group is None:
        tensor_group = mx.distributed.init() if can_shard or parallel == "experts" else None
        pipeline_group = mx.distributed.init() if tensor_group is None else None
    if tensor_group is not None and not can_shard and parallel == "tensor":
        other = "; its experts can be shared: expert parallelism" if mapping.experts else ""
        raise ValueError(f"{type(model).__module__} has no tensor parallelism{other}")
    if pipeline_group is not None and staged is None:
        raise ValueError(f"{type(model).__module__} has no pipeline parallelism")
    if tensor_group is None and parallel != "tensor":
        raise ValueError(f"parallel={parallel!r} is for ranks that all have a part of each layer, not for a pipeline")
    makers: Makers = {}
    if tensor_group is not None and can_shard:
        cuts = split(model, build(model_path, config, host), mapping, tensor_group, parallel)
        whole = make_local_experts(host, tensor_group, block_sums=True)
        experts = _make_experts(host, cuts) if parallel == "tensor" else whole
        makers = {"make_linear": _make_linear(host, cuts, tensor_group), "make_experts": experts}
    elif tensor_group is not None:
        check_ways(mapping, tensor_group, parallel)
        makers = {"make_experts": make_local_experts(host, tensor_group, block_sums=False)}
    if pipeline_group is not None and staged is not None:
        try:
            staged.pipeline(pipeline_group)
        except MODEL_ERRORS as error:
            raise ValueError(
                f"{type(model).__module__} cannot be split into {pipeline_group.size()} stages: {error}"
            ) from error
    return model, config, mapping, makers


def load_part(
    model_path: Path,
    pipeline_group: mx.distributed.Group | None,
    tensor_group: mx.distributed.Group | None,
    parallel: str,
    prepare: Callable[[dict], Result],
    *,
    host: Host = MLX_LM,
    dtype: mx.Dtype | None = None,
    accuracy: str = "float32",
    progress: LayerProgress | None = None,
) -> tuple[nn.Module, dict, Result]:
    """This rank's part of a model; the ranks wait for each other at the end.

    Args:
        model_path, pipeline_group, tensor_group, parallel, host: As for :func:`open_sharded`.
        prepare: Called with the config when everything is checked and nothing is read.
        dtype, accuracy, progress: As for :func:`~mlx_marlin.lm.model.load_exl3_model`.

    Returns:
        The model, its config, and what ``prepare`` returned.
    """
    with unchanged(model_path):
        model, config, mapping, makers = open_sharded(model_path, pipeline_group, tensor_group, parallel, host)
        prepared = prepare(config)
        fill(model, mapping, config, dtype, accuracy, progress=progress, **makers)
    report(model, mapping)
    # All ranks wait for the slowest here, so that the first message of one does not time out.
    mx.eval(mx.distributed.all_sum(mx.array(1.0), stream=mx.cpu))
    return model, config, prepared


def sharded_load(
    repo: str,
    pipeline_group: mx.distributed.Group | None = None,
    tensor_group: mx.distributed.Group | None = None,
    return_config: bool = False,
    *,
    tokenizer_config: dict | None = None,
    trust_remote_code: bool = False,
    parallel: str = "tensor",
    dtype: mx.Dtype | None = None,
    accuracy: str | None = None,
    progress: LayerProgress | None = None,
) -> tuple[nn.Module, TokenizerWrapper] | tuple[nn.Module, TokenizerWrapper, dict]:
    """``mlx_lm.utils.sharded_load`` for EXL3 checkpoints; same arguments, two of :func:`load`, and one more.

    Args:
        parallel: How ranks of a ``tensor_group`` share the experts: ``"tensor"``, each has a part of every one, or
            ``"experts"``, each has some whole ones and reads no others. Default: ``"tensor"``.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If the model cannot be loaded, or not split this way. Nothing has been read by then.
    """
    model_path = fetch(repo)

    def tokenizer_of(config: dict) -> TokenizerWrapper:
        check_tokenizer(model_path)
        settings = tokenizer_config or {"trust_remote_code": trust_remote_code}
        return load_tokenizer(model_path, settings, eos_token_ids=config.get("eos_token_id"))

    model, config, tokenizer = load_part(
        model_path, pipeline_group, tensor_group, parallel, tokenizer_of,
        dtype=dtype, accuracy=product_accuracy(accuracy), progress=progress,
    )  # fmt: skip
    return (model, tokenizer, config) if return_config else (model, tokenizer)
