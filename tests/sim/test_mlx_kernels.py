"""MLX's own, unmodified kernels (from the installed wheel) against MLX's CPU results."""

import os

import mlx
import mlx.core as mx
import numpy as np
import pytest

from tests import metal_sim

pytestmark = pytest.mark.skipif(metal_sim.unavailable() is not None, reason=str(metal_sim.unavailable()))


@pytest.fixture(autouse=True)
def results_by_the_cpu():
    before = mx.default_device()
    mx.set_default_device(mx.cpu)
    yield
    mx.set_default_device(before)


INC = os.path.join(list(mlx.__path__)[0], "include")
K = "mlx/backend/metal/kernels/"
ORDERS = ["forward", "reverse", "random:7"]
rng = np.random.default_rng(0)
DT = {
    "float": (np.float32, mx.float32),
    "half": (np.float16, mx.float16),
    "bfloat16_t": (np.uint16, mx.bfloat16),
}


def lib(heads, inst, **kw):
    src = (
        "#include <metal_stdlib>\n#include <metal_simdgroup>\n" + "".join(f'#include "{K}{h}"\n' for h in heads) + "\n"
    )
    return metal_sim.compile(src, include_dirs=[INC], instantiate=inst, kernels=list(inst), **kw)


def to_np(a):  # mx array -> numpy bits
    return np.array(a.view(mx.uint16)) if a.dtype == mx.bfloat16 else np.array(a)


def to_f(a, dtype):
    return np.array(mx.array(a).view(mx.bfloat16).astype(mx.float32)) if dtype == "bfloat16_t" else a.astype(np.float32)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("T,n", [("float", 1000), ("half", 512), ("bfloat16_t", 777)])
