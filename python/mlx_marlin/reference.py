"""What a layer must compute, by the codec, in float64: what the tuner compares every config with."""

from __future__ import annotations

import math

import mlx.core as mx
import numpy as np

from . import codec
from .weights import ExpertStack, TrellisWeight


def swiglu(x: np.ndarray, stacks: list[ExpertStack], indices: np.ndarray, scores, activation) -> np.ndarray:
    """The experts' outputs, ``[rows, k, hidden]``, or combined by the scores.

    Args:
        x: float64, ``[rows, hidden]``.
        stacks: Gate, up and down.
        indices: ``[rows, k]``.
        scores: ``[rows, k]`` or ``None``.
        activation: ``(name, alpha, limit)``.
    """
    gate, up, down = stacks
    x = _widened(x, gate)
    out = np.zeros((*indices.shape, down.out_features))
    for e in np.unique(indices):
        row, slot = np.nonzero(indices == e)
        middle = _activated(_product(x[row], gate, e), _product(x[row], up, e), *activation)
        out[row, slot] = _product(middle, down, e)[:, : down.out_features]
    return out if scores is None else np.einsum("rs,rsh->rh", scores.astype(np.float64), out)


def linear(x: np.ndarray, stack: ExpertStack) -> np.ndarray:
    """The product with a stack of one weight, float64."""
    return _product(_widened(x, stack), stack, 0)[:, : stack.out_features]


def row_error(actual: np.ndarray, expected: np.ndarray) -> float:
    """Largest error of a row over the row's norm; infinite where a row is not finite.

    Raises:
        ValueError: If the shapes differ.
    """
    if actual.shape != expected.shape:
        raise ValueError(f"wrong result: shape {list(actual.shape)}, expected {list(expected.shape)}")
    norm = np.linalg.norm(expected, axis=-1)
    error = np.linalg.norm(actual - expected, axis=-1) / np.where(norm > 0, norm, 1.0)
    return float(np.where(np.isfinite(error), error, np.inf).max())


def _widened(x: np.ndarray, stack: ExpertStack) -> np.ndarray:
    """Rows of the padded width."""
    return np.pad(x, ((0, 0), (0, stack.padded_shape[0] - x.shape[1])))


def _product(x: np.ndarray, stack: ExpertStack, e: int) -> np.ndarray:
    """One expert's product, padded width."""
    k, n = stack.padded_shape
    start, size = int(stack.offsets[e].item()), k * n * stack.bits[e] // 32
    trellis = stack.codes[start : start + size].view(mx.int16).reshape(k // 16, n // 16, 16 * stack.bits[e])
    weight = TrellisWeight(trellis, stack.suh[e], stack.svh[e], stack.codebooks[e])
    suh, svh = (np.array(v).astype(np.float64) for v in (weight.suh, weight.svh))
    y = codec.hadamard(codec.hadamard(x * suh) @ codec.inner(weight).astype(np.float64)) * svh
    return y if stack.bias is None else y + np.array(stack.bias[e]).astype(np.float64)


def _activated(gate: np.ndarray, up: np.ndarray, name: str, alpha: float, limit: float) -> np.ndarray:
    if name == "gelu_tanh":
        return 0.5 * gate * (1 + np.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3))) * up
    if name == "swiglu_oai":
        gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit) + 1
        return gate / (1 + np.exp(-alpha * gate)) * up
    return gate / (1 + np.exp(-gate)) * up
