"""The benchmark's contenders compute what they claim to compute, and its results are stored as they should be."""

import importlib.util
import json

import mlx.core as mx
import numpy as np
import pytest

from mlx_marlin import _ext
from tests.support import cases

RATES = {"clock_ghz": 1.0, "fma_gflops": 1.0, "read_gbs": 1.0}
pytest.importorskip("mlx_lm", reason="mlx-lm is not installed: pip install 'mlx_marlin[lm]'")


@pytest.fixture
def shape():
    from bench.cpu.shape import Shape

    return Shape(hidden=256, intermediate=512, experts=4, top_k=2)


def swiglu(x, gate, up, down):
    g, u = x @ gate, x @ up
    return (g / (1 + np.exp(-g)) * u) @ down


@pytest.mark.parametrize("bits", (2, 3, 4))
def test_the_affine_peer_is_a_quantized_switch_glu(shape, bits):
    from bench.cpu.peers import AffinePeer

    rng = np.random.default_rng(0)
    peer = AffinePeer(shape, bits, rng)
    x, routing = shape.inputs(rng, 3), shape.routings(rng, 3, 1)[0]
    y = np.array(peer.layer(mx.array(x), mx.array(routing)))
    dense = [
        np.array(mx.dequantize(p.weight, p.scales, p.biases, group_size=64, bits=bits))
        for p in (peer.layer.gate_proj, peer.layer.up_proj, peer.layer.down_proj)
    ]
    assert [d.shape for d in dense] == [(4, 512, 256), (4, 512, 256), (4, 256, 512)]
    for row, slots in enumerate(routing):
        for slot, e in enumerate(slots):
            expected = swiglu(x[row].astype(np.float64), *(d[e].T for d in dense))
            assert cases.row_error(y[row, slot][None], expected[None]) < 1e-4
    peer.prepare(x, [routing])[0]()


@pytest.mark.skipif(
    importlib.util.find_spec("xllamacpp") is None, reason="xllamacpp is not installed: ggml's peer needs it"
)
@pytest.mark.parametrize("type_name", ("Q2_K", "Q3_K", "Q4_K"))
def test_the_ggml_peer_computes_the_layer(shape, type_name):
    from bench.cpu.peers import GgmlPeer

    rng = np.random.default_rng(0)
    peer = GgmlPeer(shape, type_name, rng, 2)
    x, routing = shape.inputs(rng, 3), shape.routings(rng, 3, 1)[0]
    y = peer.result(x, routing)
    for row, slots in enumerate(routing):
        for slot, e in enumerate(slots):
            expected = swiglu(x[row], *(peer.dequantize(p, e) for p in range(3)))
            # ggml rounds activations to 8 bits.
            assert cases.row_error(y[row, slot][None], expected[None]) < 0.05


@pytest.mark.parametrize("bits", ("3", "mixed"))
def test_ours_is_measured_and_stored(shape, bits, tmp_path, monkeypatch):
    from bench.cpu import contenders, layer

    rng = np.random.default_rng(0)
    monkeypatch.setattr(contenders.device, "last_level_cache", lambda: 1 << 20)
    make = lambda: layer.MarlinContender(shape, bits, "mul1", _ext.instruction_sets()[-1], rng, 2, "half")
    contender = layer.Contender(make, shape)
    assert contender.bits == 3 and len(contender.layers) > 1
    results = layer.measure_rows([contender], shape, 4, rng, rounds=2, seconds=0.1)
    assert len(results) == 1 and results[0]["median_s"] > 0 and len(results[0]["samples"]) >= 2
    assert 1 <= results[0]["distinct_experts"] <= 4

    run = {"bits": bits, "threads": 2, "clock": "wall"}
    stored, path = layer.document(shape, {"2": RATES}), tmp_path / "a" / "layer.json"
    layer.save(path, stored, [{**run, **results[0]}])
    slower = {**RATES, "clock_ghz": 0.5, "read_gbs": 2.0}
    other = {**results[0], "rows": 16}
    layer.save(path, {**stored, "ceilings": {"2": slower, "1": RATES}}, [{**run, **other}])
    read = json.loads(path.read_text())
    assert [r["rows"] for r in read["results"]] == [4, 16] and read["ceilings"] == {
        "2": {**RATES, "read_gbs": 2.0},
        "1": RATES,
    }
    stored["machine"]["chip"] = "another"
    with pytest.raises(ValueError, match="holds results of .*, this is 'another'; choose another file"):
        layer.save(path, stored, [])


