"""A quantized linear as EXL3 stores it."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ..loader.exl3 import MARKERS
from ..storage.safetensors import Tensor, TensorInfo
from .source import half
from .spill import StoredTensor
from .weight import Codes

# Of a divisor, so much goes into svh, the rest into suh: suh is near 1 and svh near 0.01, and both stay normal numbers.
_SVH_SHARE = 8


def stored_tensors(name: str, codes: Codes, bias: np.ndarray | None, divisor: int = 1) -> dict[str, Tensor]:
    """A quantized linear as EXL3 stores it.

    Args:
        name: Its name.
        codes: Its weight.
        bias: float32 ``[out_features]`` or ``None``.
        divisor: What its outputs are divided by, a power of two; see ``loader.scaling``. Default: ``1``.
    """
    svh_divisor = min(divisor, _SVH_SHARE)
    suh, svh = codes.suh / np.float16(divisor / svh_divisor), codes.svh / np.float16(svh_divisor)
    tensors = {
        f"{name}.trellis": Tensor.of(codes.trellis),
        f"{name}.suh": half(f"{name}.suh", suh),
        f"{name}.svh": half(f"{name}.svh", svh),
    }
    if codes.codebook in MARKERS:
        tensors[f"{name}.{codes.codebook}"] = Tensor.of(np.array(MARKERS[codes.codebook], np.uint32).view(np.int32))
    if bias is not None:
        tensors[f"{name}.bias"] = half(f"{name}.bias", np.pad(bias / divisor, (0, len(codes.svh) - len(bias))))
    return tensors


def stored_codes(
    name: str, stored: Mapping[str, TensorInfo | StoredTensor], codebook: str, shape: tuple[int, int], divisor: int = 1
) -> Codes:
    """Inverse of :func:`stored_tensors`.

    Args:
        name: The linear's name.
        stored: Where its tensors lie, by name.
        codebook: Its codebook.
        shape: Its logical ``(in_features, out_features)``.
        divisor: As for :func:`stored_tensors`. Default: ``1``.
    """
    trellis, suh, svh = (stored[f"{name}.{suffix}"] for suffix in ("trellis", "suh", "svh"))
    values = np.frombuffer(trellis.read(), np.int16).reshape(trellis.shape)
    svh_divisor = min(divisor, _SVH_SHARE)
    return Codes(
        values,
        suh.floats() * np.float16(divisor / svh_divisor),
        svh.floats() * np.float16(svh_divisor),
        codebook,
        *shape,
    )
