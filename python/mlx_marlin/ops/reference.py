"""What a call must give, by the codec, in float64: for the self-test and the tuner, which check kernels at run time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Protocol

import mlx.core as mx
import numpy as np

from .. import codec
from ..weights.trellis import TrellisWeight


class ByExpert(Protocol):
    """One projection of the experts: a sequence of weights, or an ``ExpertStack``."""

    def __getitem__(self, e: int, /) -> TrellisWeight: ...


def linear(x: np.ndarray, w: TrellisWeight, *, padded: bool = False) -> np.ndarray:
    """``x @ W + bias``.

    Args:
        x: float64, shape ``[rows, in_features]``, or the padded width.
        w: The weight.
        padded: Whether the result keeps the padded width, as between gate/up and down. Default: ``False``.

    Returns:
        float64, shape ``[rows, out_features]``.
    """
    k, _ = w.padded_shape
    x = np.pad(x, ((0, 0), (0, k - x.shape[1])))
    suh, svh = (np.array(v).astype(np.float64) for v in (w.suh, w.svh))
    y = codec.hadamard(codec.hadamard(x * suh) @ codec.inner(w).astype(np.float64)) * svh
    if w.bias is not None:
        y = y + np.array(w.bias.astype(mx.float32)).astype(np.float64).reshape(-1)
    return y if padded else y[:, : w.out_features]


def integer_linear(x: np.ndarray, w: TrellisWeight, *, padded: bool = False) -> np.ndarray:
    """The same as the CPU computes it with ``use_fp32_acc=False``.

    With mul1, x is rounded once it is rotated: in each block of 128, with ``m`` the largest magnitude (at least
    2^-100), to the nearest multiple of ``m / 32767``. Weights are the codebook's values before their rounding to a
    half. Nothing else is rounded here; the kernels sum in integers inside a block and in float32 over blocks. Other
    codebooks are exact. Arguments and result as for :func:`linear`.
    """
    if w.codebook != "mul1":
        return linear(x, w, padded=padded)
    k, _ = w.padded_shape
    suh, svh = (np.array(v).astype(np.float64) for v in (w.suh, w.svh))
    rotated = codec.hadamard(np.pad(x, ((0, 0), (0, k - x.shape[1]))) * suh)
    blocks = rotated.reshape(len(x), k // codec.HADAMARD_SIZE, codec.HADAMARD_SIZE)
    step = np.maximum(np.abs(blocks).max(axis=-1, keepdims=True), 2.0**-100) / 32767
    inner = codec.tiles_to_matrix(codec.unrounded_mul1(codec.unpack(np.array(w.trellis))))
    y = codec.hadamard((np.rint(blocks / step) * step).reshape(rotated.shape) @ inner) * svh
    if w.bias is not None:
        y = y + np.array(w.bias.astype(mx.float32)).astype(np.float64).reshape(-1)
    return y if padded else y[:, : w.out_features]


def activate(x: np.ndarray, up: np.ndarray | None, activation: str, alpha: float, limit: float) -> np.ndarray:
    """The activation before down, by the formulas of :func:`mlx_marlin.trellis_swiglu` and ``trellis_mlp``.

    Args:
        x: Of the gate, or where there is none of up.
        up: What it is multiplied with; ``None`` without a gate.
        activation, alpha, limit: As the ops have them.
    """
    factor = 1.0 if up is None else up
    if activation == "gelu_tanh":
        return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) * factor
    if activation == "relu_squared":
        return np.maximum(x, 0) ** 2 * factor
    if activation == "situ":
        return alpha * np.tanh(x / alpha) / (1 + np.exp(-x)) * limit * np.tanh(factor / limit)
    if activation == "swiglu_step":
        return np.minimum(x / (1 + np.exp(-x)), limit) * np.clip(factor, -limit, limit)
    if activation in ("swiglu_oai", "swiglu_clamped"):
        x, factor = np.minimum(x, limit), np.clip(factor, -limit, limit)
        slope, shift = (alpha, 1) if activation == "swiglu_oai" else (1, 0)
        return x / (1 + np.exp(-slope * x)) * (factor + shift)
    return x / (1 + np.exp(-x)) * factor


def experts_output(
    x: np.ndarray,
    indices: np.ndarray,
    projections: Iterable[ByExpert],
    scores: np.ndarray | None,
    activation: str,
    alpha: float,
    limit: float,
    product: Callable[..., np.ndarray] = linear,
) -> np.ndarray:
    """The experts of a layer.

    Args:
        x: float64, shape ``[rows, hidden]``.
        indices: Integers, shape ``[rows, top_k]``.
        projections: Gate, up and down, each indexed by expert; without a gate up and down.
        scores: Optional, shape ``[rows, top_k]``.
        activation, alpha, limit: As for :func:`activate`.
        product: :func:`linear` or :func:`integer_linear`. Default: :func:`linear`.

    Returns:
        float64, shape ``[rows, top_k, hidden]``, or ``[rows, hidden]`` with scores.
    """
    *reading, down = projections
    out = np.zeros((*indices.shape, x.shape[1]))
    for e in np.unique(indices):
        row, slot = np.nonzero(indices == e)
        first, *others = (product(x[row], projection[e], padded=True) for projection in reading)
        up = others[0] if others else None
        out[row, slot] = product(activate(first, up, activation, alpha, limit), down[e])
    return out if scores is None else np.einsum("rs,rsh->rh", scores.astype(np.float64), out)


def row_error(actual: np.ndarray, expected: np.ndarray) -> float:
    """The largest error of a row over the row's norm; infinite if anything is not finite, but for rows that must be NaN
    and are.

    Raises:
        ValueError: If the shapes differ.
    """
    if actual.shape != expected.shape:
        raise ValueError(f"the result has shape {list(actual.shape)}, expected {list(expected.shape)}")
    norm = np.linalg.norm(expected, axis=-1)
    error = np.linalg.norm(actual - expected, axis=-1) / np.where(norm > 0, norm, 1.0)
    same = np.isnan(actual).all(axis=-1) & np.isnan(expected).all(axis=-1)
    return float(np.where(same, 0.0, np.where(np.isfinite(error), error, np.inf)).max(initial=0.0))
