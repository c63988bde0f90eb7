"""Trellis-coded weight matrices.

A weight matrix ``W`` ([k, n], ``y = x @ W``) is cut into 16x16 tiles. A tile is one circular stream of
``256 * K`` bits; the weight at storage position ``t`` is a hash of the 16-bit window of the stream that
ends at bit ``S(t)``, the bits that positions 0 to ``t`` add (:func:`ends`). Around that inner matrix stand two
Hadamard transforms and two scale vectors: ``y = H(H(x * suh) @ W_inner) * svh + bias``.

Source of every constant: ExLlamaV3 1.4.1, ``exllamav3_ext/quant/{codebook.cuh, pack.cu, hadamard_inner.cuh}``; half
rates: 1.6.5, ``exllamav3_ext/quant/frac.cu``.
"""

from __future__ import annotations

from functools import cache
from typing import Protocol

import numpy as np

CODEBOOKS = ("3inst", "mcg", "mul1")
"""Codebook names; the position is the id that the kernels use."""

TILE = 16
"""Rows and columns of a tile."""
TILE_SIZE = TILE * TILE
"""Weights of a tile."""
HADAMARD_SIZE = 128
"""Points of the Hadamard transforms, of which padded sizes are multiples."""
# Blocks that are transformed at once: two times 256 KB of float32 stay in a core's cache.
_CACHED_BLOCKS = 512

WIDTHS = (1, 1.5, 2, 2.5, 3, 3.5, 4, 5, 6, 7, 8)
"""Bits per weight that the format has. Whole widths are ints; the half rates, floats, exist for mul1 only."""
MAX_BITS = WIDTHS[-1]
"""The largest width."""
_LISTED = ", ".join(map(str, WIDTHS))
# Numbers that are equal are the same key.
_WIDTH_OF = {width: width for width in WIDTHS}

# x = x * multiplier + increment (mod 2**32) for the two codebooks that add two halves.
_HALVES_HASH = {"3inst": (89226354, 64248484), "mcg": (0xCBAC1FED, 0)}
_HALVES_MASK = 0x8FFF8FFF
_HALVES_XOR = 0x3B603B60
_MUL1_MULTIPLIER = 0x83DCD12D
# mul1 maps the byte sum s to fma(1024 + s, scale, offset) in half precision; these are the half constants' bits.
_MUL1_SCALE, _MUL1_OFFSET = np.array([0x1EEE, 0xC931], np.uint16).view(np.float16).astype(np.float64)


def _tile_order() -> tuple[np.ndarray, np.ndarray]:
    """Row and column inside the tile of each storage position (``quantize.py: tensor_core_perm``)."""
    position = np.arange(TILE_SIZE)
    lane, q = position // 8, position % 8
    rows = 2 * (lane % 4) + (q & 1) + 8 * ((q >> 1) & 1)
    columns = lane // 4 + 8 * (q >> 2)
    return rows, columns


_ORDER = _tile_order()
TILE_ROWS = _ORDER[0]
"""Row inside the tile of each storage position."""
TILE_COLUMNS = _ORDER[1]
"""Column inside the tile of each storage position."""


