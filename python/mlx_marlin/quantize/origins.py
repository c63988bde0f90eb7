"""Gives a model the tensors of a checkpoint, and tells which tensors its parameters are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..loader.contents import parts_of
from ..storage.safetensors import FLOATS, TensorInfo
from .source import Source


@contextmanager
def _watched_stacks(known: dict[int, str]) -> Iterator[dict[int, tuple[mx.array, list[str]]]]:
    """What is stacked of whole tensors of a checkpoint: by id the stack, and the tensors' names.

    Args:
        known: The tensors' names by id.
    """
    made: dict[int, tuple[mx.array, list[str]]] = {}
    plain = mx.stack

    def stack(arrays: list[mx.array], axis: int = 0, **keywords: Any) -> mx.array:
        result = plain(arrays, axis, **keywords)
        names = [known[id(array)] for array in arrays if id(array) in known]
        if axis == 0 and len(names) == len(arrays):
            made[id(result)] = result, names
        return result

    setattr(mx, "stack", stack)  # noqa: B010  # of a module
    try:
        yield made
    finally:
        setattr(mx, "stack", plain)  # noqa: B010


def load_weights(model: nn.Module, source: Source, layers: int) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Give a model the checkpoint's tensors, lazily.

    Returns:
        Of the parameters that are tensors of the checkpoint as they are: path -> name. Of those that can be read in
        parts along their first axis: path -> the tensors, one of each part or one of all.

    Raises:
        ValueError: If they do not fit.
    """
    from ..lm.host import MODEL_ERRORS  # needs mlx-lm

    arrays = source.arrays()
    known = {id(array): name for name, array in arrays.items()}
    model_name = type(model).__module__
    try:
        with _watched_stacks(known) as made:
            weights = model.sanitize(dict(arrays)) if hasattr(model, "sanitize") else dict(arrays)
    except KeyError as error:
        raise ValueError(
            f"{source.path}: {model_name} looks for {error}, which the checkpoint does not have"
        ) from error
    except MODEL_ERRORS as error:
        raise ValueError(
            f"{source.path}: {model_name} cannot take these tensors: {type(error).__name__}: {error}"
        ) from error
    parameters: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
    left_out = parts_of((*weights, *arrays), layers)
    origins, stacked = {}, {}
    for path in list(weights):
        name = known.get(id(weights[path]))
        if id(weights[path]) in made:
            stacked[path] = made[id(weights[path])][1]
        if path not in parameters and (path in left_out or name in left_out):
            del weights[path]
        elif name is not None:
            origins[path] = name
            if isinstance(source.tensors[name], TensorInfo):
                stacked[path] = [name]
    for path, array in weights.items():
        if path in parameters and mx.issubdtype(parameters[path].dtype, mx.floating):
            _check_values(source, path, array, stacked.get(path, ()))
    try:
        model.load_weights(list(weights.items()))
    except ValueError as error:
        raise ValueError(f"{source.path}: these are not the tensors of {model_name}: {error}") from error
    return origins, stacked


def _check_values(source: Source, path: str, array: mx.array, names: Sequence[str]) -> None:
    """Raise ValueError if what a model takes for numbers are integers or the codes of a format that is not unpacked.

    Args:
        source: The checkpoint.
        path: Of the parameter.
        array: What it is given, lazily.
        names: The tensors that this is, or is a stack of, where that is known. Several dtypes become one in a stack.
    """
    dtypes = {f"tensor {name}": source.tensors[name].dtype for name in names}
    if not mx.issubdtype(array.dtype, mx.floating):
        dtypes = dtypes or {f"what makes {path}": str(array.dtype).removeprefix("mlx.core.")}
    for what, dtype in dtypes.items():
        if dtype not in FLOATS:
            raise ValueError(
                f"{source.path}: {what} is {dtype}, and config.json does not say what its values are; "
                "F16, BF16 or F32 is wanted: convert the original checkpoint"
            )
