"""Regularisation: the linear map under which a weight matrix looks like unit Gaussian noise.

``W = diag(suh) H W_inner H diag(svh)`` with random signs in both vectors, the rows' and columns' magnitudes in
their absolute values, and a global scale that fits the codebook.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from .. import codec, ops
from .transform import both_sides

# Scale of a unit Gaussian input at which each codebook has its least error, by K: measured with tail-biting search on
# 320 tiles each, half rates on 4000, steps of about 0.5 %. The starting point of the search below.
_WHOLE_SCALES = {
    "3inst": (1.393, 1.225, 1.146, 1.143, 1.094, 1.040, 0.995, 0.995),
    "mcg": (1.393, 1.235, 1.167, 1.132, 1.095, 1.037, 0.995, 0.995),
    "mul1": (1.120, 0.988, 0.927, 0.880, 0.880, 0.880, 0.852, 0.825),
}
INPUT_SCALE = {
    (codebook, bits): scale for codebook, scales in _WHOLE_SCALES.items() for bits, scale in enumerate(scales, 1)
} | {("mul1", 1.5): 1.040, ("mul1", 2.5): 0.960, ("mul1", 3.5): 0.927}
# The error changes by less than 1 % per 3 % of scale near its least value, so a parabola through three scales
# this far apart finds it.
_SCALE_STEP = 0.05
# Tiles that the scale is searched on. The three errors share their noise, so that two batches of the search place the
# vertex to about 2 %, which costs 0.1 % of the error.
_SCALE_TILES = 8
# The error that the search leaves of Gaussian tiles by their standard deviation, from bench/quality/gaussian_errors.py.
GAUSSIAN_ERRORS = Path(__file__).parent / "gaussian_errors.json"
# Scales that are tried for feedback, as shares of the best one without: wider targets want smaller ones.
_FEEDBACK_SCALES = np.linspace(1.1, 0.4, 15)


@dataclass(frozen=True)
class Regularised:
    """A matrix between its transforms.

    Attributes:
        inner: float32 ``[k, n]``, near unit variance.
        suh: float32 ``[k]``, signed input scales.
        svh: float32 ``[n]``, signed output scales, without the global scale.
    """

    inner: np.ndarray
    suh: np.ndarray
    svh: np.ndarray


def random_signs(seed: int | Sequence[int], count: int) -> np.ndarray:
    """float32 ``[count]`` of +1 and -1."""
    return 1.0 - 2.0 * np.random.default_rng(seed).integers(0, 2, count).astype(np.float32)


def regularise(weight: np.ndarray, suh: np.ndarray, svh_signs: np.ndarray) -> Regularised:
    """Transform a padded weight, given its signed input scales and its output signs.

    Args:
        weight: float32 ``[k, n]``, both multiples of 128.
        suh: float32 ``[k]``, nowhere zero.
        svh_signs: float32 ``[n]`` of +1 and -1.
    """
    scaled = weight / suh[:, None]
    magnitude = np.sqrt(np.mean(np.square(scaled), axis=0, dtype=np.float64)).astype(np.float32)
    # A column of zeros (padding, pruning) gets scale 0 and is exactly zero whatever its codes are.
    svh = svh_signs * magnitude
    scaled = np.divide(scaled, svh[None, :], out=np.zeros_like(scaled), where=svh[None, :] != 0)
    return Regularised(both_sides(scaled), suh, svh)


def expected_scale(inner: np.ndarray, bits: float, codebook: str) -> float:
    """The factor on ``inner`` that is best for Gaussian values of its magnitude."""
    rms = float(np.sqrt(np.mean(np.square(inner), dtype=np.float64)))
    return INPUT_SCALE[codebook, bits] / (rms or 1.0)


def global_scale(inner: np.ndarray, bits: float, codebook: str, threads: int | None = None) -> float:
    """The factor on ``inner`` that leaves the least relative error, searched on an even sample of tiles."""
    tiles = codec.matrix_to_tiles(inner).reshape(-1, codec.TILE_SIZE)
    sample = tiles[:: max(1, len(tiles) // _SCALE_TILES)][:_SCALE_TILES]
    start = expected_scale(inner, bits, codebook)
    if not np.any(sample):
        return start
    factors = start * np.array([1 - _SCALE_STEP, 1, 1 + _SCALE_STEP])
    errors = []
    for factor in factors:
        target = sample * np.float32(factor)
        found = codec.decode(ops.viterbi_search(target, bits, codebook, threads=threads), codebook)
        errors.append(float(np.mean(np.square(found.astype(np.float64) - target)) / factor**2))
    low, middle, high = errors
    curvature = low - 2 * middle + high
    if curvature <= 0:
        return float(factors[int(np.argmin(errors))])
    vertex = 0.5 * (low - high) / curvature
    return float(start * (1 + _SCALE_STEP * float(np.clip(vertex, -1.5, 1.5))))


@cache
def _curves() -> tuple[np.ndarray, dict[tuple[str, float], np.ndarray]]:
    """Logarithms of the standard deviations of Gaussian tiles, and of their mean squared error by codebook and K."""
    table = json.loads(GAUSSIAN_ERRORS.read_text(encoding="utf-8"))
    curves = {(curve["codebook"], curve["bits"]): np.array(curve["log_errors"]) for curve in table["curves"]}
    return np.log(table["deviations"]), curves


def gaussian_error(variance: np.ndarray, bits: float, codebook: str) -> np.ndarray:
    """Expected mean squared error of Gaussian tiles of a variance, both in the codebook's own units."""
    deviations, curves = _curves()
    deviation = 0.5 * np.log(np.maximum(variance, np.finfo(np.float64).tiny))
    return np.exp(np.interp(deviation, deviations, curves[codebook, bits]))


def feedback_scale(
    inner: np.ndarray, gain: np.ndarray, spread: np.ndarray, bits: float, codebook: str
) -> tuple[float, float]:
    """The factor on ``inner`` that leaves the least loss after LDLQ, and that loss.

    What is fed back widens the targets of the rows that follow, at 1 or 2 bits by half and more: far outside a codebook
    that is scaled for the matrix alone. Targets are taken as Gaussian.

    Args:
        inner: float32 ``[k, n]``.
        gain: From :func:`hessian.feedback_gain`.
        spread: Diagonal of ``D``, ``[k]``.
        bits: K.
        codebook: One of :data:`codec.CODEBOOKS`.

    Returns:
        The factor, and the expected loss per column, in units of ``inner``.
    """
    power = np.mean(np.square(inner, dtype=np.float64).reshape(len(gain), -1), axis=1)
    weights = spread.reshape(len(gain), -1).sum(axis=1)
    scales = expected_scale(inner, bits, codebook) * _FEEDBACK_SCALES
    errors = np.zeros((len(gain), len(scales)))
    for i in range(len(gain) - 1, -1, -1):  # as LDLQ goes
        errors[i] = gaussian_error(np.square(scales) * power[i] + gain[i] @ errors, bits, codebook)
    loss = weights @ errors / np.square(scales)
    best = int(np.argmin(loss))
    return float(scales[best]), float(loss[best])
