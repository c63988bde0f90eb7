"""How far a conversion is, told as it goes."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """How far a conversion is.

    Attributes:
        stage: What is being done.
        done: Work done in all stages, as a share of the whole, 0 to 1.
        seconds_left: Expected, from the speed so far in this run; ``None`` at the start.
        under_way: Whether the stage has only begun: told every few seconds, so that something moves.
    """

    stage: str
    done: float
    seconds_left: float | None
    under_way: bool = False


# Who sees nothing move for longer wonders whether it hangs.
_TICK_SECONDS = 2.0


class Clock:
    """Turns finished work into progress reports."""

    def __init__(self, report: Callable[[Progress], None] | None):
        self.report = report
        self.total = 1.0  # until it is known
        self.done = self.begun_with = 0.0
        self.start = time.monotonic()
        self._told = -_TICK_SECONDS  # the first thing is told at once

    def skip(self, work: float) -> None:
        """Work that an earlier run did."""
        self.done += work
        self.begun_with += work

    def tell(self, message: str) -> None:
        """Something to be known, without work done."""
        if self.report is not None:
            self.report(Progress(message, min(1.0, self.done / self.total), None))

    def tick(self, stage: str, work: float = 0.0) -> None:
        """Something is under way; told if nothing else was for :data:`_TICK_SECONDS`.

        Args:
            stage: What is being done.
            work: How much of it is done, which :meth:`advance` will count when all is.
        """
        if time.monotonic() - self._told >= _TICK_SECONDS:
            self._tell(stage, work, under_way=True)

    def advance(self, stage: str, work: float) -> None:
        """Something is done."""
        self.done += work
        self._tell(stage)

    def _tell(self, stage: str, begun: float = 0.0, under_way: bool = False) -> None:
        self._told = time.monotonic()
        done = self.done + begun
        fresh = done - self.begun_with
        # The first linears of a run tell nothing about the rest.
        known = self.done > self.begun_with
        left = (self._told - self.start) * (self.total - done) / fresh if known else None
        if self.report is not None:
            self.report(Progress(stage, min(1.0, done / self.total), left, under_way))
