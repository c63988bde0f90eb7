"""Layers whose parameters are replaced, cast, captured, copied, or first used by several threads at once."""

import copy
import pickle
import threading
import time

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_marlin import (
    ExpertBank,
    GridWeight,
    TrellisLinear,
    TrellisSwitchGLU,
    TrellisWeight,
    _ext,
    ops,
    trellis_linear,
    trellis_swiglu,
)
from mlx_marlin.layers import state
from mlx_marlin.weights.experts import ExpertStack
from mlx_marlin.weights.synthetic import random_weight
from tests.support.cases import expert_formats, random_experts, row_error
from tests.support.references import reference_experts, reference_linear

FORMATS = expert_formats(2, "mcg", "both")


def make_weight(seed: int = 0, bits: int = 3):
    return random_weight(np.random.default_rng(seed), 192, 320, bits, "mul1", bias=True)


def make_experts(seed: int = 0, formats=FORMATS, bias: bool = True):
    return random_experts(np.random.default_rng(seed), 128, 256, formats, bias=bias)


X = mx.array(np.random.default_rng(1).standard_normal((3, 192)).astype(np.float32))
ROWS = mx.array(np.random.default_rng(2).standard_normal((3, 128)).astype(np.float32))
INDICES = mx.array([[0, 1], [2, 3], [4, 0]])
mx.eval(X, ROWS, INDICES)

# Kind -> how to make a layer from a seed, and what to call it with.
KINDS = {
    "linear": (lambda seed=0: TrellisLinear(make_weight(seed)), (X,)),
    "glu": (lambda seed=0: TrellisSwitchGLU(**make_experts(seed)), (ROWS, INDICES)),
}


def result(layer, inputs) -> np.ndarray:
    return np.array(layer(*inputs).astype(mx.float32))


def same_bits(a, b) -> bool:
    return np.array_equal(np.asarray(a).view(np.uint32), np.asarray(b).view(np.uint32))


# Copies.


@pytest.mark.parametrize("used", (False, True))
@pytest.mark.parametrize("how", (copy.copy, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))))
@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_computes_the_same(kind, how, used):
    make, inputs = KINDS[kind]
    layer = make()
    if used:
        result(layer, inputs)
    twin = how(layer)
    assert type(twin) is type(layer) and twin is not layer
    assert same_bits(result(twin, inputs), result(layer, inputs))
    assert twin.explain(3).config == layer.explain(3).config


def test_a_deep_copy_has_parameters_of_its_own():
    layer = KINDS["linear"][0]()
    expected = result(layer, (X,))
    twin = copy.deepcopy(layer)
    twin.suh = -twin.suh
    assert not same_bits(result(twin, (X,)), expected) and same_bits(result(layer, (X,)), expected)


def test_copies_are_not_adapted_with_the_original():
    from mlx_marlin import adapt

    model = nn.Sequential(KINDS["linear"][0]())
    adaptation = adapt(model)
    try:
        twin = copy.deepcopy(model)
        assert model.layers[0]._adaptation is not None and twin.layers[0]._adaptation is None
    finally:
        adaptation.stop()


@pytest.mark.parametrize("used", (False, True))
@pytest.mark.parametrize("how", (copy.deepcopy, lambda w: pickle.loads(pickle.dumps(w))))
def test_weights_and_banks_are_copied(how, used):
    w, experts = make_weight(), make_experts()
    bank = ExpertBank(**experts)
    if used:
        mx.eval(trellis_linear(X, w), trellis_swiglu(ROWS, INDICES, bank))
    assert same_bits(trellis_linear(X, how(w)), trellis_linear(X, w))
    assert same_bits(trellis_swiglu(ROWS, INDICES, how(bank)), trellis_swiglu(ROWS, INDICES, bank))


def test_subclasses_take_keywords_and_are_copied():
    layer = Scaled(make_weight(), scale=2.0)
    twin = pickle.loads(pickle.dumps(layer))
    assert twin.scale == 2.0 and same_bits(result(twin, (X,)), 2 * result(TrellisLinear(make_weight()), (X,)))


class Scaled(TrellisLinear):
    """A subclass with an argument of its own."""

    def __init__(self, w, *, scale: float):
        super().__init__(w)
        self.scale = scale

    def __call__(self, x):
        return self.scale * super().__call__(x)


