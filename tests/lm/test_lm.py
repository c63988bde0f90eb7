"""Loading whole models: what comes out, in which dtype, and what it costs."""

import json
import re
import subprocess
import sys

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import qwen3_moe, step3p5
from mlx_lm.models.switch_layers import SwitchGLU

import mlx_marlin
from mlx_marlin import TrellisLinear, TrellisSwitchGLU, TrellisSwitchMLP, codec
from mlx_marlin.lm.experts import activation_of, make_experts
from mlx_marlin.lm.mlx_lm_host import MLX_LM
from mlx_marlin.lm.model import cast_dense, load_exl3_model, replace_module
from mlx_marlin.lm.placeholders import LinearSource, Placeholders
from mlx_marlin.lm.problems import model_problems
from mlx_marlin.loader.directory import TrellisModelLoader
from mlx_marlin.ops import Activation
from mlx_marlin.weights.experts import ExpertStack
from tests.support import architectures, generic_checkpoints
from tests.support.cases import expert_formats, random_experts, row_error
from tests.support.checkpoints import Sizes
from tests.support.paths import MODELS

EXL3 = MODELS / "docs-moe-exl3-mixed"


@pytest.mark.parametrize("name", ["random-qwen3_moe", "random-glm4_moe_lite"])
def test_the_shipped_random_models_give_the_expected_logits(name):
    model, _ = load_exl3_model(MODELS / name)
    expected = np.load(MODELS / name / "expected.npz")
    got = np.array(model(mx.array(expected["tokens"])))
    assert np.abs(got - expected["logits"]).max() <= 1e-4 * np.abs(expected["logits"]).max()
    assert (got.argmax(-1) == expected["logits"].argmax(-1)).all()


@pytest.mark.parametrize(
    "name, perplexity",
    [("docs-moe-exl3-2.5bpw", 11.361), ("docs-moe-exl3-3.0bpw", 11.487), ("docs-moe-exl3-mixed", 11.565)],
)
def test_perplexity_of_the_shipped_models(name, perplexity):
    # The numbers were measured with an independent implementation, in float32.
    model, tokenizer = mlx_marlin.load(MODELS / name)
    text = (MODELS / "docs-moe" / "heldout.txt").read_text()[20_000:]
    tokens = np.array(tokenizer.encode(text)[:4097])
    losses = [
        nn.losses.cross_entropy(
            model(mx.array(tokens[None, i : i + 256])), mx.array(tokens[None, i + 1 : i + 257])
        ).mean()
        for i in range(0, 4096, 256)
    ]
    assert abs(np.exp(np.mean([loss.item() for loss in losses])) - perplexity) < 0.002


def test_load_takes_the_keywords_of_mlx_lm():
    model, tokenizer, config = mlx_marlin.load(
        EXL3,
        tokenizer_config={"trust_remote_code": True},
        model_config={"rope_theta": 500.0},
        return_config=True,
        lazy=True,
    )
    assert config["rope_theta"] == 500.0 and model.args.rope_theta == 500.0
    assert tokenizer.decode(tokenizer.encode("hello")) == "hello"


def test_explain_knows_the_top_k_of_the_model_before_the_first_call():
    model, config = load_exl3_model(EXL3)
    layers = [module for module in model.modules() if isinstance(module, TrellisSwitchGLU)]
    assert layers and {layer.explain(1).problem.top_k for layer in layers} == {config["num_experts_per_tok"]} == {4}


def test_the_quantized_head_of_a_tied_model_is_used():
    model, _ = load_exl3_model(EXL3)
    assert json.loads((EXL3 / "config.json").read_text())["tie_word_embeddings"]
    assert isinstance(model.lm_head, TrellisLinear)


@pytest.mark.parametrize("dtype", [None, mx.float32, mx.bfloat16, mx.float16])
def test_dtype_of_the_unquantized_parameters(dtype):
    model, _ = load_exl3_model(MODELS / "random-qwen3_moe", dtype=dtype)
    wanted = dtype or mx.float32
    for path, module in model.named_modules():
        for name, value in (
            tree_flatten(module.parameters()) if type(module) in (nn.Embedding, nn.RMSNorm, nn.Linear) else []
        ):
            assert value.dtype == wanted, f"{path}.{name}"
    assert model.lm_head.suh.dtype == mx.float16
    assert model(mx.array([[1, 2, 3]])).dtype == wanted


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_dtypes_by_name(name):
    model, _ = mlx_marlin.load(EXL3, name)
    assert model.model.norm.weight.dtype == getattr(mx, name)


