"""TrellisLinear and TrellisSwitchGLU against nn.Linear's and mlx-lm SwitchGLU's contract."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.switch_layers import SwitchLinear

from mlx_marlin import ExpertBank, Problem, TrellisLinear, TrellisSwitchGLU, codec
from mlx_marlin.weights.synthetic import random_weight
from tests.support.cases import expert_formats, random_experts, row_error
from tests.support.references import reference_experts, reference_linear


@pytest.fixture
def rng():
    return np.random.default_rng(3)


@pytest.fixture
def weight(rng):
    return random_weight(rng, 192, 320, 3, "mul1", bias=True)


@pytest.fixture
def experts(rng):
    return random_experts(rng, 128, 256, expert_formats(2, "mcg", "both"))


@pytest.fixture
def glu(experts):
    return TrellisSwitchGLU(**experts)


def x_of(rng, *shape, dtype=mx.float32):
    return mx.array(rng.standard_normal(shape).astype(np.float32)).astype(dtype)


def test_linear_is_nn_linear(rng, weight):
    """Same call and result as nn.Linear holding the dequantized weight."""
    dense = nn.Linear(192, 320)
    dense.weight = mx.array(codec.dequantize(weight).T)
    dense.bias = weight.bias[:320].astype(mx.float32)
    layer = TrellisLinear(weight)
    for shape in [(192,), (1, 192), (2, 3, 192), (0, 192)]:
        x = x_of(rng, *shape)
        y = layer(x)
        assert y.shape == (*shape[:-1], 320) and y.dtype == mx.float32
        assert row_error(y, np.array(dense(x)).astype(np.float64)) < 1e-4


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_results_have_the_dtype_of_x(rng, weight, glu, dtype):
    assert TrellisLinear(weight)(x_of(rng, 2, 192, dtype=dtype)).dtype == dtype
    x, indices = x_of(rng, 2, 128, dtype=dtype), mx.array([[0, 1], [4, 2]])
    assert glu(x, indices).dtype == dtype
    assert glu(x, indices, scores=mx.ones((2, 2), mx.float32)).dtype == dtype


@pytest.mark.parametrize("leading", [(5,), (2, 3), (1, 1, 4), (0,)])
def test_switch_glu_shapes_and_values(rng, experts, glu, leading):
    x = x_of(rng, *leading, 128)
    indices = mx.array(rng.integers(0, 5, (*leading, 2)).astype(np.uint32))
    y = glu(x, indices)
    assert y.shape == (*leading, 2, 128)
    flat = np.array(x).reshape(-1, 128).astype(np.float64), np.array(indices).reshape(-1, 2)
    expected = reference_experts(*flat, experts)
    assert row_error(y.reshape(-1, 2, 128), expected) < 2e-5


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.int32, np.int64, np.uint64])
def test_indices_of_any_integer_dtype(rng, glu, dtype):
    x, indices = x_of(rng, 3, 128), rng.integers(0, 5, (3, 2))
    expected = np.array(glu(x, mx.array(indices.astype(np.uint32))))
    assert np.array_equal(np.array(glu(x, indices.astype(dtype))), expected)
    assert np.array_equal(np.array(glu(x, mx.array(indices.astype(dtype)) + 0)), expected)


def test_scores_combine_in_slot_order(rng, glu):
    """Bit for bit the float32 sum over the slots, taken in order."""
    x, indices = x_of(rng, 4, 128), mx.array(rng.integers(0, 5, (4, 3)).astype(np.uint32))
    scores = mx.array(rng.random((4, 3)).astype(np.float32))
    slots, weights = np.array(glu(x, indices)), np.array(scores)
    expected = reference = np.einsum("rs,rsh->rh", weights.astype(np.float64), slots.astype(np.float64))
    assert row_error(glu(x, indices, scores=scores), expected) < 1e-6
    order = [2, 0, 1]
    shuffled = glu(x, indices[:, mx.array(order)], scores=scores[:, mx.array(order)])
    assert row_error(shuffled, reference) < 1e-6


def test_children_and_parameters(glu):
    assert set(glu.children()) == {"gate_proj", "up_proj", "down_proj"}
    names = {name for name, _ in tree_flatten(glu.parameters())}
    assert names == {f"{p}_proj.{n}" for p in ("gate", "up", "down") for n in ("trellis", "formats", "suh", "svh")}
    assert not any(hasattr(module, "bits") or hasattr(module, "to_quantized") for module in glu.modules())


@pytest.mark.parametrize("kind", ["linear", "glu"])
def test_parameters_survive_save_and_load(rng, tmp_path, weight, experts, kind):
    """A layer of the same structure that loads the saved file computes the same bits."""
    if kind == "linear":
        make = lambda seed: TrellisLinear(random_weight(np.random.default_rng(seed), 192, 320, 3, "mul1", bias=True))
        call = lambda layer: layer(x_of(np.random.default_rng(0), 3, 192))
    else:
        formats = expert_formats(2, "mcg", "both")
        make = lambda seed: TrellisSwitchGLU(**random_experts(np.random.default_rng(seed), 128, 256, formats))
        call = lambda layer: layer(x_of(np.random.default_rng(0), 3, 128), mx.array([[0, 1], [2, 3], [4, 0]]))
    one, other = make(1), make(2)
    assert not np.array_equal(np.array(call(one)), np.array(call(other)))
    one.save_weights(str(tmp_path / "layer.safetensors"))
    other.load_weights(str(tmp_path / "layer.safetensors"))
    assert np.array_equal(np.array(call(one)), np.array(call(other)))


def test_loaded_formats_decide(rng, experts, glu):
    """Experts saved in another order carry their bit widths with them."""
    turned = {name: weights[::-1] for name, weights in experts.items()}
    glu.update(TrellisSwitchGLU(**turned).parameters())
    x = x_of(rng, 2, 128)
    expected = reference_experts(np.array(x).astype(np.float64), np.array([[0, 3], [1, 2]]), turned)
    assert row_error(glu(x, mx.array([[0, 3], [1, 2]])), expected) < 2e-5


def test_mismatching_parameters_are_refused(rng, glu):
    glu.gate_proj.formats = mx.full((5,), 8, mx.uint32)
    with pytest.raises(ValueError, match="codes has .* words"):
        glu(x_of(rng, 1, 128), mx.array([[0]]))


def test_packed_words_stay_frozen(weight, glu):
    for layer in (TrellisLinear(weight), glu):
        layer.unfreeze()
        assert not tree_flatten(layer.trainable_parameters())
        layer.train()


def test_gradient_flows_through_frozen_layers(rng, weight):
    model = nn.Sequential(nn.Linear(192, 192), TrellisLinear(weight))
    loss, grads = nn.value_and_grad(model, lambda m, x: m(x).square().mean())(model, x_of(rng, 4, 192))
    mx.eval(loss, grads)
    assert mx.abs(grads["layers"][0]["weight"]).max().item() > 0


def test_expert_children_are_callable(rng, experts, glu):
    x, indices = x_of(rng, 2, 128), mx.array([[0, 4], [3, 3]])
    y = glu.gate_proj(x, indices)
    for row, slots in enumerate(indices.tolist()):
        for slot, expert in enumerate(slots):
            expected = reference_linear(np.array(x[row : row + 1]), experts["gate"][expert])
            assert row_error(y[row, slot][None], expected) < 2e-5


@pytest.mark.parametrize("rows", (1, 3, 40))
def test_expert_children_are_switch_linears(rng, experts, glu, rows):
    """With the shapes that mlx-lm's SwitchGLU passes: a row for all slots, a row for each, and sorted."""
    x, slots = x_of(rng, 2, rows, 128), x_of(rng, 2, rows, 3, 128)
    indices = mx.array(rng.integers(0, 5, (2, rows, 3)).astype(np.uint32))
    switch = SwitchLinear(128, 256, 5, bias=False)
    switch.weight = mx.array(np.stack([codec.dequantize(w).T for w in experts["gate"]]))
    calls = [
        (mx.expand_dims(x, (-2, -3)), indices),
        (mx.expand_dims(slots, -2), indices),
        (x.reshape(-1, 1, 128), mx.sort(indices[..., 0].reshape(-1))),
    ]
    for arguments in calls:
        y, expected = glu.gate_proj(*arguments, sorted_indices=True), np.array(switch(*arguments)).astype(np.float64)
        assert row_error(y, expected) < 1e-5
    with pytest.raises(ValueError, match=r"x must have shape \[..., 1, 128\], got"):
        glu.gate_proj(mx.zeros((2, rows, 1, 2, 128)), indices)
    with pytest.raises(ValueError, match="indices must have the shape of x without its last axis"):
        glu.gate_proj(mx.zeros((2, rows, 2, 1, 128)), indices)


