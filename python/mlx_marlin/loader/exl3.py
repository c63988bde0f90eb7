"""Linears of an EXL3 checkpoint, known from the headers, and read from the files.

Of quantized tensors, a range of rows reads only its bytes.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import mlx.core as mx
import numpy as np

from .. import codec, ops
from ..storage.reads import Read, read_all
from ..storage.safetensors import FLOATS, TensorInfo
from ..weights.trellis import TrellisWeight

MARKERS = {name: ops.CODEBOOK_MULTIPLIERS[name] for name in ("mcg", "mul1")}
"""What the tensors .mcg and .mul1 hold, as unsigned numbers; 3INST has no marker."""

# Suffixes that only a quantized linear has. A bias belongs to it too, but other modules also have one.
QUANTIZED_SUFFIXES = ("trellis", "suh", "svh", "su", "sv", "mcg", "mul1")


@dataclass(frozen=True)
class QuantizedLinear:
    """One EXL3 linear of a checkpoint, known from the headers.

    Attributes:
        name: Its name in the checkpoint.
        parts: Its tensors by suffix: trellis, suh or su, svh or sv, and maybe mcg, mul1, bias.
    """

    name: str
    parts: dict[str, TensorInfo]

    @property
    def bits(self) -> int | float:
        return codec.trellis_bits(self.parts["trellis"].shape)

    @property
    def codebook(self) -> str:
        """Told by which marker is present; :func:`check_markers` sees that it holds what it should."""
        return next((marker for marker in MARKERS if marker in self.parts), "3inst")

    @property
    def padded_shape(self) -> tuple[int, int]:
        """``(k, n)`` as stored: multiples of 128."""
        k_tiles, n_tiles, _ = self.parts["trellis"].shape
        return codec.TILE * k_tiles, codec.TILE * n_tiles

    def check(self) -> None:
        """Raise ValueError, naming file and tensor, unless the tensors are what the format says."""
        trellis = self.parts.get("trellis")
        if trellis is None:
            suffix, info = next(iter(self.parts.items()))
            raise ValueError(f"{info.file}: {self.name}.{suffix} is there, but {self.name}.trellis is missing")
        where = f"{trellis.file}: {self.name}"
        if "scale" in self.parts:
            raise ValueError(
                f"{where}.scale belongs to an early form of EXL3 that is not supported; convert the model again"
            )
        if "mcg" in self.parts and "mul1" in self.parts:
            raise ValueError(f"{where} has both .mcg and .mul1; a linear has one codebook")
        if trellis.dtype != "I16":
            raise ValueError(f"{where}.trellis must be I16, got {trellis.dtype}")
        try:
            codec.trellis_bits(trellis.shape)
        except ValueError as error:
            raise ValueError(f"{where}.trellis: {error}") from None
        self._check_half_rate(where)
        k, n = self.padded_shape
        if not k or not n or k % codec.HADAMARD_SIZE or n % codec.HADAMARD_SIZE:
            raise ValueError(
                f"{where}.trellis {list(trellis.shape)} stands for a [{k}, {n}] matrix; both sizes must be positive "
                f"multiples of {codec.HADAMARD_SIZE}"
            )
        self._check_scales(where, ("suh", "su"), k)
        self._check_scales(where, ("svh", "sv"), n)
        for suffix in MARKERS:
            if suffix in self.parts and (self.parts[suffix].dtype, self.parts[suffix].shape) != ("I32", ()):
                part = self.parts[suffix]
                raise ValueError(
                    f"{where}.{suffix} must be I32 without dimensions, got {part.dtype} {list(part.shape)}"
                )
        bias = self.parts.get("bias")
        if bias is not None and (bias.dtype not in FLOATS or bias.shape != (n,)):
            raise ValueError(f"{where}.bias must be floating point of shape [{n}], got {bias.dtype} {list(bias.shape)}")

    def _check_half_rate(self, where: str) -> None:
        if codec.is_half_rate(self.bits) and self.codebook != "mul1":
            marker = "has .mcg" if "mcg" in self.parts else "has no .mul1"
            raise ValueError(
                f"{where}.trellis holds {self.bits} bits per weight, which exist with the codebook mul1 only, but the "
                f"linear {marker}, so that its codebook is {self.codebook}; ExLlamaV3 writes half rates since 1.5.1, "
                "always with .mul1: download the file again, or convert the model again with mul1"
            )

    def _check_scales(self, where: str, suffixes: tuple[str, str], size: int) -> None:
        full, packed = suffixes
        wanted = {full: ("F16", (size,)), packed: ("I16", (size // 16,))}
        present = [suffix for suffix in suffixes if suffix in self.parts]
        if len(present) != 1:
            raise ValueError(f"{where} needs either .{full} or .{packed}, got {' and '.join(present) or 'neither'}")
        part = self.parts[present[0]]
        dtype, shape = wanted[present[0]]
        if (part.dtype, part.shape) != (dtype, shape):
            raise ValueError(f"{where}.{present[0]} must be {dtype} {list(shape)}, got {part.dtype} {list(part.shape)}")

    def load(
        self,
        rows: Sequence[int] | None = None,
        columns: Sequence[int] | None = None,
        in_features: int | None = None,
        out_features: int | None = None,
    ) -> TrellisWeight:
        """Read the weight, or some of its 128-blocks.

        Args:
            rows: Blocks of 128 inputs to keep, in this order. Default: all.
            columns: Blocks of 128 outputs to keep, in this order. Default: all.
            in_features: Logical number of inputs of the result. Default: the padded one.
            out_features: Logical number of outputs of the result. Default: the padded one.
        """
        k, n = self.padded_shape
        k = k if rows is None else codec.HADAMARD_SIZE * len(rows)
        n = n if columns is None else codec.HADAMARD_SIZE * len(columns)
        words = self.parts["trellis"].shape[2]
        trellis = ops.uninitialized((k // codec.TILE, n // codec.TILE, words), mx.int16)
        suh, svh = np.empty(k, np.float16), np.empty(n, np.float16)
        read_all(self.fill(np.array(trellis, copy=False), suh, svh, rows, columns))
        return TrellisWeight(
            trellis,
            suh,
            svh,
            self.codebook,
            bias=self.load_bias(columns),
            in_features=in_features,
            out_features=out_features,
        )

    def fill(
        self,
        trellis: np.ndarray,
        suh: np.ndarray,
        svh: np.ndarray,
        rows: Sequence[int] | None = None,
        columns: Sequence[int] | None = None,
    ) -> list[Read]:
        """Fill the arrays of a weight, but for the whole tensors among them, which the reads that are returned bring.

        Args:
            trellis: int16, contiguous, of the size of the blocks.
            suh, svh: float16, contiguous, of the size of the blocks.
            rows, columns: As for :meth:`load`.
        """
        reads = []
        if rows is None and columns is None:
            reads.append(self.parts["trellis"].into(trellis))
        else:
            trellis[...] = self._blocks(rows, columns)
        for (full, packed), values, blocks in ((("suh", "su"), suh, rows), (("svh", "sv"), svh, columns)):
            if blocks is None and full in self.parts:
                reads.append(self.parts[full].into(values))
                continue
            is_full = full in self.parts
            stored = self.parts[full].array() if is_full else codec.unpack_signs(self.parts[packed].array())
            values[...] = stored if blocks is None else _grouped(stored)[list(blocks)].reshape(-1)
        return reads

    def _blocks(self, rows: Sequence[int] | None, columns: Sequence[int] | None) -> np.ndarray:
        """128-blocks of the trellis."""
        tiles, first = codec.HADAMARD_SIZE // codec.TILE, 0
        if rows:
            first = min(rows)
            trellis = self.parts["trellis"].rows(first * tiles, (max(rows) + 1) * tiles)
        else:
            trellis = self.parts["trellis"].array()
        blocks = trellis.reshape(trellis.shape[0] // tiles, tiles, trellis.shape[1] // tiles, tiles, -1)
        blocks = blocks if rows is None else blocks[[row - first for row in rows]]
        blocks = blocks if columns is None else blocks[:, :, list(columns)]
        return blocks.reshape(blocks.shape[0] * tiles, blocks.shape[2] * tiles, -1)

    def load_bias(self, columns: Sequence[int] | None = None) -> mx.array | None:
        """The bias, padded as stored, or blocks of 128 of it."""
        if "bias" not in self.parts:
            return None
        bias = _read_floats(self.parts["bias"])
        return bias if columns is None else _grouped(bias)[mx.array(list(columns))].reshape(-1)


@dataclass(frozen=True)
class PlainLinear:
    """An expert that was left unquantized among quantized ones.

    Attributes:
        name: Its name in the checkpoint.
        parts: Its tensors by suffix: weight ``[n, k]``, and maybe bias ``[n]``.
    """

    name: str
    parts: dict[str, TensorInfo]

    @property
    def padded_shape(self) -> tuple[int, int]:
        """``(k, n)`` as its quantized neighbours have them: multiples of 128."""
        n, k = self.parts["weight"].shape
        return codec.padded(k), codec.padded(n)

    def check(self) -> None:
        """Raise ValueError, naming file and tensor, unless it is a matrix of floats with a fitting bias."""
        weight = self.parts["weight"]
        wanted = {"weight": weight.shape if len(weight.shape) == 2 else ("n", "k"), "bias": weight.shape[:1]}
        for suffix, part in self.parts.items():
            if part.dtype not in FLOATS or part.shape != wanted[suffix]:
                raise ValueError(
                    f"{part.file}: {self.name}.{suffix} must be floating point of shape {list(wanted[suffix])}, "
                    f"got {part.dtype} {list(part.shape)}"
                )

    def load(self) -> mx.array:
        """The weight, ``[n, k]``, in the dtype of the file."""
        return _read_floats(self.parts["weight"])

    def load_bias(self) -> mx.array | None:
        """The bias, ``[n]``."""
        return _read_floats(self.parts["bias"]) if "bias" in self.parts else None


def check_markers(linears: Iterable[QuantizedLinear]) -> None:
    """See that the markers of codebooks hold the codebooks' multipliers.

    Raises:
        ValueError: If one does not; the message names it.
    """
    markers: dict[Path, list[tuple[int, str, str]]] = {}
    for linear in linears:
        for suffix in MARKERS:
            if suffix in linear.parts:
                info = linear.parts[suffix]
                markers.setdefault(info.file, []).append((info.start, linear.name, suffix))
    for file, places in markers.items():
        with open(file, "rb", buffering=0) as stream:  # there are thousands, four bytes each
            for start, name, suffix in sorted(places):
                value, wanted = int.from_bytes(os.pread(stream.fileno(), 4, start), "little"), MARKERS[suffix]
                if value != wanted:
                    raise ValueError(
                        f"{file}: {name}.{suffix} holds {value:#010x}, but the codebook of this name has "
                        f"{wanted:#010x}: the file is damaged, or written for another codebook by an ExLlamaV3 later "
                        "than 1.6.5"
                    )


def _read_floats(info: TensorInfo) -> mx.array:
    values = mx.array(info.array())
    return values.view(mx.bfloat16) if info.dtype == "BF16" else values


Values = TypeVar("Values", mx.array, np.ndarray)


def _grouped(values: Values) -> Values:
    """``[blocks, 128]``."""
    return values.reshape(-1, codec.HADAMARD_SIZE)