def test_softmax(T, n, order):
    L = lib(["utils.h", "softmax.h"], {"s": f"softmax_single_row<{T}, float>", "l": f"softmax_looped<{T}, float>"})
    x = mx.array(rng.standard_normal((3, n)).astype(np.float32) * 4).astype(DT[T][1])
    want = np.array(mx.softmax(x, axis=-1, precise=True).astype(mx.float32))
    for k, th in (("s", (n // 4 + 32) // 32 * 32), ("l", 1024)):
        r = L.run(
            k,
            [to_np(x), metal_sim.Out((3, n), DT[T][0]), np.int32(n)],
            grid=3,
            threads=th,
            order=order,
            uninit=True,
        )
        np.testing.assert_allclose(
            to_f(r[1], T), want, rtol={"float": 2e-6, "half": 2e-3, "bfloat16_t": 1e-2}[T], atol=1e-7
        )


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("N", [256, 1024])
def test_hadamard(N, order):
    mr = 16
    stand_in = "METAL_FUNC void hadamard_radix_m(thread float* x) {}"  # MLX generates it for other sizes
    src = f'#include <metal_stdlib>\n{stand_in}\n#include "{K}hadamard.h"\n'
    L = metal_sim.compile(src, include_dirs=[INC], instantiate={"h": f"hadamard_n<float, {N}, {mr}, 2>"}, kernels=["h"])
    x = rng.standard_normal((5, N)).astype(np.float32)
    s = np.float32(1 / np.sqrt(N))
    r = L.run(
        "h",
        [x, metal_sim.Out((5, N), np.float32), s],
        grid_threads=(N // mr, 5, 1),
        threads=(N // mr, 1, 1),
        order=order,
    )
    np.testing.assert_allclose(r[1], np.array(mx.hadamard_transform(mx.array(x))), rtol=1e-5, atol=1e-5)


def affine(T, M, N, Kd, gs, bits, E=None):
    sh = (N, Kd) if E is None else (E, N, Kd)
    w = mx.array(rng.standard_normal(sh).astype(np.float32)).astype(DT[T][1])
    q, s, b = mx.quantize(w, group_size=gs, bits=bits)
    x = mx.array(rng.standard_normal((M, Kd)).astype(np.float32)).astype(DT[T][1])
    return q, s, b, x


QH = ["utils.h", "steel/gemm/gemm.h", "quantized_utils.h", "quantized.h"]
NOBATCH = [
    np.int32(0),
    np.zeros(1, np.int32),
    np.zeros(1, np.int64),
    np.int32(0),
    np.zeros(1, np.int32),
    np.zeros(1, np.int64),
    np.zeros(1, np.int64),
    np.zeros(1, np.int64),
]
FC = {200: True, 201: True, 202: True}
TOL = {"float": 2e-5, "half": 4e-3, "bfloat16_t": 3e-2}


@pytest.mark.parametrize(
    "T,bits,kern,N,Kd",
    [
        ("float", 4, "affine_qmv_fast", 32, 1024),
        ("half", 4, "affine_qmv_fast", 16, 512),
        ("half", 3, "affine_qmv_fast", 16, 512),
        ("float", 2, "affine_qmv", 20, 320),
        ("half", 6, "affine_qmv", 12, 192),
        ("bfloat16_t", 8, "affine_qmv", 10, 128),
    ],
)
def test_qmv(T, bits, kern, N, Kd):
    q, s, b, x = affine(T, 2, N, Kd, 64, bits)
    L = lib(QH, {"k": f"{kern}<{T}, 64, {bits}, 0>"}, function_constants=FC)
    races = (
        "threadgroup" if N % 8 else True
    )  # the last group recomputes rows of the one before: same values, but a race
    want = np.array(x.astype(mx.float32) @ mx.dequantize(q, s, b, group_size=64, bits=bits).astype(mx.float32).T)
    for order in ORDERS:
        r = L.run(
            "k",
            [
                to_np(q),
                to_np(s),
                to_np(b),
                to_np(x),
                metal_sim.Out((2, N), DT[T][0]),
                np.int32(Kd),
                np.int32(N),
                *NOBATCH,
            ],
            grid=(2, -(-N // 8), 1),
            threads=(32, 2, 1),
            order=order,
            races=races,
        )
        np.testing.assert_allclose(to_f(r[4], T), want, rtol=TOL[T], atol=TOL[T] * np.abs(want).max())


@pytest.mark.parametrize("T", ["float", "half", "bfloat16_t"])
@pytest.mark.parametrize("M,N,Kd", [(32, 64, 128), (40, 96, 192)])
def test_qmm_t(T, M, N, Kd):
    q, s, b, x = affine(T, M, N, Kd, 64, 4)
    al = N % 32 == 0
    L = lib(QH, {"k": f"affine_qmm_t<{T}, 64, 4, {str(al).lower()}, 0>"}, function_constants=FC)
    want = np.array(x.astype(mx.float32) @ mx.dequantize(q, s, b, group_size=64, bits=4).astype(mx.float32).T)
    for order in ORDERS:
        r = L.run(
            "k",
            [
                to_np(q),
                to_np(s),
                to_np(b),
                to_np(x),
                metal_sim.Out((M, N), DT[T][0]),
                np.int32(Kd),
                np.int32(N),
                np.int32(M),
                *NOBATCH,
            ],
            grid=(-(-N // 32), -(-M // 32), 1),
            threads=(32, 2, 2),
            order=order,
        )
        np.testing.assert_allclose(to_f(r[4], T), want, rtol=TOL[T], atol=TOL[T] * np.abs(want).max())


def test_gather_qmv():
    E, N, Kd, M = 4, 32, 512, 6
    q, s, b, x = affine("half", M, N, Kd, 64, 4, E)
    L = lib(QH, {"k": "affine_gather_qmv_fast<half, 64, 4>"}, function_constants=FC)
    P = {p.name: p.index for p in L.kernels["k"].parameters if p.kind == "buffer"}
    rhs = np.array([3, 0, 2, 2, 1, 3], np.uint32)
    lhs = np.arange(M, dtype=np.uint32)
    v = dict(
        w=to_np(q),
        scales=to_np(s),
        biases=to_np(b),
        x=to_np(x),
        lhs_indices=lhs,
        rhs_indices=rhs,
        y=metal_sim.Out((M, N), np.float16),
        in_vec_size=np.int32(Kd),
        out_vec_size=np.int32(N),
        x_batch_ndims=np.int32(1),
        x_shape=np.array([M, 1, Kd], np.int32),
        x_strides=np.array([Kd, Kd, 1], np.int64),
        w_batch_ndims=np.int32(1),
        w_shape=np.array([E], np.int32),
        w_strides=np.array([q.shape[1] * q.shape[2]], np.int64),
        s_strides=np.array([s.shape[1] * s.shape[2]], np.int64),
        b_strides=np.array([s.shape[1] * s.shape[2]], np.int64),
        batch_ndims=np.int32(1),
        batch_shape=np.array([M], np.int32),
        lhs_strides=np.array([1], np.int64),
        rhs_strides=np.array([1], np.int64),
    )
    r = L.run("k", {P[k]: v[k] for k in P}, grid=(1, N // 8, M), threads=(32, 2, 1))
    want = np.array(
        mx.gather_qmm(
            x[:, None, :].astype(mx.float32),
            q,
            s.astype(mx.float32),
            b.astype(mx.float32),
            rhs_indices=mx.array(rhs),
            transpose=True,
            group_size=64,
            bits=4,
        )
    )[:, 0]
    np.testing.assert_allclose(r[P["y"]].astype(np.float32), want, rtol=4e-3, atol=4e-3 * np.abs(want).max())


@pytest.mark.parametrize("T", ["float", "half"])
@pytest.mark.parametrize("M,N,Kd", [(64, 64, 64), (70, 45, 37)])
def test_steel_gemm(T, M, N, Kd):
    BM = BN = 64
    BK = 16
    fc = {10: False, 100: False, 110: False, 200: M % BM == 0, 201: N % BN == 0, 202: Kd % BK == 0}
    L = lib(
        ["utils.h", "steel/gemm/gemm.h", "steel/gemm/kernels/steel_gemm_fused.h"],
        {"k": f"gemm<{T}, {BM}, {BN}, {BK}, 2, 2, false, false, float>"},
        function_constants=fc,
    )
    tn, tm = -(-N // BN), -(-M // BM)
    a = rng.standard_normal((M, Kd)).astype(DT[T][0])
    b = rng.standard_normal((Kd, N)).astype(DT[T][0])
    raw = np.zeros(
        1,
        dtype=np.dtype(
            [
                ("M", "i4"),
                ("N", "i4"),
                ("K", "i4"),
                ("lda", "i4"),
                ("ldb", "i4"),
                ("ldd", "i4"),
                ("tn", "i4"),
                ("tm", "i4"),
                ("bsa", "i8"),
                ("bsb", "i8"),
                ("bsd", "i8"),
                ("sw", "i4"),
                ("gk", "i4"),
                ("nd", "i4"),
            ],
            align=True,
        ),
    )
    raw[0] = (M, N, Kd, Kd, N, N, tn, tm, 0, 0, 0, 0, Kd // BK, 0)
    for order in ORDERS:
        r = L.run(
            "k",
            {
                0: a,
                1: b,
                2: None,
                3: metal_sim.Out((M, N), DT[T][0]),
                4: raw,
                5: np.zeros(64, np.uint8),
                6: None,
                7: None,
            },
            grid=(tn, tm, 1),
            threads=(32, 2, 2),
            order=order,
        )
        np.testing.assert_allclose(
            r[3].astype(np.float32),
            a.astype(np.float32) @ b.astype(np.float32),
            rtol=TOL[T],
            atol=TOL[T] * 20,
        )
