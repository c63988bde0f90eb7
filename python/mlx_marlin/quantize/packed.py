"""Weights that a checkpoint keeps in 8 or 4 bits with scales, as the values they stand for: fp8 in blocks, mxfp4."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from ..ops import MLX_LOCK
from ..storage.safetensors import TensorInfo

# The values of E2M1, by their four bits: OCP Microscaling Formats 1.0, table 5.
_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
_E8M0_BIAS = 127
_MXFP4_GROUP = 32
FP8_SCALE = "_scale_inv"
"""What the name of fp8 weights' scales has behind that of the weights."""


@dataclass(frozen=True)
class PackedTensor:
    """A tensor that is stored as codes and scales; it stands for bfloat16 values, as model code takes it.

    Attributes:
        codes: F8_E4M3 ``[..., n, k]``, or U8 ``[..., k / 32, 16]``: two values each, the lower four bits first.
        scales: F32, F16 or BF16 ``[..., n / block, k / block]``, rounded up; or U8 ``[..., k / 32]``, exponents.
        block: Rows and columns that share a scale; ``None`` for mxfp4.
    """

    codes: TensorInfo
    scales: TensorInfo
    block: tuple[int, int] | None

    @property
    def dtype(self) -> str:
        return "BF16"

    @property
    def shape(self) -> tuple[int, ...]:
        shape = self.codes.shape
        return shape if self.block is not None else (*shape[:-2], shape[-2] * _MXFP4_GROUP)

    @property
    def nbytes(self) -> int:
        return 2 * math.prod(self.shape)

    def array(self, codes: mx.array, scales: mx.array) -> mx.array:
        """The values, lazily, from lazy arrays of both tensors."""
        if self.block is None:
            nibbles = mx.stack([codes & 15, codes >> 4], axis=-1).flatten(-2)  # [..., groups, 32]
            values = mx.array(_E2M1)[nibbles]
            powers = mx.power(2.0, scales.astype(mx.float32) - _E8M0_BIAS)
            return (values * powers[..., None]).flatten(-2).astype(mx.bfloat16)
        rows, columns = self.shape[-2:]
        wide = mx.repeat(scales.astype(mx.float32), self.block[0], axis=-2)[..., :rows, :]
        wide = mx.repeat(wide, self.block[1], axis=-1)[..., :columns]
        return (mx.from_fp8(codes, dtype=mx.float32) * wide).astype(mx.bfloat16)

    def floats(self) -> np.ndarray:
        """The values, float32."""
        stored = self.codes.array(), self.scales.array()
        with MLX_LOCK:
            codes, scales = map(mx.array, stored)
            if self.scales.dtype == "BF16":
                scales = scales.view(mx.bfloat16)
            return np.array(self.array(codes, scales).astype(mx.float32))

    def read(self) -> bytes:
        """The values' bytes in bfloat16."""
        return (self.floats().view(np.uint32) >> 16).astype(np.uint16).tobytes()


def unpacked(tensors: Mapping[str, TensorInfo], quantization: dict | None) -> dict[str, TensorInfo | PackedTensor]:
    """The tensors of a checkpoint by the names that they have unpacked.

    Args:
        tensors: As stored.
        quantization: ``quantization_config`` of config.json, or ``None``.

    Raises:
        ValueError: If it is of another kind than fp8 in blocks or mxfp4, or codes and scales do not belong together.
    """
    if quantization is None:
        return dict(tensors)
    method = quantization.get("quant_method")
    if method == "mxfp4":
        return _without_mxfp4(tensors)
    block = quantization.get("weight_block_size")
    if method == "fp8" and isinstance(block, list) and len(block) == 2 and all(n in range(1, 1 << 16) for n in block):
        return _without_fp8(tensors, (block[0], block[1]))
    raise ValueError(
        f"it is already quantized (quant_method {method!r}); fp8 with weight_block_size and mxfp4 are read, of others "
        "convert the original fp16, bf16 or fp32 checkpoint"
    )


def _without_mxfp4(tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo | PackedTensor]:
    result: dict[str, TensorInfo | PackedTensor] = {}
    for name, info in tensors.items():
        stem = name.removesuffix("_blocks")
        if name.endswith("_scales") and f"{name.removesuffix('_scales')}_blocks" in tensors:
            continue
        if not name.endswith("_blocks"):
            result[name] = info
            continue
        scales = tensors.get(f"{stem}_scales")
        if scales is None or info.dtype != "U8" or scales.dtype != "U8" or info.shape != (*scales.shape, 16):
            found = "missing" if scales is None else f"{scales.dtype} {list(scales.shape)}"
            raise ValueError(
                f"{name} is {info.dtype} {list(info.shape)} and its {stem}_scales {found}; mxfp4 has U8 blocks of 16 "
                "bytes and one U8 scale for each"
            )
        result[f"{stem}.weight"] = PackedTensor(info, scales, None)
    return result


def _without_fp8(tensors: Mapping[str, TensorInfo], block: tuple[int, int]) -> dict[str, TensorInfo | PackedTensor]:
    result: dict[str, TensorInfo | PackedTensor] = {}
    for name, info in tensors.items():
        if name.endswith(FP8_SCALE) and name.removesuffix(FP8_SCALE) in tensors:
            continue
        if info.dtype != "F8_E4M3":
            result[name] = info
            continue
        scales = tensors.get(f"{name}{FP8_SCALE}")
        wanted = (*info.shape[:-2], *(-(-n // size) for n, size in zip(info.shape[-2:], block)))
        if scales is None or scales.dtype not in ("F32", "F16", "BF16") or scales.shape != wanted:
            found = "missing" if scales is None else f"{scales.dtype} {list(scales.shape)}"
            raise ValueError(
                f"{name} is F8_E4M3 {list(info.shape)} and its {name}{FP8_SCALE} {found}; with weight_block_size "
                f"{list(block)} it must be floating point of shape {list(wanted)}"
            )
        result[name] = PackedTensor(info, scales, block)
    return result
