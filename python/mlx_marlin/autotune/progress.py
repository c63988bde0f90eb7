"""Progress with the time left, on stderr."""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Collection


class ProgressBar:
    """Progress over a number of problems: a bar where stderr is a terminal and rich is installed.

    Args:
        total: Problems.
        enabled: Whether to show anything. Default: ``True``.
        lines: Whether to write a line per problem where there can be no bar. Default: ``False``.
        interrupted: Where signals are listed: no problem begins once there are any. Default: ``()``.
    """

    def __init__(self, total: int, enabled: bool = True, lines: bool = False, interrupted: Collection[int] = ()):
        self._bar, self._interrupted = None, interrupted
        self._total, self._done, self._before = total, 0, 0
        self._label, self._start = "", time.monotonic()
        can_draw = sys.stderr.isatty() and importlib.util.find_spec("rich") is not None
        self._lines = enabled and lines and not can_draw
        if enabled and can_draw:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            columns = BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}")
            self._bar = Bar(*columns, console=Console(stderr=True))
            self._task = self._bar.add_task("", total=total)

    def __enter__(self) -> ProgressBar:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def total(self, total: int, done: int) -> None:
        """Set the number of problems, and how many of them were done before."""
        self._total, self._done, self._before = total, done, done
        if self._bar is not None:
            self._bar.update(self._task, total=total, completed=done)

    def begin(self, label: str) -> None:
        """The next problem begins.

        Raises:
            KeyboardInterrupt: If the process is interrupted.
        """
        if self._interrupted:
            raise KeyboardInterrupt
        self._label = label
        if self._bar is not None:
            self._bar.update(self._task, description=label)

    def say(self, text: str) -> None:
        """A line beside the progress."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        elif self._lines:
            print(text, file=sys.stderr, flush=True)

    def round(self, active: int, left: int) -> None:
        """A round of the race is over."""
        if self._bar is not None:
            self._bar.update(self._task, description=f"{self._label}: {active} candidates, {left} rounds left")

    def end(self) -> None:
        """The problem is done."""
        self._done += 1
        if self._bar is not None:
            self._bar.advance(self._task)
        elif self._lines:
            each = (time.monotonic() - self._start) / (self._done - self._before)
            left = each * (self._total - self._done)
            print(f"[{self._done}/{self._total}] {self._label}: {left:.0f} s left", file=sys.stderr, flush=True)