@pytest.mark.parametrize("shapeless", (False, True))
def test_expert_children_under_compile(rng, glu, shapeless):
    compiled = mx.compile(lambda x, i: glu.gate_proj(x, i), shapeless=shapeless)
    for rows, top_k in ((6, 2), (2, 2), (5, 3)):
        x, indices = x_of(rng, rows, 128), mx.array(rng.integers(0, 5, (rows, top_k)).astype(np.uint32))
        assert np.array_equal(np.array(compiled(x, indices)), np.array(glu.gate_proj(x, indices)))
    grad = mx.compile(mx.grad(lambda x, i: glu.gate_proj(x, i).square().sum()))
    expected = mx.grad(lambda x, i: glu.gate_proj(x, i).square().sum())(x, indices)
    assert row_error(grad(x, indices), np.array(expected).astype(np.float64)) < 1e-6


def test_lora_wraps_a_trellis_linear(rng, weight):
    pytest.importorskip("mlx_lm")
    layer = TrellisLinear(weight)
    lora = layer.to_lora(r=4)
    x = x_of(rng, 2, 192)
    assert row_error(lora(x), np.array(layer(x)).astype(np.float64)) < 1e-6
    assert {name for name, _ in tree_flatten(lora.trainable_parameters())} == {"lora_a", "lora_b"}


