"""The ``mlx_marlin`` command: mlx-lm's and mlx-vlm's commands, with EXL3 directories understood."""

from __future__ import annotations

import argparse
import contextlib
import logging
import signal
import sys
import threading
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

import msgspec

from ._abi import VERSION
from .lm import require_mlx_lm
from .vlm import require_mlx_vlm

if TYPE_CHECKING:
    from .lm.command_line import Commands

_USAGE = """usage: mlx_marlin COMMAND [ARGUMENTS]

The commands of mlx-lm (generate, chat, server, benchmark, perplexity, evaluate, lora, ...) with its arguments.
--model also takes EXL3 directories and repositories, and --revision a branch of a repository: EXL3 repositories keep
one bit rate per branch. mlx_marlin COMMAND --help shows the other arguments.
Under mlx.launch, --parallel experts gives each rank whole experts in the place of a part of every one.
Commands that write quantized weights (fuse, awq, dwq, dynamic_quant, gptq) refuse EXL3 models.

mlx_marlin vlm COMMAND [ARGUMENTS] runs those of mlx-vlm (generate, chat, server, ...): models with vision, and others
that only mlx-vlm has.

mlx_marlin info DIR [--context N] [--json] says what an EXL3 directory is, and whether it fits into this machine.

See also: mlx_marlin-tune (measure kernels), mlx_marlin-convert (quantize a model to EXL3)."""

_VLM_USAGE = """usage: mlx_marlin vlm COMMAND [ARGUMENTS]

The commands of mlx-vlm with its arguments: {}.
--model also takes EXL3 directories and repositories, and --revision a branch of a repository.
mlx_marlin vlm COMMAND --help shows the other arguments."""

INTERRUPTED = 130  # 128 + SIGINT, as shells report it

_BAR = 30  # characters


def _show_progress(done: int, total: int) -> None:
    if sys.stderr.isatty():
        filled = _BAR * done // total
        print(f"\rLoading [{'#' * filled}{'.' * (_BAR - filled)}] {done}/{total}", end="", file=sys.stderr, flush=True)
    if done == total:
        print("" if sys.stderr.isatty() else f"Loaded {total} groups of weights", file=sys.stderr, flush=True)


def _show_what_is_left_out() -> None:
    """Show what loading reports; the library itself never prints."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("mlx_marlin: %(message)s"))
    logger = logging.getLogger("mlx_marlin.lm")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False


def _fail(message: str) -> NoReturn:
    print(f"mlx_marlin: {message}", file=sys.stderr)
    sys.exit(2)


def _info(arguments: list[str]) -> None:
    from .lm.info import CONTEXT, describe
    from .lm.info_report import report

    parser = argparse.ArgumentParser(
        prog="mlx_marlin info", description="What an EXL3 directory is. Reads headers, no weights."
    )
    parser.add_argument("directory", metavar="DIR", help="of an EXL3 (ExLlamaV3) model")
    help_context = f"tokens that memory is computed for (default: {CONTEXT})"
    parser.add_argument("--context", type=int, default=CONTEXT, metavar="N", help=help_context)
    parser.add_argument("--json", action="store_true", help="sizes in bytes and everything else as JSON")
    options = parser.parse_args(arguments)
    try:
        info = describe(options.directory, options.context)
    except (FileNotFoundError, PermissionError, ValueError) as error:
        _fail(str(error))
    print(msgspec.json.format(msgspec.json.encode(info)).decode() if options.json else report(info))


def main() -> None:
    """Run ``sys.argv``. Exit status: 2 for what is refused, 130 if interrupted."""
    interrupted = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        interrupted.append(number)  # some of mlx-lm's commands end on it as if they were done
        signal.default_int_handler(number, frame)

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, interrupt)
    with contextlib.suppress(KeyboardInterrupt):
        _main()
    if interrupted:
        print("\nmlx_marlin: interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)


def _main() -> None:
    command = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if command in ("-h", "--help"):
        print(_USAGE)
        return
    if command == "convert":
        _fail("mlx-lm's convert makes affine models and is run as mlx_lm.convert; mlx_marlin-convert makes EXL3 models")
    try:
        require_mlx_lm()
    except ModuleNotFoundError as error:
        _fail(str(error))
    if command == "info":
        _info(sys.argv[2:])
    elif command == "vlm":
        _vlm()
    else:
        from .lm import commands

        _run("mlx-lm", commands, command)


def _vlm() -> None:
    command = sys.argv[2] if len(sys.argv) > 2 else "--help"
    try:
        require_mlx_vlm()
    except ModuleNotFoundError as error:
        _fail(str(error))
    from .vlm import commands

    if command in ("-h", "--help"):
        print(_VLM_USAGE.format(", ".join(commands.names())))
        return
    _run("mlx-vlm", commands, command)


def _run(host: str, commands: Commands, command: str) -> None:
    """Run a command of a library of models.

    Args:
        host: The library's name.
        commands: What there is to know of its commands.
        command: The name.
    """
    import mlx.core as mx

    from .lm.command_line import CheckpointError

    if command == "--version":
        print(f"mlx_marlin {VERSION}, {host} {commands.version()}")
        return
    if command not in commands.names():
        _fail(f"{host} has no command {command!r}; it has {', '.join(commands.names())}")
    progress = None
    if mx.distributed.init().rank() == 0:
        progress = _show_progress
        _show_what_is_left_out()
    try:
        commands.run(command, progress)
    except (CheckpointError, ModuleNotFoundError) as error:
        _fail(str(error))
