"""mlx-lm's own commands, with EXL3 directories understood.

mlx-lm has no plugin mechanism. Every command loads through ``mlx_lm.utils.load_model`` or
``mlx_lm.utils.sharded_load``; both are replaced before the command's module is imported. Other directories
go to the functions that were there.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm import cli as mlx_lm_cli
from mlx_lm import utils as mlx_lm_utils
from mlx_lm.tokenizer_utils import TokenizerWrapper

from . import command_repairs
from .command_line import (
    CheckpointError,
    guarded,
    installed_commands,
    is_our_repo,
    is_ours,
    refusal,
    take_parallel,
    take_revision,
)
from .hub import fetch
from .model import LayerProgress, load_exl3_model, open_checkpoint, product_accuracy
from .requests import ALLOW_OTHERS, take_option
from .sharding import open_sharded, sharded_load
from .tokenizer import check_tokenizer, load_tokenizer

# They write weights in other formats, which those of a trellis cannot become.
CONVERTERS = ("fuse", "awq", "dwq", "dynamic_quant", "gptq")


def names() -> list[str]:
    """mlx-lm's commands."""
    return installed_commands("mlx-lm")


def version() -> str:
    """mlx-lm's version."""
    return metadata.version("mlx-lm")


def check(repo: str, *, pipeline: bool, parallel: str = "tensor") -> None:
    """Raise :class:`CheckpointError` if this is an EXL3 model that cannot be loaded here. Reads headers only.

    Args:
        repo: Directory, or repository on the Hugging Face Hub.
        pipeline: Whether several ranks form a pipeline, rather than split each layer.
        parallel: How those that split each layer share the experts. Default: ``"tensor"``.
    """
    if not is_our_repo(repo):
        return
    directory, group = guarded(fetch, repo), mx.distributed.init()
    if group.size() > 1:
        guarded(open_sharded, directory, group if pipeline else None, None if pipeline else group, parallel)
    else:
        guarded(open_checkpoint, directory)
    guarded(check_tokenizer, directory)


def _check_tokenizer_early(directory: Path) -> None:
    """Look for the tokenizer before weights are read; what is wrong with those is still told first."""
    try:
        check_tokenizer(directory)
    except (FileNotFoundError, ValueError):
        open_checkpoint(directory)
        raise


def install(progress: LayerProgress | None = None, *, refuse: str | None = None, parallel: str = "tensor") -> None:
    """Make mlx-lm load EXL3 directories, for the rest of the process.

    Args:
        progress: Called with (layers done, layers) after each layer. Default: ``None``.
        refuse: Why EXL3 directories are refused, if they are. Default: ``None``.
        parallel: How ranks share experts. Default: ``"tensor"``.
    """
    load_others, load_others_sharded = mlx_lm_utils.load_model, mlx_lm_utils.sharded_load
    load_others_tokenizer = mlx_lm_utils.load_tokenizer

    def download(
        path_or_hf_repo: str | Path, revision: str | None = None, allow_patterns: list[str] | None = None
    ) -> Path:
        return guarded(fetch, path_or_hf_repo, revision, allow_patterns)

    def load_model(
        model_path: Path,
        lazy: bool = False,
        strict: bool = True,
        model_config: dict | None = None,
        **keywords: Any,
    ) -> tuple[nn.Module, dict]:
        if not is_ours(Path(model_path)):
            model, config = load_others(model_path, lazy, strict, model_config, **keywords)
            command_repairs.run_experts_here(model)
            return model, config
        if refuse is not None:
            raise CheckpointError(refuse)
        guarded(_check_tokenizer_early, Path(model_path))
        accuracy = product_accuracy(None)
        return guarded(load_exl3_model, Path(model_path), lazy, model_config, accuracy=accuracy, progress=progress)

    def load_sharded(repo: str, *args: Any, **keywords: Any) -> tuple:
        if not is_our_repo(repo):
            return load_others_sharded(repo, *args, **keywords)
        if refuse is not None:
            raise CheckpointError(refuse)
        return guarded(sharded_load, repo, *args, **keywords, parallel=parallel, progress=progress)

    def tokenizer_of(model_path: str | Path, *args: Any, **keywords: Any) -> TokenizerWrapper:
        if not is_ours(Path(model_path)):
            return load_others_tokenizer(model_path, *args, **keywords)
        return guarded(load_tokenizer, Path(model_path), *args, **keywords)

    vars(mlx_lm_utils).update(
        _download=download, load_model=load_model, sharded_load=load_sharded, load_tokenizer=tokenizer_of
    )


def _check_served(arguments: argparse.Namespace, parallel: str = "tensor") -> None:
    """:func:`check` the models that a server is started with."""
    for repo in (arguments.model, arguments.draft_model):
        if repo is not None:
            check(repo, pipeline=getattr(arguments, "pipeline", False), parallel=parallel)


# What mlx-lm itself installs for a command.
_EXTRAS = {"perplexity": "train", "lora": "train", "evaluate": "evaluate"}


def run(command: str, progress: LayerProgress | None = None) -> None:
    """Run the mlx-lm command that ``sys.argv`` asks for.

    Args:
        command: Its name, ``sys.argv[1]``.
        progress: See :func:`install`.

    Raises:
        CheckpointError: If a checkpoint or an argument is wrong.
        ModuleNotFoundError: If the command needs what is not installed; the message says how to get it.
    """
    take_revision()
    parallel = take_parallel()
    install(progress, refuse=refusal("mlx_lm", command) if command in CONVERTERS else None, parallel=parallel)
    command_repairs.count_weights()
    # argparse calls a subcommand by the program's name.
    sys.argv[0] = f"mlx_marlin {command}"
    try:
        if command == "server":
            from .serving import guard  # imports mlx-lm's server, which other commands do without

            guard(partial(_check_served, parallel=parallel), take_option(ALLOW_OTHERS))
            command_repairs.server()
        elif command in ("chat", "generate", "perplexity"):
            getattr(command_repairs, command)()
        mlx_lm_cli.main()
    except command_repairs.ArgumentError as error:
        raise CheckpointError(str(error)) from error
    except ModuleNotFoundError as error:
        extra = _EXTRAS.get(command)
        if extra is None or (error.name or "").partition(".")[0] in ("mlx_lm", "mlx_marlin"):
            raise
        raise ModuleNotFoundError(
            f"mlx_lm {command} needs {error.name}, which mlx-lm's extra brings: pip install 'mlx-lm[{extra}]'",
            name=error.name,
        ) from error
