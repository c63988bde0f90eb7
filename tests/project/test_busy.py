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


def test_the_time_is_that_of_the_phases(monkeypatch):
    from bench.quality import busy

    monkeypatch.setitem(busy.PHASES, "working", ("test_busy.work",))
    monkeypatch.setitem(busy.PHASES, "sleeping", ("test_busy.rest",))

    def work():
        end = time.process_time() + 0.5
        while time.process_time() < end:
            pass

    def rest():
        time.sleep(0.8)

    start = time.process_time()
    with busy.Sampler(2) as sampler:
        work()
        rest()
    used = time.process_time() - start
    spans = {span.phase: span for span in busy.sums(sampler.spans)}
    assert {"working", "sleeping", "all"} <= set(spans)
    for part in ("wall", "cpu", "waiting", "alone"):
        of_phases = sum(getattr(span, part) for phase, span in spans.items() if phase != "all")
        assert getattr(spans["all"], part) == pytest.approx(of_phases)
    assert 0 < spans["working"].cpu <= spans["all"].cpu <= used
    assert all(0 < span.alone <= span.wall * (1 + 1e-9) or span.cpu > 2 * span.wall for span in spans.values())


def test_one_busy_core_of_two_is_half():
    from bench.quality import busy

    assert busy.line(busy.Span("phase", 0.0, wall=3.0, cpu=2.0, waiting=1.0, alone=2.0), 2).endswith("| 50 % |")
