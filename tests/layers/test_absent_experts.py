"""Layers of which some experts are elsewhere: slots of those cost nothing and are zero."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_marlin import TrellisSwitchGLU, TrellisSwitchMLP
from tests.support import cases

ABSENT = cases.EXPERTS


def make(case: cases.Case):
    layer = TrellisSwitchGLU if case.gated else TrellisSwitchMLP
    numbers = {"alpha": case.alpha, "limit": case.limit} if case.gated else {}
    return layer(bank=case.bank(), activation=case.function, **numbers)


def masked(indices: mx.array, share: float) -> tuple[mx.array, np.ndarray]:
    """The indices with a share of the slots absent, and which."""
    absent = np.random.default_rng(4).random(indices.shape) < share
    return mx.array(np.where(absent, ABSENT, np.array(indices)).astype(np.uint32)), absent


@pytest.mark.parametrize("share", (0.4, 1.0), ids=("some", "all"))
@pytest.mark.parametrize("rows", (1, 5, 64, 300))
@pytest.mark.parametrize(
    "activation, dtype", [("silu", "float32"), ("mlp_relu_squared", "float16"), ("swiglu_oai", "bfloat16")]
)
def test_slots_of_absent_experts_are_zero_and_others_as_they_were(activation, dtype, rows, share):
    case = cases.Case(3, "mul1", dtype, rows, "padded", activation, mix="both", bias=True, top_k=2)
    x, indices, _ = case.inputs()
    layer = make(case)
    wanted = np.array(layer(x, indices).astype(mx.float32))
    some, absent = masked(indices, share)
    layer.absent = True
    got = np.array(layer(x, some).astype(mx.float32))
    assert not got[absent].any() and wanted[absent].all()
    if share < 1:
        np.testing.assert_allclose(got[~absent], wanted[~absent], rtol=1e-2 if dtype != "float32" else 1e-4, atol=1e-3)
    cases.check(case, layer(x, indices), (x, indices, None))  # where none is absent


def test_rows_past_one_batch_of_the_cpu():
    """More rows than one scratch holds, most of one expert absent."""
    case = cases.Case(2, "mul1", "float32", 3000, "block", "silu", top_k=2)
    x, indices, _ = case.inputs()
    layer = make(case)
    wanted = np.array(layer(x, indices))
    some, absent = masked(indices, 0.9)
    layer.absent = True
    got = np.array(layer(x, some))
    assert not got[absent].any()
    np.testing.assert_allclose(got[~absent], wanted[~absent], rtol=1e-4, atol=1e-3)


def test_gradients_take_no_part_of_absent_slots():
    case = cases.Case(3, "mul1", "float32", 9, "padded", "silu", top_k=2)
    x, indices, _ = case.inputs()
    some, absent = masked(indices, 0.4)
    weights = mx.array(np.random.default_rng(1).normal(size=(*indices.shape, x.shape[-1])).astype(np.float32))
    whole, shared = make(case), make(case)
    shared.absent = True
    kept = weights * mx.array(~absent)[..., None]
    wanted = mx.grad(lambda x: (whole(x, indices) * kept).sum())(x)
    for transform in (lambda f: f, mx.compile):
        got = transform(mx.grad(lambda x, i: (shared(x, i) * weights).sum()))(x, some)
        np.testing.assert_allclose(np.array(got), np.array(wanted), rtol=1e-4, atol=1e-4)


def test_what_is_refused():
    case = cases.Case(3, "mul1", "float32", 3, "block", "silu", top_k=2)
    x, indices, _ = case.inputs()
    layer, scores = make(case), mx.ones(indices.shape)
    some = mx.array([[0, ABSENT]] * 3)
    mx.eval(some)
    with pytest.raises(ValueError, match=f"expert index {ABSENT} at position 1 is out of range"):
        layer(x, some)
    layer.absent = True
    with pytest.raises(ValueError, match=f"expert index {ABSENT + 1} at position 0 is out of range"):
        layer(x, np.array([[ABSENT + 1, 0]] * 3))
    with pytest.raises(ValueError, match=r"\[trellis_swiglu\] .* combine outside"):
        layer(x, some, scores)
    lazy = indices + (ABSENT + 1)
    with pytest.raises((ValueError, RuntimeError), match="is out of range"):
        mx.eval(layer(x, lazy))
