"""Where the commands start: outside mlx_marlin, whose import takes a second, so that Ctrl-C is one line then too."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

INTERRUPTED = 130  # 128 + SIGINT, as shells report it


@contextlib.contextmanager
def _handled(handler: Callable[[int, FrameType | None], None], *numbers: int) -> Iterator[None]:
    """While this is open, signals go to a handler, but for those that the process was told to ignore."""
    if threading.current_thread() is not threading.main_thread():  # it alone gets signals
        yield
        return
    before = {number: signal.getsignal(number) for number in numbers}
    heeded = [number for number, known in before.items() if known is not signal.SIG_IGN]
    for number in heeded:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number in heeded:
            signal.signal(number, before[number])


@contextlib.contextmanager
def imports(command: str) -> Iterator[None]:
    """While this is open, Ctrl-C ends the process at once: an exception in the middle of an import would become others.

    Not where the process was told to ignore it, as a shell's background is.

    Args:
        command: The command's name, which the line on stderr begins with.
    """

    def end(number: int, frame: FrameType | None) -> None:
        os.write(2, f"\n{command}: interrupted\n".encode())
        os._exit(INTERRUPTED)

    with _handled(end, signal.SIGINT):
        yield


@contextlib.contextmanager
def interrupts(*numbers: int) -> Iterator[list[int]]:
    """While this is open, these signals raise KeyboardInterrupt, and are in the list: what is raised can get lost.

    Python drops it in a destructor and in callbacks, and some of mlx-lm's commands end on it as if they were done.
    Whoever works in a loop looks at the list. Signals that the process was told to ignore stay ignored.

    Args:
        numbers: The signals.
    """
    seen: list[int] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        seen.append(number)
        signal.default_int_handler(number, frame)

    with _handled(interrupt, *numbers):
        yield seen


def run() -> None:
    """The command ``mlx_marlin``."""
    with imports("mlx_marlin"):
        from mlx_marlin.__main__ import main
    main()


def convert() -> int:
    """The command ``mlx_marlin-convert``; returns its exit status."""
    with imports("mlx_marlin-convert"):
        from mlx_marlin.quantize.cli import main
    return main()


def tune() -> int:
    """The command ``mlx_marlin-tune``; returns its exit status."""
    with imports("mlx_marlin-tune"):
        from mlx_marlin.autotune.cli import main
    return main()
