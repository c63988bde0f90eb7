"""Hessians of a linear's squared output error, from its input activations, and their block factors."""

from __future__ import annotations

import numpy as np

from .. import codec
from .transform import both_sides

# Added to the diagonal as a share of its mean: keeps the factor well conditioned where calibration activations
# span fewer dimensions than the layer has. 1 % as in QuIP# and GPTQ.
DAMPING = 0.01


class Hessian:
    """Weighted mean of ``x x^T`` over activation rows.

    Args:
        size: Input features.
    """

    def __init__(self, size: int):
        self.total = np.zeros((size, size), np.float32)  # a layer has many
        self.weight = 0.0

    def add(self, x: np.ndarray, weights: np.ndarray | None = None) -> None:
        """Accumulate rows.

        Args:
            x: float32 ``[rows, size]``.
            weights: Optional, ``[rows]``, not negative: importance of each row's output error.
        """
        if weights is None:
            self.total += x.T @ x
            self.weight += len(x)
        else:
            self.total += (x * weights[:, None].astype(np.float32)).T @ x
            self.weight += float(np.sum(weights, dtype=np.float64))

    def mean(self) -> np.ndarray:
        """float32 ``[size, size]``; zeros where nothing was added."""
        return self.total / np.float32(self.weight) if self.weight else self.total

    def with_prior(self, prior: np.ndarray, strength: float) -> np.ndarray:
        """The mean, shrunk towards a prior that counts as ``strength`` rows: experts that see few tokens."""
        return (self.total + np.float32(strength) * prior) / np.float32(self.weight + strength)


def damped(h: np.ndarray) -> np.ndarray:
    """``h`` with :data:`DAMPING` on its diagonal; the identity if ``h`` is zero."""
    mean = float(np.mean(np.diagonal(h)))
    if mean <= 0:
        return np.eye(len(h))
    return h + DAMPING * mean * np.eye(len(h))


def rotate(h: np.ndarray, suh: np.ndarray) -> np.ndarray:
    """The Hessian seen by the inner matrix: ``H diag(suh) h diag(suh) H``."""
    scaled = h * suh[:, None].astype(np.float64) * suh[None, :].astype(np.float64)
    return both_sides(scaled)


def block_factor(r: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Block LDL decomposition ``r = L D L^T`` with blocks of 16.

    Returns:
        ``L``, float64 ``[k, k]``, unit block lower triangular, and the diagonal of ``D``, float64 ``[k]``.
    """
    lower = np.linalg.cholesky(r)
    d = np.empty(len(r))
    for i in range(0, len(r), codec.TILE):
        block = slice(i, i + codec.TILE)
        d[block] = np.square(lower[block, block]).sum(axis=1)
        lower[i:, block] = lower[i:, block] @ np.linalg.inv(lower[block, block])
    return lower, d


def feedback_gain(lower: np.ndarray) -> np.ndarray:
    """How much the feedback of LDLQ widens its targets.

    With ``eta`` the blocks' own rounding errors, the error is ``L^-T eta`` and a block's target is the matrix plus
    ``(I - L^-T) eta``.

    Args:
        lower: ``L`` of :func:`block_factor`, ``[k, k]``.

    Returns:
        ``[k / 16, k / 16]``: variance of a block row's target (row) per unit of squared rounding error of a block row
        below it (column).
    """
    blocks = len(lower) // codec.TILE
    power = np.square(_lower_inverse(lower).T).reshape(blocks, codec.TILE, blocks, codec.TILE)
    return np.triu(power.sum(axis=3).mean(axis=1), 1)


def _lower_inverse(lower: np.ndarray) -> np.ndarray:
    """Inverse of a lower triangular matrix by halves: a sixth of the arithmetic of a general inverse."""
    k = len(lower)
    if k <= 4 * codec.TILE:
        return np.linalg.inv(lower)
    half = k // 2
    result = np.zeros_like(lower)
    result[:half, :half] = _lower_inverse(lower[:half, :half])
    result[half:, half:] = _lower_inverse(lower[half:, half:])
    result[half:, :half] = -result[half:, half:] @ lower[half:, :half] @ result[:half, :half]
    return result
