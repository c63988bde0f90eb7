"""Every planted bug must be reported; the correct variant must pass."""

import re

import numpy as np
import pytest

from tests import metal_sim

pytestmark = pytest.mark.skipif(metal_sim.unavailable() is not None, reason=str(metal_sim.unavailable()))

HEAD = "#include <metal_stdlib>\nusing namespace metal;\n"
ARGS = (
    "device const float* a [[buffer(0)]], device float* o [[buffer(1)]], uint i "
    "[[thread_position_in_grid]], uint lane [[thread_index_in_simdgroup]],"
    " uint lid [[thread_index_in_threadgroup]], uint sg [[simdgroup_index_in_threadgroup]], uint g "
    "[[threadgroup_position_in_grid]]"
)


def k(body, pre=""):
    return HEAD + pre + "kernel void k(" + ARGS + ") {\n" + body + "\n}\n"


def go(body, pre="", n=128, tg=128, bufs=None, **kw):
    ckw = {x: kw.pop(x) for x in ("strict", "function_constants", "defines") if x in kw}
    a = np.arange(n, dtype=np.float32)
    return metal_sim.compile(k(body, pre), **ckw).run(
        "k", bufs or [a, metal_sim.Out(n, np.float32)], grid=-(-n // tg), threads=tg, **kw
    )


RUNTIME = {  # body, pattern
    "missing barrier": (
        "threadgroup float s[128]; s[lid] = a[i]; o[i] = s[127 - lid];",
        "data race on threadgroup memory",
    ),
    "missing barrier, write after read": (
        "threadgroup float s[128]; s[lid] = a[i]; threadgroup_barrier(mem_flags::mem_threadgroup); float "
        "v = s[127 - lid]; s[lid] = v; o[i] = v;",
        "data race on threadgroup",
    ),
    "mem_none barrier": (
        "threadgroup float s[128]; s[lid] = a[i]; threadgroup_barrier(mem_flags::mem_none); o[i] = s[127 - lid];",
        "data race on threadgroup",
    ),
    "simdgroup barrier across simdgroups": (
        "threadgroup float s[128]; s[lid] = a[i]; simdgroup_barrier(mem_flags::mem_threadgroup); o[i] = s[127 - lid];",
        "data race on threadgroup",
    ),
    "same-word writes": (
        "threadgroup float s[1]; s[0] = a[i]; threadgroup_barrier(mem_flags::mem_threadgroup); o[i] = s[0];",
        "data race on threadgroup",
    ),
    "device race": ("o[i / 2] = a[i];", "data race on device memory"),
    "device race between groups": ("if (lid == 0) o[0] = a[i];", "data race on device memory"),
    "oob read": (
        "o[i] = a[i + 1];",
        "out-of-bounds device memory read of 4 bytes: 0 bytes past the end of buffer 0",
    ),
    "oob read before": ("o[i] = a[int(i) - 1];", "before the start of buffer 0|past the end of buffer"),
    "oob write": ("o[i + 128 * g + 1] = a[i];", "out-of-bounds device memory write"),
    "oob threadgroup": (
        "threadgroup float s[64]; threadgroup float r[64]; r[lid & 63] = 0; (&s[0])[lid] = a[i]; "
        "threadgroup_barrier(mem_flags::mem_threadgroup); o[i] = s[lid & 63];",
        "out-of-bounds threadgroup|data race",
    ),
    "oob thread array": (
        "float q[8]; for (int j = 0; j < 8; j++) q[j] = a[j]; o[i] = q[(lid & 7) + 1];",
        "array index out of bounds",
    ),
    "divergent shuffle": (
        "float v = a[i]; if (lane < 7) v = simd_shuffle_xor(v, 1); o[i] = v;",
        "divergence.*lane",
    ),
    "divergent simd_sum": ("float v = a[i]; if (lane != 3) v = simd_sum(v); o[i] = v;", "divergence"),
    "divergent barrier": (
        "if (lid < 64) threadgroup_barrier(mem_flags::mem_threadgroup); o[i] = a[i];",
        "divergence.*threadgroup_barrier",
    ),
    "two different barriers": (
        "if (lid < 64) {\n threadgroup_barrier(mem_flags::mem_threadgroup);\n} else {\n "
        "threadgroup_barrier(mem_flags::mem_threadgroup);\n}\n o[i] = a[i];",
        "divergence.*different threadgroup_barrier",
    ),
    "early return before barrier": (
        "if (lid == 5) return; threadgroup_barrier(mem_flags::mem_threadgroup); o[i] = a[i];",
        "divergence.*barrier",
    ),
    "shuffle out of range": ("o[i] = simd_shuffle(a[i], lane + 1);", "lane 32, which is out of range"),
    "non-uniform delta": ("o[i] = simd_shuffle_down(a[i], lane & 1);", "differs between lanes"),
    "simdgroup matrix in part": (
        "simdgroup_float8x8 m; if (lane < 16) { simdgroup_load(m, a, 8); } o[i] = m.thread_elements()[0];",
        "divergence",
    ),
    "> 32 KB threadgroup": (
        "threadgroup float s[8193]; s[lid] = a[i]; threadgroup_barrier(mem_flags::mem_threadgroup); o[i] = s[lid];",
        "threadgroup memory: 32772 bytes",
    ),
    "write to const": ("((device float*)a)[i] = 1; o[i] = 0;", "write to buffer 0"),
    "misaligned vector": (
        "device const float4* p = (device const float4*)(a + 1); o[i] = p[lane & 3].x;",
        "misaligned",
    ),
    "div by zero": ("int z = int(a[i]) - 5; o[i] = float(100 / z);", "division by zero"),
    "endless loop": ("volatile int z = 1; while (z) {} o[i] = 1;", "timeout"),
    "uninitialised threadgroup": (
        "threadgroup float s[128]; if (lid != 9) s[lid] = a[i]; "
        "threadgroup_barrier(mem_flags::mem_threadgroup); o[i] = s[lid];",
        "uninitialised",
    ),
}


@pytest.mark.parametrize("name", RUNTIME)
def test_runtime(name):
    body, pat = RUNTIME[name]
    with pytest.raises(metal_sim.KernelError) as e:
        go(
            body,
            n=256 if "oob write" in name or "groups" in name else 128,
            timeout=2,
            uninit="uninit" in name,
        )
    assert re.search(pat, str(e.value), re.S), str(e.value)
    assert "k:" in str(e.value) and "thread" in str(e.value)


def test_poison():
    r = go(
        "threadgroup float s[128]; if (lid != 9) s[lid] = a[i]; "
        "threadgroup_barrier(mem_flags::mem_threadgroup); if (lid != 3) o[i] = s[lid];"
    )
    assert np.isnan(r[1][9]) and np.isnan(r[1][3]) and np.isfinite(r[1]).sum() == 126


def test_orders_show_missing_barrier():
    body = "threadgroup float s[128]; s[lid] = a[i]; o[i] = s[127 - lid];"
    rs = [go(body, races=False, order=o)[1] for o in ("forward", "reverse", "random:1")]
    assert not all(np.array_equal(rs[0], x, equal_nan=True) for x in rs[1:])


def test_correct_variants():
    a = np.arange(128, dtype=np.float32)
    for o in ("forward", "reverse", "random:3"):
        r = go(
            "threadgroup float s[128]; s[lid] = a[i]; threadgroup_barrier(mem_flags::mem_threadgroup); "
            "o[i] = s[127 - lid];",
            order=o,
        )
        assert np.array_equal(r[1], a[::-1])
        r = go(
            "threadgroup float s[128]; s[lid] = a[i]; simdgroup_barrier(mem_flags::mem_threadgroup); "
            "o[i] = s[lid ^ 31];",
            order=o,
        )
        assert np.array_equal(r[1], a.reshape(4, 32)[:, ::-1].ravel())
    r = go("float v = a[i]; if (lane < 7) v = simd_sum(v); o[i] = v;", divergence="active")
    assert r[1][0] == sum(range(7)) and r[1][33] == sum(range(32, 39)) and r[1][10] == 10


def test_other_runtime():
    L = metal_sim.compile(k("o[i] = a[i];"))
    a = np.zeros(4, np.float32)
    with pytest.raises(metal_sim.KernelError, match="missing"):
        L.run("k", [a], grid=1, threads=4)
    with pytest.raises(metal_sim.KernelError, match="not arguments"):
        L.run("k", [a, a, a], grid=1, threads=4)
    with pytest.raises(metal_sim.KernelError, match="null pointer"):
        L.run("k", [a, None], grid=1, threads=4)
    with pytest.raises(metal_sim.KernelError, match="threads per threadgroup"):
        L.run("k", [a, a], grid=1, threads=2048)
    L = metal_sim.compile(
        HEAD + "kernel void k(device float* o [[buffer(0)]], threadgroup float* s [[threadgroup(0)]], uint i "
        "[[thread_position_in_grid]]) {\n s[i] = i; o[i] = s[i]; }\n"
    )
    assert np.array_equal(
        L.run("k", [metal_sim.Out(8, "f4")], grid=1, threads=8, threadgroup_memory={0: 32})[0],
        np.arange(8, dtype="f4"),
    )
    with pytest.raises(metal_sim.KernelError, match="out-of-bounds threadgroup"):
        L.run("k", [metal_sim.Out(16, "f4")], grid=1, threads=9, threadgroup_memory={0: 32})
    with pytest.raises(metal_sim.KernelError, match="limit is 32768"):
        L.run("k", [metal_sim.Out(16, "f4")], grid=1, threads=8, threadgroup_memory={0: 32784})


COMPILE = {  # body, prelude, pattern
    "double": ("double d = a[i]; o[i] = d;", "", "double"),
    "double function": ("o[i] = a[i];", "inline double f(double x) { return x; }\n", "double"),
    "unqualified pointer parameter": (
        "float q[2] = {0, 1}; o[i] = f(q);",
        "inline float f(float* p) { return p[0]; }\n",
        "address space",
    ),
    "unqualified reference parameter": (
        "float q = 0; f(q); o[i] = q;",
        "inline void f(float& p) { p = 1; }\n",
        "address space",
    ),
    "unqualified local pointer": ("float q[2] = {0, 1}; float* p = q; o[i] = p[0];", "", "address space"),
    "constant to device": (
        "device const float* p = t; o[i] = p[0];",
        "constant float t[2] = {1, 2};\n",
        "cannot initialize",
    ),
    "device to threadgroup": ("threadgroup float* p = o; o[i] = p[0];", "", "cannot initialize"),
    "cast across address spaces": (
        "threadgroup float* p = (threadgroup float*)o; o[i] = p[0];",
        "",
        "address space",
    ),
    "device assigned to thread": ("thread float* p = o; o[i] = p[0];", "", "address space"),
    "threadgroup passed as thread": (
        "threadgroup float s[4]; s[0] = 1; o[i] = f(s, 1);",
        "inline float f(thread float* p, int n) { return p[n]; }\n",
        "address space",
    ),
    "device passed as thread": (
        "o[i] = f(o);",
        "inline float f(thread float* p) { return p[0]; }\n",
        "address space",
    ),
    "write to constant": ("t[0] = 1; o[i] = 0;", "constant float t[2] = {1, 2};\n", "const"),
    "recursion": (
        "o[i] = f(4);",
        "inline int g(int n);\ninline int f(int n) { return n ? g(n - 1) : 0; }\ninline int g(int n) { "
        "return f(n); }\n",
        "recursion",
    ),
    "goto": ("goto x; x: o[i] = 0;", "", "goto"),
    "keyword as a name": ("float fragment = 1; o[i] = fragment;", "", "fragment is a keyword"),
    "keyword as a parameter's name": ("o[i] = f(1);", "inline float f(float vertex) { return vertex; }\n", "vertex is"),
    "vla": ("int n = lid; float q[n]; q[0] = 1; o[i] = q[0];", "", "array size is not a constant"),
    "new": ("o[i] = *new float(1);", "", "new"),
    "virtual": ("o[i] = 0;", "struct S { virtual int f(); };\n", "virtual"),
    "throw": ("throw 1;", "", "throw|exception"),
    "std": ("o[i] = std::max(1.0f, a[i]);", "", "std"),
    "c header": ("o[i] = 0;", "#include <cmath>\n", "cmath"),
    "shadowed parameter": ("float a = 1; o[i] = a;", "", "redefinition"),
    "ambiguous max": ("half h = 1; o[i] = max(h, 2.0f);", "", "ambiguous"),
    "implicit vector conversion": ("half4 h = 1; float4 f = h; o[i] = f.x;", "", "cannot initialize"),
    "vector component count": ("float4 f = float4(1, 2, 3); o[i] = f.x;", "", "component count"),
    "implicit float to bfloat": ("bfloat b = a[i]; o[i] = float(b);", "", "bfloat|__bf16"),
    "static local": ("static int n = 0; o[i] = n;", "", "static"),
    "function pointer": (
        "float (*p)(float) = f; o[i] = p(1);",
        "inline float f(float x) { return x; }\n",
        "pointer",
    ),
    "unset function constant": ("o[i] = fc ? 1 : 0;", "constant bool fc [[function_constant(0)]];\n", "fc"),
    "threadgroup in pointer cast": (
        "threadgroup half s[4]; threadgroup float* p = s; o[i] = p[0];",
        "",
        "cannot initialize",
    ),
}


@pytest.mark.parametrize("name", COMPILE)
def test_compile(name):
    body, pre, pat = COMPILE[name]
    with pytest.raises(metal_sim.CompileError, match=pat):
        metal_sim.compile(k(body, pre))


@pytest.mark.parametrize(
    "sig,pat",
    [
        ("device float* o [[buffer(0)]], uint i", "no \\(known\\) attribute"),
        ("float* o [[buffer(0)]], uint i [[thread_position_in_grid]]", "device, constant or threadgroup"),
        ("device float* o [[buffer(0)]], device float* p [[buffer(0)]]", "used twice"),
        ("float o [[buffer(0)]]", "pointer or reference"),
    ],
)
def test_kernel_signature(sig, pat):
    with pytest.raises(metal_sim.CompileError, match=pat):
        metal_sim.compile(HEAD + f"kernel void k({sig}) {{ }}\n")


def test_header_missing():
    with pytest.raises(metal_sim.CompileError, match="standard header"):
        metal_sim.compile("kernel void k(device float* o [[buffer(0)]]) {\n o[0] = 1; }\n")
