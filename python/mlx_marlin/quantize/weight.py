"""One weight matrix: regularise, search, refine the scales, pack."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from .. import codec
from ..weights.trellis import Array, TrellisWeight
from . import hessian as hessians
from .ldlq import ldlq, quantize_tiles
from .regularise import Regularised, feedback_scale, global_scale, random_signs, regularise
from .transform import both_sides

# Exponents (a, b) of the input scales |W_row|^a * h^-b that are tried: (1, 0) is best if LDLQ whitens the error
# fully, (1/2, 1/4) without any feedback. The one with the least predicted loss is taken.
_INPUT_SCALE_EXPONENTS = ((1.0, 0.0), (0.75, 0.125), (0.5, 0.25), (0.5, 0.0), (0.0, 0.0))
_REFINEMENTS = 2  # alternations of output and input scales; a third changes the loss by less than 0.1 %
# Weights of a block of columns. The refinement holds some 80 bytes for each: 340 MB.
_BLOCK_WEIGHTS = 1 << 22


@dataclass(frozen=True)
class Prepared:
    """A weight ready to be quantized at any K: what does not depend on K.

    Attributes:
        weight: float32 ``[k, n]``, padded.
        shape: Logical ``(in_features, out_features)``.
        regularised: The matrix between its transforms.
        hessian: Damped Hessian in the weight's own basis, float64 ``[k, k]``, or ``None``.
        factor: ``L`` of the rotated Hessian, or ``None``.
        spread: Diagonal of ``D``, float64 ``[k]``: loss per unit of each row's rounding error.
        gain: What feedback adds to the targets, ``[k / 16, k / 16]``.
    """

    weight: np.ndarray
    shape: tuple[int, int]
    regularised: Regularised
    hessian: np.ndarray | None
    factor: np.ndarray | None
    spread: np.ndarray
    gain: np.ndarray


def _row_magnitudes(power: np.ndarray) -> np.ndarray:
    rms = np.sqrt(power)
    typical = np.sqrt(np.mean(power))
    # Rows of zeros (padding) take the typical scale; the floor keeps 1 / suh within half precision's reach.
    return np.maximum(np.where(rms > 0, rms, typical), 1e-3 * typical) / (typical or 1.0)


def _row_power(weight: np.ndarray) -> np.ndarray:
    """Mean square of each row, float64."""
    return np.asarray(np.mean(np.square(weight), axis=1, dtype=np.float64))


def _input_scales(
    power: np.ndarray, h: np.ndarray | None, signs: np.ndarray
) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
    """Signed input scales, and the factor and spread of the Hessian under them, given each row's mean square."""
    magnitudes = _row_magnitudes(power) if np.any(power) else np.ones(len(power))
    if h is None:
        suh = (signs * np.sqrt(magnitudes)).astype(np.float16).astype(np.float32)
        return suh, None, np.square(suh.astype(np.float64))
    importance = np.diagonal(h) / np.mean(np.diagonal(h))
    best: tuple[float, np.ndarray, np.ndarray, np.ndarray] | None = None
    for a, b in _INPUT_SCALE_EXPONENTS:
        scales = magnitudes**a * importance**-b
        scales /= np.exp(np.mean(np.log(scales)))
        suh = (signs * np.clip(scales, 1e-2, 1e2)).astype(np.float16).astype(np.float32)
        factor, spread = hessians.block_factor(hessians.rotate(h, suh))
        loss = float(spread.sum() * np.mean(power / np.square(suh, dtype=np.float64)))
        if best is None or loss < best[0]:
            best = loss, suh, factor, spread
    assert best is not None  # there are exponents to try
    return best[1:]


def _padded_hessian(hessian: np.ndarray | None, rows: int) -> np.ndarray | None:
    """The damped Hessian, float64, of a weight that is padded to ``rows``."""
    if hessian is None:
        return None
    return hessians.damped(np.pad(np.asarray(hessian, np.float64), (0, rows - len(hessian))))


def _gain(factor: np.ndarray | None, rows: int) -> np.ndarray:
    blocks = rows // codec.TILE
    return np.zeros((blocks, blocks)) if factor is None else hessians.feedback_gain(factor)


def prepare(weight: np.ndarray, hessian: np.ndarray | None, seed: int | Sequence[int]) -> Prepared:
    """Pad, choose signs and scales, factor the Hessian.

    Args:
        weight: float32 ``[in_features, out_features]``.
        hessian: Mean of ``x x^T``, ``[in_features, in_features]``, or ``None``: all inputs count alike.
        seed: Seed of the signs: an int or a sequence of ints.
    """
    rows, columns = weight.shape
    k, n = codec.padded(rows), codec.padded(columns)
    weight = np.pad(np.asarray(weight, np.float32), ((0, k - rows), (0, n - columns)))
    signs = random_signs(seed, k + n)
    h = _padded_hessian(hessian, k)
    suh, factor, spread = _input_scales(_row_power(weight), h, signs[:k])
    inner = regularise(weight, suh, signs[k:])
    return Prepared(weight, (rows, columns), inner, h, factor, spread, _gain(factor, k))


