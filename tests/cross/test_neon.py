"""The NEON kernels on Linux: cross-built for aarch64 with Debian's GCC and run under its qemu-user."""

from __future__ import annotations

import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_marlin import codec, ops
from mlx_marlin.kernels import ACTIVATIONS, DTYPES, UNGATED
from mlx_marlin.ops import reference
from mlx_marlin.weights.experts import ExpertStack
from mlx_marlin.weights.synthetic import random_weight
from tests.support import attention, golden
from tests.support.cases import FORMATS, TOLERANCE, random_experts, random_rows, row_error
from tests.support.objects import compiled
from tests.support.paths import ROOT
from tests.support.references import reference_experts, reference_linear

QEMU = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
# Not zig: it would first build a C++ library, which takes longer than all other tests of a folder together.
COMPILER = shutil.which("aarch64-linux-gnu-g++")
OBJECTS = ROOT / "build" / "neon"
SETS = {"neon": ["-march=armv8-a"], "neonfp16": ["-march=armv8.2-a+fp16"]}

pytestmark = [
    pytest.mark.skipif(COMPILER is None, reason="needs aarch64-linux-gnu-g++ (Debian: g++-aarch64-linux-gnu)"),
    pytest.mark.skipif(QEMU is None, reason="needs qemu-aarch64 (Debian: qemu-user)"),
]


class Build:
    """Sources to a static aarch64 program."""

    def __init__(self, directory: Path):
        self.directory, self.objects = directory, []
        self.pool = ThreadPoolExecutor(2)

    def compile(self, source: Path, flags: list[str]) -> None:
        common = ["-std=c++20", f"-I{ROOT / 'csrc'}"]
        self.objects.append(self.pool.submit(compiled, [COMPILER], [*common, *flags], source, OBJECTS))

    def link(self) -> Path:
        program = self.directory / "driver"
        objects = [str(done.result()) for done in self.objects]
        subprocess.run([COMPILER, "-static", "-s", *objects, "-o", str(program)], check=True)
        return program


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    """The kernels and their driver as a static aarch64 program."""
    build = Build(tmp_path_factory.mktemp("neon"))
    kernels = ROOT / "csrc" / "cpu"
    for name, flags in {"baseline": ["-DMARLIN_PORTABLE"], **SETS}.items():
        build.compile(kernels / "tier/table.cpp", ["-O1", "-ffp-contract=off", f"-DMARLIN_TIER={name}", *flags])
    for source in sorted(kernels.glob("*.cpp")):
        build.compile(source, ["-O1"])
    build.compile(Path(__file__).with_name("kernels_driver.cpp"), ["-O1"])
    return build.link()


@pytest.fixture(scope="module")
def search_driver(tmp_path_factory):
    """The encoder's search and its driver."""
    build = Build(tmp_path_factory.mktemp("viterbi"))
    for name in ("cpu/instruction_set", "cpu/pool", "viterbi/search", "viterbi/baseline", "viterbi/neon"):
        build.compile(ROOT / f"csrc/{name}.cpp", ["-O2"])
    build.compile(Path(__file__).with_name("viterbi_driver.cpp"), ["-O1"])
    return build.link()


@pytest.mark.slow
@pytest.mark.parametrize("bits", codec.WIDTHS)
def test_search_under_qemu(search_driver, bits, tmp_path):
    """The states that this machine's own search finds, the tail of a batch included."""
    tiles = np.random.default_rng(codec.half_bits(bits)).standard_normal((1, codec.TILE_SIZE)).astype(np.float16)
    files = [tmp_path / name for name in ("values", "tiles", "states")]
    codec.codebook_values("mul1").astype(np.float32).tofile(files[0])
    tiles.astype(np.float32).tofile(files[1])
    subprocess.run(
        [QEMU, "-cpu", "max", str(search_driver), "neon", str(codec.half_bits(bits)), *map(str, files)], check=True
    )
    found = np.fromfile(files[2], np.uint16).reshape(tiles.shape)
    np.testing.assert_array_equal(found, ops.viterbi_search(tiles, bits, "mul1"))


