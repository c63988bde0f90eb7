"""Token embeddings and n-gram tables, coded row by row.

Source: ExLlamaV3 1.6.5, ``exllamav3_ext/ngram.cu``.
"""

from __future__ import annotations

import numpy as np

from .trellis import MAX_BITS, TILE, TILE_SIZE, butterflies, decode


def embedding_bits(shape: tuple[int, ...], groups: int) -> int:
    """Bits per weight of a quantized token embedding.

    Args:
        shape: Shape of its trellis, ``[rows, groups * (1 + 16 * K)]``.
        groups: Groups of 256 elements in a row.

    Raises:
        ValueError: If no whole K from 1 to 8 has this shape.
    """
    words = shape[1] // groups if len(shape) == 2 and groups > 0 and shape[1] % groups == 0 else 0
    if words % TILE != 1 or not 1 <= words // TILE <= MAX_BITS:
        raise ValueError(
            f"the trellis of an embedding has shape [rows, {groups} * (1 + 16*K)] with a whole K from 1 to {MAX_BITS}, "
            f"for signs of shape [{groups}, {TILE_SIZE}]; got {list(shape)}"
        )
    return words // TILE


def unpack_embedding(trellis: np.ndarray, groups: int) -> tuple[np.ndarray, np.ndarray]:
    """The scales and the 16-bit states of a quantized token embedding.

    Each group is a ring of its own: one word for its scale, then plain 16-bit words (halves not swapped) whose bits,
    least significant first, are K for each element in turn.

    Args:
        trellis: int16 (or uint16), shape ``[rows, groups * (1 + 16 * K)]``.
        groups: Groups of 256 elements in a row.

    Returns:
        float16 scales, shape ``[rows, groups]``, and uint16 states, shape ``[rows, groups, 256]``, in element order.
    """
    trellis = np.asarray(trellis)
    if trellis.dtype not in (np.int16, np.uint16):
        raise ValueError(f"the trellis of an embedding is int16, got {trellis.dtype}")
    bits = embedding_bits(trellis.shape, groups)
    rings = np.ascontiguousarray(trellis).view(np.uint16).reshape(trellis.shape[0], groups, 1 + TILE * bits)
    return rings[..., 0].view(np.float16), _states(rings[..., 1:], bits)


def _states(words: np.ndarray, bits: int) -> np.ndarray:
    """The uint16 states of rings: shape ``[..., words]`` -> ``[..., 16 * words / bits]``."""
    stream = np.unpackbits(np.ascontiguousarray(words).view(np.uint8), axis=-1, bitorder="little")
    fields = stream.reshape(*words.shape[:-1], -1, bits).astype(np.uint32)
    fresh = (fields << np.arange(bits, dtype=np.uint32)).sum(axis=-1, dtype=np.uint32)
    states = np.zeros_like(fresh)
    for age in range(-(-16 // bits)):  # an element's own bits are the lowest, older ones above them
        states |= np.roll(fresh, age, axis=-1) << np.uint32(age * bits)
    return states.astype(np.uint16)


def decode_embedding(trellis: np.ndarray, signs: np.ndarray, hidden: int) -> np.ndarray:
    """The rows of a quantized token embedding, bit-exact. The codebook is always mul1.

    Args:
        trellis: int16 (or uint16), shape ``[rows, G * (1 + 16 * K)]`` with ``G = ceil(hidden / 256)`` and a whole K.
        signs: float16, shape ``[G, 256]``, of +1 and -1.
        hidden: Elements of a row.

    Returns:
        float16, shape ``[rows, hidden]``.

    Raises:
        ValueError: If a dtype or a shape is another one.
    """
    signs = np.asarray(signs)
    if not isinstance(hidden, (int, np.integer)) or hidden < 1:
        raise ValueError(f"hidden must be a positive integer, got {hidden!r}")
    groups = -(-hidden // TILE_SIZE)
    if signs.dtype != np.float16 or signs.shape != (groups, TILE_SIZE):
        raise ValueError(
            f"the signs of an embedding of {hidden} elements are float16 [{groups}, {TILE_SIZE}], "
            f"got {signs.dtype} {list(signs.shape)}"
        )
    scales, states = unpack_embedding(trellis, groups)
    values = decode(states, "mul1").astype(np.float32) * scales[..., None].astype(np.float32)
    rows = butterflies(values, TILE_SIZE) * np.float32(TILE_SIZE**-0.5) * signs.astype(np.float32)
    return rows.astype(np.float16).reshape(len(rows), -1)[:, :hidden]


NGRAM_SIZE = 160
"""Elements of a row of an n-gram table."""


def ngram_bits(shape: tuple[int, ...]) -> int:
    """Bits per weight of a quantized n-gram table.

    Args:
        shape: Shape of its trellis, ``[rows, 1 + 10 * K]``.

    Raises:
        ValueError: If no whole K from 1 to 8 has this shape.
    """
    words = NGRAM_SIZE // TILE
    if len(shape) != 2 or shape[1] % words != 1 or not 1 <= shape[1] // words <= MAX_BITS:
        raise ValueError(
            f"the trellis of an n-gram table has shape [rows, 1 + {words}*K] with a whole K from 1 to {MAX_BITS}, "
            f"got {list(shape)}"
        )
    return shape[1] // words


def decode_ngrams(trellis: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """Rows of a quantized n-gram table: rings of 160 elements without signs and transform. The codebook is mul1.

    Args:
        trellis: int16 (or uint16), shape ``[rows, 1 + 10 * K]``.
        bias: float16, shape ``[rows, 160]``: what the head that a row belongs to adds.

    Returns:
        float16, shape ``[rows, 160]``.
    """
    rings = np.ascontiguousarray(trellis).view(np.uint16)
    values = decode(_states(rings[:, 1:], ngram_bits(rings.shape)), "mul1").astype(np.float32)
    return (values * rings[:, :1].view(np.float16).astype(np.float32) + bias.astype(np.float32)).astype(np.float16)