def padded(size: int) -> int:
    """The size that EXL3 stores for a logical one: the next multiple of 128."""
    return -(-size // HADAMARD_SIZE) * HADAMARD_SIZE


def half_bits(bits: float) -> int:
    """``2 * K``: the integer that stands for a width where there are no fractions."""
    return int(2 * bits)


def bits_of_half(halves: int) -> int | float:
    """Inverse of :func:`half_bits`: an int for a whole width, a float for a half rate."""
    return halves // 2 if halves % 2 == 0 else halves / 2


def is_half_rate(bits: float) -> bool:
    """Whether these are 1.5, 2.5 or 3.5 bits and not a whole width."""
    return half_bits(bits) % 2 == 1


def as_width(value: float, what: str = "bits") -> int | float:
    """The width that a number stands for, as :data:`WIDTHS` writes it: 2.0 and NumPy's 2 are 2.

    Args:
        value: The number.
        what: What to call it in the error. Default: ``"bits"``.

    Raises:
        ValueError: If the format has no such width.
    """
    try:
        width = None if isinstance(value, bool) else _WIDTH_OF.get(value)
    except TypeError:  # lists, arrays
        width = None
    if width is None:
        raise ValueError(f"{what} must be one of {_LISTED}, got {value!r}")
    return width


def words_per_tile(bits: float) -> int:
    """16-bit words of a tile: ``16 * K``."""
    return TILE // 2 * half_bits(bits)


def fresh_bits(bits: float) -> np.ndarray:
    """Bits that each storage position of a tile adds to the stream.

    Args:
        bits: Bits per weight K.

    Returns:
        int64, shape ``[256]``: K, or at a half rate ``K - 1/2`` at even positions and ``K + 1/2`` at odd ones.
    """
    return np.diff(ends(bits), prepend=0)


def ends(bits: float) -> np.ndarray:
    """Where the window of each storage position ends in the stream: ``S(t) = floor((t + 1) * K)``.

    Args:
        bits: Bits per weight K.

    Returns:
        int64, shape ``[256]``; the last is the length of the stream, ``256 * K``.
    """
    return (np.arange(TILE_SIZE) + 1) * half_bits(bits) // 2


def format_word(bits: float, codebook: str) -> int:
    """A weight's format as the kernels read it: ``2 * bits | codebook id << 8``."""
    return half_bits(bits) | CODEBOOKS.index(codebook) << 8


def trellis_bits(shape: tuple[int, ...]) -> int | float:
    """Bits per weight of a trellis tensor of this shape.

    Args:
        shape: Shape of the tensor, ``[k / 16, n / 16, 16 * K]``.

    Raises:
        ValueError: If no K in :data:`WIDTHS` has this shape.
    """
    bits = bits_of_half(shape[2] // (TILE // 2)) if len(shape) == 3 else None
    if bits not in WIDTHS or words_per_tile(bits) != shape[2]:
        raise ValueError(f"a trellis tensor has shape [k/16, n/16, 16*K] with K one of {_LISTED}, got {list(shape)}")
    return bits


FORMATS = tuple((k, name) for k in WIDTHS for name in CODEBOOKS if name == "mul1" or not is_half_rate(k))
"""The pairs of a width and a codebook that the format has."""


def check_codebook(codebook: str) -> None:
    """Raise ValueError unless this is one of :data:`CODEBOOKS`."""
    if codebook not in CODEBOOKS:
        raise ValueError(f"codebook must be one of {', '.join(CODEBOOKS)}, got {codebook!r}")


def check_bits(bits: float, codebook: str | None = None) -> None:
    """Raise ValueError unless the format has this number of bits per weight.

    Args:
        bits: One of :data:`WIDTHS`, whole widths as integers.
        codebook: The codebook that goes with it. Default: ``None``, any that has this width.
    """
    kinds = (int, np.integer) if bits in WIDTHS and not is_half_rate(bits) else (float, np.floating)
    if bits not in WIDTHS or not isinstance(bits, kinds):
        raise ValueError(f"bits must be one of {_LISTED}, whole widths as integers; got {bits!r}")
    if codebook is not None and codebook != "mul1" and is_half_rate(bits):
        raise ValueError(f"half rates exist for mul1 only, got {bits} bits with codebook {codebook!r}")


@cache
def codebook_values(codebook: str) -> np.ndarray:
    """float16 ``[65536]``, the value of each state; not to be written."""
    values = decode(np.arange(1 << 16, dtype=np.uint16), codebook)
    values.flags.writeable = False
    return values


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
    end = ends(bits)
    start = (end - 16) % end[-1]
    word, shift = start // 16, start % 16
    pair = stream[..., word] << 16 | stream[..., (word + 1) % stream.shape[-1]]
    return (pair >> (16 - shift).astype(np.uint32)).astype(np.uint16)


def pack(states: np.ndarray, bits: float) -> np.ndarray:
    """Inverse of :func:`unpack`.

    Args:
        states: uint16, shape ``[k / 16, n / 16, 256]``, in storage order.
        bits: Bits per weight K, one of :data:`WIDTHS`.

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
    position = np.repeat(np.arange(TILE_SIZE), fresh_bits(bits))
    shift = ends(bits)[position] - 1 - np.arange(position.size)  # most significant first
    stream = np.packbits((np.take(states, position, axis=-1) >> shift.astype(np.uint16) & 1).astype(np.uint8), axis=-1)
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
    if codebook == "mul1":
        return unrounded_mul1(states).astype(np.float16)
    x = states.astype(np.uint32)
    multiplier, increment = _HALVES_HASH[codebook]
    x = x * np.uint32(multiplier) + np.uint32(increment)
    x = (x & np.uint32(_HALVES_MASK)) ^ np.uint32(_HALVES_XOR)
    low = (x & 0xFFFF).astype(np.uint16).view(np.float16)
    high = (x >> 16).astype(np.uint16).view(np.float16)
    return low + high


def unrounded_mul1(states: np.ndarray) -> np.ndarray:
    """The value of each state in MUL1 before it is rounded to a half: float64, of 11 by 11 bits exactly."""
    x = states.astype(np.uint32) * np.uint32(_MUL1_MULTIPLIER)
    byte_sum = (x & 0xFF) + (x >> 8 & 0xFF) + (x >> 16 & 0xFF) + (x >> 24)
    return (1024.0 + byte_sum) * _MUL1_SCALE + _MUL1_OFFSET


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


class Array(Protocol):
    """An array of NumPy or MLX."""

    @property
    def shape(self) -> tuple[int, ...]: ...


class Weight(Protocol):
    """A :class:`~mlx_marlin.TrellisWeight`, or the same in NumPy arrays."""

    @property
    def trellis(self) -> Array: ...
    @property
    def suh(self) -> Array: ...
    @property
    def svh(self) -> Array: ...
    @property
    def codebook(self) -> str: ...
    @property
    def in_features(self) -> int: ...
    @property
    def out_features(self) -> int: ...


def inner(w: Weight) -> np.ndarray:
    """The matrix between the two Hadamard transforms, bit-exact.

    Args:
        w: A :class:`~mlx_marlin.TrellisWeight`.

    Returns:
        float16, shape ``[k, n]``, padded sizes.

    Raises:
        ValueError: If the trellis is none, or has a width that the codebook has not.
    """
    check_bits(trellis_bits(w.trellis.shape), w.codebook)
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
    work = butterflies(work, HADAMARD_SIZE) * work.dtype.type(HADAMARD_SIZE**-0.5)
    return np.moveaxis(work, -1, axis).astype(x.dtype)


def butterflies(x: np.ndarray, size: int) -> np.ndarray:
    """Hadamard transform without a factor of each block of the last axis, by sums of width 1, 2, ... size / 2."""
    blocks = x.reshape(-1, size)
    result = np.empty(blocks.shape, x.dtype)
    for first in range(0, len(blocks), _CACHED_BLOCKS):
        # An element of all blocks side by side: sums of any width run along contiguous memory.
        values = np.ascontiguousarray(blocks[first : first + _CACHED_BLOCKS].T)
        spare = np.empty_like(values)
        width = values.shape[1]
        while width < values.size:
            pairs, sums = values.reshape(-1, 2, width), spare.reshape(-1, 2, width)
            np.add(pairs[:, 0], pairs[:, 1], out=sums[:, 0])
            np.subtract(pairs[:, 0], pairs[:, 1], out=sums[:, 1])
            values, spare = spare, values
            width *= 2
        result[first : first + _CACHED_BLOCKS] = values.T
    return result.reshape(x.shape)


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


def dequantize(w: Weight) -> np.ndarray:
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
