"""EXL3 checkpoints as models of mlx-lm, or of another host: the modules here need mlx-lm, the package itself does not.

- ``hub``: where a checkpoint is.
- ``tokenizer``: its tokenizer, checked.
- ``host``: what there is to know of a library of models; ``mlx_lm_host``: mlx-lm (``mlx_marlin.vlm`` has mlx-vlm's).
- ``placeholders``: what stands for its linears while a host moves tensors about; ``sanitizing``: how it does;
  ``graphs``: what was computed meanwhile.
- ``mapping``: where its tensors belong in a host's model.
- ``shapes``: whether that model can be called, from shapes alone.
- ``embedding``: its token embeddings there.
- ``experts``: the layers that take the places of linears and experts.
- ``dense_ops``: the ops around them, where MLX is slow.
- ``model``: that model, made and filled.
- ``sharding``: the same on several ranks; ``expert_parallel``: with whole experts on each.
- ``memory``: what it takes to run one.
- ``info``: what a checkpoint is, without reading its weights; ``info_report``: the same as text.
- ``commands``: mlx-lm's commands over all this.
- ``requests``: what clients may send to a server; ``serving``: mlx-lm's, which checks that.
- ``problems``: what a checkpoint asks of the kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, overload

import mlx.core as mx
import mlx.nn as nn

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

__all__ = ["load"]


@overload
def load(
    path_or_hf_repo: str,
    dtype: mx.Dtype | str | None = None,
    accuracy: str | None = None,
    *,
    tokenizer_config: dict | None = None,
    model_config: dict | None = None,
    adapter_path: str | None = None,
    lazy: bool = False,
    return_config: Literal[False] = False,
    revision: str | None = None,
    trust_remote_code: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[nn.Module, TokenizerWrapper]: ...


@overload
def load(
    path_or_hf_repo: str,
    dtype: mx.Dtype | str | None = None,
    accuracy: str | None = None,
    *,
    tokenizer_config: dict | None = None,
    model_config: dict | None = None,
    adapter_path: str | None = None,
    lazy: bool = False,
    return_config: Literal[True],
    revision: str | None = None,
    trust_remote_code: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[nn.Module, TokenizerWrapper, dict]: ...


def load(
    path_or_hf_repo: str,
    dtype: mx.Dtype | str | None = None,
    accuracy: str | None = None,
    *,
    tokenizer_config: dict | None = None,
    model_config: dict | None = None,
    adapter_path: str | None = None,
    lazy: bool = False,
    return_config: bool = False,
    revision: str | None = None,
    trust_remote_code: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[nn.Module, TokenizerWrapper] | tuple[nn.Module, TokenizerWrapper, dict]:
    """Load an EXL3 checkpoint as ``mlx_lm.load`` loads others; the other keywords are its own.

    Args:
        path_or_hf_repo: Directory, or repository on the Hugging Face Hub.
        dtype: Of the unquantized parameters, and so of the activations: float32, float16 or bfloat16, as
            ``mx.Dtype`` or by name. Default: ``None``: float32 on the CPU, the source's dtype on a GPU.
        accuracy: What the products with quantized weights may round: ``"float32"``, nothing but their result;
            ``"half"``, about as much as float16 does, which is faster. Default: ``None``: ``"half"`` on the CPU,
            ``"float32"`` on a GPU.
        trust_remote_code: Taken for the sake of ``mlx_lm.load``; code inside an EXL3 checkpoint is never run.
        progress: Called with (layers done, layers) after each layer. Default: ``None``.

    Returns:
        The model and the tokenizer, and the config if ``return_config``. The model's attribute ``left_out`` is a
        :class:`~mlx_marlin.loader.LeftOut`: what of the checkpoint the model does not use.

    Raises:
        FileNotFoundError: If there is no such directory or repository, or a file of it is missing; a tokenizer too.
        ModuleNotFoundError: If mlx-lm is not installed.
        ValueError: If the directory cannot be loaded, which names file and tensor; or no model runs in the dtype.
    """
    require_mlx_lm()
    from mlx_lm import utils as mlx_lm_utils

    from .hub import fetch
    from .model import activation_dtype, load_exl3_model, product_accuracy
    from .tokenizer import check_tokenizer, load_tokenizer

    dtype, accuracy = activation_dtype(dtype), product_accuracy(accuracy)
    model_path = fetch(path_or_hf_repo, revision=revision)
    check_tokenizer(model_path)
    model, config = load_exl3_model(model_path, lazy, model_config, dtype=dtype, accuracy=accuracy, progress=progress)
    if adapter_path is not None:
        model = mlx_lm_utils.load_adapters(model, adapter_path)
        model.eval()
    tokenizer = load_tokenizer(model_path, tokenizer_config, eos_token_ids=config.get("eos_token_id"))
    return (model, tokenizer, config) if return_config else (model, tokenizer)


def require_mlx_lm() -> None:
    """Raise ModuleNotFoundError, saying what to install, unless mlx-lm is there."""
    try:
        import mlx_lm  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "loading models needs mlx-lm; in a clone of mlx_marlin run: pip install '.[lm]'", name=error.name
        ) from error
