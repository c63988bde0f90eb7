"""Conversions of the quality tables, with the time that they take."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from mlx_marlin.quantize import convert, measure
from mlx_marlin.quantize.resume import WORK
from mlx_marlin.storage import atomic

_TIMES = "seconds.json"
MEASUREMENT = "measurement"
"""What the measurement that sizes share is called, its directory and its seconds."""


def show(name: str) -> Callable:
    return lambda p: print(f"{name}: {100 * p.done:.0f} % {p.stage}", file=sys.stderr)


class Conversions:
    """EXL3 models below one directory, made when they are first asked for.

    Args:
        model: The checkpoint.
        work: The directory. ``seconds.json`` in it holds the processor's and the clock's seconds of each part, those of
            interrupted runs included.
        share: Whether all sizes are made from one measurement.
    """

    def __init__(self, model: Path, work: Path, share: bool = False):
        self.model, self.work, self.share = model, work, share

    def times(self) -> dict[str, dict[str, float]]:
        path = self.work / _TIMES
        return json.loads(path.read_text()) if path.exists() else {}

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add what the block takes to the part's seconds, even if it is interrupted."""
        wall, cpu = time.perf_counter(), time.process_time()
        try:
            yield
        finally:
            before = self.times()
            past = before.get(name, {"wall_s": 0.0, "cpu_s": 0.0})
            spent = {
                "wall_s": past["wall_s"] + time.perf_counter() - wall,
                "cpu_s": past["cpu_s"] + time.process_time() - cpu,
            }
            atomic.write_text(self.work / _TIMES, json.dumps({**before, name: spent}, indent=1) + "\n")

    def directory(self, bits: float, mode: str, half_rates: bool = True, head_bits: float = 6) -> Path:
        """A model; what an interrupted conversion left is continued, a finished one stays."""
        name = f"{mode}-{'half' if half_rates else 'whole'}-{bits:g}"
        directory, job = self.work / name, self.work / MEASUREMENT if self.share else None
        if (directory / "config.json").exists() and not (directory / WORK).exists():
            return directory
        self.work.mkdir(parents=True, exist_ok=True)
        if job is not None:
            with self.timed(MEASUREMENT):
                measure(self.model, job, progress=show(MEASUREMENT))
        with self.timed(name):
            convert(
                self.model,
                directory,
                bits=bits,
                mixed=mode,
                half_rates=half_rates,
                head_bits=head_bits,
                job=job,
                resume=directory.exists(),
                progress=show(name),
            )
        return directory
