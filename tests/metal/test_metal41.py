"""The kernels under the rules of Metal 4.1, whose compiler rejects what all earlier ones accept."""

from __future__ import annotations

import re

import pytest

from mlx_marlin import _ext, ops
from mlx_marlin.ops import shaders
from tests import metal_sim
from tests.metal_sim import metal41
from tests.support import metal_executor
from tests.support.metal_sources import ALL_FORMATS, ONE_FORMAT, sources

pytestmark = pytest.mark.skipif(bool(metal_sim.unavailable()), reason=str(metal_sim.unavailable()))

SOURCES = {
    " ".join([stem, name, *(k for k, v in constants if v and not k.endswith(("widths", "codebooks")))]): (
        stem,
        constants,
        kernels,
    )
    for name, formats in (("one format", ONE_FORMAT), ("all formats", ALL_FORMATS))
    for (stem, constants), kernels in sources(formats).items()
}
DEFINED = {f"MARLIN_SOURCE_{name}": 1 for name in _ext.SOURCE_CONSTANTS}
HEAD = "#include <metal_stdlib>\nusing namespace metal;\n"


def rejected(members: str, body: str) -> list[str]:
    """Errors of a kernel with a struct S."""
    text = f"{HEAD}struct S {{\n{members}\n}};\nkernel void k(device float* o [[buffer(0)]]) {{\nS s;\n{body}\n}}\n"
    return metal41.rejected(text)


@pytest.mark.parametrize("name", SOURCES)
def test_every_source_is_accepted(name):
    stem, constants, kernels = SOURCES[name]
    options = metal_executor.compile_options(kernels[0], (*constants, ("max_threads", 512)))
    options |= {"kernels": kernels, "instantiate": {k: k for k in kernels if "<" in k}}
    assert metal41.rejected(str(metal_executor.SHADERS / f"{stem}.metal"), **options) == []


def test_every_file_and_template_is_among_them():
    assert {stem for stem, _, _ in SOURCES.values()} == set(shaders.sources(ops.SHADERS))
    for half in (False, True):
        found = [ks for _, constants, ks in SOURCES.values() if bool(dict(constants).get("half_operands")) == half]
        assert len({k for kernels in found for k in kernels if "linear" in k}) >= 18


@pytest.mark.parametrize("path", sorted(metal_executor.SHADERS.glob("*.metal")), ids=lambda path: path.stem)
def test_members_name_their_address_space(path):
    includes = [str(metal_executor.ROOT / "csrc")]
    assert metal41.risky_members(str(path), include_dirs=includes, defines=DEFINED) == []


ADD = "static METAL_FUNC void add(thread float& to) { to += 1; }"
REJECTED = {
    "member bound to a thread reference": (
        f"float v; {ADD} METAL_FUNC void twice() {{ add(v); }}",
        "s.twice();",
        "no matching function for call to 'add'|changes address space|cannot bind",
    ),
    "member function that wants thread": (
        "float v; METAL_FUNC float get() thread { return v; } METAL_FUNC float twice() { return 2 * get(); }",
        "o[0] = s.twice();",
        "object parameter of type '__private S'",
    ),
    "pointer to a member": (
        "float v; METAL_FUNC thread float* at() { return &v; }",
        "o[0] = *s.at();",
        "changes address space|return object of type '__private float",
    ),
    "matrix as a member": ("simdgroup_float8x8 m;", "o[0] = s.m.thread_elements()[0];", "deleted default constructor"),
    "elements of a matrix in a member function": (
        "float v; METAL_FUNC void f(thread simdgroup_float8x8& m) { m.thread_elements()[0] = g(v); }"
        "METAL_FUNC float g(thread float& x) const { return x; }",
        "simdgroup_float8x8 m; s.f(m); o[0] = m.thread_elements()[0];",
        "address space|object parameter|no matching",
    ),
}


@pytest.mark.parametrize("name", REJECTED)
def test_what_metal_41_rejects_is_rejected(name):
    members, body, pattern = REJECTED[name]
    errors = rejected(members, body)
    assert any(re.search(pattern, error) for error in errors), errors


ACCEPTED = {
    "qualified": (f"float v; {ADD} METAL_FUNC void twice() thread {{ add(v); }}", "s.twice(); o[0] = s.v;"),
    "unqualified, members used as values": ("float v; METAL_FUNC float get() const { return v; }", "o[0] = s.get();"),
    "local matrix": (
        "float2 v; METAL_FUNC void f() thread { simdgroup_float8x8 m; m.thread_elements()[0] = v.x; "
        "simdgroup_multiply_accumulate(m, m, m, m); v.x = m.thread_elements()[0]; }",
        "s.f(); o[0] = s.v.x;",
    ),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_what_metal_41_accepts_is_accepted(name):
    assert rejected(*ACCEPTED[name]) == []


RISKY = {
    "float v; METAL_FUNC float get() { return v; }": ["get has no address space"],
    "float v; METAL_FUNC float get() const { return v; }": ["get has no address space"],
    "float v; float get() const thread { return v; } static float one() { return 1; }": [],
    "template <int N> METAL_FUNC void run(thread float (&v)[N]) { v[0] = 1; }": ["run has no address space"],
    "typedef simdgroup_matrix<float, 8, 8> M; M sums[2][3];": ["holds matrices: M sums"],
    "simdgroup_half8x8 m;": ["holds matrices"],
    "typedef simdgroup_matrix<float, 8, 8> M; float2 sums[2]; METAL_FUNC void f() thread { M m; m = M(1); }": [],
}


@pytest.mark.parametrize("members", RISKY)
def test_risky_members_are_found(members):
    found = metal41.risky_members(f"{HEAD}struct S {{\n{members}\n}};\n")
    assert len(found) == len(RISKY[members]) and all(a in b for a, b in zip(RISKY[members], found)), found


@pytest.mark.parametrize("stem", shaders.sources(ops.SHADERS))
def test_nothing_precedes_the_pragma_that_silences_extensions(stem):
    """A failed build lists warnings with the errors, and MSL 3 is C++14."""
    text = shaders.sources(ops.SHADERS)[stem]
    code = [line for line in text.splitlines() if line and not line.startswith("//")]
    assert code[0] == '#pragma clang diagnostic ignored "-Wc++17-extensions"'
