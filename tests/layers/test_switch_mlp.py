"""TrellisSwitchMLP and trellis_mlp against mlx-lm's SwitchMLP over the dequantized weights."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models.switch_layers import SwitchMLP

from mlx_marlin import (
    ExpertBank,
    MixedBpwMoEDispatcher,
    TrellisSwitchGLU,
    TrellisSwitchMLP,
    codec,
    kernels,
    trellis_mlp,
    trellis_swiglu,
)
from tests.support import cases

HIDDEN, WIDTH = 192, 384
ACTIVATIONS = {"relu_squared": nn.ReLU2(), "gelu_tanh": nn.GELU(approx="precise"), "silu": nn.SiLU()}


def weights_of(seed: int = 3, bias: bool = True) -> dict:
    rng = np.random.default_rng(seed)
    made = cases.random_experts(rng, HIDDEN, WIDTH, cases.expert_formats(2.5, "mul1", "both"), bias)
    return {"fc1": made["up"], "fc2": made["down"]}


def dense_of(weights: dict, activation: nn.Module) -> SwitchMLP:
    """mlx-lm's own layer with the same weights."""
    dense = SwitchMLP(HIDDEN, WIDTH, cases.EXPERTS, activation, bias=True)
    for name, listed in weights.items():
        dense[name].weight = mx.stack([mx.array(codec.dequantize(w).T) for w in listed])
        dense[name].bias = mx.stack([w.bias[: w.out_features].astype(mx.float32) for w in listed])
    return dense


def rows_of(rng, *shape: int) -> mx.array:
    return mx.array(rng.standard_normal(shape).astype(np.float32))


@pytest.fixture
def rng():
    return np.random.default_rng(5)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(), (3,), (2, 40)], ids=str)
def test_calls_and_results_are_those_of_switch_mlp(rng, activation, shape):
    """Of 64 indices on mlx-lm sorts them."""
    weights = weights_of()
    layer = TrellisSwitchMLP(**weights, activation=activation)
    x, indices = rows_of(rng, *shape, HIDDEN), mx.array(rng.integers(0, cases.EXPERTS, (*shape, 2)), mx.uint32)
    y = layer(x, indices)
    assert y.shape == (*shape, 2, HIDDEN) and y.dtype == mx.float32
    wanted = dense_of(weights, ACTIVATIONS[activation])(x, indices)
    assert cases.row_error(y, np.array(wanted).astype(np.float64)) < 1e-4
    assert layer(x.astype(mx.bfloat16), indices).dtype == mx.bfloat16


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_are_those_of_switch_mlp(rng, activation):
    weights = weights_of()
    layer, dense = TrellisSwitchMLP(**weights, activation=activation), dense_of(weights, ACTIVATIONS[activation])
    x, scores = rows_of(rng, 6, HIDDEN), rows_of(rng, 6, 2)
    indices = mx.array(rng.integers(0, cases.EXPERTS, (6, 2)), mx.uint32)
    cotangent = rows_of(rng, 6, HIDDEN)
    _, ours = mx.vjp(lambda x, scores: layer(x, indices, scores), [x, scores], [cotangent])
    combined = lambda x, scores: (dense(x, indices) * scores[..., None]).sum(axis=-2)
    _, wanted = mx.vjp(combined, [x, scores], [cotangent])
    for ours_of, wanted_of in zip(ours, wanted):
        assert cases.row_error(ours_of, np.array(wanted_of).astype(np.float64)) < 1e-4


def test_parameters_survive_and_stay_frozen():
    layer, other = TrellisSwitchMLP(**weights_of(3)), TrellisSwitchMLP(**weights_of(4))
    parameters = tree_flatten(layer.parameters())
    assert {key.partition(".")[0] for key, _ in parameters} == {"fc1", "fc2"}
    layer.unfreeze()
    assert not tree_flatten(layer.trainable_parameters())
    other.update(tree_unflatten(parameters))
    x, indices = mx.ones((1, HIDDEN)), mx.array([[0, 3]])
    np.testing.assert_array_equal(np.array(other(x, indices)), np.array(layer(x, indices)))


