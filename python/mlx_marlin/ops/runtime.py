"""The extension as it runs here: threads, memory, instruction set, and the digests of what it was built from."""

from __future__ import annotations

import platform
import re
from collections.abc import Sequence
from functools import cache
from threading import RLock

import mlx.core as mx
import numpy as np

from .. import _ext

MLX_LOCK = RLock()
"""Of MLX on a GPU, where two threads are not to call it at once: held by those that may run beside others."""


def instruction_set() -> str:
    """The best instruction set of this CPU that the kernels have code for, such as avx512vbmi or neon."""
    return _ext.instruction_sets()[-1]


# The first generation of Apple's GPUs with neural accelerators: of Macs the M5's, of phones the one after it. And the
# first system whose compiler is right for them, macOS 26.2, by the version of its kernel, which no compatibility mode
# changes. MLX decides by the same (is_nax_available in backend/metal/device.cpp).
_FIRST_GENERATION, _FIRST_PHONE_GENERATION = 17, 18
_FIRST_DARWIN = (25, 2)


@cache
def has_accelerators(device: str) -> bool:
    """Whether a device, ``"cpu"`` or ``"gpu"``, has neural accelerators that its system lets kernels use."""
    if device != "gpu" or platform.system() != "Darwin" or not mx.is_available(mx.Device(mx.gpu)):
        return False
    return usable_accelerators(str(mx.device_info(mx.gpu).get("architecture", "")), platform.release())


def usable_accelerators(architecture: str, darwin: str) -> bool:
    """Whether kernels can use neural accelerators.

    Args:
        architecture: Metal's name of the GPU's, such as ``"applegpu_g17s"``; the last letter of phones is p.
        darwin: The kernel's version, such as ``"25.2.0"``.
    """
    found = re.fullmatch(r"applegpu_g(\d+)([a-z]?)", architecture)
    version = re.match(r"(\d+)\.(\d+)", darwin)
    if found is None or version is None:
        return False
    first = _FIRST_PHONE_GENERATION if found[2] == "p" else _FIRST_GENERATION
    return int(found[1]) >= first and (int(version[1]), int(version[2])) >= _FIRST_DARWIN


def cpu_digest() -> str:
    """SHA-256 of what the CPU kernels were built from: sources, compiler and flags."""
    return _ext.cpu_digest()


def plan_digest() -> str:
    """SHA-256 of the sources that plan and launch the Metal kernels."""
    return _ext.plan_digest()


def set_num_threads(n: int) -> None:
    """Set the number of CPU workers. Default: the cores that this process may use.

    Raises:
        ValueError: If n is less than 1.
    """
    if not isinstance(n, (int, np.integer)) or isinstance(n, bool) or n < 1:
        raise ValueError(f"the number of threads must be an integer >= 1, got {n!r}")
    _ext.set_num_threads(int(n))


def uninitialized(shape: Sequence[int], dtype: mx.Dtype) -> mx.array:
    """An array for data that is read into it: ``np.array(it, copy=False)`` shares its memory and can be written.

    Write all of it before anything is computed from it: MLX takes arrays for constant.
    """
    return _ext.uninitialized(list(shape), dtype)


def widen(dtype: str, halves: np.ndarray, into: np.ndarray) -> None:
    """Halves as float32, exactly, by the CPU's own conversion: NumPy takes ten times as long for float16.

    Args:
        dtype: ``"float16"`` or ``"bfloat16"``.
        halves: Their words, uint16, contiguous, of one dimension.
        into: float32, contiguous, as many.

    Raises:
        ValueError: If there is no such dtype of halves, or sizes differ.
    """
    if dtype not in ("float16", "bfloat16"):
        raise ValueError(f"halves are float16 or bfloat16, got {dtype!r}")
    if halves.shape != into.shape:
        raise ValueError(f"there must be a float for each half, got {list(into.shape)} for {list(halves.shape)}")
    _ext.widen(halves, dtype == "bfloat16", into)


def replace_sgemm(sgemm: int, sgemv: int) -> bool:
    """Make MLX's products of float32 matrices on the CPU use another BLAS, on the threads of this package.

    For the rest of the process; call it while nothing is computed.

    Args:
        sgemm: Address of a ``cblas_sgemm`` with 32-bit integers that works on the calling thread alone and may be
            called from many at once.
        sgemv: Address of its ``cblas_sgemv``, for matrices of one row.

    Returns:
        Whether it could be done: ``False`` where MLX takes its products from no shared library, or not on Linux.
    """
    return _ext.replace_sgemm(sgemm, sgemv)
