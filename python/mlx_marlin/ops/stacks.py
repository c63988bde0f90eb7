"""Weights as the primitives take them: made once, by whichever thread comes first."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import NamedTuple

import mlx.core as mx

from .. import _ext, codec
from ..weights.experts import ExpertStack
from ..weights.trellis import TrellisWeight

BUILD_LOCK = threading.RLock()
"""Held while a stack is made from a weight or from a layer's parameters."""


class Stack(NamedTuple):
    """An :class:`ExpertStack` as the primitives take it."""

    arrays: list[mx.array]
    info: _ext.StackInfo
    source: ExpertStack


def stack_info(
    experts: int, k: int, n: int, *, bias: bool, bits: Iterable[float], codebooks: Iterable[str]
) -> _ext.StackInfo:
    """Sizes and contents of a stack; bits and codebooks: those that occur."""
    return _ext.StackInfo(
        experts=experts,
        k=k,
        n=n,
        bias=bias,
        widths=sum(1 << codec.half_bits(width) for width in set(bits)),
        codebooks=sum(1 << codec.CODEBOOKS.index(name) for name in set(codebooks)),
    )


def prepare(stack: ExpertStack) -> Stack:
    """Describe a stack's arrays; done once per stack and kept on it."""
    prepared: Stack | None = getattr(stack, "_prepared", None)
    if prepared is None:
        bias = stack.bias is not None
        info = stack_info(len(stack.bits), *stack.padded_shape, bias=bias, bits=stack.bits, codebooks=stack.codebooks)
        prepared = stack._prepared = Stack(stack.arrays, info, stack)
    return prepared


def prepare_weight(op: str, w: TrellisWeight) -> Stack:
    """The stack of one weight; made once per weight and kept on it.

    Raises:
        ValueError: If w is something else; ``op`` is named.
    """
    if not isinstance(w, TrellisWeight):
        raise ValueError(f"[{op}] w must be a TrellisWeight, got {type(w).__name__}")
    stack: Stack | None = getattr(w, "_stack", None)
    if stack is None:
        with BUILD_LOCK:
            stack = getattr(w, "_stack", None)
            if stack is None:
                stack = w._stack = prepare(ExpertStack.of("w", [w]))
    return stack


def half_scales(name: str, scales: mx.array, original: mx.array | None) -> mx.array:
    """Scales that a cast of the whole model (``set_dtype``) changed, in half precision again.

    Args:
        name: For the error message.
        scales: Of any floating dtype.
        original: float16, the scales before, if they are known; they are taken where ``scales`` is nothing but a cast
            of them.

    Raises:
        ValueError: If half precision does not hold the scales. Traced scales are rounded instead.
    """
    if scales.dtype == mx.float16 or not mx.issubdtype(scales.dtype, mx.floating):
        return scales
    half = scales.astype(mx.float16)
    if original is not None and original.size == scales.size:
        original = original.reshape(scales.shape)
        half = mx.where(mx.all(scales == original.astype(scales.dtype)), original, half)
    if not _ext.is_tracer(scales) and not mx.array_equal(half.astype(scales.dtype), scales, equal_nan=True).item():
        raise ValueError(
            f"{name} holds {scales.dtype} values that half precision does not; EXL3's scales are float16: round them "
            "with astype(mx.float16) if that is wanted"
        )
    return half


def with_parameters(
    stack: Stack, codes: mx.array, formats: mx.array | None, suh: mx.array, svh: mx.array, bias: mx.array | None
) -> Stack:
    """The stack over the stand-ins that its parameters have while a function that captures them is traced.

    Formats may have other values when the function runs. The kernels were chosen for the bit widths and codebooks of
    now: formats with others, or that do not fit the codes, make every result NaN.

    Args:
        stack: As it was before the trace.
        codes, suh, svh, bias: Of the same shapes as in ``stack``.
        formats: The same, or ``None`` for those of ``stack``.

    Raises:
        ValueError: If a shape is another one.
    """
    source = stack.source
    given = {"trellis": codes, "formats": formats, "suh": suh, "svh": svh, "bias": bias}
    current = (source.codes, source.formats, source.suh, source.svh, source.bias)
    for (name, array), before in zip(given.items(), current):
        shape, wanted = getattr(array, "shape", None), getattr(before, "shape", None)
        if shape != wanted and not (name == "formats" and array is None):
            raise ValueError(
                f"{name} has shape {shape} in a traced function, but the layer was last called with {wanted}; call "
                "the layer once with its new parameters before the function is traced"
            )
    suh, svh = half_scales("suh", suh, source.suh), half_scales("svh", svh, source.svh)
    offsets = source.offsets
    if formats is None:
        formats = source.formats
    else:
        # Half a bit per weight takes as many words as there are pairs of 32 weights.
        words = (formats & 0xFF).astype(mx.int64) * (source.padded_shape[0] * source.padded_shape[1] // 64)
        ends = mx.cumsum(words)
        legal = (ends[-1] == codes.size) & _among(formats & 0xFF, map(codec.half_bits, source.bits))
        legal = legal & _among(formats >> 8, [codec.CODEBOOKS.index(name) for name in source.codebooks])
        # Not source.formats, which may be the very parameter that is captured: MLX refuses to see it again.
        known = mx.array(list(map(codec.format_word, source.bits, source.codebooks)), mx.uint32)
        formats = mx.where(legal, formats, known)
        offsets = mx.where(legal, ends - words, offsets)
        svh = mx.where(legal, svh, mx.array(float("nan"), mx.float16))
    return stack._replace(arrays=[codes, offsets, formats, suh, svh, *([] if bias is None else [bias])])


def _among(values: mx.array, known: Iterable[int]) -> mx.array:
    """Whether every value is one of the known ones."""
    return (values[:, None] == mx.array(sorted(set(known)), values.dtype)).any(axis=1).all()
