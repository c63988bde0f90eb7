"""The ops of models that MLX's wheel for Linux computes slowly on a CPU.

Attention is composed there of products and a softmax on one thread, and products of float32 matrices are those of the
reference BLAS: 2 GFLOP/s. A prompt of a thousand tokens would spend minutes in them. On macOS, and on a GPU, nothing is
changed.
"""

from __future__ import annotations

import ctypes
import functools
import sys
import warnings
from pathlib import Path

import mlx.core as mx

from .. import ops


def install() -> None:
    """Make both fast for the rest of the process: MLX's own functions run on this package's threads.

    Raises:
        ModuleNotFoundError: If scipy-openblas32, which the extra ``lm`` brings, is not installed.
    """
    if sys.platform == "linux" and ops.device_of(None) == "cpu":
        _replace_products()  # first: where it fails nothing is changed
        _replace_attention()


@functools.cache
def _replace_attention() -> None:
    composed = mx.fast.scaled_dot_product_attention

    @functools.wraps(composed)
    def scaled_dot_product_attention(
        q: mx.array,
        k: mx.array,
        v: mx.array,
        *,
        scale: float,
        mask: mx.array | str | None = None,
        sinks: mx.array | None = None,
        force_fused: bool = False,
        stream: ops.StreamOrDevice = None,
    ) -> mx.array:
        if not force_fused and ops.attention_runs(q, k, v, mask, sinks, stream):
            return ops.run_attention(q, k, v, scale=scale, mask=mask, sinks=sinks, stream=stream)
        return composed(q, k, v, scale=scale, mask=mask, sinks=sinks, force_fused=force_fused, stream=stream)

    mx.fast.scaled_dot_product_attention = scaled_dot_product_attention


@functools.cache
def _replace_products() -> None:
    try:
        import scipy_openblas32
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "models on a Linux CPU need scipy-openblas32; in a clone of mlx_marlin run: pip install '.[lm]'",
            name=error.name,
        ) from error
    # A copy that nobody else in the process uses: NumPy and SciPy bring their own under other names.
    openblas = ctypes.CDLL(str(Path(scipy_openblas32.get_lib_dir(), scipy_openblas32.get_library(fullname=True))))
    # The worker pool runs its parts, so that two pools of threads do not wait for the same cores.
    openblas.scipy_openblas_set_num_threads(1)
    functions = (openblas.scipy_cblas_sgemm, openblas.scipy_cblas_sgemv)
    if not ops.replace_sgemm(*(ctypes.cast(function, ctypes.c_void_p).value or 0 for function in functions)):
        warnings.warn(
            "this MLX takes its float32 products from no library that could be replaced; they run at its own speed",
            RuntimeWarning,
            stacklevel=2,
        )
