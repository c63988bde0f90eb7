"""Running layers of half rates: whatever is told of them or chooses for them, their values are the codec's."""

import json
from dataclasses import asdict, replace

import mlx.core as mx
import numpy as np
import pytest

import mlx_marlin
from mlx_marlin import MixedBPWAutoTuner, MixedBpwMoEDispatcher, TrellisLinear, TrellisSwitchGLU, kernels, profile
from mlx_marlin.autotune import cli as tune_cli
from mlx_marlin.kernels import Problem
from mlx_marlin.selection.selector import MixedKernelSelector
from mlx_marlin.weights.synthetic import random_weight
from tests.support.cases import TOLERANCE, random_experts, row_error
from tests.support.references import reference_experts, reference_linear
from tests.support.tuning import BASE, DOCUMENT

pytestmark = pytest.mark.usefixtures("tuning_sandbox")

HIDDEN, WIDTH, TOP_K = 256, 128, 2
TRIPLES = ((1.5, 2.5, 3.5), (2.5, 2, 3), (3.5, 1, 8), (2.5, 2, 3))
WIDTHS = (1, 1.5, 2, 2.5, 3, 3.5, 8)


@pytest.fixture(scope="module")
def experts():
    formats = [tuple((bits, "mul1") for bits in triple) for triple in TRIPLES]
    return random_experts(np.random.default_rng(11), HIDDEN, WIDTH, formats)


@pytest.fixture
def glu(experts):
    return TrellisSwitchGLU(**experts)


@pytest.fixture
def weight():
    return random_weight(np.random.default_rng(3), HIDDEN, 384, 2.5)


def call(rows: int, ids=None) -> tuple[mx.array, np.ndarray, mx.array]:
    rng = np.random.default_rng(rows)
    if ids is None:
        ids = np.stack([rng.permutation(len(TRIPLES))[:TOP_K] for _ in range(rows)])
    scores = rng.dirichlet(np.ones(TOP_K), rows).astype(np.float32)
    return mx.array(rng.standard_normal((rows, HIDDEN)).astype(np.float32)), ids, mx.array(scores)


def error(experts, y, x, ids, scores=None) -> float:
    scores = None if scores is None else np.array(scores)
    return row_error(y, reference_experts(np.array(x), ids, experts, scores))


def linear_error(weight, y, x) -> float:
    return row_error(y, reference_linear(np.array(x), weight))


@pytest.mark.parametrize("rows", [1, 4, 17])
def test_explain_tells_what_runs(experts, glu, rows):
    x, ids, _ = call(rows)
    assert error(experts, glu(x, mx.array(ids)), x, ids) <= TOLERANCE["float32"]
    choice = glu.explain(rows)
    assert choice.config == kernels.default(choice.problem) and choice.problem.bits == tuple(sorted(set(TRIPLES)))
    assert choice.problem.widths == WIDTHS


@pytest.mark.parametrize("fp32acc", [False, True])
def test_every_kernel_that_the_dispatcher_tries(experts, glu, fp32acc):
    dispatcher = MixedBpwMoEDispatcher(glu, use_fp32_acc=fp32acc, exploration_rate=1.0)
    x, ids, scores = call(5)
    expected = reference_experts(np.array(x), ids, experts, np.array(scores))
    names = set()
    for _ in range(20):
        y, metadata = dispatcher.dispatch(x, mx.array(ids), scores)
        names.add(metadata["kernel_name"])
        assert row_error(y, expected) <= TOLERANCE["float32"]
    assert len(names) > 1 and metadata["active_bits"] == [TRIPLES[e][1] for e in np.unique(ids)]


def test_experts_of_one_triple_take_its_kernel(experts, glu):
    dispatcher = MixedBpwMoEDispatcher(glu, dict(enumerate(TRIPLES)), enable_ab_testing=False)
    x, ids, scores = call(1, np.array([[1, 3]]))
    y, metadata = dispatcher.dispatch(x, mx.array(ids), scores)
    assert metadata["kernel_name"] == "moe_trellis_swiglu_decode_2p5_2_3" and metadata["active_bits"] == [2, 2]
    assert error(experts, y, x, ids, scores) <= TOLERANCE["float32"]
    with pytest.raises(ValueError, match=r"says \(2, 2, 3\) for expert 1, which has \(2.5, 2, 3\)"):
        MixedBpwMoEDispatcher(glu, {1: (2, 2, 3)})


def test_the_selector_learns_of_them(glu):
    selector = MixedKernelSelector(exploration_rate=0.0)
    problem = glu.explain(1).problem
    name, _ = selector.select_kernel(1, [2.5], gate_bits=1.5, up_bits=2.5, down_bits=3.5, problem=problem)
    assert name == "moe_trellis_swiglu_decode_1p5_2p5_3p5"
    selector.record_latency(name, 1, 0.5, problem)
    assert selector.get_statistics()["tracked_kernels"] == 1


