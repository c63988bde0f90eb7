"""The ops that users call: argument errors, a config, one lazy primitive."""

from __future__ import annotations

import mlx.core as mx

from .. import _ext
from ..kernels import KernelConfig
from ..weights.experts import ExpertBank
from ..weights.trellis import TrellisWeight
from .calls import check_experts, check_linear, run
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
        activation: What is made of gate g and up u, with sigma the sigmoid and c(u) up clamped to +-``limit``. Default:
            ``"silu"``.

            - ``"silu"``: ``g sigma(g) u``; ``"gelu_tanh"``: ``gelu(g) u``; ``"relu_squared"``: ``max(g, 0)^2 u``
            - ``"swiglu_oai"`` (gpt-oss): ``g sigma(alpha g) (c(u) + 1)``, g at most ``limit``
            - ``"swiglu_clamped"`` (DeepSeek V4, GLM-5): ``g sigma(g) c(u)``, g at most ``limit``
            - ``"swiglu_step"`` (Step 3.5): ``min(g sigma(g), limit) c(u)``
            - ``"situ"`` (Kimi K3): ``alpha tanh(g / alpha) sigma(g) limit tanh(u / limit)``
        alpha: Of ``"swiglu_oai"`` and ``"situ"``. Default: ``1.702``.
        limit: Of all from ``"swiglu_oai"`` on. Default: ``7.0``.
        config: A :class:`KernelConfig` or a kernel name. Default: ``None``, the default for this problem.
        stream: Stream or device. Default: ``None``, the default stream.

    Returns:
        Shape ``[..., k, hidden]``, or ``[..., hidden]`` with scores; dtype of x.

    Raises:
        ValueError: If an argument does not fit, or an index is out of range and already known. An index that is
            only known later makes the evaluation fail on the CPU, and its slot NaN on a GPU.
    """
    act = Activation.checked(activation, alpha, limit)
    return _experts("trellis_swiglu", x, indices, bank, act, scores, config, stream)


def trellis_mlp(
    x: mx.array,
    indices: Indices,
    bank: ExpertBank,
    *,
    scores: mx.array | None = None,
    activation: str = "relu_squared",
    config: KernelConfig | str | None = None,
    stream: StreamOrDevice = None,
) -> mx.array:
    """The experts of a layer without a gate, fused: ``down(activation(up(x)))`` for each (token, slot).

    Args:
        x: float32, float16 or bfloat16, shape ``[..., hidden]``.
        indices: Integers, shape ``[..., k]``: the experts of each token. NumPy or MLX.
        bank: The experts' weights, made with ``gate=None``; bits and codebooks may differ per expert and projection.
        scores: Optional, floating point, shape ``[..., k]``: the top-k sum is then taken inside, in slot order,
            in float32. Default: ``None``.
        activation: ``"relu_squared"`` (``max(x, 0) ** 2``), ``"gelu_tanh"`` or ``"silu"``. Default:
            ``"relu_squared"``.
        config: A :class:`KernelConfig` or a kernel name. Default: ``None``, the default for this problem.
        stream: Stream or device. Default: ``None``, the default stream.

    Returns:
        Shape ``[..., k, hidden]``, or ``[..., hidden]`` with scores; dtype of x.

    Raises:
        ValueError: As :func:`trellis_swiglu` does.
    """
    act = Activation.checked(activation, gated=False)
    return _experts("trellis_mlp", x, indices, bank, act, scores, config, stream)


def _experts(
    op: str,
    x: mx.array,
    indices: Indices,
    bank: ExpertBank,
    activation: Activation,
    scores: mx.array | None,
    config: KernelConfig | str | None,
    stream: StreamOrDevice,
) -> mx.array:
    if not isinstance(bank, ExpertBank):
        raise ValueError(f"[{op}] bank must be an ExpertBank, got {type(bank).__name__}")
    other = "trellis_mlp" if bank.gate is None else "trellis_swiglu"
    if op != other:
        has = "no gate" if bank.gate is None else "a gate"
        raise ValueError(f"[{op}] the experts of the bank have {has}; use {other}")
    device = device_of(stream)
    call = check_experts(x, indices, tuple(map(prepare, bank.stacks)), activation, scores, stream=stream)
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
