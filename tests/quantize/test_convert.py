"""Whole conversions of small models: layout, error, resumption, determinism, clear failures."""

import hashlib
import json
import os
import re
import resource
import signal
import subprocess
import sys

import numpy as np
import pytest
from mlx_lm import utils as mlx_lm_utils

from mlx_marlin import TrellisModelLoader, codec, kernels
from mlx_marlin.lm.model import load_exl3_model
from mlx_marlin.quantize import convert
from mlx_marlin.quantize.calibration import BUNDLED
from mlx_marlin.storage.safetensors import Tensor, read_header, write_tensors
from tests.support.generic_checkpoints import logits
from tests.support.paths import MODELS
from tests.support.small_conversions import quick_conversions  # noqa: F401

HIDDEN, WIDTH, EXPERTS, VOCABULARY = 128, 128, 4, 2048

MOE = dict(
    architectures=["Qwen3MoeForCausalLM"], model_type="qwen3_moe", hidden_size=HIDDEN, num_hidden_layers=2,
    intermediate_size=WIDTH, num_attention_heads=2, num_key_value_heads=1, head_dim=64, num_experts=EXPERTS,
    num_experts_per_tok=2, moe_intermediate_size=WIDTH, decoder_sparse_step=1, mlp_only_layers=[], norm_topk_prob=True,
    rms_norm_eps=1e-6, rope_theta=10000.0, vocab_size=VOCABULARY, tie_word_embeddings=True,
    max_position_embeddings=2048,
)  # fmt: skip
DENSE = dict(
    architectures=["Qwen2ForCausalLM"], model_type="qwen2", hidden_size=192, num_hidden_layers=1, intermediate_size=160,
    num_attention_heads=3, num_key_value_heads=1, rms_norm_eps=1e-6, rope_theta=10000.0, vocab_size=VOCABULARY,
    tie_word_embeddings=False, max_position_embeddings=2048,
)  # fmt: skip


def moe_shapes():
    shapes = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN), "model.norm.weight": (HIDDEN,)}
    for i in range(2):
        layer = f"model.layers.{i}"
        for name, out in (("q", 128), ("k", 64), ("v", 64), ("o", HIDDEN)):
            shapes[f"{layer}.self_attn.{name}_proj.weight"] = (out, HIDDEN)
        for name in ("q_norm", "k_norm"):
            shapes[f"{layer}.self_attn.{name}.weight"] = (64,)
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{layer}.{name}.weight"] = (HIDDEN,)
        shapes[f"{layer}.mlp.gate.weight"] = (EXPERTS, HIDDEN)
        for e in range(EXPERTS):
            for name in ("gate", "up", "down"):
                shapes[f"{layer}.mlp.experts.{e}.{name}_proj.weight"] = (WIDTH, HIDDEN)
    return shapes


def dense_shapes():
    shapes = {
        "model.embed_tokens.weight": (VOCABULARY, 192),
        "lm_head.weight": (VOCABULARY, 192),
        "model.norm.weight": (192,),
    }
    layer = "model.layers.0"
    for name, out in (("q", 192), ("k", 64), ("v", 64)):
        shapes[f"{layer}.self_attn.{name}_proj.weight"] = (out, 192)
        shapes[f"{layer}.self_attn.{name}_proj.bias"] = (out,)
    shapes[f"{layer}.self_attn.o_proj.weight"] = (192, 192)
    for name, size in (("gate", (160, 192)), ("up", (160, 192)), ("down", (192, 160))):
        shapes[f"{layer}.mlp.{name}_proj.weight"] = size
    for name in ("input_layernorm", "post_attention_layernorm"):
        shapes[f"{layer}.{name}.weight"] = (192,)
    return shapes


