"""What the commands of every host have in common: which checkpoints are ours, and how errors are told."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol, TypeVar

from ..loader.directory import INDEX_NAME, Kind, kind_of
from .expert_parallel import PARALLEL
from .hub import DESCRIPTION_FILES, fetch, pin

Result = TypeVar("Result")


class Commands(Protocol):
    """The commands of a library of models: a module of this package, or of mlx_marlin.vlm."""

    def names(self) -> list[str]:
        """Its commands."""

    def version(self) -> str:
        """Its version."""

    def run(self, command: str, progress: Callable[[int, int], None] | None = None) -> None:
        """Run the one that ``sys.argv`` asks for, calling ``progress`` with (layers done, layers).

        Raises:
            CheckpointError: If a checkpoint or an argument is wrong.
            ModuleNotFoundError: If the command needs what is not installed; the message says how to get it.
        """


def installed_commands(distribution: str) -> list[str]:
    """The commands of a library of models, from the scripts that it installs: ``mlx_lm.chat`` is one called chat."""
    scripts = metadata.distribution(distribution).entry_points.select(group="console_scripts")
    return sorted(script.name.partition(".")[2] for script in scripts if "." in script.name)


class CheckpointError(ValueError):
    """A checkpoint that cannot be loaded; the message says which file and tensor, and why."""


def guarded(load: Callable[..., Result], *args: Any, **keywords: Any) -> Result:
    """Call ``load``; what is wrong with a checkpoint becomes a :class:`CheckpointError`."""
    try:
        return load(*args, **keywords)
    except (FileNotFoundError, PermissionError, ValueError) as error:
        raise CheckpointError(str(error)) from error


def is_ours(directory: Path) -> bool:
    """Whether a host must not take a directory; those of the metal-marlin format are refused here too."""
    return kind_of(directory) is not Kind.PLAIN


def is_our_repo(repo: str) -> bool:
    """:func:`is_ours` without fetching the weights of models that are not, as far as it can be told."""
    directory = guarded(fetch, repo, allow_patterns=DESCRIPTION_FILES)
    # A single file has no index: its header tells, and others load the whole of it too.
    return is_ours(directory) or (not (directory / INDEX_NAME).exists() and is_ours(guarded(fetch, repo)))


def value_of(option: str) -> str | None:
    """What an option of ``sys.argv`` is given, ``--option value`` or ``--option=value``."""
    for at, argument in enumerate(sys.argv):
        if argument == option and at + 1 < len(sys.argv):
            return sys.argv[at + 1]
        if argument.startswith(f"{option}="):
            return argument.partition("=")[2]
    return None


# What the commands of either host call the models that they make others from.
_SOURCES = ("--model", "--quantized-model", "--reference-model", "--hf-path", "--model-path")


def refusal(host: str, command: str) -> str:
    """What a command that makes other models says where it is given an EXL3 model: now, or when it loads one.

    Args:
        host: The library's name.
        command: Its command.

    Raises:
        CheckpointError: If ``sys.argv`` names one, before anything large is downloaded.
    """
    reason = f"{host} {command} cannot work on EXL3 weights; give it the model that they were made from"
    for option in _SOURCES:
        repo = value_of(option)
        if repo is not None and is_our_repo(repo):
            raise CheckpointError(reason)
    return reason


def take_value(option: str) -> str | None:
    """:func:`value_of` an option that the command does not have, which is taken off ``sys.argv``."""
    value = value_of(option)
    if value is not None:
        at = next(i for i, argument in enumerate(sys.argv) if argument.partition("=")[0] == option)
        del sys.argv[at : at + (1 if "=" in sys.argv[at] else 2)]
    return value


def take_parallel() -> str:
    """Take ``--parallel`` off ``sys.argv``: how ranks share experts, one of ``expert_parallel.PARALLEL``."""
    value = take_value("--parallel")
    if value is not None and value not in PARALLEL:
        raise CheckpointError(f"--parallel must be one of {', '.join(PARALLEL)}, got {value!r}")
    return value or PARALLEL[0]


def take_revision() -> None:
    """Take ``--revision``, which the command does not have, off ``sys.argv``: it is of the ``--model``."""
    revision, model = take_value("--revision"), value_of("--model")
    if revision is None:
        return
    if model is None:
        raise CheckpointError("--revision is the branch, tag or commit of a --model, and there is none")
    if Path(model).exists():
        raise CheckpointError(f"--revision is of repositories of the Hugging Face Hub, and {model} is a directory here")
    pin(model, revision)
