"""Tensor and pipeline parallel loading of EXL3 checkpoints, with mlx-lm's own ``shard`` and ``pipeline``.

mlx-lm splits dense weights. It is shown index arrays instead: first lazy weights of the true shapes, of
which only the shapes afterwards are looked at, to learn which axis of each weight it splits; then arrays
that hold the index along that axis, to learn which indices this rank keeps. The trellis tensors are then cut
at the same places. An output split takes trellis columns and svh, an input split trellis rows and suh; both
must fall on 128-blocks, because the Hadamard transforms mix inside those.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.nn.layers.distributed import AllToShardedLinear, ShardedToAllLinear, sum_gradients
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..codec import HADAMARD_SIZE
from ..layers.linear import TrellisLinear
from ..storage.untrusted import unchanged
from ..weights.experts import ExpertStack
from ..weights.trellis import TrellisWeight
from .experts import load_source, make_experts, unquantized_experts
from .host import MODEL_ERRORS, Host
from .hub import fetch
from .mapping import WeightMap
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


class AllToShardedTrellisLinear(TrellisLinear):
    """Each rank computes some of the outputs."""

    def __init__(self, w: TrellisWeight, group: mx.distributed.Group):
        super().__init__(w)
        self._group = group

    def __call__(self, x: mx.array) -> mx.array:
        return super().__call__(sum_gradients(self._group)(x))


class ShardedToAllTrellisLinear(TrellisLinear):
    """Each rank has some of the inputs; the results are summed, and the bias is added once."""

    def __init__(self, w: TrellisWeight, group: mx.distributed.Group):
        bias, w.bias = w.bias, None
        super().__init__(w)
        self._group = group
        if bias is not None:
            self.summed_bias = bias[: w.out_features]

    def __call__(self, x: mx.array) -> mx.array:
        y = mx.distributed.all_sum(super().__call__(x), group=self._group)
        return y + self.summed_bias.astype(y.dtype) if "summed_bias" in self else y


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


def _shard(model: nn.Module, group: mx.distributed.Group) -> None:
    try:
        model.shard(group)
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


def _split_axes(model: nn.Module, targets: dict[str, LinearSource], group: mx.distributed.Group) -> dict[str, int]:
    """Split the untouched model and see which axis of each weight got shorter: -2 (outputs) or -1 (inputs)."""
    before = {path: module_at(model, path).weight.shape for path in targets}
    _shard(model, group)
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


def split(model: nn.Module, probe: nn.Module, mapping: WeightMap, group: mx.distributed.Group) -> dict[str, Cut]:
    """Split a model for this rank, without reading a weight.

    Args:
        model: The model that ``mapping`` was made for; mlx-lm's ``shard`` is applied to it.
        probe: Another instance of it, which is used up.
        mapping: Where everything goes. Its dense arrays are replaced by this rank's.
        group: The ranks.

    Returns:
        What this rank keeps of every quantized weight, by path of the linear or of the experts' projection.

    Raises:
        ValueError: If mlx-lm cannot split the model this way, or a trellis cannot be cut where it splits.
    """
    for path, sources in mapping.experts.items():
        if any(unquantized_experts(sources)):
            raise ValueError(
                f"{path}: some of its experts are not quantized, and such a layer cannot be split over ranks; use "
                "pipeline parallelism"
            )
    for path in (*mapping.joined, *mapping.grouped):
        raise ValueError(f"{path} is quantized in parts, and such a linear cannot be split over ranks")
    cuts, targets = {}, _targets(mapping)
    axes = _split_axes(probe, targets, group)
    model.load_weights(list(mapping.dense.items()), strict=False)
    shapes = {path: module_at(model, path).weight.shape[-2:] for path in targets}
    for path in targets:
        module = module_at(model, path)
        if path in axes:
            _put_indices(module, axes[path])
        if "bias" in module:
            module.bias = _stored_bias(mapping, path, module.bias.shape)
    _shard(model, group)
    for path in targets:
        out_features, in_features = shapes[path]
        cut = Cut(in_features, out_features)
        if path in axes:
            kept = np.array(module_at(model, path).weight)
            kept = kept.reshape(-1, max(kept.shape[-2:]))
            if (kept != kept[0]).any():
                raise ValueError(f"{path}: experts are split differently from each other")
            blocks = _blocks(path, kept[0], in_features if axes[path] == -1 else out_features)
            if axes[path] == -1:
                cut = Cut(kept.shape[1], out_features, rows=blocks)
            else:
                cut = Cut(in_features, kept.shape[1], columns=blocks)
        cuts[path] = cut
    _check_experts(mapping, cuts)
    mapping.dense.update({key: module_at(model, key) for key in mapping.dense})
    mapping.stored.clear()  # parts of tensors
    return cuts


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


def _make_linear(cuts: dict[str, Cut], group: mx.distributed.Group) -> MakeLinear:
    def make(path: str, module: nn.Module, source: LinearSource) -> TrellisLinear:
        w = cuts[path].load(source, module.get("bias"))
        if isinstance(module, AllToShardedLinear):
            return AllToShardedTrellisLinear(w, group)
        if isinstance(module, ShardedToAllLinear):
            return ShardedToAllTrellisLinear(w, group)
        return TrellisLinear(w)

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
    model_path: Path, pipeline_group: mx.distributed.Group | None, tensor_group: mx.distributed.Group | None
) -> tuple[nn.Module, dict, WeightMap, Makers]:
    """This rank's part of a model: everything checked, nothing read.

    Without a group, the tensor parallelism of the model is used, or else its pipeline, as mlx-lm does.

    Returns:
        The model, its config, where its weights go, and keywords for :func:`fill`.

    Raises:
        ValueError: If the model cannot be loaded, or not split this way.
    """
    model, config, mapping = open_checkpoint(model_path)
    can_pipeline, can_shard = hasattr(getattr(model, "model", None), "pipeline"), hasattr(model, "shard")
    if pipeline_group is tensor_group is None:
        tensor_group = mx.distributed.init() if can_shard else None
        pipeline_group = None if can_shard else mx.distributed.init()
    if tensor_group is not None and not can_shard:
        raise ValueError(f"{type(model).__module__} has no tensor parallelism")
    if pipeline_group is not None and not can_pipeline:
        raise ValueError(f"{type(model).__module__} has no pipeline parallelism")
    makers: Makers = {}
    if tensor_group is not None:
        cuts = split(model, build(model_path, config), mapping, tensor_group)
        makers = {"make_linear": _make_linear(cuts, tensor_group), "make_experts": _make_experts(mapping.host, cuts)}
    if pipeline_group is not None:
        try:
            model.model.pipeline(pipeline_group)
        except MODEL_ERRORS as error:
            raise ValueError(
                f"{type(model).__module__} cannot be split into {pipeline_group.size()} stages: {error}"
            ) from error
    return model, config, mapping, makers


def sharded_load(
    repo: str,
    pipeline_group: mx.distributed.Group | None = None,
    tensor_group: mx.distributed.Group | None = None,
    return_config: bool = False,
    *,
    tokenizer_config: dict | None = None,
    trust_remote_code: bool = False,
    dtype: mx.Dtype | None = None,
    accuracy: str | None = None,
    progress: LayerProgress | None = None,
) -> tuple[nn.Module, TokenizerWrapper] | tuple[nn.Module, TokenizerWrapper, dict]:
    """``mlx_lm.utils.sharded_load`` for EXL3 checkpoints; same arguments, and two of :func:`load`.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If the model cannot be loaded, or not split this way. Nothing has been read by then.
    """
    accuracy = product_accuracy(accuracy)
    model_path = fetch(repo)
    with unchanged(model_path):
        model, config, mapping, makers = open_sharded(model_path, pipeline_group, tensor_group)
        check_tokenizer(model_path)
        tokenizer = load_tokenizer(
            model_path,
            tokenizer_config or {"trust_remote_code": trust_remote_code},
            eos_token_ids=config.get("eos_token_id"),
        )
        fill(model, mapping, config, dtype, accuracy, progress=progress, **makers)
    report(model, mapping)
    # All ranks wait for the slowest here, so that the first message of one does not time out.
    mx.eval(mx.distributed.all_sum(mx.array(1.0), stream=mx.cpu))
    return (model, tokenizer, config) if return_config else (model, tokenizer)