@pytest.mark.parametrize("make", (TrellisLinear, lambda w: Scaled(w, scale=1.0)))
def test_a_grid_weight_has_a_layer_of_its_own(make):
    with pytest.raises(ValueError, match=r"GridWeight.*whose layer is GridLinear\(w\)"):
        make(GridWeight.__new__(GridWeight))


# Casts of the whole model.


@pytest.mark.parametrize("dtype", (mx.float32, mx.float16, mx.bfloat16))
@pytest.mark.parametrize("kind", KINDS)
def test_set_dtype_changes_no_scale(kind, dtype):
    """The scales stay what they were: a cast to bfloat16 and back would lose three bits of each."""
    make, (x, *rest) = KINDS[kind]
    layer = make()
    inputs = (x.astype(dtype), *rest)
    expected, scales = result(layer, inputs), {k: v for k, v in tree_flatten(layer.parameters()) if "h" in k[-3:]}
    model = nn.Sequential(layer)
    model.set_dtype(dtype)
    y = layer(*inputs)
    assert y.dtype == dtype
    biases_rounded = 2e-2 if dtype == mx.bfloat16 else 1e-3
    assert row_error(y, expected.astype(np.float64)) <= (biases_rounded if dtype != mx.float32 else 0)
    after = dict(tree_flatten(layer.parameters()))
    for name, before in scales.items():
        assert after[name].dtype == mx.float16 and mx.array_equal(after[name], before)


def test_scales_of_other_dtypes_are_taken_where_they_are_exact():
    one, other = KINDS["linear"][0](1), KINDS["linear"][0](2)
    one.update({k: v.astype(mx.float32) if k != "trellis" else v for k, v in other.parameters().items()})
    assert same_bits(result(one, (X,)), result(other, (X,)))
    one.suh = one.suh.astype(mx.float32) * (1 + 2**-20)
    with pytest.raises(ValueError, match="suh holds .*float32 values that half precision does not"):
        one(X)


# Replaced parameters.


def test_parameters_of_any_layout():
    glu = KINDS["glu"][0]()
    expected = result(glu, (ROWS, INDICES))
    for child in (glu.gate_proj, glu.down_proj):
        for name in ("suh", "svh", "bias"):
            child[name] = mx.contiguous(child[name].T).T
        child.formats = mx.stack([child.formats, child.formats], axis=-1)[:, 0]
        child.trellis = mx.stack([child.trellis, child.trellis], axis=-1)[:, 0]
    assert same_bits(result(glu, (ROWS, INDICES)), expected)
    layer = TrellisLinear(make_weight())
    expected = result(layer, (X,))
    layer.suh = mx.stack([layer.suh, layer.suh], axis=-1)[:, 0]
    layer.trellis = mx.contiguous(layer.trellis.T).T
    assert same_bits(result(layer, (X,)), expected)


def test_weights_of_any_layout():
    w = make_weight()
    strided = type(w)(
        mx.contiguous(w.trellis.T).T, mx.stack([w.suh, w.suh], axis=-1)[:, 0], w.svh, w.codebook, w.bias, 192, 320
    )
    for f in (lambda w: trellis_linear(X, w), lambda w: TrellisLinear(w)(X)):
        assert same_bits(f(strided), f(w))


@pytest.mark.parametrize("child", ("gate_proj", "up_proj", "down_proj"))
def test_projections_with_other_experts_are_refused(child):
    """The index of an expert that one projection does not have must not be followed."""
    glu = KINDS["glu"][0]()
    mx.eval(glu(ROWS, INDICES))
    fewer = TrellisSwitchGLU(**make_experts(1, FORMATS[:3]))
    glu[child].update(fewer[child].parameters())
    with pytest.raises(ValueError, match="for the same experts; got gate .* experts of"):
        glu(ROWS, INDICES)
    with pytest.raises(ValueError, match="for the same experts; got gate .* experts of"):
        glu.explain(1)


