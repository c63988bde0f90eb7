"""Fixtures that several files share, and how tests are spread over the workers of pytest-xdist."""

import signal

import pytest

from mlx_marlin import _ext

# Tests of one group run on one worker, one after the other: those that measure time, or hold the clock's lock, ...
MEASURING = ("tests/autotune/", "tests/selection/", "tests/project/test_bench.py", "tests/project/test_docs.py")
# ... and those that look for a free port, which would be free for both.
LISTENING = ("tests/lm/test_commands.py", "tests/lm/test_distributed.py")
# These take longest, and no test of theirs needs what another has made.
SPREAD = ("tests/metal/", "tests/ops/", "tests/sim/")


def _group(nodeid: str) -> str | None:
    if nodeid.startswith(MEASURING):
        return "measuring"
    if nodeid.startswith(LISTENING):
        return "listening"
    # A file stays together, for what it makes once.
    return None if nodeid.startswith(SPREAD) else nodeid.split("::")[0]


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items):
    for item in items:
        if group := _group(item.nodeid):
            item.add_marker(pytest.mark.xdist_group(group))


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
