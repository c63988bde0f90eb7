"""Blockwise LDLQ: quantize 16 rows at a time and feed the error forward into the rows that follow."""

from __future__ import annotations

import numpy as np

from .. import codec, ops


def quantize_tiles(
    inner: np.ndarray, bits: float, codebook: str, threads: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Nearest codes without feedback.

    Returns:
        ``(states uint16 [k / 16, n / 16, 256], values float32 [k, n])``.
    """
    tiles = codec.matrix_to_tiles(inner)
    states = ops.viterbi_search(tiles.reshape(-1, codec.TILE_SIZE), bits, codebook, threads=threads)
    states = states.reshape(tiles.shape)
    return states, codec.tiles_to_matrix(codec.decode(states, codebook)).astype(np.float32)


def ldlq(
    inner: np.ndarray, factor: np.ndarray, bits: float, codebook: str, threads: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Codes that keep ``tr(E^T R E)`` small, for ``R = L D L^T``.

    Block row i is quantized after all rows below it, towards ``W_i + sum_{j > i} L_ji^T E_j``, so that what is left
    of the error is each block's own rounding, weighted by D.

    Args:
        inner: float32 ``[k, n]``, in the codebook's scale.
        factor: ``L``, float64 ``[k, k]``, from :func:`hessian.block_factor`.
        bits: K.
        codebook: One of :data:`codec.CODEBOOKS`.
        threads: Worker threads of the search.

    Returns:
        ``(states uint16 [k / 16, n / 16, 256], values float32 [k, n])``.
    """
    k, n = inner.shape
    error = np.zeros((k, n), np.float32)
    values = np.empty((k, n), np.float32)
    states = np.empty((k // codec.TILE, n // codec.TILE, codec.TILE_SIZE), np.uint16)
    feedback = factor.astype(np.float32)
    for i in range(k - codec.TILE, -1, -codec.TILE):
        rows = slice(i, i + codec.TILE)
        below = slice(i + codec.TILE, k)
        target = inner[rows] + feedback[below, rows].T @ error[below]
        found, values[rows] = quantize_tiles(target, bits, codebook, threads)
        states[i // codec.TILE] = found[0]
        error[rows] = inner[rows] - values[rows]
    return states, values
