"""Small conversions without the search: some codes in its place, which depend on the weight and the Hessian."""

import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest

from mlx_marlin import codec
from mlx_marlin.quantize import calibration, embedding, head, layers
from mlx_marlin.quantize.weight import Codes, Prepared, prepare

LENGTH, WINDOWS = 32, 2


def codes_without_search(prepared: Prepared, bits: float, codebook: str, threads: int | None = None) -> Codes:
    k, n = prepared.weight.shape
    rng = np.random.default_rng([zlib.crc32(prepared.weight.tobytes()), zlib.crc32(prepared.spread.tobytes())])
    words = codec.half_bits(bits) * codec.TILE // 2
    trellis = rng.integers(-(1 << 15), 1 << 15, (k // codec.TILE, n // codec.TILE, words), np.int16)
    suh, svh = (x.astype(np.float16) for x in (prepared.regularised.suh, prepared.regularised.svh))
    return Codes(trellis, suh, svh, codebook, *prepared.shape)


def wide_without_search(
    read: Callable[[slice], np.ndarray],
    shape: tuple[int, int],
    bits: float,
    codebook: str,
    hessian: np.ndarray,
    seed: list[int],
    threads: int | None = None,
) -> Codes:
    return codes_without_search(prepare(read(slice(None)), hessian, seed), bits, codebook)


def rows_without_search(rows: np.ndarray, signs: np.ndarray, bits: int, threads: int | None = None) -> np.ndarray:
    rng = np.random.default_rng(zlib.crc32(rows.tobytes()))
    return rng.integers(0, 1 << 13, (len(rows), len(signs) * (1 + 16 * bits)), np.int16)


@contextmanager
def no_search() -> Iterator[None]:
    """Conversions take a tenth of a second and two windows of text."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layers, "quantize_prepared", codes_without_search)
        patch.setattr(head, "quantize_wide", wide_without_search)
        patch.setattr(embedding, "quantize_rows", rows_without_search)
        patch.setattr(calibration, "WINDOWS", WINDOWS)
        patch.setattr(calibration, "LENGTH", LENGTH)
        yield


class Interrupted(Exception):
    """Raised in place of a kill."""


def interrupt(stage: str):
    """A ``progress`` that stops where a stage of this name is told."""

    def report(progress):
        if progress.stage.startswith(stage):
            raise Interrupted

    return report