@dataclass(frozen=True)
class Codes:
    """A quantized weight in NumPy arrays: what :class:`TrellisWeight` is made of."""

    trellis: np.ndarray
    suh: np.ndarray
    svh: np.ndarray
    codebook: str
    in_features: int
    out_features: int


def expected_loss(p: Prepared, bits: float, codebook: str) -> float:
    """Expected squared output error per input row at one K."""
    _, loss = feedback_scale(p.regularised.inner, p.gain, p.spread, bits, codebook)
    return loss * float(np.sum(np.square(p.regularised.svh, dtype=np.float64)))


def quantize_prepared(p: Prepared, bits: float, codebook: str, threads: int | None = None) -> Codes:
    """Quantize a prepared weight at one K."""
    r = p.regularised
    states, values, scale = _search(r, p.factor, p.gain, p.spread, bits, codebook, threads)
    part = _Part(slice(None), p.weight, values, p.hessian)
    suh, svh = _refine_scales(p.hessian, r.suh, r.svh / scale, lambda: [part])
    return Codes(codec.pack(states, bits), suh, svh, codebook, *p.shape)


def _search(
    r: Regularised,
    factor: np.ndarray | None,
    gain: np.ndarray,
    spread: np.ndarray,
    bits: float,
    codebook: str,
    threads: int | None,
) -> tuple[np.ndarray, np.ndarray, np.float32]:
    """States, their values, and the factor between ``r.inner`` and those."""
    if factor is None:
        scale = np.float32(global_scale(r.inner, bits, codebook, threads))
        return *quantize_tiles(r.inner * scale, bits, codebook, threads), scale
    scale = np.float32(feedback_scale(r.inner, gain, spread, bits, codebook)[0])
    return *ldlq(r.inner * scale, factor, bits, codebook, threads), scale


class _Part:
    """Some columns of a weight beside what their codes stand for, float64.

    Args:
        columns: Which.
        weight: float32 ``[k, columns]``.
        values: float32 ``[k, columns]``, of the codes.
        h: The Hessian or ``None``.
    """

    def __init__(self, columns: slice, weight: np.ndarray, values: np.ndarray, h: np.ndarray | None):
        self.columns = columns
        self.outer = both_sides(values).astype(np.float64)
        self.hw = weight.astype(np.float64) if h is None else h @ weight.astype(np.float64)


def _refine_scales(
    h: np.ndarray | None, suh: np.ndarray, svh: np.ndarray, parts: Callable[[], Iterable[_Part]]
) -> tuple[np.ndarray, np.ndarray]:
    """Least-squares output and input scales for fixed codes, as float16.

    With ``B = outer diag(svh)`` the best input scales solve ``(H o B B^T) s = rowsum(H W o B)``; a column's best
    output scale is the regression of the column on its decoded direction.
    """
    s, v = suh.astype(np.float64), svh.astype(np.float64)
    for _ in range(_REFINEMENTS):
        right, squares = np.zeros(len(s)), np.zeros(len(s))
        gram = None if h is None else np.zeros_like(h)
        for part in parts():
            direction = s[:, None] * part.outer
            power = np.sum(direction * (direction if h is None else h @ direction), axis=0)
            match = np.sum(direction * part.hw, axis=0)
            old = v[part.columns]
            new = np.where((old != 0) & (power > 0), match / np.where(power > 0, power, 1.0), 0.0)
            v[part.columns] = new.astype(np.float16).astype(np.float64)
            b = part.outer * v[part.columns]
            right += np.sum(part.hw * b, axis=1)
            if gram is None:
                squares += np.sum(np.square(b), axis=1)
            else:
                gram += b @ b.T
        if h is None or gram is None:
            s = np.where(squares > 0, right / np.where(squares > 0, squares, 1.0), s)
        else:
            gram *= h
            # The ridge holds scales in place along directions that the calibration does not see.
            ridge = hessians.DAMPING * np.mean(np.diagonal(gram))
            if ridge > 0:
                s = s + np.linalg.solve(gram + ridge * np.eye(len(s)), right - gram @ s)
        s = s.astype(np.float16).astype(np.float64)
    return s.astype(np.float16), v.astype(np.float16)


