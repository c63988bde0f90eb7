"""Batches that run side by side: what they leave does not depend on how many there are, nor on which ends first."""

import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest

from mlx_marlin import kernels
from mlx_marlin.ops import mlx_turn
from mlx_marlin.quantize import runner as runners
from mlx_marlin.quantize.layered import LayeredModel
from mlx_marlin.quantize.source import Source
from tests.support.gpu_search import gpu_search  # noqa: F401
from tests.support.small_conversions import source_of

BATCHES, LENGTH = 6, 16


@pytest.fixture
def running(tmp_path, monkeypatch):
    """Makes a runner of a number of workers, its first layer loaded, and its first hidden states."""
    tokens = np.random.default_rng(0).integers(0, 64, (BATCHES, LENGTH)).astype(np.int32)

    def make(workers, name="qwen2_moe"):  # experts, and a shared one beside them
        source = Source(source_of(tmp_path / f"{name}-{workers}", name)[0])
        monkeypatch.setattr(kernels, "cpu_threads", lambda: workers)
        monkeypatch.setattr(runners, "BATCH", 1)
        clock = SimpleNamespace(tick=lambda *_: None)
        made = runners.Runner(source, tokens, LayeredModel(source, tokens, 1), clock)
        made.reopen()
        hidden = list(made.embeddings())
        made.load(0)
        return made, hidden

    return make


def seen(taps):
    """All that the taps of a layer saw."""
    found = {path: (tap.hessian.total, tap.hessian.weight) for path, tap in taps.linears.items()}
    for path, tap in taps.experts.items():
        rows = tap.rows
        found[path] = (rows.x.all(), np.concatenate(rows.indices), np.concatenate(rows.scores))
    return found


@pytest.mark.parametrize("name", ["qwen2_moe", "gemma3"])
def test_batches_leave_the_same_whichever_ends_first(running, name):
    """Gemma's layers are given masks that the model has made on the main thread."""
    one, hidden = running(1, name)
    with one.taps(0) as taps:
        outputs, wanted = list(one.run(0, hidden, taps=taps)), seen(taps)
    several, _ = running(3, name)
    real, threads = several.model.output, set()

    def output(index, x, batch):
        threads.add(threading.get_ident())
        time.sleep(0.05 if batch % 2 else 0.0)  # the next one ends before
        return real(index, x, batch)

    several.model.output = output
    with several.taps(0) as taps:
        for found, expected in zip(several.run(0, hidden, taps=taps), outputs, strict=True):
            np.testing.assert_array_equal(found, expected)
        assert len(threads) > 2
        found = seen(taps)
    assert found.keys() == wanted.keys() and len(found) > 4
    for path, values in wanted.items():
        for a, b in zip(found[path], values, strict=True):
            np.testing.assert_array_equal(a, b)


def test_a_linear_sees_each_batch_once(running):
    """Not what the block of experts is shown in search of its scores."""
    made, hidden = running(2)
    with made.taps(0) as taps:
        made.run(0, hidden, taps=taps)
        assert any("shared_expert" in path for path in taps.linears)
        assert {tap.hessian.weight for tap in taps.linears.values()} == {BATCHES * LENGTH}


def test_taps_that_are_not_asked_note_nothing(running):
    made, hidden = running(2)
    with made.taps(0) as taps:
        made.run(0, hidden)
        assert not any(tap.hessian for tap in taps.linears.values())
        assert not any(tap.rows.indices for tap in taps.experts.values())


def test_where_a_batch_fails_none_is_begun_after_it(running):
    made, hidden = running(2)
    begun = []

    def output(index, x, batch):
        begun.append(batch)
        if batch == 1:
            raise ValueError("of batch 1")
        time.sleep(0.02)
        return x

    made.model.output = output
    with pytest.raises(ValueError, match="of batch 1"):
        made.run(0, hidden)
    assert max(begun) < BATCHES - 1
    count = len(begun)
    time.sleep(0.1)
    assert len(begun) == count


def test_a_gpu_runs_batches_one_after_another(running, gpu_search, monkeypatch):  # noqa: F811
    monkeypatch.setattr(runners, "fingerprint", lambda device: SimpleNamespace(cores=10))
    made, hidden = running(3)
    real, threads = made.model.output, set()
    made.model.output = lambda *given: threads.add(threading.get_ident()) or real(*given)
    made.run(0, hidden)
    assert threads == {threading.get_ident()}


def test_one_thread_at_a_time_calls_mlx_on_a_gpu(gpu_search):  # noqa: F811
    """Which may take its turn again inside of it: an expert's effect reads weights that MLX unpacks."""
    waited = threading.Event()

    def other():
        with mlx_turn():
            waited.set()

    with mlx_turn(), mlx_turn():
        thread = threading.Thread(target=other)
        thread.start()
        assert not waited.wait(0.05)
    thread.join()
    assert waited.is_set()
