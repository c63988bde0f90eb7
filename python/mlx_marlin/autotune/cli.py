"""The ``mlx_marlin-tune`` command."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import math
import signal
import sys
import time
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import mlx.core as mx

from mlx_marlin_commands import INTERRUPTED, imports, interrupts

from .. import codec, kernels, ops
from ..device.machine import default_device, is_present, memory_bytes, mlx_device
from ..kernels import Problem, Triple
from ..measure.race import RaceSettings
from ..profile import files as profile_files
from ..profile.schema import ProfileError
from ..storage import atomic
from . import check as regression
from . import labels, report
from . import run as tuning_run
from .progress import ProgressBar

BATCH_SIZES = (1, 4, 8, 16, 32, 64)
# --quick: one size per variant that serving meets most, and samples enough to tell 20 % apart at 5 % noise.
QUICK_BATCH_SIZES, QUICK_ITERATIONS = (1, 16, 64), 8
# Without --model or --shape: the experts of Qwen3-30B-A3B, uniform and mixed, and its largest attention projection.
DEFAULT_SHAPE, DEFAULT_MIXES, DEFAULT_LINEAR = (
    (2048, 768, 128, 8),
    (((3, 3, 3),), ((2, 2, 2), (3, 3, 3), (4, 4, 4))),
    (2048, 4096),
)
Number = TypeVar("Number", int, float)


def _integers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be integers with commas between them, got {text!r}") from None


def _batch_sizes(text: str) -> tuple[int, ...]:
    sizes = tuple(dict.fromkeys(_integers(text)))
    if min(sizes) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1 each, got {text!r}")
    return sizes


def _shape(text: str) -> tuple[int, ...]:
    shape = _integers(text)
    if len(shape) != 4 or min(shape) < 1 or shape[3] > shape[2]:
        raise argparse.ArgumentTypeError(
            f"must be hidden,inter,experts,top_k, each at least 1, top_k <= experts; got {text!r}"
        )
    return shape


def _bits(text: str) -> tuple[Triple, ...]:
    known = {str(width): width for width in codec.WIDTHS}
    triples: set[Triple] = set()
    for part in text.split(","):
        widths = part.split("_")
        if len(widths) not in (1, 3) or not known.keys() >= set(widths):
            raise argparse.ArgumentTypeError(
                f"must be widths such as 2,2.5,4, or gate_up_down such as 6_2_3, each one of {', '.join(known)}; "
                f"got {part!r}"
            )
        gate, up, down = (known[width] for width in (widths if len(widths) == 3 else widths * 3))
        triples.add((gate, up, down))
    return tuple(sorted(triples))


def _positive(kind: Callable[[str], Number]) -> Callable[[str], Number]:
    def parse(text: str) -> Number:
        value = kind(text)
        if not 0 < value < math.inf:
            raise argparse.ArgumentTypeError(f"must be above 0, got {text}")
        return value

    return parse


def parser() -> argparse.ArgumentParser:
    """The arguments of ``mlx_marlin-tune``."""
    p = argparse.ArgumentParser(
        prog="mlx_marlin-tune",
        description="Measure the kernels of mlx_marlin on this machine and write the profile that layers select from.",
        epilog="Interrupted runs are continued by the same command. "
        "mlx.launch -n 2 --backend ring -- mlx_marlin-tune ... splits the problems over machines of one kind; "
        "processes on one machine take turns at the clock.",
    )
    what = p.add_mutually_exclusive_group()
    what.add_argument("--model", metavar="DIR", help="tune for the problems of this EXL3 directory")
    what.add_argument(
        "--shape", type=_shape, metavar="HIDDEN,INTER,EXPERTS,TOP_K", help="tune for a layer of experts of this shape"
    )
    p.add_argument(
        "--bits",
        type=_bits,
        metavar="2,2.5,4",
        help="with --shape: widths of the experts, in equal shares (or gate_up_down such as 6_2_3); default 4",
    )
    p.add_argument("--quick", action="store_true", help="3 batch sizes, fewer candidates and iterations")
    p.add_argument("--batch-sizes", type=_batch_sizes, metavar="1,4,8", help="rows; default 1,4,8,16,32,64")
    p.add_argument("--iterations", type=_positive(int), metavar="N", help="samples per candidate; default 20")
    p.add_argument("--warmup", type=int, default=5, metavar="N", help="calls before the first sample; default 5")
    p.add_argument(
        "--budget", type=_positive(float), metavar="SECONDS", help="stop after this time; the same command continues"
    )
    p.add_argument(
        "--memory-limit",
        type=_positive(float),
        metavar="GB",
        help="for weight copies and scratch; default half of the device's memory",
    )
    p.add_argument("--output", type=Path, metavar="FILE", help="profile to write; default: the one that layers use")
    p.add_argument(
        "--check",
        action="store_true",
        help="measure the stored profile again, all of it or the part that --model, --shape and --batch-sizes name; "
        "exit code 1 if something has become slower than it was or than the default, wrong, or impossible",
    )
    p.add_argument(
        "--tolerance",
        type=_positive(float),
        default=0.25,
        metavar="PART",
        help="with --check: slowdown that counts as noise, as a fraction; default 0.25",
    )
    p.add_argument("--device", choices=kernels.DEVICES, help="default: MLX's default device")
    p.add_argument("--dtype", choices=kernels.DTYPES, help="of the activations; default float32 on cpu, float16 on gpu")
    p.add_argument(
        "--accuracy",
        choices=kernels.ACCURACIES,
        help="of the products; default: with --model as load has it, else float32",
    )
    p.add_argument("--json", action="store_true", help="results as JSON on stdout")
    p.add_argument("--verbose", action="store_true", help="log rejected configs with their reasons")
    return p


def layers(args: argparse.Namespace, device: str) -> list[Problem]:
    """The problems that the arguments name, at one row."""
    dtype = args.dtype or kernels.USUAL_DTYPE[device]
    accuracy = args.accuracy or "float32"  # as layers have it that no model is made of
    if args.model:
        with imports("mlx_marlin-tune"):
            from ..lm.problems import model_problems  # takes seconds

        return list(model_problems(args.model, dtype, device, args.accuracy))
    hidden, inter, experts, top_k = args.shape or DEFAULT_SHAPE
    mixes = ((args.bits or ((4, 4, 4),)),) if args.shape else DEFAULT_MIXES
    problems = [
        Problem.swiglu(
            hidden, inter, experts=experts, top_k=top_k, bits=bits, dtype=dtype, device=device, accuracy=accuracy
        )
        for bits in mixes
    ]
    if not args.shape:
        problems.append(Problem.linear(*DEFAULT_LINEAR, dtype=dtype, device=device, accuracy=accuracy))
    return [replace(problem, accelerators=ops.has_accelerators(device)) for problem in problems]


def main(argv: list[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: Arguments. Default: ``None``, those of the process.

    Returns:
        0; 1 for a regression with ``--check``; 2 for a wrong argument or file, or where nothing could be measured; 130
        if interrupted.
    """
    args = parser().parse_args(argv)
    if args.bits and not args.shape:
        parser().error("--bits goes with --shape; a model has its own bits")
    if args.warmup < 0:
        parser().error(f"argument --warmup: must be at least 0, got {args.warmup}")
    args.iterations = args.iterations or (QUICK_ITERATIONS if args.quick else RaceSettings.rounds)
    logging.basicConfig(level=logging.INFO if args.verbose else logging.WARNING, format="mlx_marlin-tune: %(message)s")
    try:
        # A terminated run is an interrupted one: what is measured is on disk.
        with interrupts(signal.SIGINT, signal.SIGTERM) as seen:
            return _run(args, seen)
    except KeyboardInterrupt:
        print("mlx_marlin-tune: interrupted; what was measured is kept, the same command continues", file=sys.stderr)
        return INTERRUPTED
    except (ValueError, MemoryError, OSError) as error:
        print(f"mlx_marlin-tune: {error}", file=sys.stderr)
        return 2


