"""The values of weights that a checkpoint keeps in 8 or 4 bits with scales: fp8 in blocks, mxfp4, nvfp4."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from ..ops import mlx_turn
from ..storage.safetensors import FLOATS, TensorInfo
from ..storage.untrusted import is_whole

# The values of E2M1, by their four bits: OCP Microscaling Formats 1.0, table 5.
_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
_E8M0_BIAS = 127
_MXFP4_GROUP, _NVFP4_GROUP = 32, 16
FP8_SCALE = "_scale_inv"
"""What the name of fp8 weights' scales has behind that of the weights."""

# Of nvfp4: what the names of the codes and of the scale of the whole tensor have behind that of the linear. That scale
# multiplies as NVIDIA's Model Optimizer stores it, and divides as compressed-tensors does.
_NVFP4_NAMES = {
    "modelopt": ("weight", "weight_scale_2"),
    "compressed-tensors": ("weight_packed", "weight_global_scale"),
}
# Of activations and of a quantized cache, which the values of the weights do not need.
_ACTIVATION_SCALES = re.compile(r"\.(?:input_scale|input_global_scale|[qkv]_scale)$")
# Beside codes of 4 and 8 bits the dtypes that a tensor with a value per element may have.
_PLAIN = frozenset({*FLOATS, "I64", "I32", "BOOL"})


@dataclass(frozen=True)
class PackedTensor:
    """A tensor that is stored as codes and scales; it stands for bfloat16 values, as model code takes it.

    Attributes:
        codes: The codes.
        scales: What multiplies them.
    """

    codes: TensorInfo
    scales: TensorInfo

    @property
    def parts(self) -> tuple[TensorInfo, ...]:
        """What :meth:`array` takes, as stored."""
        return self.codes, self.scales

    @property
    def dtype(self) -> str:
        return "BF16"

    @property
    def shape(self) -> tuple[int, ...]:
        raise NotImplementedError

    @property
    def nbytes(self) -> int:
        return 2 * math.prod(self.shape)

    def array(self, *parts: mx.array) -> mx.array:
        """The values, lazily, from lazy arrays of the parts."""
        raise NotImplementedError

    def floats(self) -> np.ndarray:
        """The values, float32."""
        return self._unpacked([part.array() for part in self.parts])

    def row(self, index: int) -> np.ndarray:
        """The values of one along the first axis, float32, of which alone the bytes are read."""
        is_whole = [math.prod(part.shape) == 1 for part in self.parts]  # a scale of the whole tensor
        stored = [p.array() if whole else p.rows(index, index + 1) for p, whole in zip(self.parts, is_whole)]
        return self._unpacked(stored)[0]

    def _unpacked(self, stored: Sequence[np.ndarray]) -> np.ndarray:
        with mlx_turn():
            arrays = [mx.array(values) for values in stored]
            arrays = [a.view(mx.bfloat16) if part.dtype == "BF16" else a for a, part in zip(arrays, self.parts)]
            return np.array(self.array(*arrays).astype(mx.float32))

    def read(self) -> bytes:
        """The values' bytes in bfloat16."""
        return (self.floats().view(np.uint32) >> 16).astype(np.uint16).tobytes()


@dataclass(frozen=True)
class Fp8Tensor(PackedTensor):
    """Codes F8_E4M3 ``[..., n, k]``; scales F32, F16 or BF16 ``[..., n / block, k / block]``, rounded up.

    Attributes:
        block: Rows and columns that share a scale.
    """

    block: tuple[int, int]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape

    def array(self, *parts: mx.array) -> mx.array:
        codes, scales = parts
        rows, columns = self.shape[-2:]
        wide = mx.repeat(scales.astype(mx.float32), self.block[0], axis=-2)[..., :rows, :]
        wide = mx.repeat(wide, self.block[1], axis=-1)[..., :columns]
        return (mx.from_fp8(codes, dtype=mx.float32) * wide).astype(mx.bfloat16)


@dataclass(frozen=True)
class Mxfp4Tensor(PackedTensor):
    """Codes U8 ``[..., k / 32, 16]``, scales U8 ``[..., k / 32]``: exponents of two."""

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.scales.shape[:-1], self.scales.shape[-1] * _MXFP4_GROUP)

    def array(self, *parts: mx.array) -> mx.array:
        codes, scales = parts
        powers = mx.power(2.0, scales.astype(mx.float32) - _E8M0_BIAS)
        return (_e2m1(codes) * powers[..., None]).flatten(-2).astype(mx.bfloat16)


@dataclass(frozen=True)
class Nvfp4Tensor(PackedTensor):
    """Codes U8 ``[..., n, k / 2]``, scales F8_E4M3 ``[..., n, k / 16]``.

    Attributes:
        whole: F32, one value: a scale of the whole tensor.
        divides: Whether it divides.
    """

    whole: TensorInfo
    divides: bool

    @property
    def parts(self) -> tuple[TensorInfo, ...]:
        return self.codes, self.scales, self.whole

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.codes.shape[:-1], 2 * self.codes.shape[-1])

    def array(self, *parts: mx.array) -> mx.array:
        codes, scales, whole = parts
        factor = 1 / whole.reshape(()) if self.divides else whole.reshape(())
        groups = _e2m1(codes).reshape(*scales.shape, _NVFP4_GROUP)
        wide = mx.from_fp8(scales, dtype=mx.float32) * factor
        return (groups * wide[..., None]).flatten(-2).astype(mx.bfloat16)


