"""Attention and dense products on the CPU, against float64 and beside MLX's own."""

from __future__ import annotations

import functools
import itertools

import mlx.core as mx
import numpy as np
import pytest

from mlx_marlin import _ext, ops, set_num_threads
from tests.support.attention import MASKS, SHAPES, Case, Shape, exact, random_case, reference

# float32: sums of up to 1500 terms; the rest: half an ulp of the result.
LIMITS = {mx.float32: 1e-5, mx.float16: 1e-3, mx.bfloat16: 8e-3}


def run(case: Case) -> mx.array:
    return ops.attention(*case[:3], scale=case.scale, mask=case.mask, sinks=case.sinks)


def composed(case: Case) -> mx.array:
    return mx.fast.scaled_dot_product_attention(*case[:3], scale=case.scale, mask=case.mask, sinks=case.sinks)


def error(y: mx.array, want: np.ndarray) -> float:
    """Of the largest value; zeros (a sink beside keys that are all masked) are compared with 0.1."""
    return float(np.abs(exact(y) - want).max() / max(np.abs(want).max(), 0.1))


@pytest.fixture(params=_ext.instruction_sets())
def instruction_set(request):
    _ext.set_instruction_set(request.param)
    yield request.param
    _ext.set_instruction_set("auto")


@pytest.fixture
def threads():
    before = _ext.num_threads()
    yield set_num_threads
    set_num_threads(before)


@functools.cache
def all_cases(dtype: mx.Dtype) -> list[tuple[str, Case, np.ndarray]]:
    rng, made = np.random.default_rng(0), []
    for shape, mask, sinks in itertools.product(SHAPES, MASKS, (False, True)):
        case = random_case(rng, shape, dtype, mask, sinks)
        made.append((f"{shape}, mask {mask}, sinks {sinks}", case, reference(case)))
    return made


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
def test_values(instruction_set, dtype):
    for what, case, want in all_cases(dtype):
        assert error(run(case), want) <= LIMITS[dtype], what


@pytest.mark.parametrize("mask", MASKS)
def test_no_less_exact_than_mlx(mask):
    """Root of the mean square of the errors, which single values that come out exactly do not decide."""
    rng, ours, theirs = np.random.default_rng(1), 0.0, 0.0
    for shape in SHAPES:
        case = random_case(rng, shape, mx.float32, mask, False)
        want = reference(case)
        ours += np.mean((exact(run(case)) - want) ** 2)
        theirs += np.mean((exact(composed(case)) - want) ** 2)
    assert ours**0.5 <= 1.1 * theirs**0.5


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_same_bits_on_any_number_of_threads(shape, threads):
    case = random_case(np.random.default_rng(2), shape, mx.float32, "causal", True)
    results = []
    for count in (1, 2, 5):
        threads(count)
        results.append(np.array(run(case)))
    assert all((results[0] == other).all() for other in results[1:])


def test_any_strides():
    """Features apart, repeated batches, reversed positions: read where they lie."""
    rng = np.random.default_rng(3)
    x = mx.array(rng.standard_normal((2, 3, 24, 40), np.float32))
    views = (
        mx.swapaxes(x, 2, 3)[:, :, 5:29:2],
        mx.broadcast_to(x[:1, :1, ::-1, :24], (2, 1, 24, 24)),
        mx.swapaxes(x[:, :1, :, :24], 2, 3),
    )
    case = Case(*views, 0.2, "causal", None)
    assert error(run(case), reference(case)) <= LIMITS[mx.float32]


@pytest.mark.parametrize("mask", ["bool", "causal"])
def test_a_query_that_may_look_at_nothing_looks_at_all_alike(mask):
    case = random_case(np.random.default_rng(4), SHAPES[6], mx.float32, mask, False)
    if mask == "bool":
        case = case._replace(mask=mx.zeros_like(case.mask))
    assert error(run(case), reference(case)) <= LIMITS[mx.float32]
    assert error(composed(case), reference(case)) <= LIMITS[mx.float32]


def test_infinite_and_undefined_scores():
    case = random_case(np.random.default_rng(5), SHAPES[4], mx.float32, "additive", False)
    blocked = mx.where(mx.arange(70) < 60, -mx.inf, case.mask)  # whole blocks of keys, the first ones
    case = case._replace(mask=blocked)
    assert error(run(case), reference(case)) <= LIMITS[mx.float32]
    undefined = case.values.at[0, 0, 65, 3].add(mx.nan)
    y = np.array(run(case._replace(values=undefined)))
    assert np.isnan(y[0, :3, :, 3]).all() and not np.isnan(np.delete(y[0, :3], 3, axis=-1)).any()
    assert not np.isnan(y[0, 3:]).any()
    assert np.isnan(np.array(run(case._replace(queries=case.queries * mx.nan)))).all()