# Rows of x, and rows per decoded panel: one row, a few in one panel, and more than one panel.
SHAPES = ((1, 1), (2, 4), (3, 64), (5, 4), (17, 8))


def to_bytes(x: mx.array) -> np.ndarray:
    return np.array(mx.contiguous(x).view(mx.uint8)).reshape(-1)


class Cases:
    """The driver's input file, and what must come out, in the driver's order."""

    def __init__(self):
        self.decodes, self.products, self.swiglus, self.ids, self.attentions = [], [], [], [], []
        self.parts: list[bytes] = []

    def array(self, values, dtype):
        values = np.ascontiguousarray(values, dtype)
        self.parts += [np.int64(values.size).tobytes(), values.tobytes()]

    def stack(self, weights):
        """The arrays of a projection; of none, as of a gate that there is not: zeros and no items."""
        if not weights:
            self.array([0, 0, 0], np.int32)
            for dtype in (np.uint32, np.int64, np.uint32, np.uint16, np.uint16, np.float32):
                self.array([], dtype)
            return
        stack = ExpertStack.of("weights", weights)
        self.array([len(weights), *stack.padded_shape], np.int32)
        self.array(np.array(stack.codes), np.uint32)
        self.array(np.array(stack.offsets), np.int64)
        self.array(np.array(stack.formats), np.uint32)
        for values in (stack.suh, stack.svh):
            self.array(np.array(values).view(np.uint16), np.uint16)
        self.array([] if stack.bias is None else np.array(stack.bias), np.float32)

    def decode(self, w):
        self.decodes.append((w,))

    def product(
        self,
        w,
        x: mx.array,
        dtype: str,
        panel_rows: int,
        transposed: bool = False,
        ids=None,
        divisor: int = 1,
        exact=None,
        integers: bool = False,
    ):
        """w: a weight, or with ids, the expert of each row, a list; row r reads x[r // divisor]."""
        x = x.astype(getattr(mx, dtype))
        weights = w if ids is not None else [w]
        if exact is None:
            x64 = np.array(x.astype(mx.float32)).astype(np.float64)
            rows = np.repeat(x64, divisor, axis=0)
            chosen = np.zeros(len(rows), np.uint32) if ids is None else ids
            exact = np.zeros((len(rows), weights[0].in_features if transposed else weights[0].out_features))
            for e in np.unique(chosen):
                back = codec.dequantize(weights[e]).astype(np.float64).T if transposed else None
                mine = rows[chosen == e]
                product = reference.integer_linear if integers else reference_linear
                exact[chosen == e] = mine @ back if transposed else product(mine, weights[e])
        self.products.append((weights, x, dtype, panel_rows, transposed, ids, divisor, exact, integers))

    def swiglu(
        self, experts, x, ids, scores, dtype: str, panel_rows: int, activation: str, exact=None, integers: bool = False
    ):
        x = x.astype(getattr(mx, dtype))
        if exact is None:
            x64 = np.array(x.astype(mx.float32)).astype(np.float64)
            options = scores, activation, 1.702, 7.0
            exact = (
                reference.experts_output(x64, ids, experts.values(), *options, reference.integer_linear)
                if integers
                else reference_experts(x64, ids, experts, scores, activation)
            )
        self.swiglus.append((experts, x, ids, scores, dtype, panel_rows, activation, exact, integers))

    def bad_ids(self, ids, experts: int):
        wrong = np.nonzero(np.asarray(ids) >= experts)[0]
        self.ids.append((ids, experts, max(wrong, key=lambda i: (ids[i], -i)) if wrong.size else -1))

    def attention(self, shape: attention.Shape, dtype: str, mask: str | None, sinks: bool):
        case = attention.random_case(np.random.default_rng(8), shape, getattr(mx, dtype), mask, sinks)
        self.attentions.append((shape, dtype, case, attention.reference(case)))

    def write(self, path: Path) -> None:
        self.parts.clear()
        kinds = (self.decodes, self.products, self.swiglus, self.ids, self.attentions)
        self.array([len(cases) for cases in kinds], np.int32)
        for (w,) in self.decodes:
            self.stack([w])
        for weights, x, dtype, panel_rows, transposed, ids, divisor, exact, integers in self.products:
            self.stack(weights)
            sizes = weights[0].in_features, weights[0].out_features
            self.array([DTYPES.index(dtype), panel_rows, len(exact), *sizes, transposed, divisor, integers], np.int32)
            self.array([] if ids is None else ids, np.uint32)
            self.array(to_bytes(x), np.uint8)
        for experts, x, ids, scores, dtype, panel_rows, activation, _, integers in self.swiglus:
            for name in ("gate", "up", "down"):
                self.stack(experts.get(name, []))
            hidden, kind = experts["up"][0].in_features, ACTIVATIONS.index(activation)
            combine = scores is not None
            sizes = [DTYPES.index(dtype), panel_rows, x.shape[0], hidden, ids.shape[1], kind, combine, integers]
            self.array(sizes, np.int32)
            self.array(to_bytes(x), np.uint8)
            self.array(ids, np.uint32)
            self.array(scores if combine else [], np.float32)
        for ids, experts, _ in self.ids:
            self.array(ids, np.uint32)
            self.array([experts], np.int32)
        for shape, dtype, case, _ in self.attentions:
            self.attention_arrays(shape, dtype, case)
        path.write_bytes(b"".join(self.parts))

    def attention_arrays(self, shape: attention.Shape, dtype: str, case: attention.Case) -> None:
        b, heads, key_heads, queries, keys, key_size, value_size = shape
        mask = None if isinstance(case.mask, str) else case.mask
        is_bool = mask is not None and mask.dtype == mx.bool_
        sizes = [b, key_heads, heads // key_heads, queries, keys, key_size, value_size, case.mask == "causal", is_bool]
        self.array([DTYPES.index(dtype), *sizes], np.int32)
        self.array([case.scale], np.float32)
        for values in case[:3]:
            self.array(to_bytes(values), np.uint8)
        if mask is not None:
            mask = mx.broadcast_to(mask if is_bool else mask.astype(mx.float32), (b, heads, queries, keys))
        self.array([] if mask is None else to_bytes(mask), np.uint8)
        self.array([] if case.sinks is None else attention.exact(case.sinks), np.float32)

    def check(self, data: bytes) -> None:
        at = 0

        def take(dtype: str, shape) -> mx.array:
            nonlocal at
            count = int(np.prod(shape)) * (4 if dtype == "float32" else 2)
            values = mx.array(np.frombuffer(data, np.uint8, count, at)).view(getattr(mx, dtype)).reshape(shape)
            at += count
            return values

        for (w,) in self.decodes:
            got = np.array(take("float16", w.padded_shape)).view(np.uint16)
            np.testing.assert_array_equal(got, codec.inner(w).view(np.uint16), err_msg=str(w))
        for weights, x, dtype, panel_rows, transposed, _, _, exact, integers in self.products:
            error = row_error(take(dtype, exact.shape), exact)
            assert error <= TOLERANCE[dtype], (weights, x.shape, dtype, panel_rows, transposed, integers, error)
        for _, x, ids, _, dtype, panel_rows, activation, exact, integers in self.swiglus:
            error = row_error(take(dtype, exact.shape), exact)
            # Where gate and up differ in the last bit, elements between are rounded to other integers.
            limit = max(TOLERANCE[dtype], 1e-4 if integers else 0.0)
            assert error <= limit, (activation, x.shape, ids.shape, dtype, panel_rows, integers, error)
        for ids, experts, wrong in self.ids:
            assert np.frombuffer(data, np.int64, 1, at)[0] == wrong, (ids, experts)
            at += 8
        for shape, dtype, case, want in self.attentions:
            error = row_error(take(dtype, want.shape), want)
            assert error <= TOLERANCE[dtype], (shape, dtype, case.mask, error)
        assert at == len(data)


def add_vectors(cases: Cases) -> None:
    """The vectors of an independent implementation, in every dtype."""
    for name in golden.names("linear_*"):
        z = golden.load(name)
        for dtype in DTYPES:  # x is exact in half precision
            exact = z["y64"] if dtype != "bfloat16" else None
            cases.product(golden.weight(z), mx.array(z["x"]), dtype, 4, exact=exact)
    for name in golden.names("moe_*"):
        z = golden.load(name)
        for dtype in DTYPES:
            exact = z["y64"] if dtype != "bfloat16" else None
            cases.swiglu(golden.experts(z), mx.array(z["x"]), z["ids"], z["probs"], dtype, 4, "silu", exact)


# Activations of experts with a gate, then without.
KINDS = [*((name, True) for name in ACTIVATIONS), *((name, False) for name in UNGATED)]


def projections(experts: dict, gated: bool) -> dict:
    return {name: weights for name, weights in experts.items() if gated or name != "gate"}


def add_random(cases: Cases) -> None:
    """Every dtype with every activation, ragged sizes, few rows and many; all formats, decoded and multiplied."""
    rng = np.random.default_rng(0)
    for bits, codebook in FORMATS:
        cases.decode(random_weight(rng, 1024, 1024, bits, codebook))
    for i, (rows, panel_rows) in enumerate(SHAPES):
        for j, dtype in enumerate(DTYPES):
            w = random_weight(rng, 192, 320, *FORMATS[(5 * i + 8 * j) % len(FORMATS)], bias=(i + j) % 2 == 0)
            for transposed in (False, True):
                x = random_rows(rng, rows, (192, 320)[transposed], dtype)
                cases.product(w, x, dtype, panel_rows, transposed)
    for i, (activation, gated) in enumerate(KINDS):
        for j, dtype in enumerate(DTYPES):
            rows, panel_rows = SHAPES[(i + 2 * j) % len(SHAPES)]
            formats = [[FORMATS[(7 * e + 5 * p + i) % len(FORMATS)] for p in range(3)] for e in range(4)]
            experts = projections(random_experts(rng, 192, 96, formats, bias=j % 2 == 0), gated)
            ids = rng.permuted(np.tile(np.arange(4), (rows, 1)), axis=1)[:, :2].astype(np.uint32)
            scores = rng.dirichlet(np.ones(2), rows).astype(np.float32) if (i + j) % 2 else None
            cases.swiglu(experts, random_rows(rng, rows, 192, dtype), ids, scores, dtype, panel_rows, activation)


def add_integers(cases: Cases) -> None:
    """Sums of integers: every width of mul1, and experts of which some have other codebooks."""
    rng = np.random.default_rng(6)
    for i, bits in enumerate(codec.WIDTHS):
        rows, panel_rows = SHAPES[i % len(SHAPES)]
        w = random_weight(rng, 256, 192, bits, bias=i % 2 == 0)
        cases.product(w, random_rows(rng, rows, 256), "float32", panel_rows, integers=True)
    for rows, panel_rows in SHAPES:
        formats = [[FORMATS[(7 * e + 5 * p + rows) % len(FORMATS)] for p in range(3)] for e in range(3)]
        experts = random_experts(rng, 192, 96, [*formats, [(2, "mul1")] * 3])
        ids = rng.permuted(np.tile(np.arange(4), (rows, 1)), axis=1)[:, :2].astype(np.uint32)
        for gated in (True, False):
            of_kind, x = projections(experts, gated), random_rows(rng, rows, 192)
            cases.swiglu(of_kind, x, ids, None, "float32", panel_rows, "silu", integers=True)


def add_attention(cases: Cases) -> None:
    """Every mask and dtype, with and without sinks; no sink beside keys that are all masked, which gives zeros."""
    for i, shape in enumerate(attention.SHAPES):
        for j, mask in enumerate(attention.MASKS):
            cases.attention(shape, DTYPES[(i + j) % len(DTYPES)], mask, (i + j) % 2 == 0 and mask != "bool")


@pytest.fixture(scope="module")
def all_cases():
    cases = Cases()
    add_vectors(cases)
    add_random(cases)
    add_integers(cases)
    add_attention(cases)
    return cases


@pytest.mark.parametrize("name", list(SETS))
def test_kernels_under_qemu(driver, all_cases, name, tmp_path):
    cases, results = tmp_path / "cases", tmp_path / "results"
    all_cases.write(cases)
    subprocess.run([QEMU, "-cpu", "max", str(driver), name, str(cases), str(results)], check=True)
    all_cases.check(results.read_bytes())
