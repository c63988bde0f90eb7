"""Non-finite and huge rows, MLX's transforms, streams and threads, gradients."""

import re
import subprocess
import sys
import threading

import mlx.core as mx
import numpy as np
import pytest

from mlx_marlin import kernels, trellis_linear
from tests.support import cases, references

ROWS = (2, 17)
ACTIVATIONS = cases.AXES["activation"]


def call(case: cases.Case, x, indices, scores, **keywords) -> mx.array:
    return case.run(x, indices, scores, **keywords)


def make(activation: str, dtype: str = "float32", rows: int = 5, **options) -> cases.Case:
    moe = {"top_k": 2, "scores": True, "mix": "both"} if activation != "none" else {}
    return cases.Case(3, "mul1", dtype, rows, "blocks", activation, **{**moe, **options})


def bits_of(a: mx.array) -> bytes:
    return bytes(memoryview(mx.contiguous(a).view(mx.uint8)))


# Values of x.


@pytest.mark.parametrize("value", (np.nan, np.inf, -np.inf))
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("rows", ROWS)
def test_a_non_finite_row_keeps_to_itself(rows, dtype, activation, value, instruction_set):
    """Its own output is non-finite everywhere; no bit of another row changes."""
    case = make(activation, dtype, rows)
    x, indices, scores = case.inputs()
    clean = np.array(call(case, x, indices, scores).astype(mx.float32))
    for bad in {0, rows // 2, rows - 1}:
        poisoned = mx.array(x)
        poisoned[bad, 77] = value
        y = np.array(call(case, poisoned, indices, scores).astype(mx.float32))
        assert not np.isfinite(y[bad]).any()
        others = np.arange(rows) != bad
        np.testing.assert_array_equal(y[others].view(np.uint32), clean[others].view(np.uint32))


def test_a_non_finite_score_keeps_to_its_row():
    case = make("silu")
    x, indices, scores = case.inputs()
    clean = np.array(call(case, x, indices, scores))
    scores[2, 1] = np.nan
    y = np.array(call(case, x, indices, scores))
    assert not np.isfinite(y[2]).any()
    np.testing.assert_array_equal(np.delete(y, 2, 0), np.delete(clean, 2, 0))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
@pytest.mark.parametrize("some", (False, True), ids=("all_rows", "one_row"))
def test_rows_scaled_by_a_million_stay_within_tolerance(some, dtype, activation, instruction_set):
    case = make(activation, dtype)
    x, indices, scores = case.inputs()
    factor = np.ones((case.rows, 1), np.float32)
    factor[2 if some else slice(None)] = 1e6
    x = (x.astype(mx.float32) * mx.array(factor)).astype(x.dtype)
    y = call(case, x, indices, scores)
    assert np.isfinite(np.array(y.astype(mx.float32))).all()
    with np.errstate(over="ignore"):  # exp(-gate) in the reference: its inverse is 0
        cases.check(case, y, (x, indices, scores))


@pytest.mark.parametrize("activation", [a for a in ACTIVATIONS if a != "swiglu_oai"])
def test_zero_rows_give_zeros(activation):
    # gpt-oss's activation too is 0 at gate = 0, but it is used with biases only.
    case = make(activation)
    _, indices, scores = case.inputs()
    assert not np.array(call(case, mx.zeros((case.rows, 256)), indices, scores)).any()


# Sizes.


@pytest.mark.parametrize("activation", ("none", "silu"))
def test_more_rows_than_16_bits_count(activation):
    case = cases.Case(3, "mul1", "float32", 70_000, "block", activation)
    inputs = case.inputs()
    cases.check(case, call(case, *inputs), inputs)


_PEAK_MEMORY = """
import resource, sys
import mlx.core as mx, numpy as np
from mlx_marlin import TrellisWeight, trellis_linear
mx.set_default_device(mx.cpu)
words = np.random.default_rng(0).integers(0, 1 << 16, (256, 256, 32), np.uint16).view(np.int16)
w = TrellisWeight(words, np.ones(4096, np.float16), np.ones(4096, np.float16), "mul1")
x = mx.ones((int(sys.argv[1]), 4096), mx.float16)
loss = lambda x: trellis_linear(x, w).astype(mx.float32).sum()
mx.eval(trellis_linear(mx.zeros((1, 4096)), w))  # starts the workers
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
mx.eval(trellis_linear(x, w), mx.grad(loss)(x))
grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
print(grown * (1 if sys.platform == "darwin" else 1024))
"""


@pytest.mark.parametrize("rows", (1, 64))
def test_no_weight_matrix_is_made(rows):
    """The process grows by less than a quarter of the matrix in half precision (32 MiB), forward and backward."""
    run = subprocess.run([sys.executable, "-c", _PEAK_MEMORY, str(rows)], check=True, capture_output=True, text=True)
    assert int(run.stdout) < 8 << 20


# Layouts of x.


@pytest.mark.parametrize("activation", ("none", "silu"))
@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_x_of_any_layout(activation, dtype):
    case = make(activation, dtype)
    x, indices, scores = case.inputs()
    expected = bits_of(call(case, x, indices, scores))
    layouts = {
        "transposed": mx.contiguous(x.T).T,
        "strided rows": mx.stack([x, -x], axis=1)[:, 0],
        "strided columns": mx.stack([x, -x], axis=-1)[..., 0],
        "reversed twice": mx.contiguous(x[::-1])[::-1],
        "offset": mx.concatenate([-x[:1], x])[1:],
    }
    for name, same in layouts.items():
        assert bits_of(call(case, same, indices, scores)) == expected, name


def test_a_broadcast_row():
    case = make("none")
    x, _, _ = case.inputs()
    row = mx.broadcast_to(x[:1], (5, 256))
    y = trellis_linear(row, case.weight())
    assert len({bits_of(y[i]) for i in range(5)}) == 1


# Transforms.


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shapeless", (False, True))
def test_compile(activation, shapeless):
    def f(x, *rest):
        return 2 * call(make(activation), x, *(rest or (None, None)))

    compiled = mx.compile(f, shapeless=shapeless)
    for rows in (5, 2, 5, 0):
        inputs = [a for a in make(activation, rows=rows).inputs() if a is not None]
        assert bits_of(compiled(*inputs)) == bits_of(f(*inputs))


def test_compile_keeps_configs_apart():
    case = make("silu")
    inputs = case.inputs()
    names = [kernels.make_name(variant) for variant in kernels.VARIANTS]
    both = mx.compile(lambda x, i, s: [call(case, x, i, s, config=name) for name in names])
    for name, y in zip(names, both(*inputs)):
        assert bits_of(y) == bits_of(call(case, *inputs, config=name))


def test_equal_calls_are_merged_by_compile_and_different_ones_are_not(tmp_path):
    case, other, linear = make("silu"), make("gelu_tanh"), make("none")
    x, indices, scores = case.inputs()

    def twice_and_once(x, i, s):
        experts = call(case, x, i, s) + call(case, x, i, s) + call(other, x, i, s)
        linears = call(linear, x, None, None) + call(linear, x, None, None) + call(linear, x + 1, None, None)
        return experts, linears

    compiled = mx.compile(twice_and_once)
    for got, expected in zip(compiled(x, indices, scores), twice_and_once(x, indices, scores)):
        assert bits_of(got) == bits_of(expected)
    mx.export_to_dot(str(tmp_path / "graph.dot"), *compiled(x, indices, scores))
    graph = (tmp_path / "graph.dot").read_text()
    nodes = [
        len(set(re.findall(rf'"?(\w+)"? \[label ="{name}"', graph))) for name in ("TrellisSwiglu", "TrellisLinear")
    ]
    assert nodes == [2, 2], graph


def test_async_eval():
    case = make("silu", rows=17)
    inputs = case.inputs()
    expected = bits_of(call(case, *inputs))
    pending = [call(case, *inputs) for _ in range(8)]
    mx.async_eval(*pending)
    assert {bits_of(y) for y in pending} == {expected}


def test_several_streams():
    case = make("silu", rows=17)
    inputs = case.inputs()
    expected = bits_of(call(case, *inputs))
    streams = [mx.new_stream(mx.cpu) for _ in range(3)]
    results = [call(case, *inputs, stream=streams[i % 3]) for i in range(12)]
    mx.eval(results)
    assert {bits_of(y) for y in results} == {expected}


def test_a_result_feeds_a_call_on_another_stream():
    case = make("silu", rows=3, scores=False)
    x, indices, scores = make("silu", rows=3).inputs()
    one, two = mx.new_stream(mx.cpu), mx.new_stream(mx.cpu)
    chain = [call(case, x, indices, scores) for _ in range(1)]
    for s in (one, two, one):
        chain.append(call(case, chain[-1] / 16, indices, scores, stream=s))
    same = call(case, x, indices, scores)
    for _ in range(3):
        same = call(case, same / 16, indices, scores)
    assert bits_of(chain[-1]) == bits_of(same)


def test_several_threads():
    """Every thread has a stream of its own; all share the workers."""
    selected = [make("silu", rows=17), make("none", rows=3), make("gelu_tanh", "bfloat16", rows=8)]
    prepared = [(case, case.inputs()) for case in selected]
    mx.eval([[a for a in inputs if a is not None] for _, inputs in prepared])
    expected = [bits_of(call(case, *inputs)) for case, inputs in prepared]
    wrong = []

    def work(first: int):
        stream = mx.new_stream(mx.cpu)
        for i in range(6):
            case, inputs = prepared[(first + i) % 3]
            y = call(case, *inputs, stream=stream)
            with mx.stream(stream):
                if bits_of(y) != expected[(first + i) % 3]:
                    wrong.append((first, i))

    workers = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_other_transforms_say_that_they_are_not_supported():
    case = make("silu", rows=3)
    x, indices, scores = case.inputs()
    linear = make("none", rows=3)
    with pytest.raises(ValueError, match=r"(?i)trellis.?swiglu"):
        mx.eval(mx.jvp(lambda x: call(case, x, indices, scores), [x], [x]))
    with pytest.raises(ValueError, match=r"(?i)trellis.?linear"):
        mx.eval(mx.jvp(lambda x: call(linear, x, None, None), [x], [x]))
    with pytest.raises(ValueError, match=r"(?i)trellis.?linear"):
        mx.eval(mx.vmap(lambda x: call(linear, x, None, None))(x))
    with pytest.raises(ValueError, match=r"(?i)trellis.?swiglu"):
        mx.eval(mx.vmap(lambda x, i, s: call(case, x, i, s))(x[:, None], indices[:, None], scores[:, None]))


# Gradients.


@pytest.mark.parametrize("dims", cases.DIMS)
@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_the_gradient_of_a_linear_is_the_transposed_product(dims, dtype):
    case = cases.Case(3, "mcg", dtype, 5, dims, "none", bias=True)
    x, _, _ = case.inputs()
    size = cases.DIMS[dims][1]
    ct = cases.random_rows(np.random.default_rng(1), 5, size, dtype)
    (grad,) = mx.vjp(lambda x: trellis_linear(x, case.weight()), [x], [ct])[1]
    assert grad.dtype == x.dtype
    unit = np.eye(cases.DIMS[dims][0])
    w = references.reference_linear(unit, case.weight()) - references.reference_linear(0 * unit, case.weight())
    assert cases.row_error(grad, np.array(ct.astype(mx.float32)).astype(np.float64) @ w.T) <= case.tolerance


@pytest.mark.parametrize("scores_given", (False, True))
@pytest.mark.parametrize("dims", ("blocks", "padded", "odd"))
@pytest.mark.parametrize("activation", kernels.ACTIVATIONS)
def test_the_gradient_of_the_experts_is_the_slope_of_the_reference(activation, dims, scores_given):
    case = cases.Case(4, "mul1", "float32", 3, dims, activation, mix="both", bias=True, top_k=2, scores=scores_given)
    x, indices, scores = case.inputs()
    rng = np.random.default_rng(2)
    x = mx.array(rng.standard_normal(x.shape).astype(np.float32))
    experts = case.experts()

    def reference(x64, s64):
        return references.reference_experts(x64, np.array(indices), experts, s64, activation)

    x64 = np.array(x).astype(np.float64)
    s64 = np.array(scores).astype(np.float64) if scores_given else None
    ct = rng.standard_normal(reference(x64, s64).shape).astype(np.float32)
    arguments = [x, scores] if scores_given else [x]
    grads = mx.vjp(lambda x, s=None: call(case, x, indices, s), arguments, [mx.array(ct)])[1]
    direction = rng.standard_normal(x64.shape)
    # Central differences in float64: 1e-6 balances the two errors, each near 1e-9.
    step = 1e-6
    slope = ((reference(x64 + step * direction, s64) - reference(x64 - step * direction, s64)) * ct).sum() / (2 * step)
    size = np.linalg.norm(np.array(grads[0])) * np.linalg.norm(direction)
    assert abs((np.array(grads[0]) * direction).sum() - slope) < 1e-5 * size
    if scores_given:
        slots = references.reference_experts(x64, np.array(indices), experts, None, activation)
        assert cases.row_error(grads[1], np.einsum("rsh,rh->rs", slots, ct)) < 2e-5


@pytest.mark.parametrize("dtype", ("float16", "bfloat16"))
def test_gradients_have_the_dtype_of_x(dtype):
    case = make("silu", dtype)
    x, indices, scores = case.inputs()
    loss = lambda x, s: call(case, x, indices, s).astype(mx.float32).square().sum()
    gx, gs = mx.grad(loss, argnums=(0, 1))(x / 16, scores)
    assert (gx.dtype, gs.dtype) == (x.dtype, mx.float32)
    exact = mx.grad(loss)((x / 16).astype(mx.float32), scores)
    assert cases.row_error(gx, np.array(exact).astype(np.float64)) < 4 * case.tolerance


def test_gradients_under_compile():
    case = make("silu")
    x, indices, scores = case.inputs()
    f = mx.grad(lambda x: call(case, x, indices, scores).sum())
    assert bits_of(mx.compile(f)(x)) == bits_of(f(x))
