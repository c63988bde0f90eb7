"""The encoder's search: the states of a tile that decode nearest to given values."""

from __future__ import annotations

import threading
import warnings
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache

import mlx.core as mx
import numpy as np

from .. import _ext, codec
from .gathering import Gathering
from .problems import device_of
from .runtime import MLX_LOCK

# Tiles of one command buffer: a second of an M1 (predicted). The system ends command buffers that take many, and draws
# nothing meanwhile.
_TILES_AT_A_TIME = 2048

CODEBOOK_MULTIPLIERS = dict(zip(codec.CODEBOOKS, _ext.CODEBOOK_MULTIPLIERS))
"""Multiplier of each codebook's hash, as the kernels have it; EXL3 marks MCG and MUL1 by it."""


@lru_cache(maxsize=len(codec.CODEBOOKS))
def _values_on_cpu(codebook: str) -> np.ndarray:
    return codec.codebook_values(codebook).astype(np.float32)


def searches_on_gpu() -> bool:
    """Whether :func:`viterbi_search` runs on a GPU here: where MLX's default device is one."""
    return device_of(None) == "gpu"


def mlx_turn() -> AbstractContextManager[object]:
    """What a thread that may run beside others holds while it calls MLX: a lock where MLX's default device is a GPU.

    On a CPU nothing is held: each thread has a stream of its own, and what others have evaluated may be read.
    """
    return MLX_LOCK if searches_on_gpu() else nullcontext()


def viterbi_search(tiles: np.ndarray, bits: float, codebook: str, *, threads: int | None = None) -> np.ndarray:
    """The tail-biting states whose values are nearest to tiles: the encoder's search.

    Two passes over 2^16 states: free ends on the tile rotated by 128, then the state found before position 0 forced
    at both ends. Targets are rounded to half precision first, as in ExLlamaV3's kernel.

    It runs on the GPU where MLX's default device is one, with the same result: before a width is first searched there,
    a few tiles are compared with the CPU's search, which takes over with a warning if they differ. Searches of several
    threads then run together.

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
    if len(targets) and searches_on_gpu() and not search_fault(bits, codebook):
        return _gathering().run((bits, codebook), targets)
    return _search_on_cpu(targets, bits, codebook, threads)


def _search_on_cpu(targets: np.ndarray, bits: float, codebook: str, threads: int | None = None) -> np.ndarray:
    values = _values_on_cpu(codebook)
    return _ext.viterbi_search(targets, values, codec.half_bits(bits), threads or _ext.num_threads())


@lru_cache(maxsize=len(codec.CODEBOOKS))
def _values_on_gpu(codebook: str) -> mx.array:
    return mx.array(codec.codebook_values(codebook))


def _search_on_gpu(targets: np.ndarray, bits: float, codebook: str) -> np.ndarray:
    number, half_bits = codec.CODEBOOKS.index(codebook), codec.half_bits(bits)
    found = []
    for first in range(0, len(targets), _TILES_AT_A_TIME):
        some = targets[first : first + _TILES_AT_A_TIME]
        with MLX_LOCK:
            values = _values_on_gpu(codebook)
            found.append(np.array(_ext.trellis_viterbi(mx.array(some), values, half_bits, number, mx.gpu)))
    return np.concatenate(found)


@lru_cache(maxsize=1)
def _gathering() -> Gathering[tuple[float, str]]:
    return Gathering(lambda targets, key: _search_on_gpu(targets, *key))


# Bits of a path that ends in state 65535. Where the first tile of the test ends as it does, the best path that ends
# elsewhere has another state in the middle, which is all that the first pass is for: at 1 bit, with each of the
# codebooks (searched for; few beginnings are so).
_LAST_BITS = 0xABB8FFFF
_LAST_LENGTH = 19  # of those before the last state

_test_lock = threading.Lock()
_faults: dict[tuple[float, str], str] = {}  # by what is searched, "" for none


def search_fault(bits: float, codebook: str) -> str:
    """What is wrong with the GPU's search of a width, or ``""``; a few tiles are searched the first time."""
    with _test_lock:
        if (bits, codebook) not in _faults:
            _faults[bits, codebook] = fault = _test(bits, codebook)
            if fault:
                warnings.warn(
                    f"tiles are searched on the CPU, as the GPU's search at {bits} bits with {codebook} is refused: "
                    f"{fault}",
                    RuntimeWarning,
                    stacklevel=3,
                )
        return _faults[bits, codebook]


def _test(bits: float, codebook: str) -> str:
    targets = np.random.default_rng(0).standard_normal((4, codec.TILE_SIZE)).astype(np.float16).astype(np.float32)
    steps = np.arange(int(_LAST_LENGTH / bits), -1, -1)
    last = _LAST_BITS >> np.ceil(bits * steps).astype(np.int64) & 0xFFFF
    middle = codec.TILE_SIZE // 2  # where the first pass ends
    targets[0, middle - len(last) : middle] = _values_on_cpu(codebook)[last]
    targets[1] = 0  # costs tie everywhere
    targets[2, ::7] = np.finfo(np.float16).max
    try:
        found = _gathering().run((bits, codebook), targets)
    except RuntimeError as failure:  # what MLX raises for kernels that do not compile or run
        return f"it does not run: {failure}"
    wrong = np.count_nonzero(found != _search_on_cpu(targets, bits, codebook))
    return f"{wrong} of {targets.size} states differ from the CPU's" if wrong else ""
