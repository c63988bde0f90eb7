"""A progress bar with the time left, on stderr; nothing where stderr is no terminal or rich is not installed."""

from __future__ import annotations

import importlib.util
import sys


class Progress:
    """Progress over a number of problems.

    Args:
        total: Problems.
        enabled: Whether to show anything. Default: ``True``.
    """

    def __init__(self, total: int, enabled: bool = True):
        self._bar = None
        if enabled and sys.stderr.isatty() and importlib.util.find_spec("rich"):
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            columns = BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}")
            self._bar = Bar(*columns, console=Console(stderr=True))
            self._task = self._bar.add_task("", total=total)
        self._label = ""

    def __enter__(self) -> "Progress":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_) -> None:
        if self._bar is not None:
            self._bar.stop()

    def begin(self, label: str) -> None:
        """The next problem begins."""
        self._label = label
        if self._bar is not None:
            self._bar.update(self._task, description=label)

    def round(self, active: int, left: int) -> None:
        """A round of the race is over."""
        if self._bar is not None:
            self._bar.update(self._task, description=f"{self._label}: {active} candidates, {left} rounds left")

    def end(self) -> None:
        """The problem is done."""
        if self._bar is not None:
            self._bar.advance(self._task)
