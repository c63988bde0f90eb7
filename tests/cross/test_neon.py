"""The NEON kernels on Linux: cross-built for aarch64 with zig and run under Debian's qemu-user."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mlx_marlin import codec
from mlx_marlin.kernels import ACTIVATIONS
from mlx_marlin.weights import ExpertStack, TrellisWeight

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "tests"))
from cases import TOLERANCE, reference_linear, reference_swiglu, row_error  # noqa: E402

QEMU = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
SETS = {"neon": ["-mcpu=generic"], "neonfp16": ["-mcpu=generic+fullfp16"]}

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("ziglang") is None, reason="needs PyPI's ziglang"),
    pytest.mark.skipif(QEMU is None, reason="needs qemu-aarch64 (Debian: qemu-user)"),
]


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    """The kernels and their driver as a static aarch64 program."""
    build = tmp_path_factory.mktemp("neon")
    zig = [sys.executable, "-m", "ziglang", "c++", "-target", "aarch64-linux-musl", "-std=c++20"]
    zig.append(f"-I{ROOT / 'csrc'}")
    kernels = ROOT / "csrc" / "cpu"
    objects = []

    def compile_(source, name, flags):
        objects.append(str(build / f"{name}.o"))
        subprocess.run([*zig, *flags, "-c", str(source), "-o", objects[-1]], check=True)

    for name, flags in {"baseline": ["-DMARLIN_PORTABLE", "-mcpu=generic"], **SETS}.items():
        compile_(kernels / "tier.cpp", name, ["-O1", "-ffp-contract=off", f"-DMARLIN_TIER={name}", *flags])
    for source in sorted(kernels.glob("*.cpp")):
        if source.name != "tier.cpp":
            compile_(source, source.stem, ["-O1", "-mcpu=generic"])
    compile_(Path(__file__).with_name("kernels_driver.cpp"), "driver", ["-O1", "-mcpu=generic"])
    program = build / "driver"
    subprocess.run([*zig, "-static", "-s", *objects, "-o", str(program)], check=True)
    return program


def make_weight(rng, k, n, bits, codebook, bias=False):
    trellis = rng.integers(-(2**15), 2**15, (k // 16, n // 16, 16 * bits), dtype=np.int16)
    suh = (rng.choice([-1.0, 1.0], k) * rng.uniform(0.5, 1.5, k)).astype(np.float16)
    svh = (rng.choice([-1.0, 1.0], n) * rng.uniform(0.5, 1.5, n) / k**0.5).astype(np.float16)
    bias = rng.standard_normal(n).astype(np.float32) if bias else None
    return TrellisWeight(trellis, suh, svh, codebook, bias)


class Cases:
    """The driver's input file."""

    def __init__(self):
        self.parts = []

    def array(self, values, dtype):
        values = np.ascontiguousarray(values, dtype)
        self.parts += [np.int64(values.size).tobytes(), values.tobytes()]

    def stack(self, weights):
        stack = ExpertStack.of("weights", weights)
        self.array([len(weights), *stack.padded_shape], np.int32)
        self.array(np.array(stack.codes), np.uint32)
        self.array(np.array(stack.offsets), np.int64)
        self.array(np.array(stack.formats), np.uint32)
        for values in (stack.suh, stack.svh):
            self.array(np.array(values).view(np.uint16), np.uint16)
        self.array([] if stack.bias is None else np.array(stack.bias), np.float32)


@pytest.mark.parametrize("name", list(SETS))
def test_kernels_under_qemu(driver, name, tmp_path):
    rng = np.random.default_rng(0)
    formats = [(bits, codebook) for bits in range(1, codec.MAX_BITS + 1) for codebook in codec.CODEBOOKS]
    file = Cases()
    rows = (1, 2, 3, 4, 5, 17)
    file.array([len(formats), 2 * len(rows), 2], np.int32)
    decoded = [make_weight(rng, 1024, 1024, *format_) for format_ in formats]
    for w in decoded:
        file.stack([w])
    products = []
    for i, count in enumerate(rows):
        w = make_weight(rng, 256, 384, *formats[(5 * i) % len(formats)], bias=i % 2 == 0)
        for transposed in (0, 1):
            x = rng.standard_normal((count, (256, 384)[transposed])).astype(np.float32)
            file.stack([w])
            file.array([count, transposed], np.int32)
            file.array(x, np.float32)
            matrix = codec.dequantize(w).astype(np.float64)
            products.append(x.astype(np.float64) @ matrix.T if transposed else reference_linear(x, w))
    layers = []
    for count, activation in ((1, 0), (20, 2)):
        weights = {
            part: [make_weight(rng, *shape, *formats[7 * e], bias=activation == 2) for e in range(4)]
            for part, shape in (("gate", (256, 128)), ("up", (256, 128)), ("down", (128, 256)))
        }
        x = rng.standard_normal((count, 256)).astype(np.float32)
        ids = rng.permuted(np.tile(np.arange(4), (count, 1)), axis=1)[:, :2].astype(np.uint32)
        scores = rng.dirichlet(np.ones(2), count).astype(np.float32)
        for part in weights.values():
            file.stack(part)
        file.array([count, 2, activation], np.int32)
        for values in (x, ids, scores):
            file.array(values, values.dtype)
        layers.append(reference_swiglu(x, ids, weights, scores, ACTIVATIONS[activation]))
    cases, results = tmp_path / "cases", tmp_path / "results"
    cases.write_bytes(b"".join(file.parts))
    subprocess.run([QEMU, "-cpu", "max", str(driver), name, str(cases), str(results)], check=True)

    data = results.read_bytes()
    at = 0
    for w, (bits, codebook) in zip(decoded, formats):
        got = np.frombuffer(data, np.uint16, 1 << 20, at).reshape(1024, 1024)
        at += got.nbytes
        np.testing.assert_array_equal(got, codec.inner(w).view(np.uint16), err_msg=f"{codebook}, {bits} bits")
    for exact in products + layers:
        got = np.frombuffer(data, np.float32, exact.size, at).reshape(exact.shape)
        at += got.nbytes
        assert row_error(got, exact) <= TOLERANCE["float32"]
    assert at == len(data)