def test_masked_keys_weigh_nothing(instruction_set):
    """Exactly: also large values are left out, and products with weights are not denormal."""
    case = random_case(np.random.default_rng(10), SHAPES[4], mx.float32, "bool", False)
    allowed = mx.arange(70) >= 60
    huge = mx.where(allowed[:, None], case.values, 1e30)
    for mask in (allowed, mx.where(allowed, 0.0, -mx.inf)):
        wanted, got = (np.array(run(case._replace(mask=mask, values=v))) for v in (case.values, huge))
        assert (wanted == got).all()
    nowhere = case._replace(mask=mx.full(70, -mx.inf))
    assert np.isnan(np.array(run(nowhere))).all() and np.isnan(np.array(composed(nowhere))).all()


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("mask", MASKS)
def test_gradients_and_transforms_are_those_of_mlx(mask, sinks):
    case = random_case(np.random.default_rng(6), SHAPES[1], mx.float32, mask, sinks)
    arrays = [a for a in case if isinstance(a, mx.array) and a.dtype != mx.bool_]

    def replaced(values: list[mx.array]) -> Case:
        left = iter(values)
        return Case(*(next(left) if isinstance(a, mx.array) and a.dtype != mx.bool_ else a for a in case))

    def gradients(attend):
        return mx.grad(lambda values: (attend(replaced(values)) ** 2).sum())(arrays)

    for mine, theirs in zip(gradients(run), gradients(composed)):
        np.testing.assert_allclose(np.array(mine), np.array(theirs), atol=1e-4)
    tangents = [mx.cos(a) for a in arrays]
    mine, theirs = (mx.jvp(lambda *a, f=f: f(replaced(list(a))), arrays, tangents)[1][0] for f in (run, composed))
    np.testing.assert_allclose(np.array(mine), np.array(theirs), atol=1e-4)
    several = mx.stack([case.queries, 2 * case.queries])
    batched = mx.vmap(lambda q: run(case._replace(queries=q)))(several)
    for y, queries in zip(batched, several):
        assert error(y, reference(case._replace(queries=queries))) <= LIMITS[mx.float32]
    compiled = mx.compile(lambda q: run(case._replace(queries=q)))(case.queries)
    assert (compiled == run(case)).all()


def test_sinks_that_the_dtype_cannot_hold_are_left_to_mlx():
    case = random_case(np.random.default_rng(8), SHAPES[1], mx.float16, None, True)
    assert ops.attention_runs(*case[:3], sinks=case.sinks)
    assert not ops.attention_runs(*case[:3], sinks=case.sinks.astype(mx.float32))
    wide = case._replace(queries=case.queries.astype(mx.float32), keys=case.keys.astype(mx.float32))
    wide = wide._replace(values=case.values.astype(mx.float32))
    assert error(run(wide), reference(wide)) <= LIMITS[mx.float32]


def test_more_keys_than_tasks_of_the_shortest_length():
    case = random_case(np.random.default_rng(9), Shape(1, 4, 2, 40, 70_000, 4, 4), mx.float32, "causal", True)
    assert error(run(case), reference(case)) <= LIMITS[mx.float32]


@pytest.mark.parametrize(
    "change",
    [
        {"queries": mx.zeros((1, 8, 5, 15))},
        {"queries": mx.zeros((1, 7, 5, 16))},
        {"queries": mx.zeros((8, 5, 16))},
        {"keys": mx.zeros((1, 2, 7, 16), mx.float16)},
        {"values": mx.zeros((1, 2, 6, 16))},
        {"keys": mx.zeros((1, 2, 0, 16)), "values": mx.zeros((1, 2, 0, 16))},
        {"mask": mx.zeros((5, 6))},
        {"mask": mx.zeros((5, 7), mx.int32)},
        {"mask": "full"},
        {"mask": ""},
        {"sinks": mx.zeros(7)},
        {"sinks": mx.zeros(8, mx.int32)},
        {"sinks": [0.0] * 8},
    ],
    ids=str,
)
def test_the_rest_is_left_to_mlx(change):
    case = random_case(np.random.default_rng(7), SHAPES[1], mx.float32, None, False)._replace(**change)
    arguments = dict(mask=case.mask, sinks=case.sinks)
    assert not ops.attention_runs(*case[:3], **arguments)
    with pytest.raises(ValueError, match=r"\[attention\] wants queries"):
        run(case)
