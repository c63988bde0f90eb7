"""The EXL3 format in NumPy: slow, exact, and the truth that every kernel is compared with.

A weight matrix ``W`` ([k, n], ``y = x @ W``) is cut into 16x16 tiles. A tile is one circular stream of
``256 * K`` bits; the weight at storage position ``t`` is a hash of the 16-bit window of the stream that
ends at bit ``(t + 1) * K``. Around that inner matrix stand two Hadamard transforms and two scale vectors:
``y = H(H(x * suh) @ W_inner) * svh + bias``.

Source of every constant: ExLlamaV3 1.4.1, ``exllamav3_ext/quant/{codebook.cuh, pack.cu, hadamard_inner.cuh}``.
This module imports NumPy only.
"""

from __future__ import annotations

import numpy as np

CODEBOOKS = ("3inst", "mcg", "mul1")
"""Codebook names; the position is the id that the kernels use."""

TILE = 16
TILE_SIZE = TILE * TILE
HADAMARD_SIZE = 128
MAX_BITS = 8

# x = x * multiplier + increment (mod 2**32) for the two codebooks that add two halves.
_HALVES_HASH = {"3inst": (89226354, 64248484), "mcg": (0xCBAC1FED, 0)}
_HALVES_MASK = 0x8FFF8FFF
_HALVES_XOR = 0x3B603B60
_MUL1_MULTIPLIER = 0x83DCD12D
# What the tensors .mcg and .mul1 hold, as unsigned numbers; 3INST has no such marker.
MARKERS = {"mcg": _HALVES_HASH["mcg"][0], "mul1": _MUL1_MULTIPLIER}
# mul1 maps the byte sum s to fma(1024 + s, scale, offset) in half precision; these are the half constants' bits.
_MUL1_SCALE, _MUL1_OFFSET = np.array([0x1EEE, 0xC931], np.uint16).view(np.float16).astype(np.float64)


def _tile_order() -> tuple[np.ndarray, np.ndarray]:
    """Row and column inside the tile of each storage position (``quantize.py: tensor_core_perm``)."""
    position = np.arange(TILE_SIZE)
    lane, q = position // 8, position % 8
    rows = 2 * (lane % 4) + (q & 1) + 8 * ((q >> 1) & 1)
    columns = lane // 4 + 8 * (q >> 2)
    return rows, columns


TILE_ROWS, TILE_COLUMNS = _tile_order()