@pytest.mark.parametrize("dtype", [mx.int32, mx.complex64, "int4", "float", 16, np.float32])
@pytest.mark.parametrize("load", [mlx_marlin.load, lambda path, dtype: load_exl3_model(path, dtype=dtype)])
def test_dtypes_that_no_model_runs_in(load, dtype):
    with pytest.raises(ValueError, match="dtype must be one of float32, float16, bfloat16, or None .* got"):
        load(MODELS / "nothing is read", dtype)


def test_a_gpu_keeps_the_dtype_of_the_source(monkeypatch):
    monkeypatch.setattr(mx, "default_device", lambda: mx.gpu)
    dense = {
        "model.embed_tokens.weight": mx.bfloat16,
        "gate.weight": mx.float16,
        "A_log": mx.float32,
        "ids": mx.int32,
    }
    cast = cast_dense(nn.Module(), {k: mx.zeros(2, d) for k, d in dense.items()}, None)
    # Routers are stored in float16, but run in the dtype of the model.
    assert {k: v.dtype for k, v in cast.items()} == {**dense, "gate.weight": mx.bfloat16}


def test_a_cast_leaves_what_the_model_wants_left():
    class Picky(nn.Module):
        def cast_predicate(self, key):
            return "A_log" not in key

    dense = {key: mx.zeros(2, mx.float32) for key in ("gate.weight", "A_log")}
    cast = cast_dense(Picky(), dense, mx.bfloat16)
    assert {k: v.dtype for k, v in cast.items()} == {"gate.weight": mx.bfloat16, "A_log": mx.float32}


def test_loading_shows_progress_and_gives_buffers_back(monkeypatch):
    seen, cleared = [], []
    monkeypatch.setattr(mx, "clear_cache", lambda: cleared.append(len(seen)))
    load_exl3_model(EXL3, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(i, 4) for i in range(1, 5)]  # embeddings, norm and head; then three layers
    assert cleared == [0, 1, 2, 3]  # a GPU's allocator would keep what each layer was read into


_MEMORY = """
import sys
from pathlib import Path
import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_marlin.lm.model import load_exl3_model

before = mx.get_active_memory()
mx.reset_peak_memory()
model, _ = load_exl3_model(Path(sys.argv[1]))
layer = sum(value.nbytes for _, value in tree_flatten(model.layers[1].parameters()))
whole = sum(value.nbytes for _, value in tree_flatten(model.parameters()))
print(mx.get_peak_memory() - before, mx.get_active_memory() - before, layer, whole)
"""


@pytest.mark.parametrize(
    "sizes",
    [Sizes(hidden=512, width=384, experts=16, layers=6), Sizes(hidden=256, vocab=40_000, experts=32, layers=8)],
    ids=("experts", "embeddings"),
)
def test_memory_at_the_peak(sizes, tmp_path):
    """In a process of its own: what other tests leave behind would count."""
    checkpoint = architectures.qwen3_moe(sizes, dense_layers=(), dense=False)
    directory = checkpoint.write(tmp_path / "model", shards=3)
    run = subprocess.run([sys.executable, "-c", _MEMORY, str(directory)], check=True, capture_output=True, text=True)
    peak, resident, layer, whole = map(int, run.stdout.split())
    assert resident > 20_000_000  # the test weighs something
    assert peak <= 1.15 * resident + layer
    assert resident <= 1.05 * whole


def placeholder(loader: TrellisModelLoader, name: str) -> tuple[Placeholders, np.ndarray]:
    placeholders = Placeholders(loader, "mlx-lm")
    return placeholders, np.array(placeholders.make()[f"{name}.weight"])[:, 0]


def test_rows_that_a_model_takes_apart():
    loader = TrellisModelLoader(MODELS / "random-glm4_moe_lite")
    name = "model.layers.0.self_attn.q_b_proj"
    placeholders, codes = placeholder(loader, name)
    linear = loader.quantized[name]
    assert placeholders.read("a", codes, 512) == LinearSource(linear, None)
    assert placeholders.read("a", codes, 400) == LinearSource(linear, None)  # padded in the file
    assert placeholders.read("a", codes[128:384], 256) == LinearSource(linear, (1, 2))
    with pytest.raises(ValueError, match="outputs 64 to 192 of 512 where the model wants 128"):
        placeholders.read("a", codes[64:192], 128)
    with pytest.raises(ValueError, match="outputs 0 to 512 of 512 where the model wants 384"):
        placeholders.read("a", codes, 384)
    with pytest.raises(ValueError, match=f"{name}.* has its outputs reordered"):
        placeholders.read("a", codes[::-1], 512)
    other = placeholder(loader, "lm_head")[1]
    with pytest.raises(ValueError, match=f"joins .*{name}.*; linears that are quantized separately cannot be joined"):
        placeholders.read("a", np.concatenate([codes, other]), 1024)


