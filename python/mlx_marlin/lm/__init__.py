"""EXL3 checkpoints as mlx-lm models. Needs mlx-lm: ``pip install ".[lm]"`` in a clone of the repository."""

from __future__ import annotations

import mlx.core as mx

try:
    from mlx_lm import utils as mlx_lm_utils
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "loading models needs mlx-lm; in a clone of mlx_marlin run: pip install '.[lm]'", name=error.name
    ) from error

from .hub import fetch
from .model import LayerProgress, activation_dtype, is_exl3, load_exl3_model

__all__ = ["is_exl3", "load", "load_exl3_model"]


def load(
    path_or_hf_repo: str,
    dtype: mx.Dtype | str | None = None,
    *,
    tokenizer_config: dict | None = None,
    model_config: dict | None = None,
    adapter_path: str | None = None,
    lazy: bool = False,
    return_config: bool = False,
    revision: str | None = None,
    trust_remote_code: bool = False,
    progress: LayerProgress | None = None,
):
    """Load an EXL3 checkpoint as ``mlx_lm.load`` loads others; the other keywords are its own.

    Args:
        path_or_hf_repo: Directory, or repository on the Hugging Face Hub.
        dtype: Of the unquantized parameters, and so of the activations: float32, float16 or bfloat16, as
            ``mx.Dtype`` or by name. Default: ``None``: float32 on the CPU, the source's dtype on a GPU.
        trust_remote_code: Taken for the sake of ``mlx_lm.load``; code inside an EXL3 checkpoint is never run.
        progress: Called with (layers done, layers) after each layer. Default: ``None``.

    Returns:
        The model and the tokenizer, and the config if ``return_config``.

    Raises:
        FileNotFoundError: If there is no such directory or repository, or a file of it is missing.
        ValueError: If the directory cannot be loaded, which names file and tensor; or no model runs in the dtype.
    """
    dtype = activation_dtype(dtype)
    model_path = fetch(path_or_hf_repo, revision=revision)
    model, config = load_exl3_model(model_path, lazy, model_config, dtype=dtype, progress=progress)
    if adapter_path is not None:
        model = mlx_lm_utils.load_adapters(model, adapter_path)
        model.eval()
    tokenizer = mlx_lm_utils.load_tokenizer(model_path, tokenizer_config, eos_token_ids=config.get("eos_token_id"))
    return (model, tokenizer, config) if return_config else (model, tokenizer)
