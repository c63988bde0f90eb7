"""mlx_marlin-convert: quantize a checkpoint to EXL3. Progress on stderr, the result on stdout."""

from __future__ import annotations

import argparse
import contextlib
import errno
import logging
import shlex
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from mlx_marlin_commands import INTERRUPTED, imports, interrupts

from .. import codec

if TYPE_CHECKING:
    from .allocation import Allocation
    from .progress import Progress


def _width_or(others: tuple[str, ...], meaning: str) -> Callable[[str], int | float]:
    """The type of an option that is a width, or one of some numbers that mean something else."""

    def parse(text: str) -> int | float:
        try:
            return int(text) if text in others else codec.as_width(float(text))
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{error}; {meaning}") from None

    return parse


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mlx_marlin-convert",
        description="Quantize a Hugging Face checkpoint that mlx-lm can run into an EXL3 directory.",
        epilog="mlx_marlin-convert measure only measures what widths cost; mlx_marlin-convert allocate only chooses "
        "widths by such a measurement. Each has --help.",
    )
    _add_model(parser)
    parser.add_argument("--output", metavar="DIR", required=True, help="directory to make")
    size = parser.add_mutually_exclusive_group(required=True)
    size.add_argument(
        "--bits",
        type=float,
        nargs="+",
        metavar="N",
        help="stored bits per weight of the quantized layers, scales included; several make a folder each",
    )
    size.add_argument("--allocation", metavar="FILE", help="table of widths to use: a plan.txt, as it is or edited")
    parser.add_argument(
        "--job", metavar="DIR", help="measurement to use, made if there is none (default: in the output)"
    )
    parser.add_argument(
        "--head-bits",
        type=_width_or(("16",), "16 leaves the head in half precision"),
        default=6,
        metavar="N",
        help="bits of lm_head, or 16 for half precision (default: 6)",
    )
    parser.add_argument(
        "--embed-bits", type=int, metavar="N", help="bits of the token embedding, 1 to 8 (default: unquantized)"
    )
    parser.add_argument(
        "--mtp-bits",
        type=_width_or(("0", "16"), "16 keeps the layers, 0 leaves them out"),
        default=4,
        metavar="N",
        help="bits of multi-token prediction layers; 16 keeps them as they are, 0 leaves them out (default: 4)",
    )
    parser.add_argument(
        "--vision-bits",
        type=int,
        default=6,
        metavar="N",
        help="bits of the vision tower of Qwen3-VL and Qwen3.5, others are kept; 16 keeps it as it is, 0 leaves it out "
        "(default: 6)",
    )
    _add_sharing(parser)
    parser.add_argument("--resume", action="store_true", help="continue an interrupted conversion, or add sizes")
    return parser


def _add_model(parser: argparse.ArgumentParser) -> None:
    """What a measurement depends on."""
    parser.add_argument(
        "--model",
        metavar="DIR",
        required=True,
        help="directory of the checkpoint: fp16, bf16, fp32, fp8 in blocks, mxfp4 or nvfp4",
    )
    parser.add_argument(
        "--codebook",
        choices=("mul1", "mcg", "3inst"),
        default="mul1",
        help="of the codes; only mul1 has half rates (default: mul1)",
    )
    parser.add_argument("--calibration", metavar="FILE", help="UTF-8 text file (default: the bundled text)")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="let the tokenizer run code from the checkpoint"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the random signs (default: 0)")


def _add_sharing(parser: argparse.ArgumentParser) -> None:
    """What an allocation depends on beside its size."""
    from .allocation import MODES

    parser.add_argument(
        "--no-half",
        dest="half_rates",
        action="store_false",
        help="whole widths only, for ExLlamaV3 before 1.5.1, which does not read 1.5, 2.5 and 3.5 bits",
    )
    parser.add_argument(
        "--mixed",
        choices=MODES,
        default="per-layer",
        help="which linears share a width: per-layer, all experts of a layer; per-expert, none, which only mlx_marlin "
        "runs on a GPU; uniform, all of them (default: per-layer)",
    )


def _measure_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mlx_marlin-convert measure",
        description="Measure how much loss every width of every linear would cause, for allocate and for conversions "
        "with --job. The same command continues an interrupted measurement.",
    )
    _add_model(parser)
    parser.add_argument(
        "--job", required=True, metavar="DIR", help="directory of the measurement, made if there is none"
    )
    return parser


def _allocate_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mlx_marlin-convert allocate",
        description="Choose a width for every linear of a measured model, and show the expected loss.",
    )
    parser.add_argument("--job", required=True, metavar="DIR", help="directory of the measurement")
    parser.add_argument(
        "--bits", type=float, metavar="N", required=True, help="stored bits per weight, scales included"
    )
    _add_sharing(parser)
    parser.add_argument("--allocation", metavar="FILE", help="write the widths there, to edit or to convert with")
    return parser


# Between lines about work under way where lines stay: a conversion of a day leaves 1500.
_LINE_SECONDS = 60.0


class _Screen:
    """Progress on stderr: one line that moves on a terminal, else a line for what is done and one a minute.

    Args:
        interrupted: Where signals are listed: work ends at the next line once there are any.
    """

    def __init__(self, interrupted: Collection[int]) -> None:
        self._interrupted = interrupted
        self._moves = sys.stderr.isatty()
        self._last = -_LINE_SECONDS
        self._open = False

    def __call__(self, progress: Progress) -> None:
        """Show it.

        Raises:
            KeyboardInterrupt: If the process is interrupted.
        """
        if self._interrupted:
            raise KeyboardInterrupt
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


