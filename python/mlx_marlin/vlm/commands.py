"""mlx-vlm's own commands, with EXL3 directories understood.

mlx-vlm has no plugin mechanism. Every command loads through ``mlx_vlm.utils``, whose functions are replaced there
before the command runs. Other directories go to the functions that were there.
"""

from __future__ import annotations

import importlib
import os
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_vlm import utils as mlx_vlm_utils

from ..lm.command_line import (
    CheckpointError,
    guarded,
    installed_commands,
    is_our_repo,
    is_ours,
    refusal,
    take_parallel,
    take_revision,
    value_of,
)
from ..lm.hub import fetch
from ..lm.model import LayerProgress, load_exl3_model, open_checkpoint, product_accuracy
from ..lm.sharding import load_part, open_sharded
from . import drafters
from .host import FILES, MLX_VLM
from .processor import check_processor, load_own_processor

# They write weights in other formats, which those of a trellis cannot become, or train what only they know.
CONVERTERS = ("convert", "moe_offload", "train")
# It takes --revision itself.
_TAKES_REVISION = ("generate",)


def names() -> list[str]:
    """mlx-vlm's commands."""
    return installed_commands("mlx-vlm")


def version() -> str:
    """mlx-vlm's version."""
    return metadata.version("mlx-vlm")


def check(repo: str, parallel: str = "tensor") -> None:
    """Raise :class:`CheckpointError` if this is an EXL3 model that cannot be loaded here. Reads headers only.

    Args:
        repo: Directory, or repository on the Hugging Face Hub.
        parallel: How ranks, if there are several, share the experts. Default: ``"tensor"``.
    """
    if is_our_repo(repo):
        directory = guarded(fetch, repo, allow_patterns=FILES)
        if mx.distributed.init().size() > 1:
            guarded(open_sharded, directory, None, None, parallel, MLX_VLM)
        else:
            guarded(open_checkpoint, directory, host=MLX_VLM)
        guarded(check_processor, directory)


def install(progress: LayerProgress | None = None, *, refuse: str | None = None, parallel: str = "tensor") -> None:
    """Make mlx-vlm load EXL3 directories, for the rest of the process: where there are ranks, each its part.

    Args:
        progress: Called with (layers done, layers) after each layer. Default: ``None``.
        refuse: Why EXL3 directories are refused, if they are. Default: ``None``.
        parallel: How ranks share the experts. Default: ``"tensor"``.
    """
    load_others, load_others_processor = mlx_vlm_utils.load_model, mlx_vlm_utils.load_processor
    find_others = mlx_vlm_utils.get_model_path

    def get_model_path(
        path_or_hf_repo: str,
        revision: str | None = None,
        force_download: bool = False,
        allow_patterns: list[str] | None = None,
    ) -> Path:
        if force_download:
            return find_others(path_or_hf_repo, revision, force_download, allow_patterns)
        return guarded(fetch, path_or_hf_repo, revision, allow_patterns or FILES)

    def load_model(model_path: Path, lazy: bool = False, **keywords: Any) -> nn.Module:
        if not is_ours(Path(model_path)):
            return load_others(model_path, lazy, **keywords)
        if refuse is not None:
            raise CheckpointError(refuse)
        if keywords.get("quantize_activations"):
            raise CheckpointError(
                f"{model_path}: activations are quantized for models in nvfp4 or mxfp8 only, and this one is EXL3; "
                "leave --quantize-activations out"
            )
        options = {"accuracy": product_accuracy(None), "progress": progress, "host": MLX_VLM}
        if mx.distributed.init().size() > 1:
            model = guarded(load_part, Path(model_path), None, None, parallel, lambda _: None, **options)[0]
        else:
            model, _ = guarded(load_exl3_model, Path(model_path), lazy, **options)
        model.model_path = model_path
        return model

    def load_processor(model_path: str | Path, *args: Any, **keywords: Any) -> Any:
        if not is_ours(Path(model_path)):
            return load_others_processor(model_path, *args, **keywords)
        return guarded(load_own_processor, Path(model_path), *args, **keywords)

    drafters.install()
    vars(mlx_vlm_utils).update(get_model_path=get_model_path, load_model=load_model, load_processor=load_processor)


def _run_alike(command: str) -> None:
    """See that several ranks do the same, and that one of them shows it: mlx-vlm's commands know nothing of ranks.

    Raises:
        CheckpointError: If they cannot.
    """
    group = mx.distributed.init()
    if group.size() == 1:
        return
    if command != "generate":
        raise CheckpointError(
            f"mlx_vlm {command} runs on one rank; generate runs on several, and so does mlx_marlin.vlm.sharded_load in "
            "a program"
        )
    for option in ("--draft-model", "--adapter-path"):
        if value_of(option) is not None:
            raise CheckpointError(f"{option} is for one rank; leave it out, or run without mlx.launch")
    if value_of("--seed") is None:
        number = int.from_bytes(os.urandom(3), "big") if group.rank() == 0 else 0
        sys.argv += ["--seed", str(mx.distributed.all_sum(mx.array(number), stream=mx.cpu).item())]
    if group.rank() > 0:
        sys.stdout = open(os.devnull, "w")


def run(command: str, progress: LayerProgress | None = None) -> None:
    """Run the mlx-vlm command that ``sys.argv`` asks for.

    Args:
        command: Its name, ``sys.argv[2]``.
        progress: See :func:`install`.

    Raises:
        CheckpointError: If a checkpoint or an argument is wrong.
    """
    del sys.argv[1]
    # argparse calls a command by the program's name.
    sys.argv[0:2] = [f"mlx_marlin vlm {command}"]
    if command not in _TAKES_REVISION:
        take_revision()
    parallel = take_parallel()
    _run_alike(command)
    refuse = refusal("mlx_vlm", command) if command in CONVERTERS else None
    repo = value_of("--model")
    if repo is not None:  # a command may tell errors in a way of its own, or go on without a model
        check(repo, parallel)
    install(progress, refuse=refuse, parallel=parallel)
    if command == "server":
        from .serving import guard  # imports mlx-vlm's server, which other commands do without

        guard()
    importlib.import_module(f"mlx_vlm.{command}").main()