def _run(args: argparse.Namespace, interrupted: Collection[int]) -> int:
    device = args.device or default_device()
    if not is_present(device):
        raise ValueError("--device gpu: this machine has no GPU that MLX can use")
    mx.set_default_device(mlx_device(device))
    limit = int(args.memory_limit * 1e9) if args.memory_limit else memory_bytes(device) // 2
    settings = RaceSettings(rounds=max(2, args.iterations), warmup=args.warmup)
    deadline = time.perf_counter() + args.budget if args.budget else math.inf
    bar = ProgressBar(0, enabled=True, lines=True, interrupted=interrupted)
    return (_check if args.check else _tune)(args, device, limit, settings, deadline, bar)


def _tune(
    args: argparse.Namespace, device: str, limit: int, settings: RaceSettings, deadline: float, bar: ProgressBar
) -> int:
    path = args.output or profile_files.default_path(device)
    try:  # before anything is measured
        atomic.check_writable(path)
    except OSError as error:
        raise ProfileError(f"{path} cannot be written: {error}. Choose another place with --output") from None
    run = tuning_run.Run(path, device, args.dtype, limit, settings, args.quick)
    sizes = args.batch_sizes or (QUICK_BATCH_SIZES if args.quick else BATCH_SIZES)
    problems = tuning_run.at_rows(layers(args, device), sizes)
    group = mx.distributed.init()
    if not group.rank():
        print(_announcement(args, device, problems), file=sys.stderr)
    with bar:
        outcome = run.tune(problems, group, deadline, bar)
    if group.rank():
        return 0
    print(f"mlx_marlin-tune: profile {path}", file=sys.stderr)
    if outcome.left:
        left = f"{outcome.left} problem{'s' * (outcome.left > 1)} early"
        print(f"mlx_marlin-tune: the budget ended {left}; the same command continues", file=sys.stderr)
    names = labels.names(problems)
    for problem, reason in outcome.failed.items():
        where = f"{names[problem]}, {kernels.rows_label(problem.rows)}"
        print(f"mlx_marlin-tune: could not tune {where}: {reason}", file=sys.stderr)
    found, failed = outcome.entries, outcome.failed
    _print(args, report.tuned_json(found, failed, names), report.tuned_text(found, names) if found else "")
    return 2 if outcome.failed and not outcome.entries else 0


