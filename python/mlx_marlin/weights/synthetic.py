"""Random weights, for whoever needs a layer and no model: tests, tuner, self-test and benchmarks.

Every bit pattern is a legal trellis, so that random words are weights; their scales are of a trained model's size.
"""

from __future__ import annotations

import math

import numpy as np

from .. import codec
from ..kernels import Problem
from .trellis import TrellisWeight


def random_weight(
    rng: np.random.Generator,
    in_features: int,
    out_features: int,
    bits: float,
    codebook: str = "mul1",
    bias: bool = False,
    gain: float = 1.0,
) -> TrellisWeight:
    """A weight of random trellis words.

    Args:
        rng: Source of everything random.
        in_features, out_features: Logical sizes; the arrays have the next multiples of 128.
        bits: K, one of ``codec.WIDTHS``.
        codebook: One of ``codec.CODEBOOKS``. Default: ``"mul1"``.
        bias: Whether to add one. Default: ``False``.
        gain: About the standard deviation of the output for inputs of standard deviation 1. Default: ``1.0``.
    """
    k, n = codec.padded(in_features), codec.padded(out_features)
    shape = k // codec.TILE, n // codec.TILE, codec.words_per_tile(bits)
    words = rng.integers(0, 1 << 16, shape, np.uint16).view(np.int16)

    def scales(size: int, magnitude: float) -> np.ndarray:
        return (magnitude * rng.uniform(0.5, 1.5, size) * rng.choice([-1.0, 1.0], size)).astype(np.float16)

    return TrellisWeight(
        words,
        scales(k, 1.0),
        scales(n, gain / in_features**0.5),
        codebook,
        bias=rng.standard_normal(n).astype(np.float16) if bias else None,
        in_features=in_features,
        out_features=out_features,
    )


def random_projection(rng: np.random.Generator, problem: Problem, part: int) -> list[TrellisWeight]:
    """One projection of a problem: a weight for each expert.

    Args:
        rng: Source of everything random.
        problem: Its bit widths and codebooks all occur as far as there are experts, in all combinations if there are
            enough.
        part: 0 to 2 for gate, up and down; 0 for a linear.
    """
    formats = zip(widths_of(problem, part), codebooks_of(problem))
    return [
        # Half rates exist for mul1 only.
        random_weight(rng, *problem.shapes[part], bits, "mul1" if codec.is_half_rate(bits) else codebook, problem.bias)
        for bits, codebook in formats
    ]


def random_embedding(rng: np.random.Generator, rows: int, features: int, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """A quantized token embedding of random trellis words.

    Args:
        rng: Source of everything random.
        rows: Tokens.
        features: Logical width; the arrays have the next multiple of 256.
        bits: K, 1 to 8.

    Returns:
        ``trellis`` int16 ``[rows, words]`` and ``signs`` float16 ``[groups, 256]``, as EmbeddingWeight takes them.
    """
    groups = -(-features // codec.TILE_SIZE)
    rings = rng.integers(0, 1 << 16, (rows, groups, 1 + codec.words_per_tile(bits)), np.uint16)
    rings[..., 0] = rng.uniform(0.01, 2, (rows, groups)).astype(np.float16).view(np.uint16)  # the scale
    signs = rng.choice([-1.0, 1.0], (groups, codec.TILE_SIZE)).astype(np.float16)
    return rings.reshape(rows, -1).view(np.int16), signs


def widths_of(problem: Problem, part: int) -> list[int | float]:
    """Bits of each expert's weight in :func:`random_projection`: the problem's, in turn."""
    return [problem.bits[e % len(problem.bits)][part] for e in range(problem.experts)]


def codebooks_of(problem: Problem) -> list[str]:
    """Codebook of each expert in :func:`random_projection`: the problem's, in turn, one step further whenever widths
    and codebooks would begin to repeat themselves.
    """
    names = problem.codebooks
    period = math.lcm(len(problem.bits), len(names))
    return [names[(e + e // period) % len(names)] for e in range(problem.experts)]
