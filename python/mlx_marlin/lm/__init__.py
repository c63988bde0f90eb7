"""EXL3 checkpoints as mlx-lm models. Needs mlx-lm: ``pip install mlx_marlin[lm]``."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx

try:
    from mlx_lm import utils as mlx_lm_utils
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("loading models needs mlx-lm: pip install 'mlx_marlin[lm]'", name=error.name) from error

from .model import Progress, is_exl3, load_exl3_model

__all__ = ["is_exl3", "load", "load_exl3_model"]


def load(
    path_or_hf_repo: str,
    dtype: mx.Dtype | None = None,
    *,
    tokenizer_config: dict | None = None,
    model_config: dict | None = None,
    adapter_path: str | None = None,
    lazy: bool = False,
    return_config: bool = False,
    revision: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
):
    """Load an EXL3 checkpoint as ``mlx_lm.load`` loads others; the other keywords are its own.

    Args:
        path_or_hf_repo: Directory, or repository on the Hugging Face Hub.
        dtype: Of the unquantized parameters, and so of the activations. Default: ``None``: float32 on the
            CPU, the source's dtype on a GPU.
        trust_remote_code: Taken for the sake of ``mlx_lm.load``; code inside an EXL3 checkpoint is never run.
        progress: Called with (layers done, layers) after each layer. Default: ``None``.

    Returns:
        The model and the tokenizer, and the config if ``return_config``.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If the directory cannot be loaded; the message names file and tensor.
    """
    model_path = mlx_lm_utils._download(str(path_or_hf_repo), revision=revision)
    model, config = load_exl3_model(Path(model_path), lazy, model_config, dtype=dtype, progress=progress)
    if adapter_path is not None:
        model = mlx_lm_utils.load_adapters(model, adapter_path)
        model.eval()
    tokenizer = mlx_lm_utils.load_tokenizer(model_path, tokenizer_config, eos_token_ids=config.get("eos_token_id"))
    return (model, tokenizer, config) if return_config else (model, tokenizer)
