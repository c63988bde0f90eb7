"""A machine whose GPU searches: the primitive runs on the CPU."""

import mlx.core as mx
import pytest

from mlx_marlin import _ext, ops
from mlx_marlin.ops import search


@pytest.fixture
def gpu_search(monkeypatch):
    """A default device that is a GPU. Tells how many tiles the primitive is given at a time."""
    runs, real = [], _ext.trellis_viterbi

    def run(targets, values, half_bits, codebook, stream):
        assert stream == mx.gpu and values.dtype == mx.float16
        runs.append(len(targets))
        return real(targets, values, half_bits, codebook, mx.cpu)

    for module in (search, ops):
        monkeypatch.setattr(module, "searches_on_gpu", lambda: True)
    monkeypatch.setattr(_ext, "trellis_viterbi", run)
    monkeypatch.setattr(search, "_faults", {})
    return runs
