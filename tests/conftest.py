"""Fixtures that several files share."""

import gc
import signal

import pytest

from mlx_marlin import _ext


def pytest_addoption(parser):
    parser.addoption("--fuzz-times", type=int, default=1, help="times their usual inputs that the slow fuzzers try")


def pytest_collection_finish():
    """What was imported is left out of collections: the tuner asks for many, and with every test's imports each takes
    half a second.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture
def fuzz_times(request):
    """Other inputs for each: the seeds go on."""
    return request.config.getoption("--fuzz-times")


def _tiers() -> list:
    """Every compiled instruction set; what this machine lacks is skipped with a reason, never left out."""
    runnable = _ext.instruction_sets()
    lacking = pytest.mark.skip(reason="this machine lacks the instruction set")
    return [
        pytest.param(name, marks=[] if name in runnable else [lacking]) for name in _ext.compiled_instruction_sets()
    ]


@pytest.fixture(params=_tiers())
def instruction_set(request):
    """Each instruction set of the CPU kernels in turn; afterwards the best one again."""
    _ext.set_instruction_set(request.param)
    yield request.param
    _ext.set_instruction_set("auto")


@pytest.fixture
def tuning_sandbox(tmp_path, monkeypatch):
    """No profile of the machine, weight copies for a small cache; afterwards the process is as it was."""
    from mlx_marlin import profile
    from mlx_marlin.autotune import workload

    monkeypatch.setenv("MLX_MARLIN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(workload, "last_level_cache", lambda: 1 << 16)
    handler = signal.getsignal(signal.SIGTERM)
    profile.refresh()
    yield
    signal.signal(signal.SIGTERM, handler)
    profile.use_profile(None)
