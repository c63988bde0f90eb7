"""The ``mlx_marlin`` command: mlx-lm's and mlx-vlm's commands, with EXL3 directories understood."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import signal
import sys
import time
from typing import TYPE_CHECKING, NoReturn

import msgspec

from mlx_marlin_commands import INTERRUPTED, interrupts

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

mlx_marlin vlm COMMAND [ARGUMENTS] runs the commands of mlx-vlm (generate, chat, server, ...), for models with vision
and for models that only mlx-vlm has.

mlx_marlin info DIR [--context N] [--json] shows what an EXL3 directory contains, and whether it fits into this machine.

See also: mlx_marlin-tune (time kernels on this machine), mlx_marlin-convert (quantize a model to EXL3)."""

_VLM_USAGE = """usage: mlx_marlin vlm COMMAND [ARGUMENTS]

The commands of mlx-vlm with its arguments: {}.
--model also takes EXL3 directories and repositories, and --revision a branch of a repository.
mlx_marlin vlm COMMAND --help shows the other arguments."""

_BROKEN_PIPE = 141  # 128 + SIGPIPE, as shells report it

_BAR = 30  # characters
# Between lines about loading where lines stay: loading takes seconds to a few minutes.
_LINE_SECONDS = 10.0


class _Loading:
    """Progress on stderr: a bar on a terminal, else a line now and then."""

    def __init__(self) -> None:
        self._moves, self._last = sys.stderr.isatty(), time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        """Show it."""
        if self._moves:
            filled = _BAR * done // total
            bar = f"\rLoading [{'#' * filled}{'.' * (_BAR - filled)}] {done}/{total}"
            print(bar, end="\n" if done == total else "", file=sys.stderr, flush=True)
        elif done == total:
            print(f"Loaded {total} groups of weights", file=sys.stderr, flush=True)
        elif time.monotonic() - self._last >= _LINE_SECONDS:
            print(f"Loading: {done} of {total} groups of weights", file=sys.stderr, flush=True)
            self._last = time.monotonic()


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
        prog="mlx_marlin info", description="Show what an EXL3 directory contains and takes. Reads headers only."
    )
    parser.add_argument("directory", metavar="DIR", help="directory of an EXL3 (ExLlamaV3) model")
    help_context = f"tokens for which the cache's memory is computed (default: {CONTEXT})"
    parser.add_argument("--context", type=int, default=CONTEXT, metavar="N", help=help_context)
    parser.add_argument("--json", action="store_true", help="print everything as JSON, sizes in bytes")
    options = parser.parse_args(arguments)
    try:
        info = describe(options.directory, options.context)
    except (FileNotFoundError, PermissionError, ValueError) as error:
        _fail(str(error))
    print(msgspec.json.format(msgspec.json.encode(info)).decode() if options.json else report(info))


def main() -> None:
    """Run ``sys.argv``. Exit status: 2 for what is refused, 130 if interrupted, 141 if nobody reads the output."""
    with interrupts(signal.SIGINT) as seen:
        try:
            _main()
            sys.stdout.flush()
        except BrokenPipeError:  # who read the output, such as head, has left: nothing can be written, here or at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(_BROKEN_PIPE)
        except BaseException:  # in the middle of an import an interrupt can become any other
            if not seen:
                raise
        if seen:
            with contextlib.suppress(OSError):
                sys.stdout.flush()
            print("\nmlx_marlin: interrupted", file=sys.stderr, flush=True)
            # Not by sys.exit: Python then ends daemon threads, as servers have, inside MLX, and C++ aborts the process.
            os._exit(INTERRUPTED)


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
        progress = _Loading()
        _show_what_is_left_out()
    try:
        commands.run(command, progress)
    except (CheckpointError, ModuleNotFoundError) as error:
        _fail(str(error))
    except EOFError:
        if command != "chat":
            raise
        print()  # Ctrl-D at the prompt ends a chat as "q" does


if __name__ == "__main__":
    main()