def test_unknown_children_are_kept(glu):
    glu.norm = nn.RMSNorm(128)
    assert "norm.weight" in dict(tree_flatten(glu.parameters()))


def test_problem_of_a_layer(weight, glu):
    problem = Problem.of(TrellisLinear(weight), 3, mx.float16, "cpu")
    assert (problem.kind, problem.rows, problem.hidden, problem.intermediate) == ("linear", 3, 192, 320)
    assert problem.bits == ((3,),) and problem.bias
    problem = Problem.of(glu, 7, mx.float32, "cpu")
    assert (problem.kind, problem.rows, problem.experts, problem.activation) == ("swiglu", 7, 5, "silu")
    assert len(problem.bits) == 5 and problem.codebooks == ("3inst", "mcg", "mul1")


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({}, "pass either"),
        ({"gate": []}, "pass either"),
        ({"activation": "relu"}, "activation must be one of silu"),
        ({"activation": "swiglu_oai", "limit": None}, "limit must be a number, got None"),
        ({"activation": "swiglu_step", "limit": 0}, "limit of swiglu_step must be positive and finite, got 0"),
        ({"activation": "situ", "alpha": -1.0}, "alpha of situ must be positive and finite, got -1.0"),
        ({"bank": []}, "bank must be an ExpertBank, got list"),
    ],
)
def test_bad_arguments(experts, arguments, message):
    if "activation" in arguments:
        arguments = {**experts, **arguments}
    with pytest.raises(ValueError, match=message):
        TrellisSwitchGLU(**arguments)


def test_bank_argument(rng, experts, glu):
    x, indices = x_of(rng, 1, 128), mx.array([[1, 2]])
    same = TrellisSwitchGLU(bank=ExpertBank(**experts))(x, indices)
    assert np.array_equal(np.array(same), np.array(glu(x, indices)))
