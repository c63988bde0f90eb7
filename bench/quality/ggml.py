"""ggml's formats: weights quantized and dequantized by the library in the wheel of xllamacpp.

ggml's K and IQ formats hold blocks of 256 weights of one row. Rows of 576 are not multiples of that: llama.cpp stores
them as IQ4_NL instead, at 4.5 bits. Here blocks run on from row to row, which no kernel of llama.cpp reads, so that the
formats are seen at their own bits and without padding.
"""

from __future__ import annotations

import ctypes
import math
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from bench.cpu.peers import ggml_library
from mlx_marlin.quantize.calibration import calibration_tokens
from mlx_marlin.quantize.layered import LayeredModel
from mlx_marlin.quantize.source import Source
from mlx_marlin.quantize.taps import replace_module

# ggml_type in ggml.h.
TYPES = {
    "Q2_K": 10,
    "Q3_K": 11,
    "IQ2_XS": 17,
    "IQ3_XXS": 18,
    "IQ4_NL": 20,
    "IQ3_S": 21,
    "IQ2_S": 22,
    "IQ4_XS": 23,
}
FALLBACK = "IQ4_NL"
"""What llama.cpp stores rows as that the other types' blocks do not fit into."""


class _Squares:
    """Stands in for an ``nn.Linear``: adds up the squares of its inputs. It multiplies in NumPy, whose BLAS is fast."""

    def __init__(self, linear: nn.Linear):
        self.weight = np.ascontiguousarray(np.array(linear.weight).T)
        self.bias = np.array(linear.bias) if "bias" in linear else 0
        self.total, self.rows = np.zeros(len(self.weight)), 0

    def __call__(self, x: mx.array) -> mx.array:
        rows = np.array(x.astype(mx.float32)).reshape(-1, x.shape[-1])
        self.total += np.square(rows).sum(axis=0, dtype=np.float64)
        self.rows += len(rows)
        return mx.array((rows @ self.weight + self.bias).reshape(*x.shape[:-1], -1))


def importance(model: Path) -> dict[str, np.ndarray]:
    """The importance matrix of llama.cpp: means of each linear's squared inputs over the calibration text.

    Args:
        model: Directory of a checkpoint without experts.

    Returns:
        float32 ``[in]`` by the linear's name.
    """
    layered = LayeredModel(Source(model), calibration_tokens(model, None), 4)
    hidden, found = layered.embeddings(), {}
    for index, path in enumerate(layered.paths):
        layered.load(index)
        layer, linears = layered.layers[index], layered.names.linears(path)
        modules = dict(layer.named_modules())
        taps = {inside: _Squares(modules[inside]) for inside in linears}
        for inside, tap in taps.items():
            replace_module(layer, inside, tap)
        hidden = [layered.output(index, h, batch) for batch, h in enumerate(hidden)]
        for inside, tap in taps.items():
            found[linears[inside]] = (tap.total / tap.rows).astype(np.float32)
            replace_module(layer, inside, modules[inside])
        layered.unload(index)
    return found


class Ggml:
    """ggml's quantizers.

    Raises:
        ModuleNotFoundError: If xllamacpp is not installed.
    """

    def __init__(self):
        self._g = ggml_library()
        pointer, i64, i32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
        self._g.ggml_quantize_chunk.restype = ctypes.c_size_t
        self._g.ggml_quantize_chunk.argtypes = [i32, pointer, pointer, i64, i64, i64, pointer]

    def block(self, kind: str) -> tuple[int, int]:
        """Weights and bytes of a block.

        Raises:
            RuntimeError: If the library's type of that number is another one.
        """
        traits = self._g.ggml_get_type_traits(TYPES[kind]).contents
        if traits.type_name.decode().lower() != kind.lower():
            raise RuntimeError(f"type {TYPES[kind]} of this ggml is {traits.type_name.decode()}; {kind} was expected")
        return traits.blck_size, traits.type_size

    def bits(self, kind: str) -> float:
        """Bits per weight, scales included."""
        weights, size = self.block(kind)
        return 8 * size / weights

    def type_for(self, kind: str, inputs: int) -> str:
        """What llama.cpp stores rows of so many inputs as, asked for a type."""
        return FALLBACK if inputs % self.block(kind)[0] else kind

    def restored(self, weight: np.ndarray, kind: str, importance: np.ndarray) -> np.ndarray:
        """A weight after quantizing and dequantizing.

        Args:
            weight: float32 ``[in, out]``.
            kind: One of :data:`TYPES`.
            importance: float32 ``[in]``.

        Returns:
            float32 ``[in, out]``.

        Raises:
            ValueError: If the weights are no whole number of blocks.
        """
        inputs, outputs = weight.shape
        block, size = self.block(kind)
        together = block // math.gcd(block, inputs)  # rows that are a whole number of blocks
        if outputs % together:
            raise ValueError(f"{outputs} rows of {inputs} are no whole number of blocks of {block} of {kind}")
        rows, length = outputs // together, inputs * together
        source = np.ascontiguousarray(weight.T)
        packed = np.empty(rows * length // block * size, np.uint8)
        weights = np.tile(importance, together)
        self._g.ggml_quantize_chunk(
            TYPES[kind], source.ctypes.data, packed.ctypes.data, 0, rows, length, weights.ctypes.data
        )
        found = np.empty((outputs, inputs), np.float32)
        to_float = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)(
            self._g.ggml_get_type_traits(TYPES[kind]).contents.to_float
        )
        to_float(packed.ctypes.data, found.ctypes.data, found.size)
        return found.T
