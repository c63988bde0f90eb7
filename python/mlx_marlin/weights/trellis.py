"""The tensors of one EXL3 linear, validated."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from .. import codec

Array = mx.array | np.ndarray


def as_array(name: str, value: Array) -> mx.array:
    """A NumPy or MLX array, or what NumPy makes one of."""
    if isinstance(value, mx.array):
        return value
    array = np.asarray(value)
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{name} must be an array of numbers, NumPy's or MLX's, got {type(value).__name__}")
    return mx.array(array)


def _scale_vector(name: str, value: Array, size: int) -> mx.array:
    """suh or svh as float16 [size]; packed int16 sign words of older checkpoints are expanded."""
    value = as_array(name, value)
    if value.dtype in (mx.int16, mx.uint16):
        if value.shape != (size // 16,):
            raise ValueError(f"{name}: packed signs must have shape [{size // 16}], got {list(value.shape)}")
        return mx.array(codec.unpack_signs(np.array(value)))
    if value.dtype != mx.float16 or value.shape != (size,):
        raise ValueError(
            f"{name} must be float16 of shape [{size}] (or packed int16 signs [{size // 16}]), "
            f"got {value.dtype} {list(value.shape)}"
        )
    return value


def logical_size(name: str, value: int | None, padded: int) -> int:
    if value is None:
        return padded
    if not isinstance(value, (int, np.integer)):
        raise ValueError(f"{name} must be an integer, got {value!r}")
    if not padded - codec.HADAMARD_SIZE < value <= padded:
        raise ValueError(
            f"{name} must lie in ({padded - codec.HADAMARD_SIZE}, {padded}], because EXL3 pads to the next "
            f"multiple of {codec.HADAMARD_SIZE}; got {value}"
        )
    return int(value)


class TrellisWeight:
    """The tensors of one EXL3 linear, validated.

    Args:
        trellis: int16, shape ``[k / 16, n / 16, 16 * K]``; k and n are multiples of 128. NumPy or MLX.
        suh: Input scales, float16 ``[k]``, or packed int16 signs ``[k / 16]``.
        svh: Output scales, float16 ``[n]``, or packed int16 signs ``[n / 16]``.
        codebook: ``"3inst"``, ``"mcg"`` or ``"mul1"``. Default: ``"3inst"``.
        bias: Optional, floating point, shape ``[n]`` or ``[out_features]``. Default: ``None``.
        in_features: Logical input size where the file is padded. Default: k.
        out_features: Logical output size where the file is padded. Default: n.

    Raises:
        ValueError: If a shape, a dtype or the codebook is not one that the format allows.
    """

    _stack: object  # what ops make of it; absent until then

    def __init__(
        self,
        trellis: Array,
        suh: Array,
        svh: Array,
        codebook: str = "3inst",
        bias: Array | None = None,
        in_features: int | None = None,
        out_features: int | None = None,
    ):
        codec.check_codebook(codebook)
        self.trellis = as_array("trellis", trellis)
        if self.trellis.dtype not in (mx.int16, mx.uint16):
            raise ValueError(f"trellis must be int16, got {self.trellis.dtype}")
        self.bits = codec.trellis_bits(self.trellis.shape)
        codec.check_bits(self.bits, codebook)
        k, n = (16 * tiles for tiles in self.trellis.shape[:2])
        if k % codec.HADAMARD_SIZE or n % codec.HADAMARD_SIZE or not k or not n:
            raise ValueError(
                f"trellis {list(self.trellis.shape)} stands for a [{k}, {n}] matrix; both sizes must be "
                f"positive multiples of {codec.HADAMARD_SIZE}"
            )
        self.codebook = codebook
        self.suh = _scale_vector("suh", suh, k)
        self.svh = _scale_vector("svh", svh, n)
        self.in_features = logical_size("in_features", in_features, k)
        self.out_features = logical_size("out_features", out_features, n)
        self.bias = None if bias is None else self._padded_bias(bias, n)
        # MLX's streams belong to threads: what is still to be computed could not be in another one.
        mx.eval(self.trellis, self.suh, self.svh, [] if self.bias is None else self.bias)

    def _padded_bias(self, bias: Array, n: int) -> mx.array:
        bias = as_array("bias", bias)
        if not mx.issubdtype(bias.dtype, mx.floating) or bias.shape not in ((n,), (self.out_features,)):
            raise ValueError(
                f"bias must be floating point of shape [{n}] or [{self.out_features}], "
                f"got {bias.dtype} {list(bias.shape)}"
            )
        return mx.pad(bias, (0, n - bias.size)) if bias.size < n else bias

    @property
    def padded_shape(self) -> tuple[int, int]:
        """``(k, n)`` as stored: multiples of 128."""
        return self.suh.size, self.svh.size

    def __getstate__(self) -> dict:
        """Without what ops keep here, which a copy makes again."""
        return {name: value for name, value in self.__dict__.items() if name != "_stack"}

    def __repr__(self) -> str:
        return (
            f"TrellisWeight(in_features={self.in_features}, out_features={self.out_features}, "
            f"bits={self.bits}, codebook={self.codebook!r}, bias={self.bias is not None})"
        )
