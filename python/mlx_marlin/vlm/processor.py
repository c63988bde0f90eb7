"""The processor of a checkpoint: its tokenizer's files checked before weights are read."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.nn as nn
from mlx_vlm import utils as mlx_vlm_utils

from ..lm.tokenizer import check_tokenizer
from ..storage.untrusted import is_listed, read_json

if TYPE_CHECKING:
    from transformers.processing_utils import ProcessorMixin

# What transformers and mlx-vlm configure processors with.
_CONFIGS = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json", "chat_template.json")


def check_processor(directory: Path) -> None:
    """See that a directory holds what a processor is made of, before weights are read.

    Raises:
        FileNotFoundError: If it holds no tokenizer, or a file of it is a link that leads nowhere.
        ValueError: If a file of it is not what its name says.
    """
    check_tokenizer(directory)
    for name in _CONFIGS:
        if is_listed(directory / name):
            read_json(directory / name, finite=False)


def load_own_processor(directory: Path, *arguments: Any, **keywords: Any) -> ProcessorMixin:
    """``mlx_vlm.utils.load_processor`` of a directory that :func:`check_processor` found good.

    Checkpoints may bring code: asked for or not, it is not run.

    Raises:
        ValueError: If transformers cannot make a processor of its files.
    """
    try:
        return _make(directory, *arguments, **{**keywords, "trust_remote_code": False})
    except (ImportError, MemoryError):  # a package that is missing is no fault of the files
        raise
    except Exception as error:  # the tokenizers package raises bare Exceptions
        raise ValueError(
            f"{directory}: transformers cannot make a processor of its files: {type(error).__name__}: "
            f"{str(error).partition(chr(10))[0]}"
        ) from error


def load_processor(model: nn.Module, directory: Path, **keywords: Any) -> ProcessorMixin:
    """What ``mlx_vlm.load`` makes of a directory that :func:`check_processor` found good.

    Raises:
        ValueError: If transformers cannot make a processor of its files.
    """
    image_processor = mlx_vlm_utils.load_image_processor(directory)
    eos_token_ids = getattr(model.config, "eos_token_id", None)
    processor = load_own_processor(directory, True, eos_token_ids=eos_token_ids, **keywords)
    if image_processor is not None:
        processor.image_processor = image_processor
    return processor


# mlx-vlm's own, also after `commands.install`.
_make = mlx_vlm_utils.load_processor
