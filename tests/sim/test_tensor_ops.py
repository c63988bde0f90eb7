"""matmul2d of MetalPerformancePrimitives in the simulator: MLX's kernels on it against NumPy; what is refused."""

from __future__ import annotations

import re
from pathlib import Path

import mlx
import mlx.core as mx
import numpy as np
import pytest

from tests import metal_sim

pytestmark = pytest.mark.skipif(metal_sim.unavailable() is not None, reason=str(metal_sim.unavailable()))

INCLUDE = Path(list(mlx.__path__)[0]) / "include"
KERNELS = "mlx/backend/metal/kernels"
HEADER = "MetalPerformancePrimitives/MetalPerformancePrimitives.h"
needs_mlx = pytest.mark.skipif(
    not (INCLUDE / KERNELS / "steel/gemm/kernels/steel_gemm_fused_nax.h").exists(),
    reason="this wheel of MLX has no sources of its kernels for the accelerators",
)
# GEMMParams of MLX.
PARAMS = np.dtype(
    [(name, "i4") for name in ("M", "N", "K", "lda", "ldb", "ldd", "tiles_n", "tiles_m")]
    + [(name, "i8") for name in ("batch_a", "batch_b", "batch_d")]
    + [(name, "i4") for name in ("swizzle", "iterations", "batch_ndim")],
    align=True,
)
TYPES = {"half": (np.float16, 2e-3), "float": (np.float32, 2e-3)}  # floats are rounded to the 11 bits of TF32


