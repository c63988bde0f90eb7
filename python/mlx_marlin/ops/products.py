"""The products with trellis weights: argument errors, then one lazy primitive."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from .. import _ext, kernels
from ..weights.experts import ExpertBank
from ..weights.trellis import TrellisWeight
from .problems import DTYPES, Activation, device_of, linear_problem, resolve, swiglu_problem
from .stacks import Stack, _prepare_weight, prepare

_INTEGERS = frozenset((mx.int8, mx.int16, mx.int32, mx.int64, mx.uint8, mx.uint16, mx.uint32, mx.uint64))


def _check_x(op: str, x, features: int) -> mx.array:
    if not isinstance(x, mx.array):
        raise ValueError(f"[{op}] x must be an mx.array, got {type(x).__name__}")
    if x.dtype not in DTYPES:
        raise ValueError(f"[{op}] x must be float32, float16 or bfloat16, got {x.dtype}; cast it first")
    if x.ndim == 0 or x.shape[-1] != features:
        raise ValueError(f"[{op}] x must have shape [..., {features}], got {list(x.shape)}")
    return x


def _index_array(op: str, indices) -> mx.array:
    """Indices that are no MLX array yet: NumPy's, or lists."""
    try:
        array = np.asarray(indices)
    except ValueError:  # rows of different lengths
        array = None
    if array is None or not np.issubdtype(array.dtype, np.integer):
        kind = type(indices).__name__ if array is None or array.dtype == object else array.dtype
        raise ValueError(f"[{op}] indices must be integers, got {kind}")
    return mx.array(array)


def _check_indices(op: str, indices, leading: tuple[int, ...], experts: int, stream) -> mx.array:
    """Indices ``[*leading, k]`` as uint32, checked as far as they are known."""
    if not isinstance(indices, mx.array):
        indices = _index_array(op, indices)
    if indices.dtype not in _INTEGERS:
        raise ValueError(f"[{op}] indices must be integers, got {indices.dtype}")
    shape = indices.shape
    if not shape or shape[:-1] != leading or shape[-1] < 1:
        raise ValueError(
            f"[{op}] indices must have shape [..., k] with k >= 1 and the leading dimensions of x "
            f"{list(leading)}, got {list(shape)}"
        )
    return _ext.expert_ids(op, indices, experts, stream)


def _check_scores(op: str, scores, indices: mx.array, stream) -> mx.array:
    if not isinstance(scores, mx.array) or not mx.issubdtype(scores.dtype, mx.floating):
        raise ValueError(
            f"[{op}] scores must be a floating point mx.array, got {getattr(scores, 'dtype', type(scores).__name__)}"
        )
    if scores.shape != indices.shape:
        raise ValueError(
            f"[{op}] scores must have the shape of indices {list(indices.shape)}, got {list(scores.shape)}"
        )
    return scores.astype(mx.float32, stream)


def linear(x: mx.array, stack: Stack, *, config=None, stream=None, select=None, op: str = "trellis_linear") -> mx.array:
    """:func:`trellis_linear` for a prepared stack of one weight.

    ``select`` takes the place of ``config``: from (x, rows, top-k, combine) it gives a resolved config.
    """
    source = stack.source
    _check_x(op, x, source.in_features)
    rows = x.size // source.in_features
    if select is not None:
        native = select(x, rows, 1, False)
    else:
        native = resolve(op, linear_problem(source, rows, x.dtype, device_of(stream)), config)
    return _ext.trellis_linear(x, stack.arrays, stack.info, source.in_features, source.out_features, native, stream)


def trellis_linear(x: mx.array, w: TrellisWeight, *, config=None, stream=None) -> mx.array:
    """Product with a trellis weight, ``x @ W + bias``, decoding tile by tile.

    Args:
        x: float32, float16 or bfloat16, shape ``[..., in_features]``.
        w: The weight.
        config: A :class:`KernelConfig` or a kernel name. Default: ``None``, the default for this problem.
        stream: Stream or device. Default: ``None``, the default stream.

    Returns:
        Shape ``[..., out_features]``, dtype of x. Sums are float32.

    Raises:
        ValueError: If an argument does not fit.
    """
    return linear(x, _prepare_weight("trellis_linear", w), config=config, stream=stream)


