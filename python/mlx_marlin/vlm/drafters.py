"""Drafters out of the prediction layers that a checkpoint brings: mlx-vlm's own, over quantized layers.

mlx-vlm has a splitter for each family, which chooses a drafter's tensors and names them as its class does.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_vlm import utils as mlx_vlm_utils
from mlx_vlm.speculative.drafters.mtp_split import MTPSplitter, get_mtp_splitter

from ..lm.command_line import guarded, is_ours
from ..lm.host import MODEL_ERRORS
from ..lm.model import fill, open_checkpoint, product_accuracy, read_config
from ..loader.contents import DRAFT
from ..loader.directory import TrellisModelLoader
from ..storage.untrusted import unchanged
from . import rearranging
from .host import MLX_VLM, MlxVlm


class Drafters(MlxVlm):
    """The drafters of one family as models of a host.

    Args:
        splitter: The family's.
        source: config.json of the checkpoint.
    """

    whole = False

    def __init__(self, splitter: MTPSplitter, source: dict):
        self.splitter = splitter
        self.text = splitter.read_text_config(source)
        # What is meant for other quantizations, which the splitter would undo.
        self.text.pop("quantization_config", None)
        self.text_layers = int(self.text.get("num_hidden_layers", 0))

    def new_model(self, config: dict) -> nn.Module:
        # As MTPSplitter.prepare does it.
        drafter = {
            "model_type": self.splitter.output_model_type,
            "text_config": json.loads(json.dumps(self.text)),
            "block_size": self.splitter.depth(self.text) + self.splitter.block_size_extra,
            "tie_word_embeddings": bool(
                self.text.get("tie_word_embeddings", self.splitter.tie_word_embeddings_default)
            ),
            **self.splitter.extra_config(self.text),
        }
        code, _ = mlx_vlm_utils.get_model_and_args(drafter)
        model = code.Model(code.ModelConfig.from_dict(drafter))
        rearranging.separate_gates(model)
        return model

    def sanitize(self, model: nn.Module, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        chosen = {key: value for key, value in weights.items() if self.splitter.select_keys(key, self.text)}
        chosen = rearranging.split_latents(model.config.text_config, chosen)
        return rearranging.split_gates(model, self.splitter.transform(chosen, self.text, False))

    def uses(self, part: str) -> bool:
        return part == DRAFT

    def layers(self, model: nn.Module) -> int:
        return self.text_layers


def load_drafter(
    directory: Path, lazy: bool = False, *, dtype: mx.Dtype | None = None, accuracy: str = "float32"
) -> nn.Module:
    """The drafter of an EXL3 directory's prediction layers.

    Args:
        directory: The directory.
        lazy: Leave the unquantized parameters unevaluated. Default: ``False``.
        dtype: Of the unquantized parameters. Default: ``None``, as for :func:`mlx_marlin.load`.
        accuracy: Of the products. Default: ``"float32"``.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If mlx-vlm has no drafter for the model, or the checkpoint no prediction layers, or damaged ones.
    """
    with unchanged(directory):
        model, config, mapping = open_checkpoint(directory, host=_host_of(directory))
        fill(model, mapping, config, dtype, accuracy, lazy=lazy)
    return model


def _host_of(directory: Path) -> Drafters:
    read_config(MLX_VLM, directory, TrellisModelLoader(directory), None)  # refuses what is no config
    source = mlx_vlm_utils.load_config(directory)
    try:
        splitter = get_mtp_splitter(source_config=source)
        host = None if splitter is None else Drafters(splitter, source)
    except MODEL_ERRORS as error:
        raise ValueError(
            f"{directory / 'config.json'}: mlx-vlm cannot choose a drafter by it: {type(error).__name__}: {error}"
        ) from error
    if host is None:
        raise ValueError(f"{directory}: mlx-vlm has no drafter for the prediction layers of {source['model_type']}")
    return host


def install() -> None:
    """Make mlx-vlm's splitters load those of EXL3 directories, for the rest of the process."""
    load_others = MTPSplitter.load

    def load(self: MTPSplitter, source_path: Path, lazy: bool = False, **keywords: Any) -> nn.Module:
        if not is_ours(Path(source_path)):
            return load_others(self, source_path, lazy, **keywords)
        return guarded(load_drafter, Path(source_path), lazy, accuracy=product_accuracy(None))

    type.__setattr__(MTPSplitter, "load", load)  # a plain assignment is nothing for a type checker