def test_the_extension_refuses_projections_that_do_not_fit():
    glu, fewer = KINDS["glu"][0](), TrellisSwitchGLU(**make_experts(1, FORMATS[:3]))
    wider = TrellisSwitchGLU(**random_experts(np.random.default_rng(1), 128, 384, FORMATS))
    native = _ext.KernelConfig(_ext.Variant.decode, 1, 128, 1, True)
    for other in (fewer, wider):
        gate, up, down = glu.gate_proj.stack, other.up_proj.stack, glu.down_proj.stack
        with pytest.raises(ValueError, match=r"must have the same experts.* got gate 5 of \[128, 256\], up"):
            arrays = gate.arrays + up.arrays + down.arrays
            infos = gate.info, up.info, down.info
            _ext.trellis_swiglu(ROWS, INDICES.astype(mx.uint32), None, arrays, *infos, 128, 0, 1.0, 1.0, native, False)


def test_a_layer_with_unusable_parameters_can_be_printed():
    layer = TrellisLinear(make_weight())
    layer.load_weights([("trellis", mx.zeros((1,), mx.uint32))], strict=False)
    assert "TrellisLinear(192 -> 320" in repr(layer)
    with pytest.raises(ValueError, match=r"trellis must have shape \[k/16, n/16, 8\*K\], got \[1\]"):
        layer(X)
    glu = KINDS["glu"][0]()
    glu.gate_proj.formats = mx.full((5,), 16, mx.uint32)
    assert "5 experts, 128 -> 256, bits=8" in repr(glu)


def test_the_table_of_a_layer_is_bounded():
    """Ever new numbers of rows leave nothing behind, and are computed as the first ones are."""
    layer = TrellisLinear(random_weight(np.random.default_rng(0), 128, 128, 3))
    x = mx.random.normal((300, 128))
    wanted = np.array(layer(x))
    for rows in range(1, 301):
        y = layer(x[:rows])
        assert len(layer._derived.configs._resolved[2]) <= state._MAX_CONFIGS
    np.testing.assert_array_equal(np.array(y), wanted)


