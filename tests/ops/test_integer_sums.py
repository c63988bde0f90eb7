"""Sums of integers: what mul1 computes on the CPU where halves are allowed, on every instruction set."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from mlx_marlin import TrellisLinear, TrellisWeight, codec, kernels
from mlx_marlin.kernels.cpu import TILE_ROWS, cpu_threads
from mlx_marlin.ops import reference, trellis_linear
from mlx_marlin.weights.synthetic import random_weight
from tests.support import cases
from tests.support.cases import TOLERANCE, random_rows, row_error

# Error of a row over its norm. Left out is the rounding of weights to halves, 2.1e-4 of their norm, and of a product's
# result as much; three products and the activation make up a layer of experts.
PRODUCT, EXPERTS = 5e-4, 8e-4
# To the reference: sums of float32, and elements of x that are rounded the other way because they were rotated in
# float32, in a layer of experts those of down because gate and up differ.
SAME, SAME_EXPERTS = 3e-5, 1e-4


def config(panel_rows=64, columns=256, threads=None) -> kernels.KernelConfig:
    variant = next(name for name, rows in TILE_ROWS.items() if panel_rows in rows)
    name = kernels.make_name(variant)
    return kernels.KernelConfig(name, panel_rows, columns, threads or cpu_threads(), False, variant)


def as64(x: mx.array) -> np.ndarray:
    return np.array(x.astype(mx.float32)).astype(np.float64)


def run(case: cases.Case, x, indices, scores, config) -> mx.array:
    return case.run(x, indices, scores, config=config)


def integer_reference(case: cases.Case, x, indices, scores) -> np.ndarray:
    if case.linear:
        return reference.integer_linear(as64(x), case.weight())
    experts = case.experts().values()
    given = None if scores is None else as64(scores)
    activation = case.function, case.alpha, case.limit
    return reference.experts_output(as64(x), np.array(indices), experts, given, *activation, reference.integer_linear)


@pytest.mark.parametrize("bits", codec.WIDTHS)
def test_products_are_those_of_the_reference(instruction_set, bits):
    """Few rows, blocks of rows that are full and ragged, and more rows than share a sweep over all columns."""
    rng = np.random.default_rng(codec.half_bits(bits))
    w = random_weight(rng, 384, 256, bits, bias=True)
    for rows, panel_rows in ((1, 1), (2, 2), (5, 4), (6, 8), (13, 16), (70, 64), (140, 64)):
        x = random_rows(rng, rows, 384)
        y = trellis_linear(x, w, config=config(panel_rows, (128, 256)[rows % 2]))
        assert row_error(y, reference.integer_linear(as64(x), w)) <= SAME, (rows, panel_rows)
        assert row_error(y, reference.linear(as64(x), w)) <= PRODUCT, (rows, panel_rows)


@pytest.mark.parametrize("case", [c for c in cases.pairwise() if c.rows and c.rows <= 64], ids=str)
def test_the_case_list(case):
    inputs = case.inputs()
    y = run(case, *inputs, kernels.default(replace(case.problem(), accuracy="half")))
    rounding = TOLERANCE[case.dtype] if case.dtype != "float32" else 0.0
    with np.errstate(over="ignore"):
        assert row_error(y, integer_reference(case, *inputs)) <= (SAME if case.linear else SAME_EXPERTS) + rounding
        assert row_error(y, case.reference(*inputs)) <= (PRODUCT if case.linear else EXPERTS) + rounding


def test_experts_of_several_codebooks(instruction_set):
    case = cases.Case(3, "mul1", "float32", 17, "padded", "silu", mix="both", bias=True, top_k=2, scores=True)
    inputs = case.inputs()
    for panel_rows in (1, 4, 64):
        y = run(case, *inputs, config(panel_rows))
        assert row_error(y, integer_reference(case, *inputs)) <= SAME_EXPERTS
        assert row_error(y, case.reference(*inputs)) <= EXPERTS


def test_other_codebooks_are_exact(instruction_set):
    rng = np.random.default_rng(1)
    for codebook in ("3inst", "mcg"):
        w, x = random_weight(rng, 256, 128, 3, codebook), random_rows(rng, 5, 256)
        exact = trellis_linear(x, w, config=replace(config(), use_fp32_acc=True))
        assert mx.array_equal(trellis_linear(x, w, config=config()), exact)


def test_the_largest_sums_do_not_overflow(instruction_set):
    """Every weight has about the largest byte sum, then the smallest, and all of a rotated x is 32767, then -32767."""
    states = np.arange(1 << 16, dtype=np.uint16)
    values = codec.unrounded_mul1(states)
    for state in (states[values.argmax()], states[values.argmin()]):
        # Tail-biting: at 8 bits a state that repeats one byte, of which there are 256.
        same = states[(states >> 8) == (states & 0xFF)]
        best = same[np.abs(values[same] - values[state]).argmin()]
        words = np.full((128 // 16, 128 // 16, codec.words_per_tile(8)), best, np.uint16)
        w = TrellisWeight(words.view(np.int16), np.ones(128, np.float16), np.ones(128, np.float16), "mul1")
        for sign in (1.0, -1.0):
            x = np.zeros((7, 128), np.float32)
            x[:, 0] = sign  # rotated: all alike
            y = trellis_linear(mx.array(x), w, config=config())
            assert row_error(y, reference.integer_linear(x.astype(np.float64), w)) <= SAME


def test_the_same_bits_for_any_number_of_threads_panels_and_columns(instruction_set):
    case = cases.Case(2.5, "mul1", "float32", 17, "blocks", "silu", mix="bits", top_k=2, scores=True)
    inputs = case.inputs()
    results = {
        bytes(memoryview(run(case, *inputs, config(panel_rows, columns, threads)).view(mx.uint8)))
        for panel_rows in (1, 4, 64)
        for columns in (128, 256)
        for threads in range(1, cpu_threads() + 1)
    }
    assert len(results) == 1


@pytest.mark.parametrize("rows", [3, 20])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_bad_row_leaves_the_others_alone(instruction_set, rows, value):
    rng = np.random.default_rng(4)
    w = random_weight(rng, 256, 128, 3)
    x = np.array(random_rows(rng, rows, 256))
    good = np.array(trellis_linear(mx.array(x), w, config=config()))
    x[1, 7] = value
    y = np.array(trellis_linear(mx.array(x), w, config=config()))
    assert not np.isfinite(y[1]).any()
    others = np.arange(rows) != 1
    np.testing.assert_array_equal(y[others].view(np.uint32), good[others].view(np.uint32))


@pytest.mark.parametrize("factor", [1e6, 1e-6, 1e30, 1e-28])
def test_rows_of_any_size_are_as_accurate(instruction_set, factor):
    rng = np.random.default_rng(5)
    w = random_weight(rng, 256, 128, 3)
    x = np.array(random_rows(rng, 9, 256)) * np.where(np.arange(9) % 3 == 0, factor, 1)[:, None].astype(np.float32)
    y = trellis_linear(mx.array(x), w, config=config())
    assert row_error(y, reference.linear(x.astype(np.float64), w)) <= PRODUCT


def test_zeros_give_zeros(instruction_set):
    w = random_weight(np.random.default_rng(6), 256, 128, 3)
    assert not np.array(trellis_linear(mx.zeros((3, 256)), w, config=config())).any()


def test_a_layer_rounds_where_its_accuracy_allows_it():
    rng = np.random.default_rng(7)
    w, x = random_weight(rng, 256, 128, 3), random_rows(rng, 5, 256)
    layer = TrellisLinear(w)
    exact = layer(x)
    assert layer.accuracy == "float32" and mx.array_equal(exact, trellis_linear(x, w))
    assert row_error(exact, reference.linear(as64(x), w)) <= TOLERANCE["float32"]
    layer.accuracy = "half"
    rounded = layer(x)
    assert not mx.array_equal(rounded, exact)
    assert row_error(rounded, reference.integer_linear(as64(x), w)) <= SAME
    assert layer.explain(5).problem.accuracy == "half" and not layer.explain(5).config.use_fp32_acc
    layer.accuracy = "float32"
    assert mx.array_equal(layer(x), exact)
    with pytest.raises(ValueError, match="accuracy must be one of float32, half, got 'fast'"):
        layer.accuracy = "fast"
