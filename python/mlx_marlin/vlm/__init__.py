"""EXL3 checkpoints as models of mlx-vlm: text, vision towers and projectors, quantized or not.

The package needs the extra ``[vlm]``, and imports mlx-vlm when it is used.

- ``host``: mlx-vlm as a host of models; where tensors go is found by :mod:`mlx_marlin.lm`, as for mlx-lm.
- ``layers``: what stands for its linears and experts.
- ``processor``: what prepares text, pictures and sound for a model.
- ``drafters``: drafters out of the prediction layers that a checkpoint brings.
- ``verifying``: a draft's tokens through these layers at once.
- ``commands``: mlx-vlm's commands over all this.
- ``serving``: its server, whose clients' requests are checked.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn

if TYPE_CHECKING:
    from transformers.processing_utils import ProcessorMixin

__all__ = ["load", "load_drafter", "sharded_load"]


def load(
    path_or_hf_repo: str,
    accuracy: str | None = None,
    *,
    dtype: mx.Dtype | str | None = None,
    adapter_path: str | None = None,
    lazy: bool = False,
    revision: str | None = None,
    progress: Callable[[int, int], None] | None = None,
    **keywords: Any,
) -> tuple[nn.Module, ProcessorMixin]:
    """Load an EXL3 checkpoint as ``mlx_vlm.load`` loads others; the other keywords are its own.

    Args:
        path_or_hf_repo: Directory, or repository on the Hugging Face Hub.
        accuracy: What the products with quantized weights may round, see :func:`mlx_marlin.load`. Default: ``None``:
            ``"half"`` on the CPU, ``"float32"`` on a GPU.
        dtype: Of the unquantized parameters, see :func:`mlx_marlin.load`. Default: ``None``: float32 on the CPU, the
            source's dtype on a GPU.
        adapter_path: Directory of a LoRA adapter. Default: ``None``.
        lazy: Leave the unquantized parameters unevaluated. Default: ``False``.
        revision: Branch, tag or commit of the repository. Default: ``None``.
        progress: Called with (layers done, layers) after each layer. Default: ``None``.
        keywords: For the processor, such as ``use_fast``. Code inside an EXL3 checkpoint is never run.

    Returns:
        The model and its processor. The model's attribute ``left_out`` is a :class:`~mlx_marlin.loader.LeftOut`: what
        of the checkpoint the model does not use.

    Raises:
        FileNotFoundError: If there is no such directory or repository, or a file of it is missing; a tokenizer too.
        ModuleNotFoundError: If mlx-vlm is not installed.
        ValueError: If the directory cannot be loaded, which names file and tensor; or no model runs in the dtype.
    """
    require_mlx_vlm()
    from mlx_vlm.trainer.peft.utils import apply_lora_layers

    from ..lm.hub import fetch
    from ..lm.model import activation_dtype, load_exl3_model, product_accuracy
    from .host import FILES, MLX_VLM
    from .processor import check_processor, load_processor

    dtype, accuracy = activation_dtype(dtype), product_accuracy(accuracy)
    model_path = fetch(path_or_hf_repo, revision, FILES)
    check_processor(model_path)
    model, _ = load_exl3_model(model_path, lazy, dtype=dtype, accuracy=accuracy, progress=progress, host=MLX_VLM)
    model.model_path = model_path
    if adapter_path is not None:
        model = apply_lora_layers(model, adapter_path)
        model.eval()
    return model, load_processor(model, model_path, **keywords)


def sharded_load(
    path_or_hf_repo: str,
    tensor_group: mx.distributed.Group | None = None,
    pipeline_group: mx.distributed.Group | None = None,
    *,
    parallel: str = "tensor",
    dtype: mx.Dtype | str | None = None,
    accuracy: str | None = None,
    revision: str | None = None,
    progress: Callable[[int, int], None] | None = None,
    **keywords: Any,
) -> tuple[nn.Module, ProcessorMixin]:
    """``mlx_vlm.utils.sharded_load`` for EXL3 checkpoints: each rank of ``mlx.launch`` loads its part.

    Every rank must then generate with the same prompt, and sample alike: with temperature 0, or one seed.

    Args:
        path_or_hf_repo: Directory, or repository on the Hugging Face Hub.
        tensor_group: Ranks of which each has a part of each layer. Default: ``None``; all of them, if the model can be
            split so and there is no pipeline.
        pipeline_group: Ranks of which each has some of the layers. Default: ``None``.
        parallel: How the ranks of a tensor group share the experts: ``"tensor"``, each has a part of every one, or
            ``"experts"``, each has some whole ones and reads no others. Default: ``"tensor"``.
        dtype, accuracy, revision, progress, keywords: As for :func:`load`.

    Returns:
        The model and its processor.

    Raises:
        FileNotFoundError: If there is no such directory or repository, or a file of it is missing.
        ModuleNotFoundError: If mlx-vlm is not installed.
        ValueError: If the directory cannot be loaded, or not split this way. Nothing has been read by then.
    """
    require_mlx_vlm()
    from ..lm.hub import fetch
    from ..lm.model import activation_dtype, product_accuracy
    from ..lm.sharding import load_part
    from .host import FILES, MLX_VLM
    from .processor import check_processor, load_processor

    dtype, accuracy = activation_dtype(dtype), product_accuracy(accuracy)
    model_path = fetch(path_or_hf_repo, revision, FILES)
    model, _, _ = load_part(
        model_path, pipeline_group, tensor_group, parallel, lambda _: check_processor(model_path),
        host=MLX_VLM, dtype=dtype, accuracy=accuracy, progress=progress,
    )  # fmt: skip
    model.model_path = model_path
    return model, load_processor(model, model_path, **keywords)


def load_drafter(
    path_or_hf_repo: str,
    accuracy: str | None = None,
    *,
    dtype: mx.Dtype | str | None = None,
    lazy: bool = False,
    revision: str | None = None,
) -> nn.Module:
    """Load the multi-token prediction layers of an EXL3 checkpoint as mlx-vlm's drafter of their kind.

    It goes with the model of the same checkpoint: ``mlx_vlm.generate(..., draft_model=drafter, draft_kind="mtp")``.

    Args:
        path_or_hf_repo: Directory, or repository on the Hugging Face Hub.
        accuracy: As for :func:`load`. Default: ``None``.
        dtype: As for :func:`load`. Default: ``None``.
        lazy: Leave the unquantized parameters unevaluated. Default: ``False``.
        revision: Branch, tag or commit of the repository. Default: ``None``.

    Raises:
        FileNotFoundError: If there is no such directory or repository, or a file of it is missing.
        ModuleNotFoundError: If mlx-vlm is not installed.
        ValueError: If mlx-vlm has no drafter for the model, or the checkpoint no prediction layers, or damaged ones.
    """
    require_mlx_vlm()
    from ..lm.hub import fetch
    from ..lm.model import activation_dtype, product_accuracy
    from . import drafters
    from .host import FILES

    dtype, accuracy = activation_dtype(dtype), product_accuracy(accuracy)
    directory = fetch(path_or_hf_repo, revision, FILES)
    return drafters.load_drafter(directory, lazy, dtype=dtype, accuracy=accuracy)


def require_mlx_vlm() -> None:
    """Raise ModuleNotFoundError, saying what to install, unless mlx-vlm is there."""
    try:
        import mlx_vlm  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "models of mlx-vlm need mlx-vlm; in a clone of mlx_marlin run: pip install '.[vlm]'", name=error.name
        ) from error
