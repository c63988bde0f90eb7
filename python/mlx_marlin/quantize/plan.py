"""What was measured of a layer's linears, as JSON; and the plan that it leads to, as a table that may be edited."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from .. import codec
from .allocation import MODES, Allocation, Item

_COMMENT = "#"
_SHOWN = 3  # of the linears that a table leaves out


def items_value(items: list[Item], energy: float) -> dict:
    """A layer's measurement as a JSON value."""
    rows = [
        [i.name, i.group, i.weights, list(i.bits.items()), [[k, v.hex()] for k, v in i.loss.items()]] for i in items
    ]
    return {"energy": energy.hex(), "items": rows}


def items_from(value: dict) -> tuple[list[Item], float]:
    """Inverse of :func:`items_value`."""
    items = [
        Item(name, group, weights, dict(bits), {k: float.fromhex(v) for k, v in loss})
        for name, group, weights, bits, loss in value["items"]
    ]
    return items, float.fromhex(value["energy"])


def plan_table(allocation: Allocation, notes: Sequence[str] = ()) -> str:
    """The plan as a table: one line per linear, after what is done with parts that no text model uses.

    :func:`read_table` reads the first two columns.
    """
    gap = allocation.loss / allocation.bound - 1 if allocation.bound > 0 else 0.0
    lines = [
        f"bits per weight {allocation.bits:.4f}   loss {allocation.loss:.6g}   within {100 * gap:.3g} % of the bound",
        *notes,
        f"{'linear':60} {'K':>3} {'weights':>10} {'loss':>12} {'share of loss':>14}",
    ]
    lines = [f"{_COMMENT} {line}" for line in lines]
    for item in allocation.items:
        k = allocation.widths[item.name]
        share = item.loss[k] / allocation.loss if allocation.loss else 0.0
        lines.append(f"{item.name:62} {k!s:>3} {item.weights:10d} {item.loss[k]:12.4g} {100 * share:13.3f}%")
    return "\n".join(lines) + "\n"


def read_table(path: Path, groups: Mapping[str, str], allowed: Sequence[float], mixed: str) -> dict[str, float]:
    """The widths of a table: on each line a linear's name, its K, and what else may follow; ``#`` begins a comment.

    Args:
        path: The file.
        groups: Every linear of the model, by name: what shares its K in the modes ``per-layer`` and ``uniform``.
        allowed: The widths that a linear may have.
        mixed: One of :data:`MODES`.

    Returns:
        K of each linear, by name.

    Raises:
        ValueError: If the table is not fit; the message names the line, what it gives and what is wanted.
        OSError: If the file cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from None
    widths: dict[str, float] = {}
    lines: dict[str, int] = {}
    shared: dict[str, str] = {}  # the first linear of each group
    for number, line in enumerate(text.splitlines(), 1):
        fields = line.partition(_COMMENT)[0].split()
        if not fields:
            continue
        try:
            name, k = _entry(fields, groups, allowed)
            if name in lines:
                raise ValueError(f"{name} has a K already, on line {lines[name]}; one line for each linear is wanted")
            first = shared.setdefault(groups[name], name)
            if mixed != MODES[0] and widths.get(first, k) != k:
                raise ValueError(
                    f"{name} is given {k}, but {first} on line {lines[first]} {widths[first]}; "
                    f"with {mixed} all of {groups[name]} want one K"
                )
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
        widths[name], lines[name] = k, number
    _check_complete(path, widths, groups)
    return widths


def _entry(fields: Sequence[str], groups: Mapping[str, str], allowed: Sequence[float]) -> tuple[str, float]:
    """Name and K of a line."""
    name = fields[0]
    if name not in groups:
        close = difflib.get_close_matches(name, groups, 1)
        hint = f"; the nearest is {close[0]}" if close else ""
        raise ValueError(f"the model has no linear {name}{hint}; a linear's name and its K are wanted")
    if len(fields) < 2:
        raise ValueError(f"{name} is given no K; one of {_listed(allowed)} is wanted")
    try:
        k = codec.as_width(float(fields[1]))
    except ValueError:
        k = 0
    if k not in allowed:
        raise ValueError(f"K of {name} is {fields[1]}; one of {_listed(allowed)} is wanted")
    return name, k


def _listed(widths: Iterable[float]) -> str:
    return ", ".join(map(str, widths))


def _check_complete(path: Path, widths: Mapping[str, float], groups: Mapping[str, str]) -> None:
    missing = [name for name in groups if name not in widths]
    if missing:
        shown = ", ".join(missing[:_SHOWN])
        more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
        raise ValueError(
            f"{path} has {len(widths)} of the model's {len(groups)} linears; lines are wanted for {shown}{more}"
        )
