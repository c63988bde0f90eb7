"""Expert indices: legal ones in any layout, and what becomes of those out of range."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_marlin import TrellisSwitchGLU, trellis_swiglu
from tests.ops.test_numeric_robustness import bits_of, call, make
from tests.support import cases


def named(bad: int, dtype) -> str:
    """How a wrong index of some dtype is named once it is evaluated: as 32 bits, at most."""
    limits = np.iinfo(np.uint32 if dtype == np.uint64 else np.int32)
    if np.dtype(dtype).itemsize == 8:
        bad = int(np.clip(bad, limits.min, limits.max))
    bad %= 1 << 32
    return rf"{bad - (1 << 32)} \(unsigned: {bad}\)" if bad >> 31 else str(bad)


WRONG = [(np.int64, bad) for bad in (cases.EXPERTS, -1, 1 << 31, (1 << 32) - 1, 1 << 32, (1 << 32) + 1, -(1 << 32))] + [
    (np.uint32, (1 << 32) - 1),
    (np.int8, -1),
    (np.uint8, 255),
    (np.int16, -2),
    (np.uint16, 9),
    (np.int32, -1),
]
WRONG += [(np.uint64, (1 << 64) - 1), (np.uint64, 1 << 32)]
# Now and then MLX loses count of its tasks when an evaluation fails, and waits for ever once it has lost eleven: few
# evaluations may fail in one process.
FAILING = [("op", np.int64, 1 << 32), ("layer", np.int64, -1), ("op", np.uint64, 1 << 32), ("layer", np.uint8, 255)]


def refusals():
    for door in ("op", "layer"):
        for dtype, bad in WRONG:
            yield from ((door, known, dtype, bad) for known in ("numpy", "evaluated", "strided"))
    for door, dtype, bad in FAILING:
        yield door, "lazy", dtype, bad


@pytest.mark.parametrize("door, known, dtype, bad", list(refusals()))
def test_an_index_out_of_range_is_refused(door, known, dtype, bad):
    """By the call where the index is known, whatever its layout; else by the evaluation."""
    case = make("silu", scores=False)
    x, indices, _ = case.inputs()
    mx.eval(x)
    wrong = np.array(indices).astype(dtype)
    wrong[3, 1] = bad
    layer = TrellisSwitchGLU(bank=case.bank())
    run = layer if door == "layer" else lambda x, i: trellis_swiglu(x, i, case.bank(), stream=mx.cpu)
    message = "expert index {} at position 7 is out of range: the layer has 5 experts"
    if known == "lazy":
        y = run(x, mx.array(wrong) + mx.array(0, mx.array(wrong).dtype))
        with pytest.raises((ValueError, RuntimeError), match=message.format(named(bad, dtype))):
            mx.eval(y)
    else:
        given = wrong
        if known != "numpy":
            given = mx.array(wrong)
        if known == "strided":  # what argpartition(...)[..., :k] gives
            given = mx.stack([given, given[::-1]], axis=-1)[..., 0]
        mx.eval(given)
        with pytest.raises(ValueError, match=message.format(bad)):
            run(x, given)
    # The stream still works.
    cases.check(case, call(case, x, indices, None), (x, indices, None))


def test_known_indices_are_refused_inside_transforms_too():
    case = make("silu", scores=False)
    x, indices, _ = case.inputs()
    layer, wrong = TrellisSwitchGLU(bank=case.bank()), indices + cases.EXPERTS
    mx.eval(wrong)
    for transform in (mx.grad, mx.compile):
        with pytest.raises(ValueError, match="at position 0 is out of range"):
            transform(lambda x: layer(x, wrong).sum())(x)


def read_after_refusal(case: cases.Case, attempts: int = 3) -> np.ndarray:
    """What the result of a refused evaluation holds, where MLX gives it out: once the error was raised elsewhere."""
    x, indices, scores = case.inputs()
    stream = mx.default_stream(mx.cpu)
    busy = mx.ones((600, 600))
    for _ in range(attempts):
        y = call(case, x, mx.array(indices) + cases.EXPERTS, scores, stream=stream)
        with pytest.raises((ValueError, RuntimeError), match="is out of range"):
            mx.async_eval(mx.matmul(busy, busy, stream=stream))  # so that the refusal comes after the next line
            mx.async_eval(y)
            mx.synchronize(stream)
        try:
            return np.array(y.view(mx.uint16) if y.itemsize == 2 else y)
        except (ValueError, RuntimeError):
            continue
    pytest.skip("MLX never gave the result out")


@pytest.mark.parametrize("scores_given", (False, True))
@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_what_a_refused_evaluation_leaves_is_nan(dtype, scores_given):
    """MLX lets the result be read after the error: it must not show memory of something else."""
    left = read_after_refusal(make("silu", dtype, scores=scores_given))
    if dtype == "float32":
        assert np.isnan(left).all()
    else:
        assert mx.isnan(mx.array(left).view(getattr(mx, dtype))).all().item()


def test_indices_made_from_x_take_no_part_in_the_gradient():
    case = make("silu")
    x, _, scores = case.inputs()

    def route(x):
        return mx.argpartition(x[:, : cases.EXPERTS], kth=-2, axis=-1)[:, -2:]

    for transform in (lambda f: f, mx.compile):
        grad = transform(mx.grad(lambda x: call(case, x, route(x), scores).sum()))(x)
        fixed = mx.grad(lambda x, i: call(case, x, i, scores).sum())(x, route(x))
        assert bits_of(grad) == bits_of(fixed)


def test_an_index_out_of_range_in_a_compiled_function_or_an_async_evaluation():
    case = make("silu")
    x, indices, scores = case.inputs()
    wrong = mx.array(np.array(indices) + cases.EXPERTS) + 0
    compiled = mx.compile(lambda x, i, s: call(case, x, i, s, stream=mx.cpu))
    with pytest.raises((ValueError, RuntimeError), match="is out of range"):
        mx.eval(compiled(x, wrong, scores))
    with pytest.raises((ValueError, RuntimeError), match="is out of range"):
        y = call(case, x, wrong + 0, scores, stream=mx.cpu)
        mx.async_eval(y)
        mx.eval(y)
        mx.synchronize(mx.default_stream(mx.cpu))
    assert bits_of(compiled(x, indices, scores)) == bits_of(call(case, x, indices, scores))


def test_a_legal_index_is_read_from_any_layout():
    case = make("silu", rows=8)
    x, indices, scores = case.inputs()
    expected = bits_of(call(case, x, indices, scores))
    wide = mx.contiguous(mx.stack([indices, indices + 900], axis=-1))
    mx.eval(wide)
    assert bits_of(call(case, x, wide[..., 0], scores)) == expected
    assert bits_of(call(case, x, mx.contiguous(indices.T).T, scores)) == expected
