"""Where the weights of one expert lie in a tensor that a checkpoint holds of all experts of a layer.

mlx-lm's code takes such tensors apart in many ways: halves or every second row for gate and up, transposed or not. What
it does is found by showing it the numbers of the elements of one expert in place of their values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..storage.safetensors import TensorInfo
from .packed import PackedTensor

_ELEMENT_BITS = 40  # of a number: which element of a tensor; above these, which tensor


@dataclass(frozen=True)
class Slice:
    """Evenly spaced elements of a matrix.

    Attributes:
        start: The first, counted along the rows.
        shape: Rows and columns of the result.
        steps: From one of its rows, and of its columns, to the next.
    """

    start: int
    shape: tuple[int, ...]
    steps: tuple[int, ...]

    def of(self, values: np.ndarray) -> np.ndarray:
        """The elements, a view of a contiguous array."""
        flat = values.reshape(-1)[self.start :]
        return np.lib.stride_tricks.as_strided(flat, self.shape, [step * flat.itemsize for step in self.steps])


def numbers_made(
    model: nn.Module,
    tensors: Mapping[str, TensorInfo | PackedTensor],
    arrays: Mapping[str, mx.array],
    stacks: Sequence[str],
) -> dict[str, mx.array]:
    """What a model makes of the numbers of the elements of one expert, for some of its stacks, lazily.

    Args:
        model: mlx-lm's.
        tensors: The checkpoint's.
        arrays: These, lazily.
        stacks: Paths of parameters; nothing is made of those that the model cannot make so.
    """
    from ..lm.host import MODEL_ERRORS  # needs mlx-lm

    if not stacks:
        return {}
    given = dict(arrays)
    for number, (name, info) in enumerate(tensors.items()):
        if len(info.shape) == 3:  # those of all experts, and few others
            size = info.shape[1] * info.shape[2]
            numbers = mx.arange(size, dtype=mx.int64) + (number << _ELEMENT_BITS)
            given[name] = numbers.reshape(1, *info.shape[1:])
    try:
        made = model.sanitize(given) if hasattr(model, "sanitize") else given
    except (KeyError, *MODEL_ERRORS):
        return {}  # it looks at how many experts there are, or at values
    return {path: made[path] for path in stacks if path in made}


def found_slice(numbers: mx.array, tensors: Mapping[str, TensorInfo | PackedTensor]) -> tuple[str, Slice] | None:
    """The tensor that an expert's matrix is taken from, and which elements; ``None`` if they are not evenly spaced.

    Args:
        numbers: Of :func:`numbers_made`, int64 ``[1, rows, columns]``.
        tensors: The checkpoint's.
    """
    if numbers.dtype != mx.int64 or numbers.ndim != 3 or len(numbers) != 1 or not numbers.size:
        return None
    (values,) = np.array(numbers)
    name, info = list(tensors.items())[int(values[0, 0]) >> _ELEMENT_BITS]
    values &= (1 << _ELEMENT_BITS) - 1
    first = int(values[0, 0])
    steps = tuple(int(line[1]) - first if len(line) > 1 else 0 for line in (values[:, 0], values[0]))
    rows, columns = (np.arange(length) for length in values.shape)
    evenly = first + steps[0] * rows[:, None] + steps[1] * columns
    if not np.array_equal(values, evenly) or values.max() >= info.shape[1] * info.shape[2]:
        return None
    return name, Slice(first, values.shape, steps)