def make_source(path, config, shapes, dtype):
    path.mkdir()
    rng = np.random.default_rng(0)
    tensors = {}
    for name, shape in shapes.items():
        values = rng.standard_normal(shape) * shape[-1] ** -0.5
        values = (1 + 0.1 * values if "norm" in name else values).astype(np.float32)
        if dtype == "BF16":
            tensors[name] = Tensor("BF16", shape, (values.view(np.uint32) >> 16).astype(np.uint16).tobytes())
        else:
            tensors[name] = Tensor("F32", shape, values.tobytes())
    write_tensors(path / "model.safetensors", tensors)
    (path / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (path / name).write_bytes((MODELS / "docs-moe" / name).read_bytes())
    return path


@pytest.fixture(scope="module")
def calibration(tmp_path_factory):
    """Enough for six windows."""
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    path.write_text(BUNDLED.read_text()[20000:27000])
    return path


@pytest.fixture(scope="module")
def moe(tmp_path_factory):
    return make_source(tmp_path_factory.mktemp("moe") / "source", MOE, moe_shapes(), "BF16")


@pytest.fixture(scope="module")
def converted(moe, calibration, tmp_path_factory):
    output = tmp_path_factory.mktemp("moe") / "exl3"
    reports = []
    allocation = convert(moe, output, bits=2.75, head_bits=4, calibration=calibration, progress=reports.append)
    return output, allocation, reports


def digest(directory):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(directory.iterdir())}


def values(info):
    raw = np.array(info.array())
    return (raw.astype(np.uint32) << 16).view(np.float32) if info.dtype == "BF16" else raw


def pattern(name):
    return re.sub(r"\d+", "N", name)


def test_layout_is_that_of_a_reference_directory(converted):
    """Names and dtypes of a directory that an independent writer made from the same architecture."""
    output, _, _ = converted
    wanted = {pattern(n): t.dtype for n, t in read_header(MODELS / "docs-moe-exl3-mixed/model.safetensors").items()}
    tensors = read_header(output / "model.safetensors")
    found = {pattern(n): t.dtype for n, t in tensors.items()}
    wanted |= {n: "BF16" for n, d in wanted.items() if "norm" in n or "embed" in n}  # kept as in this source
    assert found == wanted
    linears = [n[: -len(".weight")] for n in moe_shapes() if re.search("_proj", n)] + ["lm_head"]
    suffixes = {"trellis", "suh", "svh", "mul1"}
    assert {n for n in tensors if n.rpartition(".")[2] in suffixes} == {f"{n}.{s}" for n in linears for s in suffixes}
    assert all(tensors[f"{n}.mul1"].shape == () and values(tensors[f"{n}.mul1"]) == -2082680531 for n in linears)
    assert tensors["model.layers.0.self_attn.k_proj.svh"].shape == (128,)  # 64 padded


def test_configuration(converted):
    output, allocation, _ = converted
    reference = json.loads((MODELS / "docs-moe-exl3-mixed/quantization_config.json").read_text())
    config = json.loads((output / "config.json").read_text())
    ours = json.loads((output / "quantization_config.json").read_text())
    assert config["quantization_config"].keys() == reference.keys() - {"tensor_storage"}
    assert {k: config[k] for k in MOE} == {**MOE, "tie_word_embeddings": False}  # the head has its own weights
    assert ours.keys() == reference.keys()
    assert config["quantization_config"] == {k: v for k, v in ours.items() if k != "tensor_storage"}
    assert (ours["quant_method"], ours["head_bits"], ours["codebook"], ours["out_scales"]) == (
        "exl3",
        4,
        "mul1",
        "always",
    )
    sizes = {n: np.prod([codec.padded(size) for size in shape]) for n, shape in moe_shapes().items()}
    average = np.average(list(allocation.widths.values()), weights=[sizes[f"{n}.weight"] for n in allocation.widths])
    assert ours["bits"] == round(average, 2) < allocation.bits  # codes without scales
    assert ours["version"] == "1.6.5" and ours["tensor_storage"].keys() == {
        n.rpartition(".")[0] for n in moe_shapes()
    } | {"lm_head"}
    name = "model.layers.0.mlp.experts.0.down_proj"
    entry, wanted = ours["tensor_storage"][name], reference["tensor_storage"][name]
    assert entry.keys() == wanted.keys() and entry["mul1_multiplier"] == wanted["mul1_multiplier"]
    assert entry["stored_tensors"].keys() == wanted["stored_tensors"].keys()
    for name, k in allocation.widths.items():
        found = ours["tensor_storage"][name]["bits_per_weight"]
        assert found == k and type(found) is (float if codec.is_half_rate(k) else int)
    assert any(codec.is_half_rate(k) for k in allocation.widths.values())


