"""Runs a model's layers, one in memory at a time, and their linears, the cores shared among them."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np

from .. import kernels
from .job_state import States
from .layered import LayeredModel
from .progress import Clock
from .source import Source
from .taps import Taps

BATCH = 8
"""Windows per call of a layer."""

Task = TypeVar("Task")
Result = TypeVar("Result")


class Runner:
    """A model that may be run through several times.

    Args:
        source: The checkpoint.
        tokens: int32 ``[windows, length]``: calibration text.
        model: The model made of these, nothing of it read.
        clock: What progress is told to.

    Attributes:
        workers: Worker threads.
    """

    def __init__(self, source: Source, tokens: np.ndarray, model: LayeredModel, clock: Clock):
        self.source, self.tokens, self.model, self.clock = source, tokens, model, clock
        self.workers = kernels.cpu_threads()
        self._unloaded: set[int] = set()  # layers that the model let go of
        self._is_fresh = True

    @property
    def count(self) -> int:
        """Number of layers."""
        return len(self.model.layers)

    def reopen(self) -> None:
        """Begin a run from the first layer: a model with all its parts in place and none read."""
        if not self._is_fresh:
            self.model = LayeredModel(self.source, self.tokens, BATCH)
            self._unloaded.clear()
        self._is_fresh = False

    def load(self, index: int) -> None:
        """Bring a layer into memory."""
        if index in self._unloaded:
            self.reopen()
        self.model.load(index)

    def unload(self, index: int) -> None:
        """Let go of a layer's weights."""
        self.model.unload(index)
        self._unloaded.add(index)

    def taps(self, index: int) -> Taps:
        """Taps on a layer's linears and experts."""
        path, names = self.model.paths[index], self.model.names
        return Taps(self.model.layers[index], names.linears(path), names.experts(path))

    def run(self, index: int, hidden: States) -> States:
        """The layer's output for the calibration's windows."""
        stage = f"calibrating {self.of(index)}"
        return self.model.run(index, hidden, lambda n: self.clock.tick(f"{stage}: {n} of {len(hidden)} batches"))

    def of(self, index: int) -> str:
        """A layer in words."""
        return f"layer {index + 1} of {self.count}"

    def finished(self, verb: str, size: str = "") -> Callable[[int, int, bool], None]:
        """What tells that layers are done; see :class:`Pass`.

        Args:
            verb: What was done to them.
            size: Of which of several sizes, in words. Default: ``""``.
        """

        def report(first: int, last: int, made: bool) -> None:
            if made:
                self.clock.advance(f"{verb} {self.of(last - 1)}{size}", last - first)
            else:
                self.clock.skip(last - first)

        return report

    def parallel(
        self, task: Callable[[Task, int], Result], jobs: list[Task], stage: str, work: float = 0.0
    ) -> list[Result]:
        """Run a task for every job, the cores shared among them; results in the order of the jobs.

        Args:
            task: Given a job and its number of threads.
            jobs: The jobs.
            stage: What they are, for the progress.
            work: What they are together of the clock's total. Default: ``0.0``, not counted.
        """
        threads = max(1, self.workers // max(1, len(jobs)))
        results: list[Result] = []
        with ThreadPoolExecutor(self.workers) as pool:
            for result in pool.map(lambda job: task(job, threads), jobs):
                results.append(result)
                self.clock.tick(f"{stage}: {len(results)} of {len(jobs)} linears", work * len(results) / len(jobs))
        return results
