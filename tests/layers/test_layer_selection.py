"""Which config a layer's call runs: shared per problem, from shapes only, and explained."""

import copy
import json

import mlx.core as mx
import numpy as np
import pytest

from mlx_marlin import KernelConfig, TrellisLinear, TrellisSwitchGLU, kernels, ops, profile
from mlx_marlin.selection import choices
from mlx_marlin.selection.selector import MixedKernelSelector
from mlx_marlin.weights.synthetic import random_weight
from tests.support.cases import Case, expert_formats, random_experts, row_error

DECODE64 = KernelConfig("moe_trellis_swiglu_decode", 1, 64, 1, True, "decode")


@pytest.fixture(autouse=True)
def untuned(tmp_path, monkeypatch):
    """No profile of this machine, and no feedback from other tests."""
    monkeypatch.setenv("MLX_MARLIN_CACHE_DIR", str(tmp_path / "cache"))
    profile.use_profile(None)
    yield
    profile.use_profile(None)


@pytest.fixture
def feedback():
    """set_feedback that is taken back after the test."""
    given = []

    def give(problem, config, reason="measured"):
        given.append(problem)
        choices.set_feedback(problem, config, reason)

    yield give
    for problem in given:
        choices.set_feedback(problem, None)


@pytest.fixture(scope="module")
def experts():
    return random_experts(np.random.default_rng(0), 128, 256, expert_formats(2, "mul1", "bits"))


@pytest.fixture
def glu(experts):
    return TrellisSwitchGLU(**experts)


@pytest.fixture
def resolved(monkeypatch):
    """The configs that reach the primitives, in order."""
    seen, resolve = [], ops.resolve
    monkeypatch.setattr(ops, "resolve", lambda op, problem, config: seen.append(config) or resolve(op, problem, config))
    return seen


def rows_of(n, dtype=mx.float32):
    return mx.ones((n, 128), dtype), mx.broadcast_to(mx.array([[0, 3]], mx.uint32), (n, 2))


@pytest.mark.parametrize("rows, variant", [(1, "decode"), (2, "prefill4"), (17, "base"), (33, "large_batch")])
def test_the_default_runs_and_is_explained(glu, resolved, rows, variant):
    glu(*rows_of(rows))
    assert [c.kernel_variant for c in resolved] == [variant]
    choice = glu.explain(rows)
    assert choice.config == resolved[0] == kernels.default(choice.problem)
    assert choice.problem.top_k == 2 and choice.problem.rows == rows and not choice.tuned
    assert variant in str(choice) and "no profile knows this problem" in str(choice)


def test_a_kind_of_call_is_resolved_once(glu, resolved):
    for dtype in (mx.float32, mx.float16):
        for _ in range(3):
            glu(*rows_of(4, dtype))
    x, indices = rows_of(4)
    for _ in range(3):
        glu(x, indices, scores=mx.ones((4, 2)))
    assert len(resolved) == 3


def test_explain_follows_the_latest_kind_of_call(glu):
    assert glu.explain(1).problem.top_k == 1
    glu(*rows_of(3, mx.bfloat16))
    problem = glu.explain(8).problem
    assert (problem.rows, problem.top_k, problem.dtype, problem.combine) == (8, 2, "bfloat16", False)
    problem = glu.explain(8, mx.float16, top_k=4, combine=True).problem
    assert (problem.top_k, problem.dtype, problem.combine) == (4, "float16", True)


def test_explain_takes_the_top_k_of_the_model_until_a_call_shows_another(glu):
    glu.top_k = 3
    assert glu.explain(1).problem.top_k == 3 and "for 1 row and top-k 3" in str(glu.explain(1))
    assert glu.explain(1, top_k=1).problem.top_k == 1
    assert copy.deepcopy(glu).explain(1).problem.top_k == 3
    glu(*rows_of(1))
    assert glu.explain(1).problem.top_k == 2
    for wrong in (0, 6):
        with pytest.raises(ValueError, match=rf"top_k must be in \[1, 5\].* got {wrong}"):
            glu.top_k = wrong


def test_the_kernel_of_a_linear_is_not_called_swiglu(glu):
    layer = TrellisLinear(random_weight(np.random.default_rng(1), 128, 128, 3))
    choice = layer.explain(64, mx.float32)
    text = str(choice)
    assert "swiglu" not in text and text.startswith("linear large_batch (variant large_batch, tile ")
    choices.refuse(choice.problem, choice.config, "planted")
    try:
        text = str(layer.explain(64, mx.float32))
        assert "swiglu" not in text and "linear large_batch is refused here: planted" in text
    finally:
        choices._choices.refused.pop(choice.problem)
        choices._choices.table.pop(choice.problem, None)
    assert str(glu.explain(1)).startswith("moe_trellis_swiglu_decode (variant decode, ")
    workers = "threads" if choice.problem.device == "cpu" else "simdgroups"
    assert f"{workers} {choice.config.simdgroups}, " in str(choice)


