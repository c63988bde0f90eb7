"""The ``mlx_marlin`` command: mlx-lm's commands, with EXL3 directories understood."""

from __future__ import annotations

import sys

_USAGE = """usage: mlx_marlin COMMAND [ARGUMENTS]

The commands of mlx-lm (generate, chat, server, benchmark, perplexity, evaluate, lora, ...) with its arguments.
--model also takes EXL3 directories and repositories. mlx_marlin COMMAND --help shows the arguments.

See also: mlx_marlin-tune (measure kernels), mlx_marlin-convert (quantize a model)."""

_BAR = 30  # characters


def _show_progress(done: int, total: int) -> None:
    if sys.stderr.isatty():
        filled = _BAR * done // total
        print(f"\rLoading [{'#' * filled}{'.' * (_BAR - filled)}] {done}/{total}", end="", file=sys.stderr, flush=True)
    if done == total:
        print("" if sys.stderr.isatty() else f"Loaded {total} groups of weights", file=sys.stderr, flush=True)


def _argument(arguments: list[str], name: str) -> str | None:
    """The value of ``--name value`` or ``--name=value``."""
    for argument, following in zip(arguments, [*arguments[1:], None]):
        if argument == name:
            return following
        if argument.startswith(f"{name}="):
            return argument.removeprefix(f"{name}=")
    return None


def main() -> None:
    """Run ``sys.argv``."""
    command = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if command in ("-h", "--help"):
        print(_USAGE)
        return
    import mlx.core as mx

    from .lm import commands

    if command != "--version" and not commands.is_command(command):
        sys.exit(f"mlx_marlin: mlx-lm has no command {command!r}; mlx_marlin --help lists some")
    progress = _show_progress if mx.distributed.init().rank() == 0 else None
    try:
        model = _argument(sys.argv[2:], "--model")
        if command == "server" and model is not None:
            # The server loads in a thread, and would keep listening without a model.
            commands.check(model, pipeline="--pipeline" in sys.argv)
        commands.run(command, progress)
    except commands.CheckpointError as error:
        sys.exit(f"mlx_marlin: {error}")
