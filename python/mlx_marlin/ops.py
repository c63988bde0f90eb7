"""The ops, with their argument errors. The only door to the C++ extension."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from . import _ext, codec, kernels, shaders
from .kernels import KernelConfig, Problem
from .weights import ExpertBank, ExpertStack, TrellisWeight

SHADERS = Path(_ext.__file__).parent / "kernels"
"""Where the Metal sources are installed."""

if mx.metal.is_available():
    _ext.set_shaders(shaders.sources(SHADERS))

_DTYPES = {mx.float32: "float32", mx.float16: "float16", mx.bfloat16: "bfloat16"}


class Stack(NamedTuple):
    """An :class:`ExpertStack` as the primitives take it."""

    arrays: list[mx.array]
    info: _ext.StackInfo
    source: ExpertStack


def prepare(stack: ExpertStack) -> Stack:
    """Collect a stack's arrays and describe them; done once per stack and kept on it."""
    prepared = getattr(stack, "_prepared", None)
    if prepared is None:
        k, n = stack.padded_shape
        arrays = [stack.codes, stack.offsets, stack.formats, stack.suh, stack.svh]
        if stack.bias is not None:
            arrays.append(stack.bias)
        info = _ext.StackInfo(
            experts=len(stack.bits),
            k=k,
            n=n,
            bias=stack.bias is not None,
            widths=sum(1 << bits for bits in set(stack.bits)),
            codebooks=sum(1 << codec.CODEBOOKS.index(name) for name in set(stack.codebooks)),
        )
        mx.eval(arrays)  # not part of any later graph, trace or thread
        prepared = stack._prepared = Stack(arrays, info, stack)
    return prepared


def with_parameters(stack: Stack, codes: mx.array, suh: mx.array, svh: mx.array, bias: mx.array | None) -> Stack:
    """The stack over the stand-ins that its parameters have while a function that captures them is traced."""
    _, offsets, formats, *_ = stack.arrays
    return stack._replace(arrays=[codes, offsets, formats, suh, svh, *([] if bias is None else [bias])])


def _prepare_weight(op: str, w) -> Stack:
    if not isinstance(w, TrellisWeight):
        raise ValueError(f"[{op}] w must be a TrellisWeight, got {type(w).__name__}")
    stack = getattr(w, "_stack", None)
    if stack is None:
        stack = w._stack = ExpertStack.of("w", [w])
    return prepare(stack)


def device_of(stream) -> str:
    """``"cpu"`` or ``"gpu"``: where an op given this stream runs."""
    device = mx.default_device() if stream is None else getattr(stream, "device", stream)
    return "gpu" if device in (mx.gpu, mx.Device(mx.gpu)) else "cpu"


@lru_cache(maxsize=4096)
def _native(config: KernelConfig) -> _ext.KernelConfig:
    variant = getattr(_ext.Variant, config.kernel_variant)
    return _ext.KernelConfig(variant, config.tile_size_m, config.tile_size_n, config.simdgroups, config.use_fp32_acc)


@lru_cache(maxsize=4096)
def resolve(op: str, problem: Problem, config: KernelConfig | str | None) -> _ext.KernelConfig:
    """A config as the primitives take it, its sizes fitted to the problem; ``None`` stands for the default.

    Raises:
        ValueError: If it cannot run the problem.
    """
    if config is None:
        config = kernels.default(problem)
    elif isinstance(config, str):
        config = kernels.config_for(problem, config)
    elif not isinstance(config, KernelConfig):
        raise ValueError(f"[{op}] config must be a KernelConfig or a kernel name, got {type(config).__name__}")
    else:
        runnable = kernels.fitted(problem, config)
        if runnable is None:
            raise ValueError(f"[{op}] {config} cannot run this problem: {kernels.feasible(problem, config)}")
        config = runnable
    return _native(config)


def _check_x(op: str, x, features: int) -> mx.array:
    if not isinstance(x, mx.array):
        raise ValueError(f"[{op}] x must be an mx.array, got {type(x).__name__}")
    if x.dtype not in _DTYPES:
        raise ValueError(f"[{op}] x must be float32, float16 or bfloat16, got {x.dtype}; cast it first")
    if x.ndim == 0 or x.shape[-1] != features:
        raise ValueError(f"[{op}] x must have shape [..., {features}], got {list(x.shape)}")
    return x