def test_what_the_tuner_found_runs(experts, glu, weight, tmp_path):
    layers = {"linear": TrellisLinear(weight), "experts": glu}
    tuner = MixedBPWAutoTuner()
    results = tuner.benchmark_all(layers, [1, 4], num_warmup=1, num_iter=2, verbose=False)
    assert all(len(timed) > 1 and timed[0].latency_ms > 0 for sizes in results.values() for timed in sizes.values())
    found = tuner.config.problems
    assert {(p.kind, p.rows, p.widths) for p in found} == {
        (kind, rows, widths) for kind, widths in (("linear", (weight.bits,)), ("swiglu", WIDTHS)) for rows in (1, 4)
    }
    assert {e.verdict for e in found.values()} == {"correct"}
    assert {str(key) for key in tuner.config.lookup_table[4][HIDDEN]} == {f"({weight.bits},)", str(WIDTHS)}

    tuner.export_config(tmp_path / "profile.json")
    assert MixedBPWAutoTuner.load_config(tmp_path / "profile.json").config == tuner.config
    profile.use_profile(tmp_path / "profile.json")
    x, ids, _ = call(4)
    for layer in layers.values():
        assert "in the profile" in layer.explain(4).reason and layer.explain(4).tuned
    assert linear_error(weight, layers["linear"](x), x) <= TOLERANCE["float32"]
    assert error(experts, glu(x, mx.array(ids)), x, ids) <= TOLERANCE["float32"]


@pytest.mark.parametrize("bits", [1.5, 2.5, 3.5])
def test_every_config_that_the_tuner_times(bits):
    weight = random_weight(np.random.default_rng(3), HIDDEN, 384, bits)
    layer, (x, _, _) = TrellisLinear(weight), call(4)
    for result in MixedBPWAutoTuner().benchmark_layer(weight, 4, num_warmup=1, num_iter=2):
        assert linear_error(weight, layer.run(x, config=result.config), x) <= TOLERANCE["float32"]


def test_older_profiles_stay_valid(experts, glu, weight, tmp_path):
    """They know whole widths only: half rates run by default beside them, or by what a later run adds."""
    path = tmp_path / "older.json"
    path.write_text(json.dumps(DOCUMENT))
    profile.use_profile(path, allow_foreign=True)
    layer, (x, ids, _) = TrellisLinear(weight), call(4)
    for one in (layer, glu):
        assert not one.explain(4).tuned and one.explain(4).config == kernels.default(one.explain(4).problem)
    assert (
        linear_error(weight, layer(x), x) <= TOLERANCE["float32"]
        and error(experts, glu(x, mx.array(ids)), x, ids) <= TOLERANCE["float32"]
    )

    cell = asdict(replace(BASE, tile_size_m=8))
    document = json.loads(json.dumps(DOCUMENT))
    document["lookup_table"]["4"][str(HIDDEN)] = {str(WIDTHS): cell}
    path.write_text(json.dumps(document))
    profile.use_profile(path, allow_foreign=True)
    assert glu.explain(4).config == kernels.KernelConfig(**cell) and "lookup_table" in glu.explain(4).reason
    assert error(experts, glu(x, mx.array(ids)), x, ids) <= TOLERANCE["float32"]


def test_adaptation_in_use(experts, glu):
    x, ids, _ = call(20)
    expected = reference_experts(np.array(x), ids, experts)
    with mlx_marlin.adapt(glu, exploration=1.0, max_overhead=1.0, seed=0) as adaptation:
        for _ in range(12):
            assert row_error(glu(x, mx.array(ids)), expected) <= TOLERANCE["float32"]
    assert adaptation.stop(forget=True)["timed_calls"] > 0


def test_the_command_and_its_check(capsys):
    shape = ["--shape", f"{HIDDEN},{WIDTH},4,{TOP_K}", "--bits", "1.5,2.5_2_3,3.5"]
    quick = ["--device", "cpu", "--iterations", "2", "--warmup", "1", "--quick", "--batch-sizes", "1"]
    assert tune_cli.main([*shape, *quick, "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["label"] == "swiglu 256x128 4/2 1.5..3.5" and row["verdict"] == "correct"
    problem = Problem.swiglu(
        HIDDEN, WIDTH, experts=4, top_k=TOP_K, bits=((1.5, 1.5, 1.5), (2.5, 2, 3), (3.5, 3.5, 3.5))
    )
    (stored,) = profile.load(profile.default_path("cpu")).problems
    assert replace(stored, codebooks=problem.codebooks) == problem
    assert row["problem"]["bits"] == [
        [1.5, 1.5, 1.5], [2.5, 2, 3], [3.5, 3.5, 3.5]
    ]  # fmt: skip
    assert tune_cli.main(["--check", *shape, *quick]) in (0, 1)  # what it says of the time is the machine's
    out = capsys.readouterr().out
    assert "1.5..3.5" in out and not any(word in out for word in ("infeasible", "wrong", "crash"))