def padded(size: int) -> int:
    """The size that EXL3 stores for a logical one: the next multiple of 128."""
    return -(-size // HADAMARD_SIZE) * HADAMARD_SIZE


def trellis_bits(shape: tuple[int, ...]) -> int:
    """Bits per weight of a trellis tensor of this shape.

    Args:
        shape: Shape of the tensor, ``[k / 16, n / 16, 16 * K]``.

    Raises:
        ValueError: If no K in 1..8 has this shape.
    """
    if len(shape) != 3 or shape[2] % TILE or not 1 <= shape[2] // TILE <= MAX_BITS:
        raise ValueError(f"a trellis tensor has shape [k/16, n/16, 16*K] with K in 1..{MAX_BITS}, got {list(shape)}")
    return shape[2] // TILE


def check_codebook(codebook: str) -> None:
    """Raise ValueError unless this is one of :data:`CODEBOOKS`."""
    if codebook not in CODEBOOKS:
        raise ValueError(f"codebook must be one of {', '.join(CODEBOOKS)}, got {codebook!r}")


def check_bits(bits: int) -> None:
    """Raise ValueError unless this is a number of bits per weight that the format has."""
    if not isinstance(bits, (int, np.integer)) or not 1 <= bits <= MAX_BITS:
        raise ValueError(f"bits must be in 1..{MAX_BITS}, got {bits}")


def _swap_halves(words: np.ndarray) -> np.ndarray:
    """uint16 in memory order <-> uint16 in stream order: the halves of each 32-bit word are swapped."""
    return words.reshape(*words.shape[:-1], -1, 2)[..., ::-1].reshape(words.shape)


def unpack(trellis: np.ndarray) -> np.ndarray:
    """The 16-bit states of a trellis tensor.

    Args:
        trellis: int16 (or uint16), shape ``[k / 16, n / 16, 16 * K]``.

    Returns:
        uint16, shape ``[k / 16, n / 16, 256]``, in storage order.
    """
    trellis = np.asarray(trellis)
    if trellis.dtype not in (np.int16, np.uint16):
        raise ValueError(f"a trellis tensor is int16, got {trellis.dtype}")
    bits = trellis_bits(trellis.shape)
    stream = _swap_halves(np.ascontiguousarray(trellis).view(np.uint16)).astype(np.uint32)
    start = ((np.arange(TILE_SIZE) + 1) * bits - 16) % (TILE_SIZE * bits)
    word, shift = start // 16, start % 16
    pair = stream[..., word] << 16 | stream[..., (word + 1) % stream.shape[-1]]
    return (pair >> (16 - shift).astype(np.uint32)).astype(np.uint16)


def pack(states: np.ndarray, bits: int) -> np.ndarray:
    """Inverse of :func:`unpack`.

    Args:
        states: uint16, shape ``[k / 16, n / 16, 256]``, in storage order.
        bits: Bits per weight K, 1 to 8.

    Returns:
        int16, shape ``[k / 16, n / 16, 16 * K]``.

    Raises:
        ValueError: If the states are not tail-biting: every state must continue the one before it, and the
            first the last.
    """
    states = np.asarray(states)
    if states.dtype != np.uint16 or states.ndim != 3 or states.shape[2] != TILE_SIZE:
        raise ValueError(
            f"states must be uint16 of shape [k/16, n/16, {TILE_SIZE}], got {states.dtype} {list(states.shape)}"
        )
    check_bits(bits)
    fresh = states[..., None] >> np.arange(bits - 1, -1, -1, dtype=np.uint16) & 1
    stream = np.packbits(fresh.astype(np.uint8).reshape(*states.shape[:2], -1), axis=-1)
    words = stream.view(">u2").astype(np.uint16)
    trellis = np.ascontiguousarray(_swap_halves(words)).view(np.int16)
    if not np.array_equal(unpack(trellis), states):
        raise ValueError(f"the states are not tail-biting windows of a {bits}-bit stream")
    return trellis


def decode(states: np.ndarray, codebook: str) -> np.ndarray:
    """The value of each state.

    Args:
        states: uint16, any shape.
        codebook: One of :data:`CODEBOOKS`.

    Returns:
        float16, same shape: the exact value, rounded once as the format says.

    Raises:
        ValueError: If the states are not uint16, or there is no such codebook.
    """
    check_codebook(codebook)
    states = np.asarray(states)
    if states.dtype != np.uint16:
        raise ValueError(f"states must be uint16, got {states.dtype}")
    x = states.astype(np.uint32)
    if codebook == "mul1":
        x *= np.uint32(_MUL1_MULTIPLIER)
        byte_sum = (x & 0xFF) + (x >> 8 & 0xFF) + (x >> 16 & 0xFF) + (x >> 24)
        # Exact in double (11 x 11 bit product), so that the conversion is the only rounding.
        return ((1024.0 + byte_sum) * _MUL1_SCALE + _MUL1_OFFSET).astype(np.float16)
    multiplier, increment = _HALVES_HASH[codebook]
    x = x * np.uint32(multiplier) + np.uint32(increment)
    x = (x & np.uint32(_HALVES_MASK)) ^ np.uint32(_HALVES_XOR)
    low = (x & 0xFFFF).astype(np.uint16).view(np.float16)
    high = (x >> 16).astype(np.uint16).view(np.float16)
    return low + high


def tiles_to_matrix(values: np.ndarray) -> np.ndarray:
    """Values in storage order, ``[k / 16, n / 16, 256]``, as the matrix ``[k, n]``."""
    rows, columns = values.shape[:2]
    tiles = np.empty((rows, columns, TILE, TILE), values.dtype)
    tiles[:, :, TILE_ROWS, TILE_COLUMNS] = values
    return tiles.transpose(0, 2, 1, 3).reshape(rows * TILE, columns * TILE)


def matrix_to_tiles(matrix: np.ndarray) -> np.ndarray:
    """Inverse of :func:`tiles_to_matrix`."""
    k, n = matrix.shape
    tiles = matrix.reshape(k // TILE, TILE, n // TILE, TILE).transpose(0, 2, 1, 3)
    return tiles[:, :, TILE_ROWS, TILE_COLUMNS]


def inner(w) -> np.ndarray:
    """The matrix between the two Hadamard transforms, bit-exact.

    Args:
        w: A :class:`~mlx_marlin.TrellisWeight`.

    Returns:
        float16, shape ``[k, n]``, padded sizes.
    """
    return tiles_to_matrix(decode(unpack(np.array(w.trellis)), w.codebook))


def hadamard(x: np.ndarray, axis: int = -1) -> np.ndarray:
    """Hadamard transform of each block of 128 along an axis: Sylvester order, divided by sqrt(128).

    Args:
        x: Floating point; the axis must be a multiple of 128 long. float16 is transformed in float32 and
            rounded once.
        axis: The axis. Default: ``-1``.

    Returns:
        Same shape and dtype. The transform is symmetric and its own inverse.

    Raises:
        ValueError: If x is not floating point, or the axis has another length.
    """
    x = np.asarray(x)
    if not np.issubdtype(x.dtype, np.floating):
        raise ValueError(f"x must be floating point, got {x.dtype}")
    work = np.moveaxis(x.astype(np.float32) if x.dtype == np.float16 else x, axis, -1)
    if work.shape[-1] % HADAMARD_SIZE:
        raise ValueError(f"the axis must be a multiple of {HADAMARD_SIZE} long, got {work.shape[-1]}")
    shape = work.shape
    width = 1
    while width < HADAMARD_SIZE:
        pairs = work.reshape(*shape[:-1], -1, 2, width)
        a, b = pairs[..., 0, :], pairs[..., 1, :]
        work = np.stack((a + b, a - b), axis=-2).reshape(shape)
        width *= 2
    work = work * work.dtype.type(HADAMARD_SIZE**-0.5)
    return np.moveaxis(work, -1, axis).astype(x.dtype)


def unpack_signs(words: np.ndarray) -> np.ndarray:
    """Sign vector of an older checkpoint's packed ``.su`` / ``.sv``.

    Args:
        words: int16, shape ``[n / 16]``. Bit i of word j is element ``16 * j + i``; 1 means -1.

    Returns:
        float16, shape ``[n]``, of +1 and -1.
    """
    words = np.asarray(words)
    if words.dtype not in (np.int16, np.uint16) or words.ndim != 1:
        raise ValueError(f"packed signs are int16 of shape [n/16], got {words.dtype} {list(words.shape)}")
    bits = np.ascontiguousarray(words).view(np.uint16)[:, None] >> np.arange(16, dtype=np.uint16) & 1
    return np.float16(1) - np.float16(2) * bits.reshape(-1).astype(np.float16)


def dequantize(w) -> np.ndarray:
    """The effective weight ``diag(suh) H W_inner H diag(svh)``, computed in double precision.

    Args:
        w: A :class:`~mlx_marlin.TrellisWeight`.

    Returns:
        float32, shape ``[in_features, out_features]``: logical sizes, padding removed.
    """
    matrix = hadamard(hadamard(inner(w).astype(np.float64), axis=0), axis=1)
    matrix *= np.array(w.suh).astype(np.float64)[:, None]
    matrix *= np.array(w.svh).astype(np.float64)[None, :]
    return matrix[: w.in_features, : w.out_features].astype(np.float32)
