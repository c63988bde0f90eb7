"""What the layers must give, in float64: the codec for the inner matrices only, the rest written out."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from mlx_marlin import codec
from mlx_marlin.weights.trellis import TrellisWeight


def _hadamard_matrix() -> np.ndarray:
    matrix = np.ones((1, 1))
    while len(matrix) < codec.HADAMARD_SIZE:
        matrix = np.kron(np.array([[1.0, 1.0], [1.0, -1.0]]), matrix)
    return matrix / codec.HADAMARD_SIZE**0.5


_HADAMARD = _hadamard_matrix()


def rotate(x: np.ndarray) -> np.ndarray:
    return (x.reshape(-1, codec.HADAMARD_SIZE) @ _HADAMARD).reshape(x.shape)


def reference_linear(x: np.ndarray, w: TrellisWeight, *, padded: bool = False) -> np.ndarray:
    """float64 ``[rows, out_features]``, or the padded width.

    Uses the codec for the inner matrix only; the transforms are written out as matrix products.
    """
    k, n = w.padded_shape
    x = np.pad(x.astype(np.float64), ((0, 0), (0, k - x.shape[1])))
    suh, svh = (np.array(v).astype(np.float64) for v in (w.suh, w.svh))
    y = rotate(rotate(x * suh) @ codec.inner(w).astype(np.float64)) * svh
    if w.bias is not None:
        y += np.array(w.bias.astype(mx.float32)).astype(np.float64)
    return y if padded else y[:, : w.out_features]


def reference_activation(x: np.ndarray, activation: str) -> np.ndarray:
    """The activation of the gate, or of up where there is none, float64."""
    if activation == "gelu_tanh":
        return 0.5 * x * (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3)))
    if activation == "relu_squared":
        return np.where(x > 0, x, 0) ** 2
    if activation == "silu":
        return x / (1 + np.exp(-x))
    raise ValueError(f"no activation is called {activation!r}")


def reference_hidden(gate: np.ndarray, up: np.ndarray, activation: str, alpha: float, limit: float) -> np.ndarray:
    """Down's input of gated experts, float64."""
    if activation == "swiglu_oai":
        gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit) + 1
        return gate / (1 + np.exp(-alpha * gate)) * up
    if activation == "swiglu_clamped":
        gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit)
        return reference_activation(gate, "silu") * up
    if activation == "swiglu_step":
        return np.minimum(reference_activation(gate, "silu"), limit) * np.clip(up, -limit, limit)
    if activation == "situ":
        sigmoid = 1 / (1 + np.exp(-gate))
        return alpha * np.tanh(gate / alpha) * sigmoid * limit * np.tanh(up / limit)
    return reference_activation(gate, activation) * up


def reference_experts(x, indices, experts, scores=None, activation="silu", alpha=1.702, limit=7.0) -> np.ndarray:
    """float64 ``[rows, top_k, hidden]``, or ``[rows, hidden]`` with scores. experts: with or without ``gate``; an index
    of their number is of one that is not here.
    """
    out = np.zeros((*indices.shape, experts["down"][0].out_features))
    for e in np.unique(indices[indices != len(experts["down"])]):
        row, slot = np.nonzero(indices == e)
        up = reference_linear(x[row], experts["up"][e], padded=True)
        if "gate" in experts:
            gate = reference_linear(x[row], experts["gate"][e], padded=True)
            hidden = reference_hidden(gate, up, activation, alpha, limit)
        else:
            hidden = reference_activation(up, activation)
        out[row, slot] = reference_linear(hidden, experts["down"][e])
    return out if scores is None else np.einsum("rs,rsh->rh", scores.astype(np.float64), out)