def test_rows_of_experts_are_those_of_each_expert():
    loader = TrellisModelLoader(MODELS / "random-glm4_moe_lite")
    names = [name for name in loader.quantized if re.fullmatch(r"model\.layers\.1\.mlp\.experts\.\d+\.down_proj", name)]
    placeholders = Placeholders(loader, "mlx-lm")
    made = placeholders.make()
    codes = np.stack([np.array(made[f"{name}.weight"])[:, 0] for name in names])
    count = codes.shape[1]
    linears = [loader.quantized[name] for name in names]
    assert len(names) > 2 and count > 128
    assert placeholders.read_experts("a", codes, count) == [LinearSource(w, None) for w in linears]
    some = placeholders.read_experts("a", codes[::-1, :128], 128)
    assert some == [placeholders.read("a", row[:128], 128) for row in codes[::-1]]
    for spoilt, message in (
        (codes[1, ::-1], rf"{names[1]}, which mlx-lm puts at a\[1\], has its outputs reordered"),
        (np.r_[codes[1, : count // 2], codes[2, count // 2 :]], rf"joins {names[1]} and {names[2]} into a\[1\]"),
    ):
        with pytest.raises(ValueError, match=message):
            placeholders.read_experts("a", np.stack([codes[0], spoilt]), count)
    with pytest.raises(ValueError, match=rf"gives outputs 0 to {count} of {count} where the model wants {count - 128}"):
        placeholders.read_experts("a", codes, count - 128)


def test_rows_that_a_host_joins():
    loader = TrellisModelLoader(MODELS / "random-glm4_moe_lite")
    placeholders, codes = placeholder(loader, "model.layers.0.self_attn.q_b_proj")
    other = placeholder(loader, "lm_head")[1]
    (first, rows), (second, others) = placeholders.read_joined("a", np.concatenate([codes, other]), 512 + len(other))
    assert (first.linear.name, rows) == ("model.layers.0.self_attn.q_b_proj", 512) and first.blocks is None
    assert (second.linear.name, others) == ("lm_head", len(other)) and second.blocks is None
    with pytest.raises(ValueError, match="q_b_proj, lm_head have .* outputs, but a wants 640"):
        placeholders.read_joined("a", np.concatenate([codes, other[:384]]), 640)


def test_model_code_that_computes_with_a_quantized_weight_is_refused(monkeypatch):
    """MLX adds what stands for the weight as if it were numbers; the model would load, and be another one."""
    original = qwen3_moe.Model.sanitize

    def sanitize(self, weights):
        stand_in = weights["model.layers.0.self_attn.o_proj.weight"]
        norm = weights["model.norm.weight"]
        weights["model.norm.weight"] = norm + stand_in[: norm.size, 0]
        return original(self, weights)

    monkeypatch.setattr(qwen3_moe.Model, "sanitize", sanitize)
    with pytest.raises(
        ValueError, match=r"layers\.0\.self_attn\.o_proj is quantized, but mlx-lm computes with its weight"
    ):
        load_exl3_model(EXL3)


def test_activations_with_numbers_of_their_own():
    activations = pytest.importorskip("mlx_lm.models.activations")
    if not hasattr(activations, "SwigluOAI"):
        pytest.skip("this mlx-lm has no SwigluOAI")
    glu = SwitchGLU(128, 128, 2, activation=activations.SwigluOAI(alpha=1.5, limit=3.0))
    assert activation_of(MLX_LM, glu) == Activation("swiglu_oai", 1.5, 3.0)
    assert activation_of(MLX_LM, SwitchGLU(128, 128, 2)) == Activation("silu")


@pytest.mark.parametrize(
    "module, name, numbers, activation",
    [
        ("step3p5", "ClampedSwiGLU", (0.5,), Activation("swiglu_step", limit=0.5)),
        ("deepseek_v41", "DeepseekV41SwiGLU", (0.5,), Activation("swiglu_clamped", limit=0.5)),
        ("deepseek_v41", "DeepseekV41SwiGLU", (0,), None),
        ("kimi_k3", "SiTU", (2.0, 3.0), Activation("situ", 2.0, 3.0)),
        ("kimi_k3", "SiTU", (2.0, None), None),
    ],
)
def test_activations_with_bounds(module, name, numbers, activation):
    """Where a host's class has no bound, its own code runs."""
    code = pytest.importorskip(f"mlx_lm.models.{module}")
    glu = SwitchGLU(128, 128, 2, activation=getattr(code, name)(*numbers))
    assert activation_of(MLX_LM, glu) == activation


class ScaledGLU(SwitchGLU):
    """As Inkling's in mlx-vlm."""

    def __call__(self, x, indices):
        return 2 * super().__call__(x, indices)


def test_a_class_derived_from_the_hosts_keeps_its_own_code():
    assert activation_of(MLX_LM, ScaledGLU(128, 128, 2)) is None


class Clamped(nn.Module):
    """An activation that the kernels do not know."""

    def __call__(self, up, gate):
        return mx.minimum(nn.silu(gate), 0.5) * mx.clip(up, -0.5, 0.5)


@pytest.mark.parametrize("rows", (1, 3, 40))  # mlx-lm sorts by expert from 64 slots on
@pytest.mark.parametrize("activation", (None, "oai", "step", Clamped()))
def test_experts_with_any_activation(rows, activation):
    """A fused layer, or mlx-lm's own over trellis projections: the same as over the dense weights."""
    if activation == "oai":
        activation = getattr(pytest.importorskip("mlx_lm.models.activations"), "SwigluOAI", None)
        if activation is None:
            pytest.skip("this mlx-lm has no SwigluOAI")
        activation = activation(alpha=1.5, limit=0.5)
    elif activation == "step":
        activation = step3p5.ClampedSwiGLU(0.5)
    keywords = {} if activation is None else {"activation": activation}
    glu, rng = SwitchGLU(192, 96, 4, bias=True, **keywords), np.random.default_rng(0)
    experts = random_experts(rng, 192, 96, expert_formats(3, "mul1", "both", 4), bias=True)
    for name, weights in experts.items():
        projection = glu[f"{name}_proj"]
        projection.weight = mx.array(np.stack([codec.dequantize(w).T for w in weights]))
        projection.bias = mx.stack([w.bias[: w.out_features].astype(mx.float32) for w in weights])
    for w in (*experts["gate"], *experts["up"]):  # as in EXL3 files, nothing comes out of the padding
        w.svh = mx.where(mx.arange(128) < 96, w.svh, mx.array(0, mx.float16))
        w.bias = mx.where(mx.arange(128) < 96, w.bias, mx.array(0, mx.float16))
    x = mx.array(rng.standard_normal((1, rows, 192)).astype(np.float32))
    indices = mx.array(rng.integers(0, 4, (1, rows, 2)).astype(np.uint32))
    expected = np.array(glu(x, indices)).astype(np.float64)
    stacks = {f"{name}_proj": ExpertStack.of(name, weights) for name, weights in experts.items()}
    made = make_experts(MLX_LM, glu, stacks)
    assert isinstance(made, SwitchGLU if type(activation) is Clamped else TrellisSwitchGLU)
    assert row_error(made(x, indices), expected) < 1e-5
    assert made(x.astype(mx.bfloat16), indices).dtype == mx.bfloat16


def test_problems_of_layers_that_are_not_fused_are_left_out(tmp_path, monkeypatch):
    monkeypatch.delitem(MLX_LM.activations, "mlx_lm.models.step3p5.ClampedSwiGLU")
    checkpoint, _ = generic_checkpoints.make("step3p5")
    directory = checkpoint.write(tmp_path / "model")
    assert {problem.kind for problem in model_problems(directory, "float32", "cpu")} == {"linear"}


def test_problems_of_experts_of_two_matrices(tmp_path):
    """What the tuner times is what the loaded layer asks for."""
    directory = architectures.ARCHITECTURES["nemotron_h_latent"]().write(tmp_path / "model")
    (problem,) = [p for p in model_problems(directory, "float32", "cpu", "float32") if p.kind == "mlp"]
    assert (problem.hidden, problem.intermediate, problem.experts, problem.top_k) == (96, 128, 4, 2)
    model, _ = load_exl3_model(directory)
    (layer,) = [m for m in model.modules() if isinstance(m, TrellisSwitchMLP)]
    assert layer.problem(1, "float32", "cpu") == problem and problem.activation == "relu_squared"


def test_unknown_children_of_the_experts_are_kept():
    model, _ = load_exl3_model(EXL3)
    old = model.layers[0].mlp.switch_mlp
    old.norm = nn.RMSNorm(4)
    new = model.layers[1].mlp.switch_mlp
    assert isinstance(old, TrellisSwitchGLU)
    replace_module(model, "model.layers.0.mlp.switch_mlp", new)
    assert model.layers[0].mlp.switch_mlp is new and new.norm is old.norm


def test_a_compiled_function_may_capture_the_parameters():
    model, _ = load_exl3_model(EXL3)
    tokens = mx.array([[1, 2, 3, 4]])
    wanted = np.array(model(tokens))
    state = [model.state]
    step = mx.compile(lambda ids: model(ids), inputs=state, outputs=state)
    for _ in range(2):
        assert np.allclose(np.array(step(tokens)), wanted, atol=1e-5)
    assert np.allclose(np.array(model(tokens)), wanted, atol=1e-5)