def test_what_it_says_of_itself():
    layer = TrellisSwitchMLP(**weights_of(), activation="relu_squared")
    assert layer.num_experts == cases.EXPERTS and {len(bits) for bits in layer.expert_bits} == {2}
    problem = layer.problem(7, mx.float32, "cpu", top_k=2)
    assert (problem.kind, problem.rows, problem.hidden, problem.intermediate) == ("mlp", 7, HIDDEN, 384)
    assert problem.bits == tuple(sorted(set(layer.expert_bits))) and problem.activation == "relu_squared"
    assert problem.side_by_side == 1 and problem.shapes == ((HIDDEN, 384), (384, HIDDEN))
    layer.top_k = 2
    said = str(layer.explain(1))
    assert said.startswith("mlp ") and "top-k 2" in said and "swiglu" not in said
    assert "(fc1): TrellisExperts(5 experts, 192 -> 384, bits=1..6)" in repr(layer)


def test_the_dispatcher_runs_it(rng):
    weights = weights_of()
    bank = ExpertBank(None, weights["fc1"], weights["fc2"])
    for layer_or_bank in (bank, TrellisSwitchMLP(bank=bank)):
        dispatcher = MixedBpwMoEDispatcher(layer_or_bank, enable_ab_testing=False)
        x, indices = rows_of(rng, 4, HIDDEN), rng.integers(0, cases.EXPERTS, (4, 2))
        scores = mx.array(rng.dirichlet(np.ones(2), 4).astype(np.float32))
        y, metadata = dispatcher.dispatch(x, indices, scores)
        layer = dispatcher.layer
        assert cases.row_error(y, np.array(layer(x, mx.array(indices), scores)).astype(np.float64)) < 1e-5
        assert metadata["active_bits"] == [bank.up.bits[e] for e in np.unique(indices)]


def test_banks_and_activations_that_do_not_go_with_it():
    weights = weights_of()
    ungated = ExpertBank(None, weights["fc1"], weights["fc2"])
    gated = ExpertBank(weights["fc1"], weights["fc1"], weights["fc2"])
    x, indices = mx.zeros((1, HIDDEN)), mx.array([[0]])
    with pytest.raises(ValueError, match=r"\[trellis_swiglu\] the experts of the bank have no gate; use trellis_mlp"):
        trellis_swiglu(x, indices, ungated)
    with pytest.raises(ValueError, match=r"\[trellis_mlp\] the experts of the bank have a gate; use trellis_swiglu"):
        trellis_mlp(x, indices, gated)
    with pytest.raises(ValueError, match="have no gate; use TrellisSwitchMLP"):
        TrellisSwitchGLU(bank=ungated)
    with pytest.raises(ValueError, match="have a gate; use TrellisSwitchGLU"):
        TrellisSwitchMLP(bank=gated)
    with pytest.raises(ValueError, match="pass either fc1 and fc2"):
        TrellisSwitchMLP(weights["fc1"])
    for make in (lambda: trellis_mlp(x, indices, ungated, activation="swiglu_oai"),):
        with pytest.raises(ValueError, match="activation without a gate must be one of .*, got 'swiglu_oai'"):
            make()
    with pytest.raises(ValueError, match="up must map hidden to one intermediate size and down must map it back"):
        ExpertBank(None, weights["fc1"], weights["fc1"])
    with pytest.raises(ValueError, match=r"\[trellis_mlp\].*5"):
        trellis_mlp(x, mx.array([[5]]), ungated)
    with pytest.raises(ValueError, match="kind 'mlp' does not go with activation 'swiglu_oai'"):
        kernels.Problem.mlp(HIDDEN, WIDTH, activation="swiglu_oai")


def test_a_value_that_is_no_number_stays_one():
    """max(NaN, 0) is 0 in some orders of its arguments."""
    layer = TrellisSwitchMLP(**weights_of(), activation="relu_squared")
    y = np.array(layer(mx.full((1, HIDDEN), float("nan")), mx.array([[0, 1]])))
    assert np.isnan(y).all()
