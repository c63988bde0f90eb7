"""What MLX's drawings of graphs tell of arrays that nothing was computed of yet."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator, Sequence

import mlx.core as mx

# A function that nanobind binds takes no more keywords than 1024.
_MOST_NAMES = 1000


def _drawings(inputs: dict[str, mx.array], ends: Sequence[mx.array] | None) -> Iterator[tuple[dict[str, str], str]]:
    """Labels of some of the inputs with their names, and a drawing that has them; of all inputs, by turns.

    Args:
        inputs: Arrays by name.
        ends: What is drawn. ``None``: the inputs themselves.
    """
    names = list(inputs)
    for begin in range(0, len(names), _MOST_NAMES):
        some = names[begin : begin + _MOST_NAMES]
        labels = {f"input{i}": name for i, name in enumerate(some)}
        named, graph = {label: inputs[name] for label, name in labels.items()}, io.StringIO()
        mx.export_to_dot(graph, *(named.values() if ends is None else ends), **named)
        yield labels, graph.getvalue()


def changed(inputs: dict[str, mx.array]) -> set[str]:
    """Names of the lazy arrays that are no longer what their file holds: some model code adds to an array in place."""
    found = set(inputs)
    for labels, text in _drawings(inputs, None):
        loads = set(re.findall(r'(\d+) \[label ="Load"', text))
        makers = re.findall(r'^(\d+) -> "(input\d+)"', text, re.MULTILINE)
        found -= {labels[label] for maker, label in makers if maker in loads}
    return found


def unread(inputs: dict[str, mx.array], outputs: Iterable[mx.array]) -> list[str]:
    """Names of the lazy arrays that nothing in the outputs is computed from, by MLX's drawing of the graph."""
    # Another step behind each output, so that an array that is passed through has a reader as well.
    ends, found = [mx.expand_dims(value, 0) for value in outputs], []
    for labels, text in _drawings(inputs, ends):
        read = set(re.findall(r'^"(input\d+)" ->', text, re.MULTILINE))
        found += [name for label, name in labels.items() if label not in read]
    return found
