"""Gradients of fused experts with every activation, against differences of the float64 reference."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_marlin import kernels, trellis_swiglu
from tests.support import cases
from tests.support.references import reference_experts

# Of the activations that have a bound, about a third of the values lie beyond it.
NUMBERS = {"alpha": 1.3, "limit": 2.5}
_STEP = 1e-6  # in float64, of rows about 3 long: rounding and curvature are both far below the tolerance


@pytest.mark.parametrize("activation", kernels.ACTIVATIONS)
def test_gradient_is_the_derivative(activation):
    case = cases.Case(4, "mul1", "float32", 5, "padded", activation, mix="bits", bias=True, top_k=2, scores=True)
    x, indices, scores = case.inputs()
    rng = np.random.default_rng(0)
    cotangent = rng.standard_normal(x.shape)

    def fused(x, scores):
        return trellis_swiglu(x, indices, case.bank(), scores=scores, activation=activation, **NUMBERS)

    _, gradients = mx.vjp(fused, [x, scores], [mx.array(cotangent.astype(np.float32))])
    given = [np.array(a).astype(np.float64) for a in (x, scores)]
    for i, gradient in enumerate(gradients):
        direction = rng.standard_normal(given[i].shape)
        ends = []
        for sign in (1, -1):
            moved = [a + sign * _STEP * direction if i == j else a for j, a in enumerate(given)]
            y = reference_experts(moved[0], np.array(indices), case.experts(), moved[1], activation, **NUMBERS)
            ends.append(np.sum(y * cotangent))
        wanted = (ends[0] - ends[1]) / (2 * _STEP)
        assert np.sum(np.array(gradient) * direction) == pytest.approx(wanted, rel=1e-3)