def _check_indices(op: str, indices, x: mx.array, experts: int) -> mx.array:
    if isinstance(indices, np.ndarray) and not np.issubdtype(indices.dtype, np.integer):
        raise ValueError(f"[{op}] indices must be integers, got {indices.dtype}")
    if not isinstance(indices, mx.array):
        indices = mx.array(np.asarray(indices))
    if not mx.issubdtype(indices.dtype, mx.integer):
        raise ValueError(f"[{op}] indices must be integers, got {indices.dtype}")
    if indices.ndim != x.ndim or indices.shape[:-1] != x.shape[:-1] or indices.shape[-1] < 1:
        raise ValueError(
            f"[{op}] indices must have shape [..., k] with k >= 1 and the leading dimensions of x "
            f"{list(x.shape[:-1])}, got {list(indices.shape)}"
        )
    _ext.check_indices(op, indices, experts)
    if indices.dtype in (mx.int64, mx.uint64):
        # Cast modulo 2**32, a wrong index could become a legal one.
        legal = (indices >= 0) & (indices < experts)
        indices = mx.where(legal, indices, 0xFFFFFFFF)
    return indices if indices.dtype == mx.uint32 else indices.astype(mx.uint32)


def _check_scores(op: str, scores, indices: mx.array) -> mx.array:
    if not isinstance(scores, mx.array) or not mx.issubdtype(scores.dtype, mx.floating):
        raise ValueError(
            f"[{op}] scores must be a floating point mx.array, got {getattr(scores, 'dtype', type(scores).__name__)}"
        )
    if scores.shape != indices.shape:
        raise ValueError(
            f"[{op}] scores must have the shape of indices {list(indices.shape)}, got {list(scores.shape)}"
        )
    return scores.astype(mx.float32)


def _dtype_name(dtype) -> str:
    """The name of a dtype, given itself or its name."""
    name = dtype if isinstance(dtype, str) else _DTYPES.get(dtype)
    if name not in kernels.DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(kernels.DTYPES)}, got {dtype}")
    return name


def _row_count(rows) -> int:
    if not isinstance(rows, (int, np.integer)) or rows < 0:
        raise ValueError(f"rows must be an integer >= 0, got {rows!r}")
    return int(rows)


def linear_problem(stack: ExpertStack, rows: int, dtype: mx.Dtype | str, device: str) -> Problem:
    """The problem that a linear poses for a number of rows."""
    return Problem(
        kind="linear",
        rows=_row_count(rows),
        top_k=1,
        hidden=stack.in_features,
        intermediate=stack.out_features,
        experts=1,
        bits=((stack.bits[0],),),
        codebooks=(stack.codebooks[0],),
        activation="none",
        dtype=_dtype_name(dtype),
        device=device,
        bias=stack.bias is not None,
    )


@lru_cache(maxsize=4096)
def _distinct(*per_expert: tuple) -> tuple:
    return tuple(sorted(set(zip(*per_expert))))


def swiglu_problem(
    gate: ExpertStack,
    up: ExpertStack,
    down: ExpertStack,
    rows: int,
    top_k: int,
    activation: str,
    dtype: mx.Dtype | str,
    device: str,
    combine: bool,
) -> Problem:
    """The problem that a layer of experts poses for a number of rows."""
    stacks = (gate, up, down)
    return Problem(
        kind="swiglu",
        rows=_row_count(rows),
        top_k=top_k,
        hidden=gate.in_features,
        intermediate=gate.padded_shape[1],
        experts=len(gate.bits),
        bits=_distinct(gate.bits, up.bits, down.bits),
        codebooks=tuple(sorted({name for stack in stacks for name in stack.codebooks})),
        activation=activation,
        dtype=_dtype_name(dtype),
        device=device,
        combine=combine,
        bias=any(stack.bias is not None for stack in stacks),
    )


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


