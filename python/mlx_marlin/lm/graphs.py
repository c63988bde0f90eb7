"""What MLX's drawings of graphs tell of arrays that nothing was computed of yet."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable

import mlx.core as mx


def changed(inputs: dict[str, mx.array]) -> set[str]:
    """Names of the lazy arrays that are no longer what their file holds: some model code adds to an array in place."""
    labels = {f"input{i}": name for i, name in enumerate(inputs)}
    graph = io.StringIO()
    mx.export_to_dot(graph, *inputs.values(), **dict(zip(labels, inputs.values())))
    text = graph.getvalue()
    loads = set(re.findall(r'(\d+) \[label ="Load"', text))
    makers = re.findall(r'^(\d+) -> "(input\d+)"', text, re.MULTILINE)
    return set(inputs) - {labels[label] for maker, label in makers if maker in loads}


def unread(inputs: dict[str, mx.array], outputs: Iterable[mx.array]) -> list[str]:
    """Names of the lazy arrays that nothing in the outputs is computed from, by MLX's drawing of the graph."""
    labels = {f"input{i}": name for i, name in enumerate(inputs)}
    graph = io.StringIO()
    # Another step behind each output, so that an array that is passed through has a reader as well.
    ends = [mx.expand_dims(value, 0) for value in outputs]
    mx.export_to_dot(graph, *ends, **dict(zip(labels, inputs.values())))
    read = set(re.findall(r'^"(input\d+)" ->', graph.getvalue(), re.MULTILINE))
    return [name for label, name in labels.items() if label not in read]
