"""One call of a product in its three steps: *check* the arguments, *choose* a config, *run* the primitive.

``check_*`` makes a :class:`Call` of a caller's arguments, :meth:`Call.problem` says what it asks for, and :func:`run`
makes one lazy primitive of it. What chooses stands between them: :func:`resolve` for a config that is given, a layer's
table for its own calls.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from .. import _ext, kernels
from ..kernels import Problem
from .problems import (
    DTYPE_NAMES,
    Activation,
    Indices,
    NativeConfig,
    StreamOrDevice,
    experts_problem,
    linear_problem,
)
from .stacks import Stack

_INTEGERS = frozenset((mx.int8, mx.int16, mx.int32, mx.int64, mx.uint8, mx.uint16, mx.uint32, mx.uint64))


class Call(NamedTuple):
    """Checked arguments of one product.

    Attributes:
        op: The op, for error messages.
        x: float32, float16 or bfloat16.
        stacks: The weights: one projection, or gate, up and down, or up and down.
        rows: Rows of x; of one projection of experts, slots.
        top_k: Experts per row; 1 for a linear.
        indices: uint32, the experts of each row; ``None`` for a linear.
        scores: float32, of the same shape, where the top-k sum is taken inside.
        activation: ``None`` for one projection.
        stream: Stream or device; ``None`` for the default stream.
        accuracy: One of ``kernels.ACCURACIES``.
        absent: Whether an index of the number of experts stands for one that is not here.
    """

    op: str
    x: mx.array
    stacks: tuple[Stack, ...]
    rows: int
    top_k: int = 1
    indices: mx.array | None = None
    scores: mx.array | None = None
    activation: Activation | None = None
    stream: StreamOrDevice = None
    accuracy: str = "float32"
    absent: bool = False

    def problem(self, device: str) -> Problem:
        """What the call asks for on ``"cpu"`` or ``"gpu"``."""
        if self.activation is None:
            return linear_problem(self.stacks[0].source, self.rows, self.x.dtype, device, self.accuracy)
        sources = [stack.source for stack in self.stacks]
        name, combine = self.activation.name, self.scores is not None
        return experts_problem(sources, self.rows, self.top_k, name, self.x.dtype, device, combine, self.accuracy)


def check_linear(x: mx.array, stack: Stack, *, stream: StreamOrDevice = None, accuracy: str = "float32") -> Call:
    """The call ``x @ W`` of a stack of one weight; x has shape ``[..., in_features]``."""
    op, features = "trellis_linear", stack.source.in_features
    _check_x(op, x, features)
    return Call(op, x, (stack,), x.size // features, stream=stream, accuracy=accuracy)


def check_gathered(
    x: mx.array, indices: Indices, stack: Stack, *, stream: StreamOrDevice = None, accuracy: str = "float32"
) -> Call:
    """The call of one projection of the experts.

    Args:
        x: Shape ``[..., in_features]``, or ``[..., k, in_features]`` where each slot has a row of its own.
        indices: Integers, shape ``[..., k]``.
        stack: The experts' weights.
        stream: Stream or device. Default: ``None``, the default stream.
        accuracy: One of ``kernels.ACCURACIES``. Default: ``"float32"``.
    """
    op, source = "trellis_linear", stack.source
    _check_x(op, x, source.in_features)
    own_rows = isinstance(indices, mx.array) and x.ndim == indices.ndim + 1
    leading = x.shape[:-2] if own_rows else x.shape[:-1]
    indices = _check_indices(op, indices, leading, len(source.bits), stream)
    if own_rows and indices.shape != x.shape[:-1]:
        raise ValueError(
            f"[{op}] indices must have the shape of x without its last axis, {list(x.shape[:-1])}, "
            f"got {list(indices.shape)}"
        )
    return Call(op, x, (stack,), indices.size, 1, indices, stream=stream, accuracy=accuracy)


def check_experts(
    x: mx.array,
    indices: Indices,
    stacks: tuple[Stack, ...],
    activation: Activation,
    scores: mx.array | None = None,
    *,
    stream: StreamOrDevice = None,
    accuracy: str = "float32",
    absent: bool = False,
) -> Call:
    """The call of the experts of a layer, fused; the arguments as :func:`trellis_swiglu` and :func:`trellis_mlp` have
    them. Two stacks are up and down, three gate, up and down. With ``absent`` an index one too large stands for an
    expert that is not here: its slot is not computed, and zero.
    """
    op, source = "trellis_swiglu" if len(stacks) == 3 else "trellis_mlp", stacks[0].source
    hidden = source.in_features
    _check_x(op, x, hidden)
    indices = _check_indices(op, indices, x.shape[:-1], len(source.bits) + absent, stream)
    if scores is not None:
        if absent:
            raise ValueError(f"[{op}] a layer whose experts are partly elsewhere takes no scores; combine outside")
        scores = _check_scores(op, scores, indices, stream)
    rows, top_k = x.size // hidden, indices.shape[-1]
    return Call(op, x, stacks, rows, top_k, indices, scores, activation, stream, accuracy, absent)


def run(call: Call, native: NativeConfig) -> mx.array:
    """The lazy primitive of a call.

    Args:
        call: What one of the ``check_*`` made.
        native: What :func:`resolve` made of a config for the call's problem.

    Returns:
        Shape ``[..., out_features]`` for a linear, ``[..., k, out_features]`` for one projection of experts,
        ``[..., k, hidden]`` for a layer of them, or ``[..., hidden]`` with scores; dtype of x.
    """
    indices, activation = call.indices, call.activation
    if indices is not None and activation is not None:
        return _run_experts(call, indices, activation, native)
    (stack,) = call.stacks
    sizes = stack.source.in_features, stack.source.out_features
    if indices is None:
        return _ext.trellis_linear(call.x, stack.arrays, stack.info, *sizes, native, call.stream)
    return _ext.trellis_gather_linear(call.x, indices, stack.arrays, stack.info, *sizes, native, call.stream)


def _run_experts(call: Call, indices: mx.array, activation: Activation, native: NativeConfig) -> mx.array:
    *gate, up, down = call.stacks
    name, alpha, limit = activation
    return _ext.trellis_swiglu(
        call.x,
        indices,
        call.scores,
        [*(gate[0].arrays if gate else ()), *up.arrays, *down.arrays],
        gate[0].info if gate else None,
        up.info,
        down.info,
        up.source.in_features,
        kernels.ACTIVATIONS.index(name),
        alpha,
        limit,
        native,
        call.absent,
        call.stream,
    )


def _check_x(op: str, x: mx.array, features: int) -> mx.array:
    if not isinstance(x, mx.array):
        raise ValueError(f"[{op}] x must be an mx.array, got {type(x).__name__}")
    if x.dtype not in DTYPE_NAMES:
        raise ValueError(f"[{op}] x must be float32, float16 or bfloat16, got {x.dtype}; cast it first")
    if x.ndim == 0 or x.shape[-1] != features:
        raise ValueError(f"[{op}] x must have shape [..., {features}], got {list(x.shape)}")
    return x


def _index_array(op: str, indices: np.ndarray | Sequence) -> mx.array:
    """Indices that are no MLX array yet: NumPy's, or lists."""
    array: np.ndarray | None
    try:
        array = np.asarray(indices)
    except ValueError:  # rows of different lengths
        array = None
    if array is None or not np.issubdtype(array.dtype, np.integer):
        kind = type(indices).__name__ if array is None or array.dtype == object else array.dtype
        raise ValueError(f"[{op}] indices must be integers, got {kind}")
    return mx.array(array)


