"""The dispatcher: what it reports, what it learns, and that its output is the layer's."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_marlin import ExpertBank, TrellisSwitchGLU, device, kernels
from mlx_marlin.dispatch.dispatcher import (
    ActivationPredictor,
    MixedBpwMoEDispatcher,
    MixedBpwMoEDispatcherExample,
    estimate_gpu_memory_pressure,
    get_available_kernels,
)
from mlx_marlin.dispatch.pattern import analyze_expert_activation_pattern, get_expert_bits
from tests.support.cases import random_experts

TRIPLES = [(6, 2, 3), (6, 2, 3), (6, 3, 4), (4, 4, 4)]


@pytest.fixture(scope="module")
def bank():
    formats = [tuple((bits, "mul1") for bits in triple) for triple in TRIPLES]
    return ExpertBank(**random_experts(np.random.default_rng(5), 128, 256, formats))


@pytest.fixture
def dispatcher(bank):
    return MixedBpwMoEDispatcher(bank, enable_ab_testing=False)


def call(rows, ids):
    rng = np.random.default_rng(rows)
    ids = np.broadcast_to(ids, (rows, len(ids)))
    scores = mx.array(rng.dirichlet(np.ones(ids.shape[1]), rows).astype(np.float32))
    return mx.array(rng.standard_normal((rows, 128)).astype(np.float32)), mx.array(ids), scores


def test_output_and_metadata(bank, dispatcher):
    x, ids, probs = call(5, [0, 2])
    y, metadata = dispatcher.dispatch(x, ids, probs)
    expected = TrellisSwitchGLU(bank=bank)(x, ids, scores=probs)
    np.testing.assert_allclose(np.array(y), np.array(expected), rtol=2e-5, atol=2e-4)
    assert metadata["kernel_name"] == "moe_trellis_swiglu_prefill4" == metadata["selection_metadata"]["kernel_name"]
    assert metadata["batch_size"] == 5 and metadata["active_bits"] == [2, 3] and metadata["latency_ms"] > 0
    assert 0 < metadata["memory_pressure"] < 1 and metadata["pattern_metrics"]["num_activated_experts"] == 2
    assert set(metadata) == {
        "kernel_name",
        "latency_ms",
        "batch_size",
        "active_bits",
        "memory_pressure",
        "pattern_metrics",
        "selection_metadata",
    }


@pytest.mark.parametrize("shape", [(3, 128), (1, 3, 128), (3, 1, 128)])
def test_leading_shapes(dispatcher, shape):
    x, ids, probs = call(3, [1, 3])
    lead = shape[:-1]
    y, metadata = dispatcher.dispatch(x.reshape(shape), ids.reshape(*lead, 2), probs.reshape(*lead, 2))
    assert y.shape == shape and metadata["batch_size"] == 3


def test_one_row_of_one_triple_takes_the_specialised_kernel(bank):
    for fp32, suffix in ((False, ""), (True, "_fp32acc")):
        dispatcher = MixedBpwMoEDispatcherExample(
            bank, dict(enumerate(TRIPLES)), use_fp32_acc=fp32, exploration_rate=0.0
        )
        x, ids, probs = call(1, [0, 1])
        y, metadata = dispatcher.dispatch(x, ids, probs)
        assert metadata["kernel_name"] == "moe_trellis_swiglu_decode_6_2_3" + suffix
        np.testing.assert_allclose(np.array(y), np.array(dispatcher.layer(x, ids, scores=probs)), rtol=2e-5, atol=2e-4)
        assert (
            dispatcher.dispatch(x, mx.array([[0, 2]]), probs)[1]["kernel_name"] == "moe_trellis_swiglu_decode" + suffix
        )


def test_no_rows(dispatcher):
    y, metadata = dispatcher.dispatch(mx.zeros((0, 128)), mx.zeros((0, 2), mx.uint32), mx.zeros((0, 2)))
    assert y.shape == (0, 128) and metadata["batch_size"] == 0 and metadata["active_bits"] == []
    assert dispatcher.get_statistics()["tracked_kernels"] == 0


def test_latencies_are_recorded_per_problem(dispatcher):
    for _ in range(6):
        metadata = dispatcher.dispatch(*call(4, [0, 3]))[1]
    evidence = dispatcher.dispatch(*call(4, [1, 2]))[1]["selection_metadata"]["candidates"]
    assert evidence[metadata["kernel_name"]]["samples"] == 6
    statistics = dispatcher.get_statistics()
    assert (
        statistics["total_selections"] == 7
        and statistics["explorations"] == 0
        and statistics["selection_accuracy"] == 1.0
    )
    assert (
        dispatcher.dispatch(*call(4, [1]))[1]["selection_metadata"]["candidates"][metadata["kernel_name"]]["samples"]
        == 0
    )


def test_exploration_gives_right_results(bank):
    dispatcher = MixedBpwMoEDispatcher(bank, exploration_rate=1.0)
    x, ids, probs = call(3, [2, 3])
    expected = np.array(dispatcher.layer(x, ids, scores=probs))
    names = set()
    for _ in range(30):
        y, metadata = dispatcher.dispatch(x, ids, probs)
        names.add(metadata["kernel_name"])
        assert metadata["selection_metadata"]["explored"]
        np.testing.assert_allclose(np.array(y), expected, rtol=2e-5, atol=2e-4)
    assert names == {"moe_trellis_swiglu_decode", "moe_trellis_swiglu", "moe_trellis_swiglu_large_batch"}


def test_memory_pressure_reaches_the_selection(dispatcher, monkeypatch):
    monkeypatch.setattr(device, "memory_pressure", lambda: 0.95)
    metadata = dispatcher.dispatch(*call(1, [0, 1]))[1]
    assert metadata["kernel_name"] == "moe_trellis_swiglu" and metadata["memory_pressure"] == 0.95


def test_memory_pressure_is_real():
    before = estimate_gpu_memory_pressure()
    held = mx.zeros((64, 1 << 20))
    mx.eval(held)
    grown = estimate_gpu_memory_pressure() - before
    assert grown == pytest.approx(held.nbytes / device.memory_bytes(device.default_device()), rel=0.05)


@pytest.mark.parametrize(
    "metadata, words",
    [({0: (6, 2, 4)}, "for expert 0, which has"), ({9: (6, 2, 3)}, "expert 9, which does not exist")],
)
def test_wrong_metadata_is_refused(bank, metadata, words):
    with pytest.raises(ValueError, match=words):
        MixedBpwMoEDispatcher(bank, metadata)


def test_bad_arguments(dispatcher):
    x, ids, probs = call(2, [0, 1])
    with pytest.raises(ValueError, match=r"expert_ids must lie in \[0, 4\), got 0 to 7"):
        dispatcher.dispatch(x, mx.array([[0, 1], [2, 7]]), probs)
    with pytest.raises(ValueError, match="integers"):
        dispatcher.dispatch(x, probs, probs)
    with pytest.raises(ValueError, match="scores must have the shape"):
        dispatcher.dispatch(x, ids, probs[:1])
    with pytest.raises(ValueError, match="TrellisSwitchGLU or an ExpertBank, got int"):
        MixedBpwMoEDispatcher(3)


def test_available_kernels_are_all_names():
    names = get_available_kernels()
    assert (
        len(names) == 2 * 2 * (4 + 11**3)
        and {"moe_trellis_swiglu", "moe_trellis_mixed_swiglu_decode_8_1_5_fp32acc"} <= names
    )
    for name in names:
        kernels.parse_name(name)
    names.clear()
    assert get_available_kernels()


def test_expert_bits():
    metadata = dict(enumerate(TRIPLES))
    assert get_expert_bits(mx.array([[3, 0], [2, 0]]), metadata) == [2, 3, 4]
    assert get_expert_bits([1], metadata) == [2] and get_expert_bits(np.zeros((0, 2), np.int32), metadata) == []
    with pytest.raises(ValueError, match=r"active experts \[9\]"):
        get_expert_bits([[1, 9]], metadata)


def test_activation_pattern():
    pattern = analyze_expert_activation_pattern(mx.array([[0, 1], [0, 2], [0, 3], [1, 2]]), 8)
    assert pattern["activation_rate"] == pattern["expert_utilization"] == 0.5
    assert pattern["num_activated_experts"] == 4 and pattern["tokens_per_expert_avg"] == 2.0
    assert pattern["top_expert_share"] == 0.75
    shares = np.array([3, 2, 2, 1]) / 8
    assert pattern["entropy"] == pytest.approx(-(shares * np.log(shares)).sum())
    assert analyze_expert_activation_pattern([[2, 2]], 4)["top_expert_share"] == 1.0
    assert analyze_expert_activation_pattern([[2]], 4)["entropy"] == 0.0
    assert set(analyze_expert_activation_pattern(np.zeros((0, 2), np.int32), 4).values()) == {0}
    with pytest.raises(ValueError, match="got -1 to 2"):
        analyze_expert_activation_pattern([[-1, 2]], 4)


def test_prediction_follows_the_routing(dispatcher):
    assert dispatcher.get_statistics()["prediction_hit_rate"] == 0.0
    assert dispatcher.select_ahead(1, mx.float32, 2)[1]["predicted_experts"] == []
    for _ in range(4):
        dispatcher.dispatch(*call(1, [0, 1]))
    assert dispatcher.get_statistics()["prediction_hit_rate"] == 1.0
    name, metadata = dispatcher.select_ahead(1, mx.float32, 2)
    assert metadata["predicted_experts"] == [0, 1] and name == "moe_trellis_swiglu_decode_6_2_3"
    dispatcher.dispatch(*call(1, [2, 3]))
    assert dispatcher.get_statistics()["prediction_hit_rate"] == 6 / 8
    dispatcher.dispatch(*call(1, [2, 3]))
    dispatcher.dispatch(*call(1, [2, 3]))
    assert dispatcher.select_ahead(1, mx.float32, 2)[1]["predicted_experts"] == [2, 3]


def test_prediction_beats_chance_on_slowly_changing_routing():
    rng, predictor = np.random.default_rng(0), ActivationPredictor(64)
    experts = rng.permutation(64)[:8]
    for _ in range(200):
        if rng.random() < 0.5:
            experts = np.concatenate([experts[1:], rng.choice(np.setdiff1d(np.arange(64), experts), 1)])
        predictor.observe(experts[None])
    assert predictor.hit_rate > 0.85
    uniform = ActivationPredictor(64)
    for _ in range(400):
        uniform.observe(rng.permutation(64)[:8][None])
    assert 0.08 < uniform.hit_rate < 0.18  # chance: 8 of 64


def test_more_rows_predict_more_experts():
    predictor = ActivationPredictor(16)
    rng = np.random.default_rng(1)
    for _ in range(20):
        predictor.observe(np.array([rng.permutation(16)[:2] for _ in range(32)]))
    assert len(predictor.predict(1)) <= 3 and len(predictor.predict(100)) == 16
    assert predictor.hit_rate > 0.95
