"""The token embedding: each row by itself, in rings of 256 elements with a scale each; the codebook is mul1 always."""

from __future__ import annotations

import mlx.nn as nn
import numpy as np

from .. import codec, ops
from ..storage.safetensors import Tensor, TensorInfo, widened
from .jobs import seed_of
from .layered import LayeredModel
from .regularise import expected_scale, random_signs
from .source import Source


def part_of(bits: int) -> str:
    """Name of its file, kept for other sizes beside the measurement."""
    return f"embedding-{bits}.safetensors"


CODEBOOK = "mul1"
# The codebook's largest value: a target beyond it is cut off.
_LARGEST = float(np.abs(codec.codebook_values(CODEBOOK)).max())
# Rings that are searched at a time: 4 MB of float32 values, and enough tiles for every worker.
_BLOCK_RINGS = 4096


def check_embed_bits(bits: int | None) -> int | None:
    """Raise ValueError unless an embedding can have this many bits; ``None`` leaves it unquantized."""
    if bits is None or (isinstance(bits, (int, np.integer)) and 1 <= bits <= codec.MAX_BITS):
        return None if bits is None else int(bits)
    raise ValueError(
        f"embed_bits must be a whole number from 1 to {codec.MAX_BITS}, or None to leave the embedding unquantized, "
        f"got {bits!r}"
    )


def embedding_signs(features: int, seed: int | list[int]) -> np.ndarray:
    """float16 ``[groups, 256]`` of +1 and -1, from a generator that depends on the seed alone."""
    groups = -(-features // codec.TILE_SIZE)
    return random_signs(seed, groups * codec.TILE_SIZE).reshape(groups, codec.TILE_SIZE).astype(np.float16)


def _rotate(x: np.ndarray) -> np.ndarray:
    """The orthonormal Hadamard transform of rings of 256, its own inverse: two of 128 and a butterfly."""
    low, high = np.split(codec.hadamard(x), 2, axis=-1)
    return np.concatenate((low + high, low - high), axis=-1) * np.float32(0.5**0.5)


def pack_rings(states: np.ndarray, scales: np.ndarray, bits: int) -> np.ndarray:
    """Inverse of :func:`codec.unpack_embedding`.

    Args:
        states: uint16 ``[rows, groups, 256]``, in element order, tail-biting.
        scales: float16 ``[rows, groups]``.
        bits: K, 1 to 8.

    Returns:
        int16, shape ``[rows, groups * (1 + 16 * bits)]``.
    """
    rows, groups, _ = states.shape
    fresh = states[..., None] >> np.arange(bits, dtype=np.uint16) & 1  # least significant first
    stream = np.packbits(fresh.astype(np.uint8).reshape(rows, groups, -1), axis=-1, bitorder="little")
    rings = np.concatenate((scales.view(np.uint16)[..., None], stream.view("<u2")), axis=-1)
    return rings.reshape(rows, -1).view(np.int16)


def quantize_rows(rows: np.ndarray, signs: np.ndarray, bits: int, threads: int | None = None) -> np.ndarray:
    """Rows of the table as the format stores them.

    A ring is scaled to where the codebook is best for Gaussian values of its magnitude, or less where its largest
    element would lie outside of the codebook. After the search its scale is the least-squares one.

    Args:
        rows: float32 ``[rows, features]``, finite.
        signs: float16 ``[groups, 256]``.
        bits: K, 1 to 8.
        threads: Worker threads; the result does not depend on it.

    Returns:
        int16, shape ``[rows, groups * (1 + 16 * bits)]``.

    Raises:
        ValueError: If a scale is beyond half precision.
    """
    padding = signs.size - rows.shape[1]
    rings = np.pad(rows, ((0, 0), (0, padding))).reshape(len(rows), *signs.shape)
    inner = _rotate(rings * signs.astype(np.float32)).reshape(-1, codec.TILE_SIZE)
    largest = np.abs(inner).max(axis=-1, keepdims=True)
    rms = np.sqrt(np.mean(np.square(inner, dtype=np.float64), axis=-1, keepdims=True))
    unit = expected_scale(np.ones(1, np.float32), bits, CODEBOOK)
    # Rings of zeros get scale 0 below, whatever their codes are.
    factor = np.where(
        largest > 0, np.minimum(unit / np.where(rms > 0, rms, 1), _LARGEST / np.maximum(largest, 1e-30)), 1
    )
    states = ops.viterbi_search((inner * factor).astype(np.float32), bits, CODEBOOK, threads=threads)
    values = codec.decode(states, CODEBOOK).astype(np.float64)
    with np.errstate(over="ignore"):
        scales = (np.sum(values * inner, axis=-1) / np.sum(np.square(values), axis=-1)).astype(np.float16)
    if not np.isfinite(scales).all():
        raise ValueError(f"an embedding holds values up to {np.abs(rows).max():g}, beyond half precision")
    return pack_rings(states.reshape(rings.shape), scales.reshape(rings.shape[:2]), bits)


def quantize_table(table: TensorInfo, signs: np.ndarray, bits: int, threads: int | None = None) -> np.ndarray:
    """A whole table, in blocks of rows, so that only its quantized form is held.

    Args:
        table: Where it lies, ``[rows, features]``, F16, BF16 or F32.
        signs: float16 ``[groups, 256]``.
        bits: K, 1 to 8.
        threads: Worker threads.
    """
    height = max(1, _BLOCK_RINGS // len(signs))
    blocks = []
    for first in range(0, table.shape[0], height):
        rows = table.rows(first, min(first + height, table.shape[0]))
        floats = widened(rows, table.dtype).astype(np.float32)
        if not np.isfinite(floats).all():
            raise ValueError(f"{table.file}: the embedding holds values that are not finite, near row {first}")
        blocks.append(quantize_rows(floats, signs, bits, threads))
    return np.concatenate(blocks)


def _name(model: LayeredModel, source: Source) -> str:
    """The checkpoint's name of the token embedding, without ``.weight``."""
    paths = [path for path, module in model.model.named_modules() if isinstance(module, nn.Embedding)]
    for path in sorted(paths, key=lambda path: not path.endswith("embed_tokens")):
        name = model.names.origins.get(f"{path}.weight")
        if name is not None and name.endswith(".weight"):
            return name.removesuffix(".weight")
    raise ValueError(f"{source.path} has no tensor that is known to be the token embedding; leave --embed-bits out")


def embedding_tensors(model: LayeredModel, source: Source, bits: int, seed: int, threads: int) -> dict[str, Tensor]:
    """The token embedding's tensors, quantized.

    Args:
        model: The model, for which of its modules that is.
        source: The checkpoint.
        bits: K, 1 to 8.
        seed: The conversion's seed, of the signs.
        threads: Worker threads.
    """
    name = _name(model, source)
    table = source.stored[f"{name}.weight"]
    signs = embedding_signs(table.shape[1], seed_of(seed, name))
    trellis = quantize_table(table, signs, bits, threads)
    return {f"{name}.trellis": Tensor.of(trellis), f"{name}.signs": Tensor.of(signs)}