def mlx_gemm(type_name: str, rows: int, columns: int, depth: int, transposed: tuple[bool, bool], order: str):
    """A product by MLX's kernel, and the same by NumPy."""
    block = 64
    constants = {10: False, 100: False, 110: False}
    constants |= {200: rows % block == 0, 201: columns % block == 0, 202: depth % block == 0}
    flags = ", ".join(str(t).lower() for t in transposed)
    heads = ("utils.h", "steel/gemm/gemm_nax.h", "steel/gemm/kernels/steel_gemm_fused_nax.h")
    source = "#include <metal_stdlib>\n" + "".join(f'#include "{KERNELS}/{head}"\n' for head in heads)
    library = metal_sim.compile(
        source,
        include_dirs=[str(INCLUDE)],
        instantiate={"gemm": f"gemm<{type_name}, 64, 64, 64, 2, 2, {flags}, float>"},
        kernels=["gemm"],
        function_constants=constants,
        metal_version=400,
    )
    dtype, _ = TYPES[type_name]
    rng = np.random.default_rng(rows)
    a, b = (rng.standard_normal(shape).astype(dtype) for shape in ((rows, depth), (depth, columns)))
    stored = [np.ascontiguousarray(m.T) if t else m for m, t in zip((a, b), transposed)]
    tiles = -(-columns // block), -(-rows // block)
    params = np.zeros(1, PARAMS)
    params[0] = (rows, columns, depth, *(m.shape[1] for m in stored), columns, *tiles, 0, 0, 0, 0, depth // block, 0)
    buffers = {0: stored[0], 1: stored[1], 2: None, 4: params, 5: None, 6: None, 7: None}
    buffers[3] = metal_sim.Out((rows, columns), dtype)
    result = library.run("gemm", buffers, grid=(*tiles, 1), threads=(32, 2, 2), order=order)
    return result[3].astype(np.float64), a.astype(np.float64) @ b.astype(np.float64)


@needs_mlx
@pytest.mark.parametrize("type_name", TYPES)
@pytest.mark.parametrize("transposed", [(False, False), (False, True), (True, False)], ids=str)
@pytest.mark.parametrize("size", [(64, 64, 64), (128, 64, 100)], ids=str)
def test_mlx_products(type_name, transposed, size):
    """Lane layout, transposition and accumulation are those that MLX's kernel counts on."""
    order = ("forward", "reverse", "random:7")[sum(size) % 3]
    found, expected = mlx_gemm(type_name, *size, transposed, order)
    limit = TYPES[type_name][1] * np.abs(expected).max()
    np.testing.assert_allclose(found, expected, rtol=0, atol=limit)


@needs_mlx
@pytest.mark.parametrize("bits", [4, 3])
def test_mlx_quantized_products(bits):
    """MLX's affine layer on the accelerators: weights go from threadgroup memory to the transposed operand."""
    rows, columns, depth = 128, 64, 192
    heads = ("utils.h", "steel/gemm/nax.h", "steel/gemm/gemm_nax.h", "quantized_utils.h", "quantized_nax.h")
    library = metal_sim.compile(
        "#include <metal_stdlib>\n" + "".join(f'#include "{KERNELS}/{head}"\n' for head in heads),
        include_dirs=[str(INCLUDE)],
        instantiate={"product": f"affine_qmm_t_nax<half, 64, {bits}, true, false>"},
        kernels=["product"],
        metal_version=400,
    )
    rng = np.random.default_rng(bits)
    with mx.stream(mx.cpu):
        dense = mx.array(rng.standard_normal((columns, depth)).astype(np.float16))
        quantized = mx.quantize(dense, group_size=64, bits=bits)
        weights = np.array(mx.dequantize(*quantized, group_size=64, bits=bits)).astype(np.float64)
    x = rng.standard_normal((rows, depth)).astype(np.float16)
    sizes = map(np.int32, (depth, columns, rows))
    ints, longs = np.zeros(1, np.int32), np.zeros(1, np.int64)
    batches = [np.int32(0), ints, longs, np.int32(0), ints, longs, longs, longs]
    arrays = [*map(np.array, quantized), x, metal_sim.Out((rows, columns), np.float16), *sizes, *batches]
    found = library.run("product", arrays, grid=(columns // 64, rows // 64, 1), threads=(32, 2, 2))[4]
    expected = x.astype(np.float64) @ weights.T
    np.testing.assert_allclose(found.astype(np.float64), expected, rtol=0, atol=2e-3 * np.abs(expected).max())


SETUP = """constexpr auto desc = mpp::tensor_ops::matmul2d_descriptor(16, 32, 16, false, true, false, MODE);
  mpp::tensor_ops::matmul2d<desc, metal::execution_simdgroup> op;
  auto a = op.template get_left_input_cooperative_tensor<half, half, float>();
  auto b = op.template get_right_input_cooperative_tensor<half, half, float>();
  auto c = op.template get_destination_cooperative_tensor<metal::remove_addrspace_t<decltype(a)>,
      metal::remove_addrspace_t<decltype(b)>, float>();"""
BODY = """for (ushort i = 0; i < 8; i++) { a[i] = half(lane); }
  for (ushort i = 0; i < 16; i++) { b[i] = half(1); c[i] = 100.0f; }
  op.run(a, b, c);
  out[lane] = c[0];"""


def kernel(setup: str = SETUP, body: str = BODY, mode: str = "multiply", header: bool = True) -> str:
    mode = f"mpp::tensor_ops::matmul2d_descriptor::mode::{mode}"
    include = f"#include <{HEADER}>\n" if header else ""
    return (
        f"#include <metal_stdlib>\n{include}using namespace metal;\n"
        "kernel void k(device float* out [[buffer(0)]], uint lane [[thread_index_in_simdgroup]]) {\n"
        f"  {setup.replace('MODE', mode)}\n  {body}\n}}\n"
    )


def run(source: str, **options) -> np.ndarray:
    library = metal_sim.compile(source, metal_version=400, **options)
    return library.run("k", [metal_sim.Out((32,), np.float32)], grid=1, threads=32)[0]


def test_modes():
    """One overwrites what the destination held, the other adds to it. A lane's first row is that of four lanes."""
    lanes = np.arange(32)
    row = (lanes // 4 & 4) + (lanes // 2 & 3)
    sums = np.array([4 * sum(lane for lane in lanes if row[lane] == r) for r in row], np.float32)
    np.testing.assert_array_equal(run(kernel()), sums)
    np.testing.assert_array_equal(run(kernel(mode="multiply_accumulate")), sums + 100)


REFUSED = {
    "without its header": (kernel(header=False), "mpp"),
    "a type with an address space": (
        kernel(SETUP.replace("metal::remove_addrspace_t<decltype(a)>", "decltype(a)")),
        "remove_addrspace_t",
    ),
    "neither M nor N a multiple of 16": (kernel(SETUP.replace("16, 32, 16", "8, 40, 16")), "multiple of 16"),
    "an unknown layout": (kernel(SETUP.replace("16, 32, 16", "32, 16, 16")), "layouts"),
    "types that it does not have": (
        kernel(SETUP.replace("half, half, float", "half, char, float")),
        "no such types|candidate",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name):
    source, message = REFUSED[name]
    with pytest.raises(metal_sim.CompileError, match=message):
        metal_sim.compile(source, metal_version=400)


def test_it_needs_metal_4():
    with pytest.raises(metal_sim.CompileError, match="needs Metal 4"):
        metal_sim.compile(kernel(), metal_version=320)


def test_an_element_that_there_is_not():
    with pytest.raises(metal_sim.KernelError, match=re.compile("index", re.IGNORECASE)):
        run(kernel(body=BODY.replace("b[i] = half(1);", "a[i] = half(1);")))


def test_lanes_that_are_not_there():
    with pytest.raises(metal_sim.KernelError, match="all 32 lanes|divergen|reach"):
        run(kernel(body=BODY.replace("op.run(a, b, c);", "if (lane < 16) { op.run(a, b, c); }")))
