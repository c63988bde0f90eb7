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
    """

    stage: str
    done: float
    seconds_left: float | None


class Clock:
    """Turns finished work into progress reports."""

    def __init__(self, report: Callable[[Progress], None] | None):
        self.report = report
        self.total = 1.0  # until it is known
        self.done = self.begun_with = 0.0
        self.start = time.monotonic()

    def skip(self, work: float) -> None:
        """Work that an earlier run did."""
        self.done += work
        self.begun_with += work

    def tell(self, message: str) -> None:
        """Something to be known, without work done."""
        if self.report is not None:
            self.report(Progress(message, min(1.0, self.done / self.total), None))

    def advance(self, stage: str, work: float) -> None:
        self.done += work
        fresh = self.done - self.begun_with
        left = (time.monotonic() - self.start) * (self.total - self.done) / fresh if fresh else None
        if self.report is not None:
            self.report(Progress(stage, min(1.0, self.done / self.total), left))