@contextlib.contextmanager
def _screen() -> Iterator[_Screen]:
    """The progress of work that Ctrl-C and SIGTERM end."""
    with interrupts(signal.SIGINT, signal.SIGTERM) as seen, contextlib.closing(_Screen(seen)) as screen:
        yield screen


def _duration(seconds: float) -> str:
    minutes, hours = int(seconds) // 60, int(seconds) // 3600
    return f"{hours} h {minutes % 60:02} min" if hours else f"{minutes} min {int(seconds) % 60:02} s"


def _begun(directory: Path) -> bool:
    """Whether a conversion or measurement has begun in a directory, so that there is something to continue."""
    from .job_state import JOB
    from .resume import MEASUREMENT, WORK

    return any((directory / place / JOB).is_file() for place in ("", WORK, MEASUREMENT))


def _guarded(run: Callable[[], int], directory: str, continues: str) -> int:
    """Run; errors in one line.

    Args:
        run: What to do.
        directory: Where it writes.
        continues: What continues it: an option, or ``""`` where the same command does.
    """
    with_option = f" with {continues}" if continues else ""
    try:
        return run()
    except (ValueError, FileExistsError) as error:
        print(f"mlx_marlin-convert: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        kept = f"{with_option}; every finished layer is kept" if _begun(Path(directory)) else ""
        advice = "make room" if full else "mend this"
        print(f"mlx_marlin-convert: {error}; {advice} and run again{kept}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        kept = f"; the same command{with_option} continues, every finished layer is kept"
        shown = kept if _begun(Path(directory)) else ""
        print(f"\nmlx_marlin-convert: interrupted{shown}", file=sys.stderr)
        return INTERRUPTED


def _convert(options: dict) -> int:
    """Run a conversion; returns the exit status."""
    model, output, bits = options.pop("model"), options.pop("output"), options.pop("bits")
    size = options["allocation"] if bits is None else f"{', '.join(f'{b:g}' for b in bits)} bits"
    print(f"mlx_marlin-convert: {model} to {output}, {size}", file=sys.stderr, flush=True)
    with imports("mlx_marlin-convert"):
        from . import convert  # takes seconds

    logging.getLogger("mlx_marlin.quantize").addHandler(logging.NullHandler())  # progress tells it too
    wanted = bits[0] if bits is not None and len(bits) == 1 else bits

    def run() -> int:
        with _screen() as screen:
            found = convert(model, output, bits=wanted, progress=screen, **options)
        plans = found if isinstance(found, list) else [found]
        for plan in plans:
            print(f"{_shown(plan)}; see plan.txt")
        place = shlex.quote(output if len(plans) == 1 else f"{output}/{bits[0]}bpw")
        print(f"Next: mlx_marlin generate --model {place} --prompt ... (or chat, server; info tells its sizes)")
        return 0

    return _guarded(run, output, "--resume")


def _measure(options: dict) -> int:
    """Run a measurement; returns the exit status."""
    model, job = options.pop("model"), options.pop("job")
    print(f"mlx_marlin-convert: measuring {model} into {job}", file=sys.stderr, flush=True)
    with imports("mlx_marlin-convert"):
        from . import measure  # takes seconds

    logging.getLogger("mlx_marlin.quantize").addHandler(logging.NullHandler())  # progress tells it too

    def run() -> int:
        with _screen() as screen:
            measure(model, job, progress=screen, **options)
        print(f"Next: mlx_marlin-convert allocate --job {shlex.quote(job)} --bits ...")
        return 0

    return _guarded(run, job, "")


def _allocate(options: dict) -> int:
    """Make a plan; returns the exit status."""
    with imports("mlx_marlin-convert"):
        from . import allocate  # takes seconds

    job = options.pop("job")

    def run() -> int:
        plan = allocate(job, options.pop("bits"), **options)
        print(f"{_shown(plan)}, loss {plan.loss:.4g} nats per token")
        counts = Counter(plan.widths.values())
        print("linears by K: " + ", ".join(f"{k}: {counts[k]}" for k in sorted(counts)))
        if options["allocation"] is not None:
            table = shlex.quote(options["allocation"])
            print(f"Next: mlx_marlin-convert --job {shlex.quote(job)} --allocation {table} ...")
        return 0

    return _guarded(run, job, "")


def _shown(plan: Allocation) -> str:
    gap = 100 * (plan.loss / plan.bound - 1) if plan.bound > 0 else 0.0
    return f"{plan.bits:.4f} bits per weight, allocation within {gap:.3g} % of the best possible"


_COMMANDS = {"measure": (_measure_parser, _measure), "allocate": (_allocate_parser, _allocate)}


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    words = sys.argv[1:] if arguments is None else arguments
    parser, run = _COMMANDS.get(words[0], (_parser, _convert)) if words else (_parser, _convert)
    with imports("mlx_marlin-convert"):
        options = vars(parser().parse_args(words[1:] if words and words[0] in _COMMANDS else words))
    try:
        return run(options)
    except ModuleNotFoundError as error:
        print(f"mlx_marlin-convert: {error}; in a clone of mlx_marlin run: pip install '.[lm]'", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
