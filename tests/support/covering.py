"""Few choices of values that together have every pair."""

from __future__ import annotations

from itertools import combinations, product


def covering_array(axes: dict[str, tuple], legal=lambda values: True) -> list[dict]:
    """Rows that together contain every legal pair of values of any two axes. Greedy and deterministic.

    Args:
        axes: The values of each axis.
        legal: Whether a partial row may occur; two values that may not occur together need no row.
    """
    open_pairs = {
        pair: None  # a dictionary keeps the order, which makes the result deterministic
        for (a, left), (b, right) in combinations(axes.items(), 2)
        for pair in product(product((a,), left), product((b,), right))
        if legal(dict(pair))
    }
    rows = []
    while open_pairs:
        row = dict(next(iter(open_pairs)))
        for axis in sorted(set(axes) - set(row), key=list(axes).index):

            def gain(value, axis=axis):
                return sum(_pair(axes, axis, value, a, v) in open_pairs for a, v in row.items())

            # Ties go to another value in each row, so that no value is favoured.
            turn = len(rows) % len(axes[axis])
            choices = axes[axis][turn:] + axes[axis][:turn]
            row[axis] = max((v for v in choices if legal({**row, axis: v})), key=gain)
        for a, b in combinations(axes, 2):
            open_pairs.pop(((a, row[a]), (b, row[b])), None)
        rows.append({axis: row[axis] for axis in axes})
    return rows


def _pair(axes: dict, a: str, left, b: str, right) -> tuple:
    order = list(axes)
    pair = ((a, left), (b, right))
    return pair if order.index(a) < order.index(b) else pair[::-1]
