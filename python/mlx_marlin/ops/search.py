"""The encoder's search: the states of a tile that decode nearest to given values."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from .. import _ext, codec

CODEBOOK_MULTIPLIERS = dict(zip(codec.CODEBOOKS, _ext.CODEBOOK_MULTIPLIERS))
"""Multiplier of each codebook's hash, as the kernels have it; EXL3 marks MCG and MUL1 by it."""


@lru_cache(maxsize=len(codec.CODEBOOKS))
def _codebook_values(codebook: str) -> np.ndarray:
    values = codec.decode(np.arange(1 << 16, dtype=np.uint16), codebook).astype(np.float32)
    values.flags.writeable = False
    return values


def viterbi_search(tiles: np.ndarray, bits: float, codebook: str, *, threads: int | None = None) -> np.ndarray:
    """The tail-biting states whose values are nearest to tiles: the encoder's search.

    Two passes over 2^16 states: free ends on the tile rotated by 128, then the state found before position 0 forced
    at both ends. Targets are rounded to half precision first, as in ExLlamaV3's kernel.

    Args:
        tiles: Floating point, shape ``[count, 256]``, in storage order.
        bits: Bits per weight K, one of :data:`codec.WIDTHS`; half rates for mul1 only.
        codebook: One of :data:`codec.CODEBOOKS`.
        threads: Up to this many of the CPU workers; the result does not depend on it. Default: all of them.

    Returns:
        uint16, shape ``[count, 256]``: states for :func:`codec.pack` and :func:`codec.decode`.

    Raises:
        ValueError: If the shape, the bits or the codebook is wrong, or a target is not finite.
    """
    codec.check_codebook(codebook)
    codec.check_bits(bits, codebook)
    tiles = np.asarray(tiles)
    if tiles.ndim != 2 or tiles.shape[1] != codec.TILE_SIZE or not np.issubdtype(tiles.dtype, np.floating):
        raise ValueError(
            f"tiles must be floating point of shape [count, {codec.TILE_SIZE}], got {tiles.dtype} {list(tiles.shape)}"
        )
    with np.errstate(over="ignore"):  # infinite targets are refused below
        targets = np.ascontiguousarray(tiles.astype(np.float16).astype(np.float32))
    if not np.isfinite(targets).all():
        raise ValueError("tiles must be finite and within half precision's range")
    values = _codebook_values(codebook)
    return _ext.viterbi_search(targets, values, codec.half_bits(bits), threads or _ext.num_threads())