def _check(
    args: argparse.Namespace, device: str, limit: int, settings: RaceSettings, deadline: float, bar: ProgressBar
) -> int:
    path = args.output or profile_files.latest_path(device)
    if not path.exists():
        raise ProfileError(f"there is no profile {path} to check; tune first")
    stored = profile_files.load(path)
    # Whether another build of the kernels is slower is what a check is for.
    profile_files.check_native(stored, device, path, any_build=True)
    check = regression.Check(settings, limit, args.tolerance, tuning_run.clock_lock())
    with bar:
        findings = check.run(stored, _wanted(args, device), deadline, bar)
    print(f"mlx_marlin-tune: profile {path}", file=sys.stderr)
    names = labels.names(stored.problems)
    _print(args, report.checked_json(findings, names), report.checked_text(findings, names) if findings else "")
    if not any(f.measured for f in findings):
        raise ProfileError(
            f"nothing was measured: of the {len(stored.problems)} entries of {path} none was asked for, reached in "
            "the budget, or fits the memory limit. Tune these problems first, or raise --budget or --memory-limit"
        )
    return int(any(f.regression for f in findings))


def _wanted(args: argparse.Namespace, device: str) -> Callable[[Problem], bool]:
    """Which stored problems the arguments name; without any all of them."""
    named = {replace(p, rows=1) for p in layers(args, device)} if args.model or args.shape else None
    return lambda p: (named is None or replace(p, rows=1) in named) and p.rows in (args.batch_sizes or (p.rows,))


def _announcement(args: argparse.Namespace, device: str, problems: list[Problem]) -> str:
    """What is about to be tuned."""
    if args.model:
        what = f"the layers of {args.model}"
    elif args.shape:
        what = "a layer of experts"
    else:
        what = (
            "the experts of Qwen3-30B-A3B, of 3 bits and of 2, 3 and 4 mixed, and its largest attention projection; "
            "for the layers of a model of yours add --model DIR"
        )
    sizes = dict.fromkeys(p.rows for p in problems)
    rows = kernels.rows_label(*sizes) if len(sizes) == 1 else f"{', '.join(map(str, sizes))} rows"
    return f"mlx_marlin-tune: times {len(problems)} problems ({rows}) on the {device}: {what}"


def _print(args: argparse.Namespace, full: list[dict], text: str) -> None:
    """Results on stdout: all of them as JSON, or a table where there are any."""
    with contextlib.suppress(BrokenPipeError):
        print(json.dumps(full, indent=2) if args.json else text or "nothing was measured")


if __name__ == "__main__":
    sys.exit(main())