def _e2m1(codes: mx.array) -> mx.array:
    """float32 ``[..., 2 n]`` of bytes ``[..., n]``: two values each, the lower four bits first."""
    return mx.array(_E2M1)[mx.stack([codes & 15, codes >> 4], axis=-1).flatten(-2)]


def unpacked(tensors: Mapping[str, TensorInfo], quantization: dict | None) -> dict[str, TensorInfo | PackedTensor]:
    """The tensors of a checkpoint by the names that they have unpacked.

    Args:
        tensors: As stored.
        quantization: ``quantization_config`` of config.json, or ``None``.

    Raises:
        ValueError: If a tensor is quantized in another way, or codes and scales do not belong together.
    """
    if quantization is None:
        return dict(tensors)
    method = quantization.get("quant_method")
    if method == "mxfp4":
        return _without_mxfp4(tensors)
    block = quantization.get("weight_block_size")
    sizes = block if isinstance(block, list) and all(is_whole(n) and 0 < n < 1 << 16 for n in block) else []
    if method == "fp8" and len(sizes) == 2:
        return _without_fp8(tensors, (sizes[0], sizes[1]))
    if isinstance(method, str) and method in _NVFP4_NAMES:
        return _without_nvfp4(tensors, method)
    raise ValueError(
        f"it is already quantized (quant_method {method!r}); fp8 with weight_block_size, mxfp4 and nvfp4 are read, of "
        "others convert the original fp16, bf16 or fp32 checkpoint"
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
        _check_alone(f"{stem}.weight", name, tensors)
        are_bytes = scales is not None and info.dtype == scales.dtype == "U8"
        if scales is None or not are_bytes or not scales.shape or info.shape != (*scales.shape, 16):
            raise ValueError(
                f"{name} is {_told(info)} and its {stem}_scales {_told(scales)}; mxfp4 has U8 blocks of 16 bytes and "
                "one U8 scale for each"
            )
        result[f"{stem}.weight"] = Mxfp4Tensor(info, scales)
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
        if len(info.shape) < 2:
            raise ValueError(f"{name} is {_told(info)}; weight_block_size is of matrices")
        wanted = (*info.shape[:-2], *(-(-n // size) for n, size in zip(info.shape[-2:], block)))
        if scales is None or scales.dtype not in FLOATS or scales.shape != wanted:
            raise ValueError(
                f"{name} is {_told(info)} and its {name}{FP8_SCALE} {_told(scales)}; with weight_block_size "
                f"{list(block)} it must be floating point of shape {list(wanted)}"
            )
        result[name] = Fp8Tensor(info, scales, block)
    return result


def _without_nvfp4(tensors: Mapping[str, TensorInfo], method: str) -> dict[str, TensorInfo | PackedTensor]:
    codes_name, whole_name = _NVFP4_NAMES[method]
    result: dict[str, TensorInfo | PackedTensor] = {}
    for name, info in tensors.items():
        stem, _, suffix = name.rpartition(".")
        codes = tensors.get(f"{stem}.{codes_name}")
        of_codes = codes is not None and codes.dtype == "U8"
        if suffix == codes_name and of_codes:
            _check_alone(f"{stem}.weight", name, tensors)
            result[f"{stem}.weight"] = _nvfp4(stem, tensors, method)
        elif of_codes and suffix == "pre_quant_scale":
            raise ValueError(f"{name}: nvfp4 with scaled inputs (AWQ) is not read; convert the original checkpoint")
        elif (of_codes and suffix in ("weight_scale", whole_name)) or _scales_activations(name, info):
            continue
        elif info.dtype in _PLAIN and suffix not in ("weight_packed", "weight_scale"):
            result[name] = info
        else:
            raise ValueError(
                f"{name} is {_told(info)}; of what quant_method {method!r} makes only nvfp4 is read: convert the "
                "original fp16, bf16 or fp32 checkpoint"
            )
    return result


def _scales_activations(name: str, info: TensorInfo) -> bool:
    return bool(_ACTIVATION_SCALES.search(name)) and math.prod(info.shape) == 1


def _nvfp4(stem: str, tensors: Mapping[str, TensorInfo], method: str) -> Nvfp4Tensor:
    codes_name, whole_suffix = _NVFP4_NAMES[method]
    name, scales_name, whole_name = (f"{stem}.{part}" for part in (codes_name, "weight_scale", whole_suffix))
    codes, scales, whole = tensors[name], tensors.get(scales_name), tensors.get(whole_name)
    groups, rest = divmod(2 * codes.shape[-1] if codes.shape else 1, _NVFP4_GROUP)
    if scales is None or scales.dtype != "F8_E4M3" or rest or scales.shape != (*codes.shape[:-1], groups):
        raise ValueError(
            f"{name} is {_told(codes)} and its {scales_name} {_told(scales)}; nvfp4 has a scale of F8_E4M3 for each "
            f"{_NVFP4_GROUP} values"
        )
    if whole is None or whole.dtype != "F32" or math.prod(whole.shape) != 1:
        raise ValueError(f"{name} is nvfp4 and its {whole_name} {_told(whole)}; one value of F32 is wanted")
    return Nvfp4Tensor(codes, scales, whole, divides=method == "compressed-tensors")


def _check_alone(name: str, codes: str, tensors: Mapping[str, TensorInfo]) -> None:
    """Raise ValueError if a checkpoint holds values under the name of what its codes are unpacked to."""
    if name != codes and name in tensors:
        raise ValueError(f"{name} stands beside {codes}, which holds codes of the same weight; remove one of them")


def _told(info: TensorInfo | None) -> str:
    return "missing" if info is None else f"{info.dtype} {list(info.shape)}"