@pytest.mark.parametrize("peer", [False, True])
def test_gpu_contenders_are_timed_in_chains(shape, peer, monkeypatch):
    """On a Mac; here the same code runs on the CPU, where a chain of affine layers takes float16 too long."""
    from bench.cpu import contenders, layer, peers

    monkeypatch.setattr(contenders, "GPU_CHAIN", 3)
    if not mx.is_available(mx.Device(mx.gpu)):
        monkeypatch.setattr(contenders.mx, "gpu", mx.cpu)
    monkeypatch.setattr(contenders.device, "last_level_cache", lambda: 1 << 20)
    rng = np.random.default_rng(0)
    ours = lambda: layer.MarlinContender(shape, "3", "mcg", None, rng, 0, "float32")
    make = lambda: peers.AffinePeer(shape, 3, rng, gpu=True) if peer else ours()
    contender = layer.Contender(make, shape)
    assert "gpu" in contender.name
    (result,) = layer.measure_rows([contender], shape, 2, rng, rounds=1, seconds=0.0)
    assert result["median_s"] > 0


def test_routings_are_distinct_experts(shape):
    for routing in shape.routings(np.random.default_rng(0), 50, 3):
        assert routing.shape == (50, 2) and routing.max() < 4
        assert (routing[:, 0] != routing[:, 1]).all()


def test_the_decode_bound_follows_the_clock():
    from bench.cpu.ceilings import decode_bound

    limits = {"threads": 2, "clock_ghz": 2.5}
    assert decode_bound(limits, "mul1", 512) == pytest.approx(9e9)
    assert decode_bound(limits, "mcg", 512) == pytest.approx(9e9 * 14 / 20)
    assert decode_bound(limits, "mul1", 256) == pytest.approx(9e9 * 0.75)
    assert decode_bound(limits, "mul1", 128) is None


def test_the_first_run_has_its_tests_and_whole_compile_errors():
    from bench.first_run import first_run

    assert all((first_run.ROOT / "tests" / name).is_file() for name in first_run.TESTS)
    errors = [f"linear.metal:{i}:1: error: {'x' * 500}\n  y\n  ^" for i in range(10)]
    assert first_run.told("\n".join(errors)) == "\n".join(errors)
    assert len(first_run.told("E" * 5000)) == 1000


def test_whole_models_are_written_loaded_and_run(tmp_path):
    """Both formats of a random checkpoint, in this process; main() gives each a process of its own."""
    from bench.cpu import model

    arguments = model._parse(["--shape", "tiny", "--layers", "1", "--bits", "3", "--peers", "affine"])
    directories = model.write_shape(tmp_path, arguments)
    results = [model.measure(directory, [5, 9], generated=2, threads=2) for directory in directories]
    assert [result["kind"] for result in results] == ["EXL3", "mlx-lm"]
    for result in results:
        assert result["weight_bytes"] > 2048 * 256 * 4 and result["load"]["wall_s"] > 0
        assert [run["context"] for run in result["runs"]] == [5, 9]
        assert all(run["prompt"]["tokens_per_s"] > 0 and run["generation"]["cpu_s"] >= 0 for run in result["runs"])
    model.print_table(results)


def test_a_gguf_is_written_and_run(tmp_path):
    from bench.cpu import checkpoint, llama_cpp

    config = checkpoint.config_of("tiny")
    if llama_cpp.missing():
        pytest.skip(f"not installed: {', '.join(llama_cpp.missing())}")
    with pytest.raises(ValueError, match="ffn_down_exps.* multiple of 256"):
        llama_cpp.write(tmp_path / "refused.gguf", config, 3, np.random.default_rng(0))
    path = tmp_path / "tiny.gguf"
    llama_cpp.write(path, {**config, "moe_intermediate_size": 256}, 3, np.random.default_rng(0))
    result = llama_cpp.measure(path, [5, 9], generated=2, threads=2)
    assert [run["context"] for run in result["runs"]] == [5, 9]
    assert all(run["prompt"]["tokens_per_s"] > 0 and run["generation"]["tokens_per_s"] > 0 for run in result["runs"])
