"""Every instruction set of the CPU kernels: exact decode, products against float64, and their promises."""

from __future__ import annotations

import platform

import mlx.core as mx
import numpy as np
import pytest

from mlx_marlin import _ext, codec, ops
from mlx_marlin.kernels import ACTIVATIONS, UNGATED, KernelConfig, make_name
from mlx_marlin.kernels.cpu import TILE_ROWS, cpu_threads
from mlx_marlin.ops import trellis_linear, trellis_mlp, trellis_swiglu
from mlx_marlin.weights.experts import ExpertBank
from mlx_marlin.weights.synthetic import random_weight
from tests.support.cases import TOLERANCE, bank_of, random_rows, row_error
from tests.support.references import reference_experts, reference_linear


def config(panel_rows=64, threads=None):
    variant = next(name for name, rows in TILE_ROWS.items() if panel_rows in rows)
    return KernelConfig(make_name(variant), panel_rows, 128, threads or cpu_threads(), True, variant)


def test_the_best_set_is_the_default_and_unknown_names_are_refused():
    best = _ext.instruction_sets()[-1]
    assert _ext.instruction_set() == best
    with pytest.raises(ValueError, match='got "sse9"'):
        _ext.set_instruction_set("sse9")
    assert _ext.instruction_set() == best


def test_the_instruction_sets_are_those_of_the_build():
    compiled = _ext.compiled_instruction_sets()
    architecture = {
        "x86_64": ["baseline", "avx2", "avx512", "avx512vbmi", "avx512vnni", "avx512fp16"],
        "arm64": ["baseline", "neon", "neonfp16"],
    }
    assert compiled == architecture["arm64" if platform.machine() in ("arm64", "aarch64") else "x86_64"]
    assert [name for name in compiled if name in _ext.instruction_sets()] == _ext.instruction_sets()
    for lacking in set(compiled) - set(_ext.instruction_sets()):
        with pytest.raises(ValueError, match="this machine runs the instruction sets"):
            _ext.set_instruction_set(lacking)


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 8, 9, 17, 70, 300])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_linear(instruction_set, dtype, rows):
    rng = np.random.default_rng(rows)
    x = random_rows(rng, rows, 384, dtype)
    for bits, codebook in ((1 + rows % 8, codec.CODEBOOKS[rows % 3]), (1.5 + rows % 3, "mul1")):
        w = random_weight(rng, 384, 256, bits, codebook, bias=True)
        exact = reference_linear(np.array(x.astype(mx.float32)).astype(np.float64), w)
        for panel_rows in (1, 4, 64):
            y = np.array(trellis_linear(x, w, config=config(panel_rows)).astype(mx.float32))
            assert row_error(y, exact) <= TOLERANCE[dtype], (bits, panel_rows)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gated", [True, False])
def test_experts(instruction_set, activation, gated):
    if not gated and activation not in UNGATED:
        pytest.skip("needs a gate")
    rng = np.random.default_rng(2)

    def experts(k, n):
        return [
            random_weight(rng, k, n, *f, bias=True) for f in ((1, "3inst"), (2.5, "mul1"), (3, "mcg"), (3.5, "mul1"))
        ]

    weights = {"gate": experts(256, 384), "up": experts(256, 384), "down": experts(384, 256)}
    if not gated:
        del weights["gate"]
    bank, op = bank_of(weights), trellis_swiglu if gated else trellis_mlp
    for rows in (1, 40):
        x = 3 * random_rows(rng, rows, 256, "float32")
        indices = rng.permuted(np.tile(np.arange(4), (rows, 1)), axis=1)[:, :3].astype(np.uint32)
        scores = rng.dirichlet(np.ones(3), rows).astype(np.float32)
        exact = reference_experts(np.array(x).astype(np.float64), indices, weights, scores, activation)
        y = op(x, mx.array(indices), bank, scores=mx.array(scores), activation=activation, config=config())
        assert row_error(np.array(y), exact) <= TOLERANCE["float32"]


def test_the_same_bits_whatever_the_number_of_threads(instruction_set):
    rng = np.random.default_rng(3)
    bank = ExpertBank(*([random_weight(rng, 256, 256, bits) for bits in (2, 2.5, 3)] for _ in range(3)))
    x = random_rows(rng, 50, 256, "float32")
    indices = mx.array(rng.permuted(np.tile(np.arange(3), (50, 1)), axis=1)[:, :2].astype(np.uint32))
    results = []
    for threads in range(1, cpu_threads() + 1):
        y = trellis_swiglu(x, indices, bank, scores=mx.ones((50, 2)), config=config(threads=threads))
        results.append(np.array(y).view(np.uint32))
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])


@pytest.mark.parametrize("rows", [3, 20])
def test_a_bad_row_leaves_the_others_alone_and_large_rows_stay_accurate(instruction_set, rows):
    rng = np.random.default_rng(4)
    w = random_weight(rng, 256, 128, 3)
    x = np.array(random_rows(rng, rows, 256, "float32"))
    good = np.array(trellis_linear(mx.array(x), w, config=config()))
    for value in (np.nan, np.inf, -np.inf):
        bad = x.copy()
        bad[1, 7] = value
        y = np.array(trellis_linear(mx.array(bad), w, config=config()))
        assert not np.isfinite(y[1]).any()
        others = np.arange(rows) != 1
        np.testing.assert_array_equal(y[others].view(np.uint32), good[others].view(np.uint32))
    y = np.array(trellis_linear(mx.array(x * 1e6), w, config=config()))
    assert row_error(y, reference_linear((x * np.float32(1e6)).astype(np.float64), w)) <= TOLERANCE["float32"]


def test_gradient_is_the_transposed_product(instruction_set):
    rng = np.random.default_rng(5)
    for bits in (3, 1.5):
        w = random_weight(rng, 384, 256, bits)
        x = random_rows(rng, 5, 384, "float32")
        seed = random_rows(rng, 5, 256, "float32")
        _, (grad,) = mx.vjp(lambda x: trellis_linear(x, w), [x], [seed])
        exact = np.array(seed).astype(np.float64) @ codec.dequantize(w).astype(np.float64).T
        assert row_error(np.array(grad), exact) <= TOLERANCE["float32"]


def test_every_half_becomes_its_float(instruction_set):
    words = np.arange(1 << 16, dtype=np.uint16)
    wanted = {"float16": words.view(np.float16).astype(np.float32), "bfloat16": (words.astype(np.uint32) << 16)}
    for dtype, values in wanted.items():
        for count in (0, 1, 15, 67, len(words)):  # ends inside a vector, and what is behind stays
            floats = np.full(count + 1, 3, np.float32)
            ops.widen(dtype, words[len(words) - count :], floats[:-1])
            np.testing.assert_array_equal(floats[:-1], values[len(values) - count :].view(np.float32))
            assert floats[-1] == 3


def test_widening_takes_halves_and_as_many_floats():
    with pytest.raises(ValueError, match="float16 or bfloat16, got 'float32'"):
        ops.widen("float32", np.zeros(2, np.uint16), np.zeros(2, np.float32))
    with pytest.raises(ValueError, match=r"a float for each half, got \[3\] for \[2\]"):
        ops.widen("float16", np.zeros(2, np.uint16), np.zeros(3, np.float32))