def test_budget_counts_everything_stored(converted):
    output, allocation, _ = converted
    tensors = read_header(output / "model.safetensors")
    stored = 8 * sum(
        t.nbytes for n, t in tensors.items()
        if n.rpartition(".")[2] in ("trellis", "suh", "svh", "mul1") and not n.startswith("lm_head")
    )  # fmt: skip
    weights = sum(int(np.prod(s)) for n, s in moe_shapes().items() if "_proj" in n)
    assert stored / weights == pytest.approx(allocation.bits)
    smallest_step = max(np.prod(s) for n, s in moe_shapes().items() if "_proj" in n) / weights
    assert 2.75 - max(0.01, smallest_step) < allocation.bits <= 2.75
    assert len({allocation.widths[n] for n in allocation.widths if "experts" in n}) > 1
    assert "within" in (output / "plan.txt").read_text()


def test_weights_decode_to_the_source(moe, converted):
    """Decoded by the codec from the files alone; the error is that of each K, calibration allowed for."""
    output, allocation, _ = converted
    source, loader = read_header(moe / "model.safetensors"), TrellisModelLoader(output)
    for name in loader.names:
        w = loader.load_weight(name)
        stored = "model.embed_tokens" if name == "lm_head" else name
        wanted = values(source[f"{stored}.weight"]).T
        assert w.bits == (4 if name == "lm_head" else allocation.widths[name])
        found = codec.dequantize(w)[: wanted.shape[0], : wanted.shape[1]]
        error = np.mean(np.square(found - wanted)) / np.mean(np.square(wanted))
        assert 0.9 * 4.0**-w.bits < error < 3 * 4.0**-w.bits, name
    for name in loader.unquantized:
        kept = read_header(output / "model.safetensors")[name]
        np.testing.assert_array_equal(
            values(kept).astype(np.float32),
            values(source[name]).astype(np.float16 if kept.dtype == "F16" else np.float32),
        )
    assert loader.unquantized["model.layers.0.mlp.gate.weight"].dtype == "F16"


