"""The case list covers what it says, and its reference agrees with the codec."""

from itertools import combinations, product

import mlx.core as mx
import numpy as np
import pytest

from mlx_marlin import codec
from tests.support import cases
from tests.support.cases import FORMATS
from tests.support.covering import covering_array

AXES = {**cases.AXES, **cases.OPTIONS}


def pairs_of(selection):
    return {pair for case in selection for pair in combinations(((a, getattr(case, a)) for a in AXES), 2)}


def test_the_selection_covers_every_pair():
    selection = cases.pairwise()
    every, computing = pairs_of(selection), pairs_of(c for c in selection if c.rows)
    assert all(cases.legal({a: getattr(c, a) for a in AXES}) for c in selection)
    for (a, left), (b, right) in combinations(AXES.items(), 2):
        for values in product(left, right):
            pair = tuple(zip((a, b), values))
            seen = every if ("rows", 0) in pair else computing
            assert pair in seen or not cases.legal(dict(pair)), f"no case has {pair}"


def test_the_axes_need_no_exception_but_the_formats():
    for (a, left), (b, right) in combinations(cases.AXES.items(), 2):
        for values in product(left, right):
            assert cases.legal(dict(zip((a, b), values))) or ((a, b) == ("bits", "codebook") and values not in FORMATS)


def test_half_rates_are_cases_of_mul1_only():
    for bits, codebook in product(codec.WIDTHS, codec.CODEBOOKS):
        legal = codebook == "mul1" or type(bits) is int
        assert cases.legal({"bits": bits, "codebook": codebook}) == ((bits, codebook) in FORMATS) == legal


def test_the_selection_is_small_and_fixed():
    largest = sorted(len(v) for v in cases.AXES.values())[-2:]
    assert largest[0] * largest[1] <= len(cases.pairwise()) < 2 * largest[0] * largest[1]
    assert covering_array(AXES, cases.legal) == covering_array(AXES, cases.legal)


@pytest.mark.slow
def test_the_full_product_is_full():
    expected = len(FORMATS)
    for axis, values in cases.AXES.items():
        expected *= 1 if axis in ("bits", "codebook") else len(values)
    assert len({tuple(getattr(c, a) for a in cases.AXES) for c in cases.full()}) == expected


def test_names_are_distinct():
    assert len({str(c) for c in cases.pairwise()}) == len(cases.pairwise())
    assert len({str(c) for c in cases.full()}) == len(cases.full())


def test_a_mix_has_different_formats_in_one_expert_and_between_experts():
    formats = cases.expert_formats(2, "mcg", "both")
    for p in range(3):
        assert len({expert[p] for expert in formats}) == cases.EXPERTS
    assert all(len({bits for bits, _ in expert}) == 3 for expert in formats)
    assert formats[0][0] == (2, "mcg")
    for mix in ("bits", "both"):
        formats = cases.expert_formats(2.5, "mul1", mix)
        assert formats[0][0] == (2.5, "mul1") and {f for expert in formats for f in expert} <= set(FORMATS)
        assert {1.5, 2.5, 3.5} < {bits for expert in formats for bits, _ in expert}


@pytest.mark.parametrize("dims", cases.DIMS)
def test_the_reference_agrees_with_dequantize(dims):
    case = cases.Case(3, "mcg", "float32", 5, dims, "none", bias=True)
    w = case.weight()
    x, _, _ = case.inputs()
    bias = np.array(w.bias.astype(mx.float32))[: w.out_features]
    product = np.array(x).astype(np.float64) @ codec.dequantize(w) + bias
    assert cases.row_error(product, case.reference(x)) < 1e-6


def test_the_reference_is_the_sum_over_slots():
    case = cases.Case(2, "mul1", "float32", 3, "padded", "silu", top_k=2, scores=True, mix="both", bias=True)
    x, indices, scores = case.inputs()
    slots = case.reference(x, indices)
    assert slots.shape == (3, 2, 192)
    combined = (np.array(scores)[..., None] * slots).sum(axis=1)
    np.testing.assert_allclose(case.reference(x, indices, scores), combined, rtol=1e-12)


def test_row_error_looks_at_single_rows():
    expected = np.ones((100, 8))
    actual = expected.copy()
    actual[7] *= 1.5
    assert cases.row_error(actual, expected) == pytest.approx(0.5)
    actual[7, 3] = np.nan
    assert cases.row_error(actual, expected) == np.inf
    assert cases.row_error(np.zeros((1, 4)), np.zeros((1, 4))) == 0
    assert cases.row_error(np.ones((1, 4)), np.zeros((1, 4))) == np.inf
    with pytest.raises(AssertionError, match="shape"):
        cases.row_error(np.ones((2, 4)), np.ones((1, 4)))