def gather_linear(x: mx.array, indices, stack: Stack, *, config=None, stream=None) -> mx.array:
    """One projection of the experts: ``[..., in_features]`` and ``[..., k]`` -> ``[..., k, out_features]``."""
    op, source = "trellis_linear", stack.source
    _check_x(op, x, source.in_features)
    indices = _check_indices(op, indices, x, len(source.bits))
    problem = linear_problem(source, indices.size, x.dtype, device_of(stream))
    y = _ext.trellis_gather_linear(
        x,
        indices.reshape(-1),
        stack.arrays,
        stack.info,
        source.in_features,
        source.out_features,
        indices.shape[-1],
        resolve(op, problem, config),
        stream,
    )
    return y.reshape(*indices.shape, source.out_features)


def swiglu(
    x: mx.array,
    indices,
    gate: Stack,
    up: Stack,
    down: Stack,
    *,
    scores=None,
    activation: str = "silu",
    alpha: float = 1.702,
    limit: float = 7.0,
    config=None,
    stream=None,
    select=None,
) -> mx.array:
    """:func:`trellis_swiglu` for prepared stacks; ``select`` as in :func:`linear`."""
    op, source = "trellis_swiglu", gate.source
    if activation not in kernels.ACTIVATIONS:
        raise ValueError(f"[{op}] activation must be one of {', '.join(kernels.ACTIVATIONS)}, got {activation!r}")
    hidden = source.in_features
    _check_x(op, x, hidden)
    indices = _check_indices(op, indices, x, len(source.bits))
    if scores is not None:
        scores = _check_scores(op, scores, indices)
    rows, top_k, combine = x.size // hidden, indices.shape[-1], scores is not None
    if select is not None:
        native = select(x, rows, top_k, combine)
    else:
        device = device_of(stream)
        problem = swiglu_problem(source, up.source, down.source, rows, top_k, activation, x.dtype, device, combine)
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
        kernels.ACTIVATIONS.index(activation),
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
        activation=activation,
        alpha=alpha,
        limit=limit,
        config=config,
        stream=stream,
    )


def trellis_decode(w: TrellisWeight, *, stream=None) -> mx.array:
    """The inner matrix of a weight, by the tile decoder that the products use: for comparing bit for bit.

    Returns:
        float16, shape ``[k, n]``, padded sizes.
    """
    stack = _prepare_weight("trellis_decode", w)
    return _ext.trellis_decode(stack.arrays, stack.info, 0, stream)


def is_traced(x: mx.array) -> bool:
    """Whether x belongs to a function that is being traced (``mx.compile``, ``mx.vjp``, ...)."""
    return _ext.is_tracer(x)


def instruction_set() -> str:
    """The best instruction set of this CPU that the kernels have code for, such as avx512vbmi or neon."""
    return _ext.instruction_sets()[-1]


def cpu_digest() -> str:
    """SHA-256 of what the CPU kernels were built from: sources, compiler and flags."""
    return _ext.cpu_digest()


def set_num_threads(n: int) -> None:
    """Set the number of CPU workers. Default: the cores that this process may use.

    Raises:
        ValueError: If n is less than 1.
    """
    if not isinstance(n, int) or n < 1:
        raise ValueError(f"the number of threads must be an integer >= 1, got {n!r}")
    _ext.set_num_threads(n)


@lru_cache(maxsize=len(codec.CODEBOOKS))
def _codebook_values(codebook: str) -> np.ndarray:
    values = codec.decode(np.arange(1 << 16, dtype=np.uint16), codebook).astype(np.float32)
    values.flags.writeable = False
    return values


