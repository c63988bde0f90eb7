"""What bench/quality/busy.py shows: phases by what the converter's functions are called, and shares of the cores."""

import importlib
import inspect
import sys
import time

import pytest

pytest.importorskip("mlx_lm", reason="mlx-lm is not installed: pip install 'mlx_marlin[lm]'")
if sys.platform != "linux":
    pytest.skip("waits for a core are Linux's to tell", allow_module_level=True)


def functions(module):
    """Names of the functions and methods of a module."""
    classes = [
        value for value in vars(module).values() if inspect.isclass(value) and value.__module__ == module.__name__
    ]
    return {name for owner in (module, *classes) for name, value in vars(owner).items() if inspect.isfunction(value)}


def test_phases_are_functions_of_the_converter():
    from bench.quality.busy import PHASES

    for name in {name for names in PHASES.values() for name in names}:
        module, function = name.split(".")
        assert function in functions(importlib.import_module(f"mlx_marlin.quantize.{module}")), name


def test_one_busy_thread_of_two_cores_is_half(monkeypatch):
    from bench.quality import busy

    monkeypatch.setitem(busy.PHASES, "working", ("test_busy.work",))
    monkeypatch.setitem(busy.PHASES, "sleeping", ("test_busy.rest",))

    def work():
        end = time.process_time() + 0.5
        while time.process_time() < end:
            pass

    def rest():
        time.sleep(0.8)

    with busy.Sampler(2) as sampler:
        work()
        rest()
    spans = {span.phase: span for span in busy.sums(sampler.spans)}
    assert spans["working"].cpu / (2 * spans["working"].alone) == pytest.approx(0.5, abs=0.2)
    assert spans["sleeping"].cpu < 0.4 * spans["sleeping"].alone  # an interval may begin in the other phase
    assert spans["all"].wall == pytest.approx(spans["working"].wall + spans["sleeping"].wall, abs=0.2)