def test_a_copy_keeps_the_accuracy():
    layer = TrellisLinear(random_weight(np.random.default_rng(0), 128, 128, 3))
    layer.accuracy = "half"
    for copied in (copy.copy(layer), copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert copied.accuracy == "half" and mx.array_equal(copied(mx.ones((3, 128))), layer(mx.ones((3, 128))))


def test_a_running_call_keeps_the_configs_of_its_weights(monkeypatch, resolve=ops.resolve):
    """A call that was checked before the weights changed gets its own weights' config, not the later ones'."""
    layer, seen = TrellisLinear(make_weight(bits=3)), []
    monkeypatch.setattr(
        ops, "resolve", lambda op, problem, config: seen.append(problem.bits) or resolve(op, problem, config)
    )
    old = ops.check_linear(X, layer.stack)
    layer.update(TrellisLinear(make_weight(bits=5)).parameters())
    new = ops.check_linear(X, layer.stack)
    configs = layer._derived.configs
    for call in (old, new, new, old):
        configs.choose(call)
    assert seen == [((3,),), ((5,),), ((3,),)]


# Captured by a compiled function.


@pytest.mark.parametrize("kind", KINDS)
def test_a_compiled_function_sees_new_parameters(kind):
    make, inputs = KINDS[kind]
    layer, other = make(1), make(2)
    compiled = mx.compile(lambda *a: layer(*a), inputs=[layer.state])
    assert same_bits(compiled(*inputs), result(layer, inputs))
    layer.update(other.parameters())
    assert same_bits(compiled(*inputs), result(other, inputs))


def test_a_compiled_function_sees_new_formats():
    layer, experts = TrellisSwitchGLU(**make_experts(bias=False)), make_experts(3, bias=False)
    compiled = mx.compile(lambda *a: layer(*a), inputs=[layer.state])
    mx.eval(compiled(ROWS, INDICES))
    turned = {name: weights[::-1] for name, weights in experts.items()}  # as many words, cut elsewhere
    layer.update(TrellisSwitchGLU(**turned).parameters())
    expected = reference_experts(np.array(ROWS).astype(np.float64), np.array(INDICES), turned)
    assert row_error(compiled(ROWS, INDICES), expected) < 2e-5


def test_formats_that_a_compiled_function_was_not_made_for_give_nan():
    layer = TrellisSwitchGLU(**make_experts(formats=expert_formats(3, "mcg", "uniform")))
    compiled = mx.compile(lambda *a: layer(*a), inputs=[layer.state])
    assert np.isfinite(np.array(compiled(ROWS, INDICES))).all()
    before = layer.gate_proj.formats
    for word in (6 | 2 << 8, 8 | 1 << 8, 4 | 1 << 8, 16 | 1 << 8, 0xFFFFFFFF):  # another codebook; other widths
        layer.gate_proj.formats = mx.concatenate([before[:1], mx.array([word], mx.uint32), before[2:]])
        assert np.isnan(np.array(compiled(ROWS, INDICES))).all()


def test_parameters_of_other_shapes_are_refused_while_tracing():
    layer = TrellisSwitchGLU(**make_experts())
    compiled = mx.compile(lambda *a: layer(*a), inputs=[layer.state])
    mx.eval(compiled(ROWS, INDICES))
    larger = make_experts(1, expert_formats(8, "mcg", "uniform"))
    layer.update(TrellisSwitchGLU(**larger).parameters())
    with pytest.raises(ValueError, match="trellis has shape .* in a traced function, but the layer was last called"):
        compiled(ROWS, INDICES)
    layer.update(TrellisSwitchGLU(**larger).parameters())  # MLX leaves its tracers behind where a trace fails
    mx.eval(layer(ROWS, INDICES))
    expected = reference_experts(np.array(ROWS).astype(np.float64), np.array(INDICES), larger)
    assert row_error(compiled(ROWS, INDICES), expected) < 2e-5


def test_scales_that_were_cast_are_restored_in_a_trace_too():
    layer = TrellisLinear(make_weight())
    expected = result(layer, (X,))
    layer.set_dtype(mx.bfloat16)
    layer.bias = make_weight().bias.astype(mx.float32)
    compiled = mx.compile(lambda x: layer(x), inputs=[layer.state])
    assert same_bits(compiled(X), expected)


# Several threads.


def in_threads(work, count: int = 8) -> list:
    """What ``count`` threads got that all begin at once."""
    barrier, results = threading.Barrier(count), []

    def run():
        barrier.wait()
        try:
            results.append(work())
        except Exception as error:
            results.append(error)

    threads = [threading.Thread(target=run) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def replaced(kind: str):
    """A layer whose parameters were replaced, and not collected yet."""
    make, _ = KINDS[kind]
    layer = make(1)
    layer.update(make(2).parameters())
    return layer


@pytest.mark.parametrize("first", ("weight", "bank", "linear", "glu"))
def test_the_first_use_by_several_threads(first):
    if first in KINDS:
        expected = result(KINDS[first][0](2), KINDS[first][1])
    elif first == "weight":
        expected = np.array(trellis_linear(X, make_weight()))
    else:
        expected = np.array(trellis_swiglu(ROWS, INDICES, ExpertBank(**make_experts())))
    for _ in range(25):
        if first == "weight":
            w = make_weight()
            results = in_threads(lambda w=w: np.array(trellis_linear(X, w)))
        elif first == "bank":
            bank = ExpertBank(**make_experts())
            results = in_threads(lambda bank=bank: np.array(trellis_swiglu(ROWS, INDICES, bank)))
        else:
            layer = replaced(first)
            results = in_threads(lambda layer=layer: np.array(layer(*KINDS[first][1])))
        for got in results:
            assert not isinstance(got, Exception), got
            assert same_bits(got, expected)


def test_a_stack_is_made_once(monkeypatch):
    """Threads that come while it is made wait for it, rather than make another of the same size."""
    make, made = ExpertStack.of.__func__, []

    def slow(cls, *arguments):
        made.append(threading.current_thread())
        time.sleep(0.05)  # the others come meanwhile
        return make(cls, *arguments)

    monkeypatch.setattr(ExpertStack, "of", classmethod(slow))
    w = make_weight()
    in_threads(lambda: np.array(trellis_linear(X, w)))
    assert len(made) == 1


def test_a_weight_that_was_made_in_another_thread():
    """MLX's streams belong to threads: what a weight or a bank holds must not wait for the one it was made in."""

    def make():
        w = make_weight()
        lazy = TrellisWeight(w.trellis + 0, w.suh * 1, w.svh * 1, w.codebook, w.bias[:320] * 1, 192, 320)
        return lazy, ExpertBank(**make_experts())

    ((w, bank),) = in_threads(make, 1)
    assert row_error(trellis_linear(X, w), reference_linear(np.array(X).astype(np.float64), w)) < 2e-5
    assert np.isfinite(np.array(trellis_swiglu(ROWS, INDICES, bank))).all()