def viterbi_search(tiles: np.ndarray, bits: int, codebook: str, *, threads: int | None = None) -> np.ndarray:
    """The tail-biting states whose values are nearest to tiles: the encoder's search.

    Two passes over 2^16 states: free ends on the tile rotated by 128, then the state found before position 0 forced
    at both ends. Targets are rounded to half precision first, as in ExLlamaV3's kernel.

    Args:
        tiles: Floating point, shape ``[count, 256]``, in storage order.
        bits: Bits per weight K, 1 to 8.
        codebook: One of :data:`codec.CODEBOOKS`.
        threads: Worker threads; the result does not depend on it. Default: the machine's cores.

    Returns:
        uint16, shape ``[count, 256]``: states for :func:`codec.pack` and :func:`codec.decode`.

    Raises:
        ValueError: If the shape, the bits or the codebook is wrong, or a target is not finite.
    """
    if codebook not in codec.CODEBOOKS:
        raise ValueError(f"codebook must be one of {', '.join(codec.CODEBOOKS)}, got {codebook!r}")
    tiles = np.asarray(tiles)
    if tiles.ndim != 2 or tiles.shape[1] != codec.TILE_SIZE or not np.issubdtype(tiles.dtype, np.floating):
        raise ValueError(
            f"tiles must be floating point of shape [count, {codec.TILE_SIZE}], got {tiles.dtype} {list(tiles.shape)}"
        )
    if not 1 <= bits <= codec.MAX_BITS:
        raise ValueError(f"bits must be in 1..{codec.MAX_BITS}, got {bits}")
    with np.errstate(over="ignore"):  # infinite targets are refused below
        targets = np.ascontiguousarray(tiles.astype(np.float16).astype(np.float32))
    if not np.isfinite(targets).all():
        raise ValueError("tiles must be finite and within half precision's range")
    return _ext.viterbi_search(targets, _codebook_values(codebook), bits, threads or kernels.cpu_threads())


def viterbi_instruction_sets() -> list[str]:
    """Instruction sets that :func:`viterbi_search` can use on this machine, best last."""
    return _ext.viterbi_instruction_sets()


def set_viterbi_instruction_set(name: str) -> None:
    """Let :func:`viterbi_search` use one instruction set, or ``"auto"``: the best."""
    _ext.set_viterbi_instruction_set(name)


def plan(
    problem: Problem, config: KernelConfig | str | None = None, *, alpha: float = 1.702, limit: float = 7.0
) -> dict:
    """What the GPU would run: the list of dispatches, computed without a GPU.

    Args:
        problem: With device ``"gpu"``.
        config: A :class:`KernelConfig` or a kernel name. Default: ``None``, the default for this problem.
        alpha, limit: For ``"swiglu_oai"``.

    Returns:
        ``{"dispatches": [...], "scratch": {name: bytes}}``. A dispatch has ``kernel`` (a function of
        ``kernels/<stem>.metal`` called ``trellis_<stem>``, with its template arguments), ``constants``, ``grid``
        (in threadgroups), ``threads``, ``args`` (bytes for slot 0), ``buffers`` (``slot``, ``name``, ``offset``,
        ``bytes``, ``access``), ``threadgroup_bytes`` and ``after``, the dispatches it waits for. Bytes of ``codes``
        of mixed widths are an upper bound.

    Raises:
        ValueError: If the problem is not for a GPU or the config is not feasible.
    """
    if problem.device != "gpu":
        raise ValueError(f"[plan] only a GPU runs plans, but the problem's device is {problem.device!r}")
    native = resolve("plan", problem, config)
    dtype = kernels.DTYPES.index(problem.dtype)
    codebooks = sum(1 << codec.CODEBOOKS.index(name) for name in problem.codebooks)
    k, n = (-(-size // codec.HADAMARD_SIZE) * codec.HADAMARD_SIZE for size in (problem.hidden, problem.intermediate))

    def stack(index, k, n):
        widths = sum(1 << bits for bits in {group[index] for group in problem.bits})
        return _ext.StackInfo(problem.experts, k, n, problem.bias, widths, codebooks)

    if problem.kind == "linear":
        return _ext.plan_linear(
            problem.rows,
            dtype,
            stack(0, k, n),
            problem.hidden,
            problem.intermediate,
            1,
            False,
            False,
            native,
        )
    return _ext.plan_swiglu(
        problem.rows,
        problem.top_k,
        dtype,
        stack(0, k, n),
        stack(1, k, n),
        stack(2, n, k),
        problem.hidden,
        kernels.ACTIVATIONS.index(problem.activation),
        alpha,
        limit,
        problem.combine,
        native,
    )