def test_explain_takes_names_of_dtypes_and_refuses_others(glu):
    assert glu.explain(4, "bfloat16") == glu.explain(4, mx.bfloat16)
    with pytest.raises(ValueError, match="dtype must be one of float32, float16, bfloat16, got .*int32"):
        glu.explain(4, mx.int32)
    with pytest.raises(ValueError, match="rows must be an integer >= 0, got -1"):
        glu.explain(-1)


def test_layers_with_the_same_problem_share_one_choice(experts, feedback, resolved):
    one, other = TrellisSwitchGLU(**experts), TrellisSwitchGLU(**experts)
    x, indices = rows_of(1)
    one(x, indices), other(x, indices)
    feedback(one.explain(1).problem, DECODE64, "measured here")
    for layer in (one, other):
        layer(x, indices)
        assert layer.explain(1).config == DECODE64 and str(layer.explain(1)).endswith("measured here")
        assert layer.explain(2).config != DECODE64
    assert resolved[2:] == [DECODE64, DECODE64]


def test_feedback_that_cannot_run_is_refused(glu):
    with pytest.raises(ValueError, match="cannot run"):
        choices.set_feedback(
            glu.explain(1).problem, KernelConfig("moe_trellis_swiglu_decode", 3, 64, 1, True, "decode")
        )


def test_a_profile_is_used_and_explained(glu, resolved, tmp_path):
    path = tmp_path / "other.json"
    entry = {
        "kernel_name": "moe_trellis_swiglu",
        "tile_size_m": 8,
        "tile_size_n": 64,
        "simdgroups": 1,
        "use_fp32_acc": True,
        "kernel_variant": "base",
    }
    widths = str(glu.explain(1).problem.widths)
    path.write_text(
        json.dumps(
            {
                "device_name": "M4 Max",
                "device_family": "M4",
                "tile_size_mapping": {"2": 128},
                "simdgroup_mapping": {"2": 16},
                "lookup_table": {"1": {"128": {widths: entry}}},
                "adaptation_enabled": True,
                "adaptation_history_len": 100,
                "benchmark_count": 1,
            }
        )
    )
    with pytest.raises(ValueError):
        profile.use_profile(path)
    profile.use_profile(path, allow_foreign=True)
    glu(*rows_of(1))
    assert resolved == [KernelConfig(**entry)] and str(path) in str(glu.explain(1)) and glu.explain(1).tuned
    name, metadata = MixedKernelSelector(exploration_rate=0.0).select_kernel(1, [2, 3], problem=glu.explain(1).problem)
    assert name == "moe_trellis_swiglu" and metadata["reason"].startswith("tuned_table: ")
    profile.use_profile(None)
    glu(*rows_of(1))
    assert resolved[1].kernel_variant == "decode"


def test_selection_never_evaluates(glu):
    """Indices out of range are noticed at evaluation, so a call that looked at them would raise."""
    bad = mx.array([[7, 7]], mx.uint32) + mx.array([[90, 90]], mx.uint32)
    y = glu(mx.ones((1, 128)), bad)
    with pytest.raises(Exception, match="97"):
        mx.eval(y)


def test_compile_fixes_the_config_at_trace_time(glu, feedback, resolved):
    x, indices = rows_of(1)
    compiled = mx.compile(lambda x, indices: glu(x, indices))
    first = np.array(compiled(x, indices))
    assert len(resolved) == 1
    feedback(glu.explain(1).problem, DECODE64)
    assert np.array_equal(np.array(compiled(x, indices)), first) and len(resolved) == 1
    compiled(*rows_of(2))
    assert len(resolved) == 2


def test_new_weights_are_a_new_problem(experts, resolved):
    glu = TrellisSwitchGLU(**experts)
    other = TrellisSwitchGLU(**random_experts(np.random.default_rng(1), 128, 256, expert_formats(4, "mcg", "uniform")))
    glu(*rows_of(1))
    before = glu.explain(1).problem
    glu.update(other.parameters())
    glu(*rows_of(1))
    assert len(resolved) == 2 and glu.explain(1).problem != before and glu.explain(1).problem.widths == (4,)


def test_a_linear_selects_too(feedback, resolved):
    layer = TrellisLinear(random_weight(np.random.default_rng(2), 128, 256, 3))
    x = mx.ones((2, 1, 128))
    layer(x), layer(x)
    assert resolved == [layer.explain(2).config] == [kernels.default(layer.explain(2).problem)]
    feedback(layer.explain(1).problem, DECODE64)
    layer(x[:1])
    assert resolved[-1] == DECODE64


def kernel_names():
    for variant in kernels.VARIANTS:
        for mixed in (False, True):
            for fp32acc in (False, True):
                yield kernels.make_name(variant, mixed=mixed, fp32acc=fp32acc)
                if variant == "decode":
                    yield kernels.make_name(variant, (3, 3, 3), mixed=mixed, fp32acc=fp32acc)


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("name", list(kernel_names()))
def test_every_kernel_that_selection_can_return_runs_and_is_right(name, rows):
    case = Case(3, "mul1", "float32", rows, "block", "silu", "uniform", top_k=2)
    x, indices, _ = case.inputs()
    y = ops.trellis_swiglu(x, indices, case.bank(), config=name)
    assert row_error(y, case.reference(x, indices)) <= case.tolerance
