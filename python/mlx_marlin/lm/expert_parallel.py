"""Whole experts on each rank, in the place of a part of every one.

All else is split as in tensor parallelism: where a host's model sums parts of all experts over the ranks, it sums
experts. Of models without tensor parallelism only the experts are shared, and summed where they are.
"""

from __future__ import annotations

from collections.abc import Mapping

import mlx.core as mx
import mlx.nn as nn

from .experts import kind_of, unquantized_experts, whole_experts
from .host import Host
from .mapping import WeightMap
from .model import MakeExperts
from .placeholders import LinearSource

PARALLEL = ("tensor", "experts")
"""How ranks that all have a part of each layer share the experts: a part of every one, or some whole ones."""


def check_ways(mapping: WeightMap, group: mx.distributed.Group, parallel: str) -> None:
    """See that a way of sharing experts is one, and that these can be shared so.

    Raises:
        ValueError: If not.
    """
    if parallel not in PARALLEL:
        raise ValueError(f"parallel must be one of {', '.join(PARALLEL)}, got {parallel!r}")
    if parallel == "experts" and not mapping.experts:
        raise ValueError("the model has no quantized experts to share among the ranks; use tensor parallelism")
    for path, sources in mapping.experts.items():
        count = len(next(iter(sources.values())))
        if parallel == "experts" and count < group.size():
            raise ValueError(f"{path} has {count} experts, fewer than {group.size()} ranks; use fewer ranks")
        if parallel == "tensor" and any(unquantized_experts(sources)):
            raise ValueError(
                f"{path}: some of its experts are not quantized, and such a layer cannot be split over ranks; use "
                "expert or pipeline parallelism"
            )


def check_summed(mapping: WeightMap, axes: Mapping[str, int]) -> None:
    """See that the block around experts sums over the ranks: where the model's class splits them, it does.

    Args:
        mapping: Which experts there are.
        axes: The axis along which the class splits each projection.

    Raises:
        ValueError: If it does not.
    """
    for path, sources in mapping.experts.items():
        split_along = sorted(axes.get(f"{path}.{projection}", 0) for projection in sources)
        if split_along != [-2] * (len(sources) - 1) + [-1]:
            raise ValueError(f"{path}: the model does not sum its experts over ranks; use pipeline parallelism")


def make_local_experts(host: Host, group: mx.distributed.Group, block_sums: bool) -> MakeExperts:
    """Makes what stands for the experts at a path, from the module there and its sources; reads this rank's alone.

    Args:
        host: Whose model.
        group: The ranks.
        block_sums: Whether the block around the experts sums over them.
    """

    def make(path: str, module: nn.Module, sources: dict[str, list[LinearSource]]) -> nn.Module:
        total = len(next(iter(sources.values())))
        first, last = (total * rank // group.size() for rank in (group.rank(), group.rank() + 1))
        mine = {projection: every[first:last] for projection, every in sources.items()}
        local, experts = kind_of(host, module).local, whole_experts(host, path, module, mine)
        return local(experts, first, last - first, None if block_sums else group)

    return make