def quantize_wide(
    read: Callable[[slice], np.ndarray],
    shape: tuple[int, int],
    bits: float,
    codebook: str,
    hessian: np.ndarray,
    seed: int | Sequence[int],
    threads: int | None = None,
) -> Codes:
    """Quantize a weight with many columns in blocks of them; only codes are held of all.

    Args:
        read: Returns float32 ``[in_features, columns]`` for a slice of columns; called several times for each.
        shape: ``(in_features, out_features)``.
        bits: K.
        codebook: One of :data:`codec.CODEBOOKS`.
        hessian: Mean of ``x x^T``, ``[in_features, in_features]``.
        seed: Seed of the signs.
        threads: Worker threads; the result does not depend on it.
    """
    rows, columns = shape
    k, n = codec.padded(rows), codec.padded(columns)
    width = max(codec.HADAMARD_SIZE, _BLOCK_WEIGHTS // k // codec.HADAMARD_SIZE * codec.HADAMARD_SIZE)
    blocks = [slice(start, min(start + width, n)) for start in range(0, n, width)]

    def padded(block: slice) -> np.ndarray:
        weight = read(slice(block.start, min(block.stop, columns)))
        return np.pad(weight, ((0, k - rows), (0, block.stop - block.start - weight.shape[1])))

    signs, h = random_signs(seed, k + n), _padded_hessian(hessian, k)
    power = sum((_row_power(padded(block)) * (block.stop - block.start) for block in blocks), np.zeros(k)) / n
    suh, factor, spread = _input_scales(power, h, signs[:k])
    gain = _gain(factor, k)
    svh = np.empty(n, np.float32)
    trellis = np.empty((k // codec.TILE, n // codec.TILE, codec.TILE * codec.half_bits(bits) // 2), np.int16)
    for block in blocks:
        r = regularise(padded(block), suh, signs[k:][block])
        states, _, scale = _search(r, factor, gain, spread, bits, codebook, threads)
        svh[block] = r.svh / scale
        trellis[:, block.start // codec.TILE : block.stop // codec.TILE] = codec.pack(states, bits)

    def parts() -> Iterable[_Part]:
        for block in blocks:
            codes = trellis[:, block.start // codec.TILE : block.stop // codec.TILE]
            values = codec.decode(codec.unpack(np.ascontiguousarray(codes)), codebook)
            yield _Part(block, padded(block), codec.tiles_to_matrix(values).astype(np.float32), h)

    suh_, svh_ = _refine_scales(h, suh, svh, parts)
    return Codes(trellis, suh_, svh_, codebook, rows, columns)


def quantize_weight(
    weight: Array,
    K: float,
    codebook: str = "mul1",
    hessian: Array | None = None,
    seed: int | Sequence[int] = 0,
    *,
    bias: Array | None = None,
    threads: int | None = None,
) -> TrellisWeight:
    """Quantize one weight matrix to EXL3.

    Args:
        weight: ``[in_features, out_features]`` (transposed against a Hugging Face ``weight``), finite. Sizes that
            are not multiples of 128 are padded.
        K: Bits per weight, 1 to 8; with mul1 also 1.5, 2.5 and 3.5.
        codebook: ``"mul1"``, ``"mcg"`` or ``"3inst"``. Default: ``"mul1"``.
        hessian: Mean of ``x x^T`` over calibration inputs, ``[in_features, in_features]``; without it all inputs
            count alike and there is no feedback. Default: ``None``.
        seed: Seed of the random signs. Default: ``0``.
        bias: Optional, ``[out_features]``. Default: ``None``.
        threads: Worker threads; the result does not depend on it. Default: the machine's cores.

    Returns:
        TrellisWeight: with the logical sizes of ``weight``.

    Raises:
        ValueError: If an argument has a wrong shape or value.
    """
    weight = np.array(weight, np.float32)
    if weight.ndim != 2 or not weight.size:
        raise ValueError(f"weight must be a matrix [in_features, out_features], got shape {list(weight.shape)}")
    if not np.isfinite(weight).all():
        raise ValueError("weight holds values that are not finite")
    codec.check_codebook(codebook)
    codec.check_bits(K, codebook)
    if hessian is not None:
        hessian = np.array(hessian, np.float64)
        if hessian.shape != (len(weight), len(weight)) or not np.isfinite(hessian).all():
            raise ValueError(
                f"hessian must be finite and [{len(weight)}, {len(weight)}], got shape {list(hessian.shape)}"
            )
    c = quantize_prepared(prepare(weight, hessian, seed), K, codebook, threads)
    return TrellisWeight(c.trellis, c.suh, c.svh, codebook, bias, c.in_features, c.out_features)