def check_ids(op: str, ids: Indices, count: int, stream: StreamOrDevice) -> mx.array:
    """Integers of any shape in [0, count) as uint32, checked as far as they are known."""
    if not isinstance(ids, mx.array):
        ids = _index_array(op, ids)
    if ids.dtype not in _INTEGERS:
        raise ValueError(f"[{op}] indices must be integers, got {ids.dtype}")
    return _ext.expert_ids(op, ids, count, stream)


def _check_indices(
    op: str, indices: Indices, leading: tuple[int, ...], experts: int, stream: StreamOrDevice
) -> mx.array:
    """Indices ``[*leading, k]`` as uint32, checked as far as they are known."""
    if not isinstance(indices, mx.array):
        indices = _index_array(op, indices)
    shape = indices.shape
    if not shape or shape[:-1] != leading or shape[-1] < 1:
        raise ValueError(
            f"[{op}] indices must have shape [..., k] with k >= 1 and the leading dimensions of x "
            f"{list(leading)}, got {list(shape)}"
        )
    return check_ids(op, indices, experts, stream)


def _check_scores(op: str, scores: mx.array, indices: mx.array, stream: StreamOrDevice) -> mx.array:
    if not isinstance(scores, mx.array) or not mx.issubdtype(scores.dtype, mx.floating):
        raise ValueError(
            f"[{op}] scores must be a floating point mx.array, got {getattr(scores, 'dtype', type(scores).__name__)}"
        )
    if scores.shape != indices.shape:
        raise ValueError(
            f"[{op}] scores must have the shape of indices {list(indices.shape)}, got {list(scores.shape)}"
        )
    return scores.astype(mx.float32, stream)