def dense_twin(directory, loader, config):
    """The same model with the weights that the converted files decode to, for mlx-lm."""
    arrays = {n: values(info).astype(np.float32) for n, info in loader.unquantized.items()}
    for name in loader.names:
        shape = moe_shapes().get(f"{name}.weight", (VOCABULARY, HIDDEN))
        weight = loader.load_weight(name, in_features=shape[1], out_features=shape[0])
        arrays[f"{name}.weight"] = codec.dequantize(weight).T
    tensors = {n: Tensor("F32", a.shape, np.ascontiguousarray(a).tobytes()) for n, a in arrays.items()}
    directory.mkdir()
    write_tensors(directory / "model.safetensors", tensors)
    (directory / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    return directory


def test_logits_equal_those_of_the_dequantized_weights(converted, tmp_path):
    output, allocation, _ = converted
    loader = TrellisModelLoader(output)
    assert {n: loader.load_weight(n).bits for n in allocation.widths} == allocation.widths
    dense, _ = mlx_lm_utils.load_model(dense_twin(tmp_path / "dense", loader, MOE))
    expected, found = logits(dense), logits(load_exl3_model(output)[0])
    error = np.linalg.norm(found - expected, axis=-1) / np.linalg.norm(expected, axis=-1)
    assert error.max() < 1e-4
    np.testing.assert_array_equal(found.argmax(-1), expected.argmax(-1))


def test_whole_widths_only(moe, calibration, tmp_path, quick_conversions):  # noqa: F811
    """For readers older than half rates."""
    allocation = convert(
        moe, tmp_path / "exl3", bits=2.5, head_bits=16, half_rates=False, calibration=calibration, mixed="uniform"
    )
    assert set(allocation.widths.values()) == {2, 3}
    loader = TrellisModelLoader(tmp_path / "exl3")
    assert {loader.load_weight(name).bits for name in allocation.widths} == {2, 3}


def test_a_head_of_a_half_rate(moe, calibration, tmp_path, quick_conversions):  # noqa: F811
    allocation = convert(moe, tmp_path / "exl3", bits=2.6, head_bits=3.5, calibration=calibration, mixed="uniform")
    assert 2.5 in allocation.widths.values() and set(allocation.widths.values()) <= {2, 2.5, 3}
    assert TrellisModelLoader(tmp_path / "exl3").load_weight("lm_head").bits == 3.5
    assert json.loads((tmp_path / "exl3/config.json").read_text())["quantization_config"]["head_bits"] == 3.5


def test_progress(converted):
    reports = converted[2]
    assert [r.done for r in reports] == sorted(r.done for r in reports) and reports[-1].done == 1
    first = next(i for i, r in enumerate(reports) if not r.under_way)
    assert all(r.seconds_left is None for r in reports[:first]) and all(r.seconds_left >= 0 for r in reports[first:])


class Interrupted(Exception):
    pass


def test_interrupted_and_resumed_with_other_threads(moe, converted, calibration, tmp_path, monkeypatch):
    """Stopped after the first measured and after the first quantized layer: the same bits in the end."""
    monkeypatch.setattr(kernels, "cpu_threads", lambda: 3)
    arguments = dict(bits=2.75, head_bits=4, calibration=calibration)
    for stop in ("measured layer 1", "quantized layer 1"):

        def interrupt(report, stop=stop):
            if report.stage.startswith(stop):
                raise Interrupted

        with pytest.raises(Interrupted):
            convert(moe, tmp_path / "exl3", resume=stop != "measured layer 1", progress=interrupt, **arguments)
    with pytest.raises(ValueError, match=r"bits was 2.75, is 3.0"):
        convert(moe, tmp_path / "exl3", resume=True, **{**arguments, "bits": 3.0})
    with pytest.raises(FileExistsError, match="resume"):
        convert(moe, tmp_path / "exl3", **arguments)
    convert(moe, tmp_path / "exl3", resume=True, **arguments)
    assert digest(tmp_path / "exl3") == digest(converted[0])


def test_dense_model_with_biases_and_padding(calibration, tmp_path):
    """Sizes that are no multiples of 128, fp32 source, untied head left in half precision, 3INST."""
    source = make_source(tmp_path / "source", DENSE, dense_shapes(), "F32")
    convert(
        source, tmp_path / "exl3", bits=3.5, head_bits=16, codebook="3inst", calibration=calibration, mixed="uniform"
    )
    tensors, original = read_header(tmp_path / "exl3/model.safetensors"), read_header(source / "model.safetensors")
    assert not any(n.endswith((".mul1", ".mcg")) for n in tensors)
    assert tensors["lm_head.weight"].dtype == "F16" and tensors["model.norm.weight"].dtype == "F16"
    assert tensors["model.layers.0.self_attn.q_proj.trellis"].shape[:2] == (16, 16)
    loader = TrellisModelLoader(tmp_path / "exl3")
    w = loader.load_weight("layers.0.self_attn.k_proj", in_features=192, out_features=64)
    wanted = values(original["model.layers.0.self_attn.k_proj.weight"]).T
    assert np.mean(np.square(codec.dequantize(w) - wanted)) < 4 * 4.0**-w.bits * np.mean(np.square(wanted))
    bias = values(original["model.layers.0.self_attn.k_proj.bias"]).astype(np.float16)
    np.testing.assert_array_equal(np.array(w.bias), np.pad(bias, (0, 64)))


def run_command(arguments, **kwargs):
    return subprocess.Popen(
        [sys.executable, "-m", "mlx_marlin.quantize.cli", *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kwargs,
    )  # fmt: skip


@pytest.mark.slow
def test_killed_at_five_moments(moe, converted, calibration, tmp_path):
    output = tmp_path / "exl3"
    arguments = ["--model", moe, "--output", output, "--bits", 2.75, "--head-bits", 4, "--calibration", calibration]
    rng = np.random.default_rng(int.from_bytes(os.urandom(4)))
    kills = 0
    while kills < 5:
        process = run_command(arguments + ["--resume"] * bool(kills and (output / ".convert").exists()))
        try:
            process.wait(timeout=float(rng.uniform(2, 12)))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
            continue
        assert process.returncode == 0, process.stderr.read()
        break
    if not (output / "config.json").exists() or (output / ".convert").exists():
        process = run_command(arguments + ["--resume"])
        out, err = process.communicate()
        assert process.returncode == 0, err
        assert "bits per weight" in out and "left" in err
    assert digest(output) == digest(converted[0])


@pytest.mark.slow
def test_full_disk(moe, converted, calibration, tmp_path):
    """Files may not grow beyond 100 KB: a clear error, nothing half-written under a final name, then resumed."""
    output = tmp_path / "exl3"
    arguments = ["--model", moe, "--output", output, "--bits", 2.75, "--head-bits", 4, "--calibration", calibration]

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    process = run_command(arguments, preexec_fn=limit)
    _, err = process.communicate()
    assert process.returncode == 1 and "make room and run again with --resume" in err and "Traceback" not in err
    assert not list(output.glob("**/*.tmp")) and not (output / "model.safetensors").exists()
    process = run_command(arguments + ["--resume"])
    _, err = process.communicate()
    assert process.returncode == 0, err
    assert digest(output) == digest(converted[0])


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda p: (p / "model.safetensors").write_bytes((p / "model.safetensors").read_bytes()[:-1000]), "truncated"),
        (lambda p: (p / "model.safetensors").unlink(), "holds no model"),
        (lambda p: (p / "config.json").unlink(), "no config.json"),
        (lambda p: (p / "config.json").write_text('{"quantization": {"bits": 4}}'), "already quantized"),
    ],
)
def test_unreadable_source(moe, tmp_path, damage, message):
    for file in moe.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    damage(tmp_path)
    with pytest.raises(ValueError, match=message):
        convert(tmp_path, tmp_path / "exl3", bits=3)
    assert not (tmp_path / "exl3").exists()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"bits": 0.5}, "1..8, got 0.5"),
        ({"head_bits": 9}, "16 to leave"),
        ({"head_bits": 2.5, "half_rates": False}, r"4, 5, 6, 7, 8 \(half_rates=False\), .* got 2.5"),
        ({"head_bits": 2.5, "codebook": "mcg"}, r"4, 5, 6, 7, 8 \(codebook mcg\), .* got 2.5"),
        ({"codebook": "nf4"}, "nf4"),
        ({"mixed": "some"}, "per-layer"),
    ],
)
def test_bad_settings(moe, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        convert(moe, tmp_path / "exl3", **{"bits": 3, **change})


def test_short_calibration(moe, tmp_path):
    (tmp_path / "short.txt").write_text("too short")
    with pytest.raises(ValueError, match="at least 256"):
        convert(moe, tmp_path / "exl3", bits=3, calibration=tmp_path / "short.txt")


def test_bundled_text_does_not_overlap_the_held_out_text():
    held = {
        line.strip() for line in (MODELS / "docs-moe/heldout.txt").read_text().splitlines() if len(line.strip()) > 40
    }
    assert not held & {line.strip() for line in BUNDLED.read_text().splitlines()}
