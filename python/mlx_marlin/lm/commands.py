"""mlx-lm's own commands, with EXL3 directories understood.

mlx-lm has no plugin mechanism. Every command loads through ``mlx_lm.utils.load_model`` or
``mlx_lm.utils.sharded_load``; both are replaced before the command's module is imported. Other directories
go to the functions that were there.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import mlx.core as mx
from mlx_lm import cli as mlx_lm_cli
from mlx_lm import utils as mlx_lm_utils

from .model import Progress, is_exl3, load_exl3_model, open_checkpoint
from .sharding import open_sharded, sharded_load

# They write weights in other formats, which those of a trellis cannot become.
CONVERTERS = ("convert", "fuse", "awq", "dwq", "dynamic_quant", "gptq")
# What mlx_lm.utils.sharded_load fetches before it looks at a model.
_DESCRIPTION_FILES = [
    "*.json",
    "*.py",
    "tokenizer.model",
    "*.tiktoken",
    "tiktoken.model",
    "*.txt",
    "*.jsonl",
    "*.jinja",
]


class CheckpointError(ValueError):
    """A checkpoint that cannot be loaded; the message says which file and tensor, and why."""


def is_command(name: str) -> bool:
    """Whether mlx-lm has a command of this name."""
    return name.isidentifier() and any(
        importlib.util.find_spec(f"{package}.{name}") for package in ("mlx_lm", "mlx_lm.quant")
    )


def check(repo: str, *, pipeline: bool) -> None:
    """Raise :class:`CheckpointError` if this is an EXL3 model that cannot be loaded here. Reads headers only.

    Args:
        repo: Directory, or repository on the Hugging Face Hub.
        pipeline: Whether several ranks form a pipeline, rather than split each layer.
    """
    if not is_exl3(Path(mlx_lm_utils._download(repo, allow_patterns=_DESCRIPTION_FILES))):
        return
    directory, group = Path(mlx_lm_utils._download(repo)), mx.distributed.init()
    try:
        if group.size() > 1:
            open_sharded(directory, group if pipeline else None, None if pipeline else group)
        else:
            open_checkpoint(directory)
    except (FileNotFoundError, ValueError) as error:
        raise CheckpointError(str(error)) from error


def install(progress: Progress | None = None, *, refuse: str | None = None) -> None:
    """Make mlx-lm load EXL3 directories, for the rest of the process.

    Args:
        progress: Called with (layers done, layers) after each layer. Default: ``None``.
        refuse: Why EXL3 directories are refused, if they are. Default: ``None``.
    """
    load_others, load_others_sharded = mlx_lm_utils.load_model, mlx_lm_utils.sharded_load

    def guarded(load, *args, **keywords):
        if refuse is not None:
            raise CheckpointError(refuse)
        try:
            return load(*args, **keywords)
        except (FileNotFoundError, ValueError) as error:
            raise CheckpointError(str(error)) from error

    def load_model(model_path, lazy=False, strict=True, model_config=None, **keywords):
        if not is_exl3(Path(model_path)):
            return load_others(model_path, lazy, strict, model_config, **keywords)
        return guarded(load_exl3_model, Path(model_path), lazy, model_config, progress=progress)

    def load_sharded(repo, *args, **keywords):
        if not is_exl3(Path(mlx_lm_utils._download(repo, allow_patterns=_DESCRIPTION_FILES))):
            return load_others_sharded(repo, *args, **keywords)
        return guarded(sharded_load, repo, *args, **keywords, progress=progress)

    mlx_lm_utils.load_model, mlx_lm_utils.sharded_load = load_model, load_sharded


def run(command: str, progress: Progress | None = None) -> None:
    """Run the mlx-lm command that ``sys.argv`` asks for.

    Args:
        command: Its name, ``sys.argv[1]``.
        progress: See :func:`install`.
    """
    refuse = None
    if command in CONVERTERS:
        refuse = f"mlx_lm {command} cannot work on EXL3 weights; give it the model that they were made from"
    install(progress, refuse=refuse)
    mlx_lm_cli.main()