def gather_linear(x: mx.array, indices, stack: Stack, *, select=None) -> mx.array:
    """One projection of the experts.

    Args:
        x: Shape ``[..., in_features]``, or ``[..., k, in_features]`` where each slot has a row of its own.
        indices: Integers, shape ``[..., k]``.
        stack: The experts' weights.
        select: As in :func:`linear`. Default: ``None``, the default config.

    Returns:
        Shape ``[..., k, out_features]``, dtype of x.
    """
    op, source = "trellis_linear", stack.source
    _check_x(op, x, source.in_features)
    own_rows = isinstance(indices, mx.array) and x.ndim == indices.ndim + 1
    leading = x.shape[:-2] if own_rows else x.shape[:-1]
    indices = _check_indices(op, indices, leading, len(source.bits), None)
    if own_rows and indices.shape != x.shape[:-1]:
        raise ValueError(
            f"[{op}] indices must have the shape of x without its last axis, {list(x.shape[:-1])}, "
            f"got {list(indices.shape)}"
        )
    if select is not None:
        native = select(x, indices.size, 1, False)
    else:
        native = resolve(op, linear_problem(source, indices.size, x.dtype, device_of(None)), None)
    sizes = source.in_features, source.out_features
    return _ext.trellis_gather_linear(x, indices, stack.arrays, stack.info, *sizes, native)


def swiglu(
    x: mx.array,
    indices,
    gate: Stack,
    up: Stack,
    down: Stack,
    *,
    activation: Activation,
    scores=None,
    config=None,
    stream=None,
    select=None,
) -> mx.array:
    """:func:`trellis_swiglu` for prepared stacks; ``select`` as in :func:`linear`."""
    op, source = "trellis_swiglu", gate.source
    device = device_of(stream) if select is None else None
    hidden = source.in_features
    _check_x(op, x, hidden)
    indices = _check_indices(op, indices, x.shape[:-1], len(source.bits), stream)
    if scores is not None:
        scores = _check_scores(op, scores, indices, stream)
    name, alpha, limit = activation
    rows, top_k, combine = x.size // hidden, indices.shape[-1], scores is not None
    if select is not None:
        native = select(x, rows, top_k, combine)
    else:
        problem = swiglu_problem(source, up.source, down.source, rows, top_k, name, x.dtype, device, combine)
        native = resolve(op, problem, config)
    return _ext.trellis_swiglu(
        x,
        indices,
        scores,
        gate.arrays + up.arrays + down.arrays,
        gate.info,
        up.info,
        down.info,
        hidden,
        kernels.ACTIVATIONS.index(name),
        alpha,
        limit,
        native,
        stream,
    )


def trellis_swiglu(
    x: mx.array,
    indices,
    bank: ExpertBank,
    *,
    scores=None,
    activation: str = "silu",
    alpha: float = 1.702,
    limit: float = 7.0,
    config=None,
    stream=None,
) -> mx.array:
    """The experts of a layer, fused: ``down(activation(gate(x), up(x)))`` for each (token, slot).

    Args:
        x: float32, float16 or bfloat16, shape ``[..., hidden]``.
        indices: Integers, shape ``[..., k]``: the experts of each token. NumPy or MLX.
        bank: The experts' weights; bits and codebooks may differ per expert and projection.
        scores: Optional, floating point, shape ``[..., k]``: the top-k sum is then taken inside, in slot order,
            in float32. Default: ``None``.
        activation: ``"silu"``, ``"gelu_tanh"`` or ``"swiglu_oai"`` (gpt-oss: gate clamped above at ``limit``, up
            to +-``limit``, ``(up + 1) * gate * sigmoid(alpha * gate)``). Default: ``"silu"``.
        alpha: For ``"swiglu_oai"``. Default: ``1.702``.
        limit: For ``"swiglu_oai"``. Default: ``7.0``.
        config: A :class:`KernelConfig` or a kernel name. Default: ``None``, the default for this problem.
        stream: Stream or device. Default: ``None``, the default stream.

    Returns:
        Shape ``[..., k, hidden]``, or ``[..., hidden]`` with scores; dtype of x.

    Raises:
        ValueError: If an argument does not fit, or an index is out of range and already known. An index that is
            only known later makes the evaluation fail on the CPU, and its slot NaN on a GPU.
    """
    if not isinstance(bank, ExpertBank):
        raise ValueError(f"[trellis_swiglu] bank must be an ExpertBank, got {type(bank).__name__}")
    return swiglu(
        x,
        indices,
        prepare(bank.gate),
        prepare(bank.up),
        prepare(bank.down),
        scores=scores,
        activation=Activation.checked(activation, alpha, limit),
        config=config,
        stream=stream,
    )


def trellis_decode(w: TrellisWeight, *, stream=None) -> mx.array:
    """The inner matrix of a weight, by the tile decoder that the products use: for comparing bit for bit.

    Returns:
        float16, shape ``[k, n]``, padded sizes.
    """
    stack = _prepare_weight("trellis_decode", w)
    device_of(stream)  # raises unless it is one
    return _ext.trellis_decode(stack.arrays, stack.info, 0, stream)


def is_traced(x: mx.array) -> bool:
    """Whether x belongs to a function that is being traced (``mx.compile``, ``mx.vjp``, ...)."""
    return _ext.is_tracer(x)
