"""Remove one barrier at a time from MLX's kernels: the race detector must notice each one."""

import os
import re

import numpy as np
import pytest

from tests import metal_sim
from tests.sim.test_mlx_kernels import FC, INC, NOBATCH, QH, K, affine, rng, to_np

pytestmark = pytest.mark.skipif(metal_sim.unavailable() is not None, reason=str(metal_sim.unavailable()))

# The barrier before storing results orders nothing that is in threadgroup memory.
ALLOWED = {"quantized.h": 1}
BAR = re.compile(r"threadgroup_barrier\(mem_flags::mem_threadgroup\);")


def mutants(header, start, stop):
    src = open(os.path.join(INC, K, header)).read()
    a = src.index(start)
    b = src.index(stop, a + len(start)) if stop else len(src)
    return [src[: a + m.start()] + ";" + src[a + m.end() :] for m in BAR.finditer(src[a:b])]


def overlay(tmp_path, header, text):
    p = tmp_path / K / header
    p.parent.mkdir(parents=True)
    p.write_text(text)
    return [str(tmp_path), INC]


def hadamard(inc):
    L = metal_sim.compile(
        f'#include <metal_stdlib>\nMETAL_FUNC void hadamard_radix_m(thread float* x) {{}}\n#include "{K}hadamard.h"\n',
        include_dirs=inc,
        instantiate={"h": "hadamard_n<float, 512, 16, 2>"},
        kernels=["h"],
    )
    L.run(
        "h",
        [rng.standard_normal((1, 512)).astype("f4"), metal_sim.Out((1, 512), "f4"), np.float32(1)],
        grid_threads=(32, 1, 1),
        threads=(32, 1, 1),
    )


def softmax(inc):
    L = metal_sim.compile(
        f'#include <metal_stdlib>\n#include "{K}utils.h"\n#include "{K}softmax.h"\n',
        include_dirs=inc,
        instantiate={"s": "softmax_single_row<float, float>"},
        kernels=["s"],
    )
    L.run(
        "s",
        [rng.standard_normal((2, 900)).astype("f4"), metal_sim.Out((2, 900), "f4"), np.int32(900)],
        grid=2,
        threads=256,
    )


def qmm(inc):  # the shapes reach all four combinations of full and partial tiles
    for M, N in ((32, 64), (40, 64), (32, 80), (8, 16)):
        q, s, b, x = affine("half", M, N, 128, 64, 4)
        L = metal_sim.compile(
            "#include <metal_stdlib>\n#include <metal_simdgroup>\n" + "".join(f'#include "{K}{h}"\n' for h in QH),
            include_dirs=inc,
            instantiate={
                "t": "affine_qmm_t<half, 64, 4, true, 0>",
                "f": "affine_qmm_t<half, 64, 4, false, 0>",
            },
            kernels=["t", "f"],
            function_constants=FC,
        )
        L.run(
            "f" if N % 32 else "t",
            [
                to_np(q),
                to_np(s),
                to_np(b),
                to_np(x),
                metal_sim.Out((M, N), np.float16),
                np.int32(128),
                np.int32(N),
                np.int32(M),
                *NOBATCH,
            ],
            grid=(-(-N // 32), -(-M // 32), 1),
            threads=(32, 2, 2),
        )


@pytest.mark.parametrize(
    "run,header,start,stop",
    [
        (hadamard, "hadamard.h", "void hadamard_n(", "void hadamard_m("),
        (softmax, "softmax.h", "void softmax_single_row(", "void softmax_looped("),
        pytest.param(qmm, "quantized.h", "void qmm_t_impl(", "void qmm_n_impl(", marks=pytest.mark.slow),
    ],
)
def test_each_barrier_matters(tmp_path, run, header, start, stop):
    run([INC])
    found, ms = [], mutants(header, start, stop)
    for i, text in enumerate(ms):
        try:
            run(overlay(tmp_path / str(i), header, text))
            found.append(False)
        except metal_sim.KernelError as e:
            assert "data race on threadgroup" in str(e)
            found.append(True)
    print(header, found)
    assert len(ms) >= 3 and sum(found) >= len(ms) - ALLOWED.get(header, 0), found
