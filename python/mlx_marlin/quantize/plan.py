"""What was measured of a layer's linears, as JSON; and the plan that it leads to, as a table."""

from __future__ import annotations

from collections.abc import Sequence

from .allocate import Allocation, Item


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


def plan_table(items: list[Item], allocation: Allocation, notes: Sequence[str] = ()) -> str:
    """The plan as a readable table: one line per linear, after what is done with parts that no text model uses."""
    gap = allocation.loss / allocation.bound - 1 if allocation.bound > 0 else 0.0
    lines = [
        f"bits per weight {allocation.bits:.4f}   loss {allocation.loss:.6g}   within {100 * gap:.3g} % of the bound",
        *notes,
        f"{'linear':60} {'weights':>10} {'K':>3} {'loss':>12} {'share of loss':>14}",
    ]
    for item in items:
        k = allocation.widths[item.name]
        share = item.loss[k] / allocation.loss if allocation.loss else 0.0
        lines.append(f"{item.name:60} {item.weights:10d} {k!s:>3} {item.loss[k]:12.4g} {100 * share:13.3f}%")
    return "\n".join(lines) + "\n"
