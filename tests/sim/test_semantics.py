"""Arithmetic and SIMD semantics, checked against numpy models written here."""

import numpy as np
import pytest

from tests import metal_sim

pytestmark = pytest.mark.skipif(metal_sim.unavailable() is not None, reason=str(metal_sim.unavailable()))

HEAD = "#include <metal_stdlib>\nusing namespace metal;\n"
IDX = "uint i [[thread_position_in_grid]], uint lane [[thread_index_in_simdgroup]]"
rng = np.random.default_rng(1)


def run(args, body, bufs, n, pre="", **kw):
    L = metal_sim.compile(
        HEAD + pre + f"kernel void k({args}, {IDX}) {{\n{body}\n}}\n",
        **{k: kw.pop(k) for k in ("function_constants", "defines", "fp_contract") if k in kw},
    )
    return L.run("k", bufs, grid_threads=n, threads=min(n, 128), **kw)


def bf(x):  # round to nearest even bfloat16, as float32
    u = np.asarray(x, np.float32).view(np.uint32).astype(np.uint64)
    return ((u + 0x7FFF + ((u >> 16) & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)


def test_half_rounds_every_operation():
    a, b, c = (rng.standard_normal(4096).astype(np.float16) for _ in range(3))
    r = run(
        "device const half* a, device const half* b, device const half* c, device half* o, device half* "
        "p, device half4* q",
        "half t = a[i] * b[i] + c[i]; o[i] = t; p[i] = fma(a[i], b[i], c[i]); if (i < 1024) { device "
        "const half4* A = (device const half4*)a; q[i] = A[i] * A[i] - A[i] / 3.0h; }",
        [a, b, c, metal_sim.Out(4096, "f2"), metal_sim.Out(4096, "f2"), metal_sim.Out((1024, 4), "f2")],
        4096,
    )
    assert np.array_equal(r[3], a * b + c)  # numpy rounds per operation
    exact = a.astype(np.float64) * b.astype(np.float64) + c.astype(np.float64)
    assert np.array_equal(r[4], exact.astype(np.float16))
    assert np.array_equal(r[5].ravel(), a * a - a / np.float16(3))


def test_bfloat_rounds_every_operation():
    a, b, c = (bf(rng.standard_normal(4096)) for _ in range(3))
    u = lambda x: (x.view(np.uint32) >> 16).astype(np.uint16)
    r = run(
        "device const bfloat* a, device const bfloat* b, device const bfloat* c, device bfloat* o",
        "o[i] = a[i] * b[i] + c[i];",
        [u(a), u(b), u(c), metal_sim.Out(4096, "u2")],
        4096,
    )
    assert np.array_equal(r[3], u(bf(bf(a * b) + c)))


def test_contraction_and_literals():
    a, b, c = (rng.standard_normal(512).astype(np.float32) for _ in range(3))
    args, body = (
        "device const float* a, device const float* b, device const float* c, device float* o",
        "o[i] = a[i] * b[i] + c[i] * 0.1;",
    )
    off = run(args, body, [a, b, c, metal_sim.Out(512, "f4")], 512)[3]
    on = run(args, body, [a, b, c, metal_sim.Out(512, "f4")], 512, fp_contract="fast")[3]
    assert np.array_equal(off, a * b + c * np.float32(0.1)) and not np.array_equal(on, off)


def test_simd_functions():
    x = rng.integers(-50, 50, 64).astype(np.int32)
    X = x.reshape(2, 32)
    body = """int v = x[i]; int r = 0; uint j = 0; device int* p = o + i * 24;
    p[j++] = simd_sum(v); p[j++] = simd_max(v); p[j++] = simd_min(v); p[j++] = simd_xor(v);
    p[j++] = simd_prefix_inclusive_sum(v); p[j++] = simd_prefix_exclusive_sum(v);
    p[j++] = simd_shuffle(v, (lane * 7) & 31); p[j++] = simd_shuffle_xor(v, 5);
    p[j++] = simd_shuffle_up(v, 3); p[j++] = simd_shuffle_down(v, 3); p[j++] = simd_broadcast(v, 9);
    p[j++] = simd_broadcast_first(v);
    p[j++] = simd_shuffle_rotate_up(v, 3); p[j++] = simd_shuffle_rotate_down(v, 3);
    p[j++] = simd_shuffle_and_fill_up(v, 77, 2); p[j++] = simd_shuffle_and_fill_down(v, 77, 2);
    p[j++] = simd_all(v > -100); p[j++] = simd_any(v > 40); p[j++] = int(ulong(simd_ballot(v > 0)));
    p[j++] = quad_sum(v); p[j++] = quad_shuffle_xor(v, 1); p[j++] = quad_broadcast(v, 2);
    float2 f = simd_sum(float2(v, 1)); p[j++] = int(f.x) + int(f.y); p[j++] = simd_is_first();"""
    for order in ("forward", "reverse", "random:5"):
        O = run("device const int* x, device int* o", body, [x, metal_sim.Out((64, 24), "i4")], 64, order=order)[
            1
        ].reshape(2, 32, 24)
        l = np.arange(32)
        Q = X.reshape(2, 8, 4)
        b = lambda v: np.repeat(np.asarray(v)[:, None], 32, 1)
        want = [
            b(X.sum(1)),
            b(X.max(1)),
            b(X.min(1)),
            b(np.bitwise_xor.reduce(X, 1)),
            X.cumsum(1),
            X.cumsum(1) - X,
            X[:, (l * 7) & 31],
            X[:, l ^ 5],
            X[:, np.where(l < 3, l, l - 3)],
            X[:, np.where(l > 28, l, (l + 3) & 31)],
            b(X[:, 9]),
            b(X[:, 0]),
            np.roll(X, 3, 1),
            np.roll(X, -3, 1),
            np.where(l < 2, 77, np.roll(X, 2, 1)),
            np.where(l > 29, 77, np.roll(X, -2, 1)),
            np.ones_like(X),
            b((X > 40).any(1)),
            b(((X > 0).astype(np.uint64) << l.astype(np.uint64)).sum(1).astype(np.uint32).view(np.int32))
            if 0
            else None,
            np.repeat(Q.sum(2), 4, 1),
            X[:, l ^ 1],
            np.repeat(Q[:, :, 2], 4, 1),
            b(X.sum(1) + 32),
            np.tile(l == 0, (2, 1)),
        ]
        for j, w in enumerate(want):
            if w is not None:
                assert np.array_equal(O[:, :, j], w), j
        assert np.array_equal(
            O[:, 0, 18].astype(np.uint32),
            [(int(sum(1 << int(k) for k in l[row > 0]))) & 0xFFFFFFFF for row in X],
        )


def test_simdgroup_matrix():
    A, B = (
        rng.standard_normal((16, 24)).astype(np.float32),
        rng.standard_normal((24, 16)).astype(np.float32),
    )
    body = """simdgroup_float8x8 a, b, c; for (uint r = 0; r < 2; r++) for (uint q = 0; q < 2;
    q++) { c = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
      for (uint k = 0; k < 3; k++) { simdgroup_load(a, A, 24, ulong2(k * 8, r * 8));
    simdgroup_load(b, Bt, 24, ulong2(k * 8, q * 8), true); simdgroup_multiply_accumulate(c, a, b, c); }
      simdgroup_store(c, C + r * 128 + q * 8, 16); } simdgroup_float8x8 d(2.0f);
    simdgroup_store(d, D, 8);"""
    r = run(
        "device const float* A, device const float* Bt, device float* C, device float* D",
        body,
        [A, np.ascontiguousarray(B.T), metal_sim.Out((16, 16), "f4"), metal_sim.Out((8, 8), "f4")],
        32,
    )
    np.testing.assert_allclose(r[2], A @ B, rtol=1e-5, atol=1e-5)
    assert np.array_equal(r[3], 2 * np.eye(8, dtype="f4"))


def test_integers_and_bits():
    x = rng.integers(0, 2**32, 128, dtype=np.uint32)
    x[:2] = [0, 2**32 - 1]
    body = (
        "uint v = x[i]; device uint* p = o + i * 8; p[0] = popcount(v); p[1] = clz(v); p[2] = ctz(v); "
        "p[3] = extract_bits(v, 5, 9); p[4] = insert_bits(v, 3u, 4, 6); p[5] = mulhi(v, v); p[6] = "
        "reverse_bits(v); p[7] = as_type<uint>(as_type<ushort2>(v).yx);"
    )
    O = run("device const uint* x, device uint* o", body, [x, metal_sim.Out((128, 8), "u4")], 128)[1]
    for v, p in zip(x.tolist(), O.tolist()):
        s = f"{v:032b}"
        assert p == [
            s.count("1"),
            32 - v.bit_length(),
            32 if v == 0 else (v & -v).bit_length() - 1,
            v >> 5 & 511,
            v & ~(63 << 4) | 3 << 4,
            v * v >> 32,
            int(s[::-1], 2),
            (v >> 16 | v << 16) & 0xFFFFFFFF,
        ]


def test_signed_extract_and_vectors():
    r = run(
        "device int* o",
        "o[0] = extract_bits(-1, 3, 4); o[1] = extract_bits(0x70, 3, 4); float4 v(1, 2, 3, 4); v.xw = "
        "v.wx; v.yz += 1; o[2] = int(v.x * 1000 + v.y * 100 + v.z * 10 + v.w); half4 h = half4(v); "
        "float4 g = (float4)h * 2; o[3] = int(g.x);"
        " packed_float3 q = float3(1, 2, 3); o[4] = sizeof(packed_float3) * 100 + sizeof(float3); o[5] = "
        "all(v > 0.0f) && any(v == 4.0f); o[6] = int(select(1.0f, 2.0f, true)); uchar4 u = "
        "as_type<uchar4>(0x04030201u); o[7] = u.z + q.y;",
        [metal_sim.Out(8, "i4")],
        1,
    )
    assert r[0].tolist() == [-1, -2, 4341, 8, 1216, 1, 2, 5]


def test_atomics_structs_and_function_constants():
    pre = (
        "struct P { uint n; float s; };\nconstant uint F [[function_constant(3)]];\nconstant uchar "
        "tab[4] = {1, 2, 3, 4};\ntemplate <typename T> METAL_FUNC T twice(const thread T* p) { return "
        "*p + *p; }\n"
    )
    body = (
        "P p = *prm; atomic_fetch_add_explicit(c, tab[i & 3], memory_order_relaxed); "
        "atomic_fetch_max_explicit(c + 1, i, memory_order_relaxed); atomic_fetch_add_explicit(f, "
        "0.5f, memory_order_relaxed); float s = p.s; o[i] = twice(&s) * F + p.n;"
    )
    r = run(
        "constant P* prm, device atomic_uint* c, device atomic<float>* f, device float* o",
        body,
        [
            np.array([(7, 1.5)], dtype=[("n", "u4"), ("s", "f4")]),
            np.zeros(2, np.uint32),
            np.zeros(1, np.float32),
            metal_sim.Out(256, "f4"),
        ],
        256,
        pre=pre,
        function_constants={3: 10},
    )
    assert r[1].tolist() == [640, 255] and r[2][0] == 128 and (r[3] == 37).all()


def test_threadgroup_histogram():
    x = rng.integers(0, 8, 512).astype(np.uint32)
    body = (
        "threadgroup atomic_uint h[8]; if (l < 8) atomic_store_explicit(&h[l], 0, "
        "memory_order_relaxed); threadgroup_barrier(mem_flags::mem_threadgroup); "
        "atomic_fetch_add_explicit(&h[x[i]], 1, memory_order_relaxed); "
        "threadgroup_barrier(mem_flags::mem_threadgroup); if (l < 8) atomic_fetch_add_explicit(o + l, "
        "atomic_load_explicit(&h[l], memory_order_relaxed), memory_order_relaxed);"
    )
    r = run(
        "device const uint* x, device atomic_uint* o, uint l [[thread_index_in_threadgroup]]",
        body,
        [x, np.zeros(8, np.uint32)],
        512,
    )
    assert np.array_equal(r[1], np.bincount(x, minlength=8))


def test_uneven_grid():
    L = metal_sim.compile(
        HEAD + "kernel void k(device uint4* o, uint2 p [[thread_position_in_grid]], uint2 t "
        "[[threads_per_threadgroup]], uint2 n [[threads_per_grid]]) { o[p.y * n.x + p.x] = uint4(p, "
        "t); }\n"
    )
    r = L.run("k", [metal_sim.Out((5, 7, 4), "u4")], grid_threads=(7, 5), threads=(4, 4))[0]
    assert r[4, 6].tolist() == [6, 4, 3, 1] and r[0, 0].tolist() == [0, 0, 4, 4]
