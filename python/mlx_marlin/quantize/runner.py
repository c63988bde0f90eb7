"""Runs a model's layers, one in memory at a time, and their linears, the cores shared among them."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, nullcontext
from pathlib import Path
from threading import Condition
from typing import TypeVar

import numpy as np

from .. import kernels, ops
from ..device.machine import fingerprint
from .layered import LayeredModel
from .progress import Clock
from .source import Source
from .spill import SpilledArrays, States
from .taps import Notes, Taps

BATCH = 8
"""Windows per call of a layer."""
# Of the linears, or of the batches, at work together: with what else a conversion holds, 8 GB.
_JOB_BYTES = 6 << 30
# What running a layer for a batch holds, in its hidden states: three times the outputs of 8 experts for each token, and
# the inputs of linears.
_STATES_OF_A_BATCH = 32
# Tiles that a GPU's core is to find in the linears at work together, 8 being searched and 8 whose targets are being
# made: one tile at a time fills a core, so that on average half a tile's time is lost at the end of each search.
_TILES_PER_CORE = 16
_TILES_OF_A_JOB = 48  # that LDLQ searches at a time: of 768 columns, as narrow as experts are in large models

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
        directory: On which disk things are kept that need not be in memory.
    """

    def __init__(self, source: Source, tokens: np.ndarray, model: LayeredModel, clock: Clock):
        self.source, self.tokens, self.model, self.clock = source, tokens, model, clock
        self.workers = kernels.cpu_threads()
        self.directory: Path | None = None
        self._at_work = jobs_at_work(self.workers)
        self._pool = ThreadPoolExecutor(self._at_work, "mlx_marlin conversion")
        self._is_evaluated = False  # the constants of the layer that was loaded last
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
        self._is_evaluated = False

    def unload(self, index: int) -> None:
        """Let go of a layer's weights."""
        self.model.unload(index)
        self._unloaded.add(index)

    def taps(self, index: int) -> Taps:
        """Taps on a layer's linears and experts."""
        path, names = self.model.paths[index], self.model.names
        layer, tensors = self.model.layers[index], self.model.experts(index)
        return Taps(layer, names.linears(path), names.experts(path), tensors, self.directory)

    def embeddings(self) -> States:
        """Hidden states before the first layer."""
        return self.model.embeddings(SpilledArrays(self.directory))

    def run(
        self,
        index: int,
        hidden: States,
        work: float = 0.0,
        taps: Taps | None = None,
        into: SpilledArrays | None = None,
        batch: int | None = None,
    ) -> SpilledArrays:
        """The layer's output for the calibration's windows, several batches at a time.

        Args:
            index: The layer.
            hidden: Its inputs.
            work: What is done of the layer before this, of the clock's total. Default: ``0.0``.
            taps: Those that are to note what they see. Default: ``None``.
            into: Where the output is put. Default: a new one, which is returned.
            batch: Of which all inputs are. Default: ``None``, one of each batch in turn.
        """
        stage, after = f"calibrating {self.of(index)}", SpilledArrays(self.directory) if into is None else into
        done = 0

        def output(number: int) -> tuple[np.ndarray, Notes | None]:
            with nullcontext() if taps is None else taps.noting() as notes:
                return self.model.output(index, hidden[number], number if batch is None else batch), notes

        def add(result: tuple[np.ndarray, Notes | None]) -> None:
            nonlocal done
            states, notes = result
            if notes is not None:
                self._in_order(lambda part: part(), notes.parts(), self._at_work)
            after.append(states)
            done += 1
            self.clock.tick(f"{stage}: {done} of {len(hidden)} batches", work)

        # Where MLX's device is a GPU, that is what batches would wait for.
        alone = len(hidden) if ops.searches_on_gpu() else int(not self._is_evaluated)
        for number in range(len(hidden))[:alone]:
            add(output(number))
        self._is_evaluated = self._is_evaluated or len(hidden) > 0
        if len(hidden) > alone:
            size = _STATES_OF_A_BATCH * hidden[0].nbytes
            # One more than there are workers, for when their results are added.
            ahead = 1 + min(self.workers, max(1, _JOB_BYTES // size))
            self._in_order(output, range(alone, len(hidden)), ahead, add)
        return after

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
        self,
        task: Callable[[Task, int], Result],
        jobs: list[Task],
        stage: str,
        work: float = 0.0,
        size: Callable[[Task], int] = lambda job: 0,
    ) -> list[Result]:
        """Run a task for every job, the cores shared among them; results in the order of the jobs.

        Args:
            task: Given a job and its number of threads.
            jobs: The jobs.
            stage: What they are, for the progress.
            work: What they are together of the clock's total. Default: ``0.0``, not counted.
            size: Bytes that a job holds at most; fewer run at a time where they are many. Default: none.
        """
        results: list[Result] = []
        budget = _Budget()

        def run(job: Task) -> Result:
            with budget.taken(size(job)):
                beside = min(self._at_work, len(jobs), max(1, _JOB_BYTES // max(1, size(job))))
                return task(job, max(1, self.workers // beside))

        def add(result: Result) -> None:
            results.append(result)
            self.clock.tick(f"{stage}: {len(results)} of {len(jobs)} linears", work * len(results) / len(jobs))

        self._in_order(run, jobs, len(jobs), add)
        return results

    def _in_order(
        self,
        task: Callable[[Task], Result],
        items: Iterable[Task],
        ahead: int,
        use: Callable[[Result], None] = lambda result: None,
    ) -> None:
        """Run a task for every item on the worker threads, and use the results in the order of the items.

        Args:
            task: Given an item.
            items: The items.
            ahead: How many are begun or wait to be used at most.
            use: Given a result; runs on this thread.
        """
        begun: deque[Future[Result]] = deque()
        try:
            for item in items:
                if len(begun) == ahead:
                    use(begun[0].result())
                    begun.popleft()
                begun.append(self._pool.submit(task, item))
            while begun:
                use(begun[0].result())
                begun.popleft()
        finally:
            for future in begun:
                future.cancel()
            wait(begun)


def jobs_at_work(workers: int) -> int:
    """Linears that are quantized side by side: as many as there are workers, or as fill the GPU that searches."""
    if not ops.searches_on_gpu():
        return workers
    return max(workers, math.ceil(_TILES_PER_CORE * fingerprint("gpu").cores / _TILES_OF_A_JOB))


class _Budget:
    """Lets jobs run while they fit into :data:`_JOB_BYTES` together; one alone always may."""

    def __init__(self) -> None:
        self._taken = 0
        self._freed = Condition()

    @contextmanager
    def taken(self, size: int) -> Iterator[None]:
        """Wait until there is room, and hold it for the length of a ``with`` block."""
        with self._freed:
            self._freed.wait_for(lambda: not self._taken or self._taken + size <= _JOB_BYTES)
            self._taken += size
        try:
            yield
        finally:
            with self._freed:
                self._taken -= size
                self._freed.notify_all()
