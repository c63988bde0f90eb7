"""mlx_marlin-convert: quantize a checkpoint to EXL3. Progress on stderr, the result on stdout."""

from __future__ import annotations

import argparse
import contextlib
import errno
import logging
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from .. import codec

if TYPE_CHECKING:
    from .progress import Progress


INTERRUPTED = 130  # 128 + SIGINT, as shells report it


def _width_or(others: tuple[str, ...], meaning: str) -> Callable[[str], int | float]:
    """The type of an option that is a width, or one of some numbers that mean something else."""

    def parse(text: str) -> int | float:
        try:
            return int(text) if text in others else codec.as_width(float(text))
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{error}; {meaning}") from None

    return parse


def _parser() -> argparse.ArgumentParser:
    from .allocate import MODES

    parser = argparse.ArgumentParser(
        prog="mlx_marlin-convert",
        description="Quantize a Hugging Face checkpoint that mlx-lm can run into an EXL3 directory.",
    )
    parser.add_argument(
        "--model", required=True, help="directory of the checkpoint: fp16, bf16, fp32, fp8 in blocks or mxfp4"
    )
    parser.add_argument("--output", required=True, help="directory to be made")
    parser.add_argument(
        "--bits", type=float, required=True, help="stored bits per weight of the quantized layers, scales included"
    )
    parser.add_argument(
        "--head-bits",
        type=_width_or(("16",), "16 leaves the head in half precision"),
        default=6,
        help="K of lm_head, or 16 for half precision (default: 6)",
    )
    parser.add_argument(
        "--embed-bits", type=int, help="K of the token embedding, 1 to 8 (default: it stays unquantized)"
    )
    parser.add_argument(
        "--mtp-bits",
        type=_width_or(("0", "16"), "16 keeps the layers, 0 leaves them out"),
        default=4,
        help="K of prediction layers; 16 keeps them as they are, 0 leaves them out (default: 4)",
    )
    parser.add_argument(
        "--vision-bits",
        type=int,
        default=6,
        help="K of the vision tower where that is of a known kind; 16 keeps it as it is, 0 leaves it out (default: 6)",
    )
    parser.add_argument("--codebook", choices=("mul1", "mcg", "3inst"), default="mul1", help="(default: mul1)")
    parser.add_argument(
        "--no-half",
        dest="half_rates",
        action="store_false",
        help="whole widths only: ExLlamaV3 reads 1.5, 2.5 and 3.5 bits since 1.5.1",
    )
    parser.add_argument("--calibration", help="UTF-8 text file (default: the bundled text)")
    parser.add_argument(
        "--mixed",
        choices=MODES,
        default=MODES[0],
        help="who shares a width; loaders other than this package need per-layer or uniform (default: per-expert)",
    )
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="let the tokenizer run code from the checkpoint"
    )
    parser.add_argument("--resume", action="store_true", help="continue an interrupted conversion")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random signs (default: 0)")
    return parser


# Between lines about work under way where lines stay: a conversion of a day leaves 1500.
_LINE_SECONDS = 60.0


class _Screen:
    """Progress on stderr: one line that moves on a terminal, else a line for what is done and one a minute."""

    def __init__(self) -> None:
        self._moves = sys.stderr.isatty()
        self._last = -_LINE_SECONDS
        self._open = False

    def __call__(self, progress: Progress) -> None:
        """Show it."""
        left = "" if progress.seconds_left is None else f", {_duration(progress.seconds_left)} left"
        line = f"{100 * progress.done:5.1f} %  {progress.stage}{left}"
        if progress.under_way and not self._moves and time.monotonic() - self._last < _LINE_SECONDS:
            return
        self._last = time.monotonic()
        self._open = progress.under_way and self._moves
        start = "\r\x1b[K" if self._moves else ""  # back to the start of the line, and erase it
        print(f"{start}{line}", end="" if self._open else "\n", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leave the line that moves."""
        if self._open:
            print(file=sys.stderr, flush=True)
            self._open = False


def _duration(seconds: float) -> str:
    minutes, hours = int(seconds) // 60, int(seconds) // 3600
    return f"{hours} h {minutes % 60:02} min" if hours else f"{minutes} min {int(seconds) % 60:02} s"


def _begun(output: str) -> bool:
    """Whether a conversion has begun in a directory, so that there is something to resume."""
    from .job_state import JOB
    from .resume import WORK

    return (Path(output) / WORK / JOB).is_file()


def _convert(options: dict) -> int:
    """Run a conversion; returns the exit status."""
    model, output = options.pop("model"), options.pop("output")
    print(f"mlx_marlin-convert: {model} to {output}, {options['bits']:g} bits", file=sys.stderr, flush=True)
    from . import convert  # takes seconds

    logging.getLogger("mlx_marlin.quantize").addHandler(logging.NullHandler())  # progress tells it too
    screen = _Screen()
    try:
        with contextlib.closing(screen):
            plan = convert(model, output, progress=screen, **options)
    except (ValueError, FileExistsError) as error:
        print(f"mlx_marlin-convert: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        kept = " with --resume; every finished layer is kept" if _begun(output) else ""
        advice = "make room" if full else "mend this"
        print(f"mlx_marlin-convert: {error}; {advice} and run again{kept}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        kept = "; the same command with --resume continues, every finished layer is kept" if _begun(output) else ""
        print(f"\nmlx_marlin-convert: interrupted{kept}", file=sys.stderr)
        return INTERRUPTED
    gap = 100 * (plan.loss / plan.bound - 1) if plan.bound > 0 else 0.0
    print(f"{plan.bits:.4f} bits per weight, allocation within {gap:.3g} % of the best possible; see plan.txt")
    print(
        f"Next: mlx_marlin generate --model {shlex.quote(output)} --prompt ... (or chat, server; info tells its sizes)"
    )
    return 0


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    try:
        return _convert(vars(_parser().parse_args(arguments)))
    except ModuleNotFoundError as error:
        print(f"mlx_marlin-convert: {error}; in a clone of mlx_marlin run: pip install '.[lm]'", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
