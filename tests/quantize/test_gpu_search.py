"""Quantizing where a GPU searches: several linears at a time, with the codes of one at a time on the CPU."""

from types import SimpleNamespace

import numpy as np
import pytest

from mlx_marlin import codec
from mlx_marlin.quantize import quantize_weight, runner
from mlx_marlin.quantize.transform import both_sides
from tests.support.gpu_search import gpu_search  # noqa: F401

BITS = (8, 8, 8, 7, 8, 7)  # those of one width are searched together; these are the quickest


def weights() -> list[tuple[np.ndarray, np.ndarray, int]]:
    rng = np.random.default_rng(1)
    found = []
    for bits in BITS:
        x = rng.standard_normal((300, 128))
        found.append((rng.standard_normal((128, 128)), x.T @ x / len(x), bits))
    return found


@pytest.fixture
def one_by_one():
    return [quantize_weight(w, bits, hessian=h).trellis for w, h, bits in weights()]


def test_linears_at_work_together_get_the_codes_of_each_alone(one_by_one, gpu_search, monkeypatch):  # noqa: F811
    monkeypatch.setattr(runner, "fingerprint", lambda device: SimpleNamespace(cores=18))
    clock = SimpleNamespace(tick=lambda *_: None)
    several = runner.Runner(None, None, None, clock)
    several.workers = 2

    def task(job, threads):
        w, h, bits = job
        return quantize_weight(w, bits, hessian=h, threads=threads).trellis

    assert runner.jobs_at_work(2) == len(BITS)
    for found, expected in zip(several.parallel(task, weights(), "searching"), one_by_one, strict=True):
        np.testing.assert_array_equal(np.array(found), np.array(expected))
    tiles = 128 // codec.TILE
    searched = [n for n in gpu_search if n % tiles == 0]  # the others are tests; how many meet depends on the machine
    assert sum(searched) == len(BITS) * tiles * tiles


def test_as_many_linears_as_workers_without_a_gpu():
    assert runner.jobs_at_work(5) == 5


@pytest.mark.parametrize("dtype, tolerance", [(np.float32, 1e-5), (np.float64, 1e-13)])
def test_transforms_by_products_are_the_codecs(dtype, tolerance):
    x = np.random.default_rng(2).standard_normal((384, 256)).astype(dtype)
    found = both_sides(x)
    assert found.dtype == dtype
    np.testing.assert_allclose(found, codec.hadamard(codec.hadamard(x, axis=0), axis=1), atol=tolerance)
