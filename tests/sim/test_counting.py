"""Counted kernels: operations against counts made by hand, and bytes of every buffer."""

import numpy as np
import pytest

from tests import metal_sim
from tests.metal_sim.counting import compile_counted

pytestmark = pytest.mark.skipif(metal_sim.unavailable() is not None, reason=str(metal_sim.unavailable()))

HEAD = "#include <metal_stdlib>\nusing namespace metal;\n"
DECODE = """
inline half value(uint window) {
  half2 parts = as_type<half2>(((window * 89226354u + 64248484u) & 0x8fff8fffu) ^ 0x3b603b60u);
  return parts.x + parts.y;
}
kernel void k(device const uint* codes, device const float* x, device float* y, constant int& tiles,
              uint lane [[thread_index_in_simdgroup]]) {
  float sum = 0;
  for (int t = 0; t < tiles; t++) {
    uint v = codes[t + lane];
    float xt = x[t];
    BODY
  }
  y[lane] = sum;
}
"""
# Complex operations for two weights of one word: two multiplies, and the shifts that are not free.
WINDOWS = {
    "low and high half": ("sum = fma(float(value(v & 0xffff)), xt, sum); sum += float(value(v >> 16));", 2),
    "bit field": ("sum = fma(float(value(v & 0xffff)), xt, sum); sum += float(value((v >> 5) & 0xffff));", 3),
    "shift that feeds an add": ("sum += float(value(v & 0xffff)) + float(value(((v << 3) + t) >> 16));", 2),
    "shift of 5 that feeds an add": (
        "sum += float(value(v & 0xffff)) + float(value(((v << 5) + t) >> 16));",
        3,
    ),
    "register shift": ("sum += float(value(v & 0xffff)) + float(value((v >> (lane & 7)) & 0xffff));", 4),
    "64-bit register shift": (
        "ulong p = (ulong(t) << 32) | v; sum += float(value(v & 0xffff)) + float(value(uint(p >> lane) & 0xffff));",
        5.5,
    ),
    "shift that feeds the add of a multiply-add": (
        "sum += float(value(v & 0xffff)) + float(value(((v & 0xff) * 255 + (v << 4)) >> 16));",
        3,
    ),
    "conversion": ("sum += float(value(v & 0xffff)) + float(value(v >> 16)) + float(t);", 3),
}


@pytest.mark.parametrize("name", WINDOWS)
def test_complex_operations(name):
    body, wanted = WINDOWS[name]
    library = compile_counted(HEAD + DECODE.replace("BODY", body))
    codes, x = np.arange(160, dtype=np.uint32), np.ones(5, np.float32)
    result = library.run("k", [codes, x, metal_sim.Out(32, "f4"), np.int32(5)], grid=1, threads=32)
    assert result.operations.weights == 5 * 2 * 32
    assert result.inner_loop.weights == result.operations.weights
    assert result.inner_loop.per_weight()["complex"] * 2 == wanted
    assert 2 <= library.registers["k"] <= 32


def test_the_multiply_add_is_one_operation():
    library = compile_counted(HEAD + DECODE.replace("BODY", "sum += float(value(v & 0xffff));"))
    codes, x = np.arange(96, dtype=np.uint32), np.ones(3, np.float32)
    result = library.run("k", [codes, x, metal_sim.Out(32, "f4"), np.int32(3)], grid=1, threads=32)
    counts, weights = result.inner_loop.counts, result.inner_loop.weights
    assert weights and counts["multiply"] == counts["load"] == weights
    assert counts["half"] == counts["float"] == weights  # adding the halves, and the sum
    assert counts["integer"] >= 2 * weights  # and, xor; then the loop's own


def test_half_and_library_functions_are_counted():
    body = "sum += float(fma(value(v & 0xffff), half(xt), half(0.5h))) + exp(xt);"
    library = compile_counted(HEAD + DECODE.replace("BODY", body))
    codes, x = np.arange(96, dtype=np.uint32), np.ones(3, np.float32)
    counts = library.run("k", [codes, x, metal_sim.Out(32, "f4"), np.int32(3)], grid=1, threads=32).inner_loop.counts
    assert counts["half"] == 2 * counts["multiply"] == 2 * 96  # the sum of the halves, and fma
    assert counts["special"] == 96


def test_counted_and_checked_builds_agree():
    source = HEAD + DECODE.replace("BODY", WINDOWS["low and high half"][0])
    codes, x = np.arange(160, dtype=np.uint64) * 2654435761, np.ones(5, np.float32)
    arguments = ("k", [codes.astype(np.uint32), x, metal_sim.Out(32, "f4"), np.int32(5)])
    counted = compile_counted(source).run(*arguments, grid=1, threads=32)
    checked = metal_sim.compile(source).run(*arguments, grid=1, threads=32)
    assert np.array_equal(counted[2], checked[2])


def test_bytes_barriers_and_simd_operations():
    source = HEAD + (
        "kernel void k(device const float* a, device const float* b, device float* o,"
        " uint i [[thread_position_in_grid]], uint l [[thread_index_in_threadgroup]]) {\n"
        "  threadgroup float s[64];\n  s[l] = a[i];\n  threadgroup_barrier(mem_flags::mem_threadgroup);\n"
        "  float v = s[63 - l] + b[l & 7];\n  v = simd_sum(v) + simd_shuffle_xor(v, 1);\n"
        "  if (l < 32) o[i] = v;\n}\n"
    )
    a, b = np.ones(192, np.float32), np.ones(16, np.float32)
    buffers = [a, b, metal_sim.Out(192, "f4")]
    result = metal_sim.compile(source).run("k", buffers, grid=3, threads=64, count=True)
    assert (result.traffic[0].read, result.traffic[0].read_distinct) == (768, 768)
    shared = result.traffic[1]
    assert (shared.read, shared.read_per_group, shared.read_distinct) == (768, 96, 32)
    assert (result.traffic[2].written, result.traffic[2].written_distinct) == (384, 384)
    assert result.stats["barriers"] == 3
    assert result.stats["simd"] == {"sum": 6, "shuffle_xor": 6}
    assert result.stats["threadgroup_bytes"] == 256


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_share_the_threadgroups(monkeypatch, workers):
    """Without counting, as many processes as asked for; the result does not depend on them."""
    library = metal_sim.compile(HEAD + "kernel void k(device int* y, uint i [[thread_position_in_grid]]) { y[i] = i; }")
    used = []
    execute = library._execute

    def spy(name, binding, sizes, settings):
        used.append((settings[5], settings[7]))
        return execute(name, binding, sizes, settings)

    monkeypatch.setattr(library, "_execute", spy)
    result = library.run("k", [metal_sim.Out(640, "i4")], grid=10, threads=64, workers=workers)
    assert np.array_equal(result[0], np.arange(640))
    assert used == [(workers, 0)]
