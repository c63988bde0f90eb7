"""What a profile's lookup table answers for a batch size, a hidden size and bit widths. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from .. import codec, kernels
from ..kernels import KernelConfig, Problem
from ..kernels.metal import LARGE_BATCH_COLUMNS
from ..kernels.search_space import SIMDGROUPS, TILE_SIZES, nearest_width
from .schema import AutotuneConfig, LookupTable, projected, table_key


def distinct_widths(bit_widths: Iterable[float]) -> tuple[float, ...]:
    """Sorted distinct bit widths.

    Raises:
        ValueError: If there are none, or the format has not one of them.
    """
    widths = {codec.as_width(b, "bit_widths") for b in bit_widths}
    if not widths:
        raise ValueError("bit_widths must have one or more widths, got none")
    return tuple(sorted(widths))


def find(
    profile: AutotuneConfig,
    device: str,
    batch_size: int,
    hidden: int,
    widths: tuple[float, ...],
    wanted: Callable[[KernelConfig], bool] | None = None,
) -> KernelConfig | None:
    """What a profile's table says: see :func:`search_table`; neighbours only where they can run.

    Args:
        device: Of profiles without a fingerprint.
        wanted: Which configs count. Default: ``None``, all.
    """
    on = profile.fingerprint.device if profile.fingerprint else device
    problem = _stand_in(batch_size, hidden, widths, on)
    table = profile.lookup_table
    if wanted is not None:
        table = {
            b: {h: {w: c for w, c in cell.items() if wanted(c)} for h, cell in row.items()} for b, row in table.items()
        }
    return search_table(table, batch_size, hidden, widths, lambda c: kernels.fitted(problem, c) is not None)


def by_distance(keys: Iterable[int], target: int) -> list[int]:
    """Keys by absolute distance to a target, the smaller first where two are equally far."""
    return sorted(keys, key=lambda key: (abs(key - target), key))


def search_table(
    table: LookupTable, batch_size: int, hidden: int, widths: tuple[float, ...], accept: Callable[[KernelConfig], bool]
) -> KernelConfig | None:
    """Exact match, then the nearest batch size, then the nearest hidden size; neighbours only where accepted."""
    exact = table.get(batch_size, {}).get(hidden, {}).get(widths)
    if exact is not None:
        return exact
    hiddens = {h for row in table.values() for h in row}
    for near_hidden in by_distance(hiddens, hidden):
        for batch in by_distance(table, batch_size):
            config = table[batch].get(near_hidden, {}).get(widths)
            if config is not None and accept(config):
                return config
    return None


def table_of(profile: AutotuneConfig, kind: str) -> LookupTable:
    """What a profile's table says about problems of one kind. Cells that no problem stands behind are of experts
    of three matrices.
    """
    if kind != "swiglu":
        return projected({p: e for p, e in profile.problems.items() if p.kind == kind})
    keys = {gated: {table_key(p) for p in profile.problems if (p.kind == "swiglu") == gated} for gated in (False, True)}
    others = keys[False] - keys[True]
    return {
        batch: {h: {w: c for w, c in cell.items() if (batch, h, w) not in others} for h, cell in row.items()}
        for batch, row in profile.lookup_table.items()
    }


def default_entry(profile: AutotuneConfig, batch_size: int, widths: Iterable[float]) -> KernelConfig:
    """The default of the widest bit width present: tiles and simdgroups by the profile's mappings, variant by rows."""
    variant = kernels.default_variant(batch_size)
    widest = max(widths)
    rows = nearest_width(profile.tile_size_mapping or TILE_SIZES, widest)
    columns = LARGE_BATCH_COLUMNS if variant == "large_batch" else rows
    simdgroups = nearest_width(profile.simdgroup_mapping or SIMDGROUPS, widest)
    return KernelConfig(kernels.make_name(variant), rows, columns, simdgroups, True, variant)


def _stand_in(rows: int, hidden: int, widths: tuple[float, ...], device: str) -> Problem:
    """A problem with the key of a table cell, for asking which configs can run."""
    bits = [(b, b, b) for b in widths]
    return Problem.swiglu(hidden, hidden, rows=rows, experts=len(widths), bits=bits, device=device)
