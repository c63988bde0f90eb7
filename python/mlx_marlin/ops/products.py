"""The ops that users call: argument errors, a config, one lazy primitive."""

from __future__ import annotations

import mlx.core as mx

from .. import _ext
from ..kernels import KernelConfig
from ..weights.experts import ExpertBank
from ..weights.trellis import TrellisWeight
from .calls import check_linear, check_swiglu, run
from .problems import Activation, Indices, StreamOrDevice, device_of, resolve
from .stacks import prepare, prepare_weight


def trellis_linear(
    x: mx.array, w: TrellisWeight, *, config: KernelConfig | str | None = None, stream: StreamOrDevice = None
) -> mx.array:
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
    device = device_of(stream)
    call = check_linear(x, prepare_weight("trellis_linear", w), stream=stream)
    return run(call, resolve(call.op, call.problem(device), config))


def trellis_swiglu(
    x: mx.array,
    indices: Indices,
    bank: ExpertBank,
    *,
    scores: mx.array | None = None,
    activation: str = "silu",
    alpha: float = 1.702,
    limit: float = 7.0,
    config: KernelConfig | str | None = None,
    stream: StreamOrDevice = None,
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
    device, act = device_of(stream), Activation.checked(activation, alpha, limit)
    stacks = prepare(bank.gate), prepare(bank.up), prepare(bank.down)
    call = check_swiglu(x, indices, stacks, act, scores, stream=stream)
    return run(call, resolve(call.op, call.problem(device), config))


def trellis_decode(w: TrellisWeight, *, stream: StreamOrDevice = None) -> mx.array:
    """The inner matrix of a weight, by the tile decoder that the products use: for comparing bit for bit.

    Returns:
        float16, shape ``[k, n]``, padded sizes.
    """
    stack = prepare_weight("trellis_decode", w)
    device_of(stream)  # raises unless it is one
    return _ext.trellis_decode(stack.arrays, stack.info, 0, stream)


def is_traced(x: mx.array) -> bool:
    """Whether x belongs to a function that is being traced (``mx.compile``, ``mx.vjp``, ...)."""
    return _ext.is_tracer(x)
