"""Models split over two ranks of a ring on this machine, against one rank."""

import socket
import subprocess
import sys
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from mlx_marlin import trellis_linear
from mlx_marlin.lm import sharding
from mlx_marlin.lm.host import GATED, UNGATED
from mlx_marlin.lm.mapping import WeightMap
from mlx_marlin.lm.mlx_lm_host import MLX_LM
from mlx_marlin.lm.model import build, load_exl3_model, open_checkpoint
from mlx_marlin.lm.sharding import AllToShardedTrellisLinear, Cut, ShardedToAllTrellisLinear, open_sharded, split
from mlx_marlin.loader.exl3 import QuantizedLinear
from mlx_marlin.weights.synthetic import random_weight
from tests.lm.test_architectures import assert_same
from tests.support import architectures
from tests.support.cases import row_error
from tests.support.checkpoints import SPLITTABLE
from tests.support.generic_checkpoints import logits
from tests.support.paths import ROOT


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def launch(*command: str) -> subprocess.CompletedProcess:
    launcher = "from mlx._distributed_utils.launch import main; main()"
    ring = ["-n", "2", "--backend", "ring", "--starting-port", str(free_port())]
    return subprocess.run(
        [sys.executable, "-c", launcher, *ring, "--", sys.executable, *command],
        capture_output=True, text=True, stdin=subprocess.DEVNULL, cwd=ROOT,
    )  # fmt: skip


NO_TENSOR_PARALLELISM = architectures.needs_new_mlx_lm("has no tensor parallelism for qwen3_moe")


@pytest.mark.parametrize(
    "name",
    [pytest.param("qwen3_moe", marks=NO_TENSOR_PARALLELISM), pytest.param("gpt_oss", marks=pytest.mark.slow)],
)
def test_tensor_parallel_logits_equal_those_of_one_rank(name, tmp_path):
    directory = architectures.ARCHITECTURES[name](SPLITTABLE).write(tmp_path / "model")
    result = launch("-m", "tests.support.ring_logits", str(directory), str(tmp_path), "tensor")
    wanted = logits(load_exl3_model(directory)[0])
    for rank in range(2):
        assert (tmp_path / f"{rank}.npy").exists(), result.stdout + result.stderr
        assert_same(np.load(tmp_path / f"{rank}.npy"), wanted)


@pytest.mark.slow
def test_pipeline_parallel_logits_equal_those_of_one_rank(tmp_path):
    directory = architectures.deepseek_v3().write(tmp_path / "model")
    result = launch("-m", "tests.support.ring_logits", str(directory), str(tmp_path), "pipeline")
    wanted = logits(load_exl3_model(directory)[0])
    assert (tmp_path / "0.npy").exists(), result.stdout + result.stderr
    assert_same(np.load(tmp_path / "0.npy"), wanted)


@NO_TENSOR_PARALLELISM
@pytest.mark.slow
def test_the_benchmark_command_runs_on_two_ranks(tmp_path):
    shipped = ROOT / "models" / "random-qwen3_moe"
    model = architectures.qwen3_moe(replace(SPLITTABLE, vocab=512)).write(tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):  # of 512 tokens
        (model / name).write_bytes((shipped / name).read_bytes())
    result = launch("-m", "mlx_marlin", "benchmark", "--model", str(model), "-p", "8", "-g", "4", "-n", "1")
    output = result.stdout + result.stderr
    assert "Averages:" in output, output
    assert output.count("Loaded") == 1  # only the first rank reports


class Rank:
    """What mlx-lm asks of a group while it splits a model."""

    def __init__(self, rank, size):
        self.rank, self.size = lambda: rank, lambda: size


@pytest.fixture
def no_reading(monkeypatch):
    monkeypatch.setattr(QuantizedLinear, "load", lambda *_, **__: pytest.fail("a weight was read"))


@NO_TENSOR_PARALLELISM
def test_a_split_is_planned_without_reading_weights(tmp_path, no_reading):
    directory = architectures.qwen3_moe(SPLITTABLE).write(tmp_path / "model")
    for rank in range(2):
        model, config, mapping = open_checkpoint(directory)
        cuts = split(model, build(directory, config), mapping, Rank(rank, 2))
        q = cuts["model.layers.1.self_attn.q_proj"]
        assert (q.in_features, q.out_features, q.rows, q.columns) == (192, 128, None, (rank,))
        down = cuts[f"model.layers.{architectures.MOE_LAYER}.mlp.switch_mlp.down_proj"]
        assert (down.in_features, down.out_features, down.rows, down.columns) == (128, 192, (rank,), None)


@pytest.mark.parametrize(
    "name, pipeline, ranks, message",
    [
        ("llama", False, 2, "self_attn.k_proj: 128 is split into 64 per rank here; .* at multiples of 128 only"),
        pytest.param(
            *("qwen3_moe", False, 3, "mlx_lm.models.qwen3_moe cannot be split over 3 ranks: ValueError"),
            marks=NO_TENSOR_PARALLELISM,
        ),
        ("mixtral", False, 2, "mlx_lm.models.mixtral has no tensor parallelism"),
        ("llama", True, 2, "mlx_lm.models.llama has no pipeline parallelism"),
        pytest.param(
            *("deepseek_v3", True, 3, "mlx_lm.models.deepseek_v3 cannot be split into 3 stages"),
            marks=architectures.needs_new_mlx_lm("gives a third rank no layer, rather than an error"),
        ),
    ],
)
def test_unsupported_splits_are_refused_before_anything_is_read(name, pipeline, ranks, message, tmp_path, no_reading):
    directory = architectures.ARCHITECTURES[name]().write(tmp_path / "model")
    group = Rank(0, ranks)
    with pytest.raises(ValueError, match=message):
        open_sharded(directory, group if pipeline else None, None if pipeline else group)


# What a sharded layer adds, on a group of one rank.


@pytest.fixture
def biased():
    return random_weight(np.random.default_rng(0), 256, 384, 3, bias=True)


def test_the_bias_of_summed_outputs_is_added_once(biased):
    x = mx.array(np.random.default_rng(1).standard_normal((3, 256)).astype(np.float32))
    expected = np.array(trellis_linear(x, biased)).astype(np.float64)
    layer = ShardedToAllTrellisLinear(biased, mx.distributed.init())
    assert row_error(layer(x), expected) < 1e-6
    assert "bias" not in layer and layer(x.astype(mx.bfloat16)).dtype == mx.bfloat16


def test_gradients_of_shared_inputs_are_summed(biased, monkeypatch):
    monkeypatch.setattr(sharding, "sum_gradients", lambda group: lambda x: 2 * x)
    x = mx.array(np.random.default_rng(1).standard_normal((3, 256)).astype(np.float32))
    layer = AllToShardedTrellisLinear(biased, mx.distributed.init())
    assert row_error(layer(x), np.array(trellis_linear(2 * x, biased)).astype(np.float64)) < 1e-6


@pytest.mark.parametrize(
    "gate, up, down",
    [
        (Cut(256, 128, columns=(0,)), Cut(256, 128, columns=(1,)), Cut(128, 256, rows=(0,))),
        (Cut(256, 128, columns=(0,)), Cut(256, 128, columns=(0,)), Cut(128, 256, rows=(1,))),
        (Cut(256, 128, columns=(0,)), Cut(256, 128, columns=(0,)), Cut(256, 128, columns=(0,))),
        (Cut(128, 256, rows=(0,)), Cut(128, 256, rows=(0,)), Cut(256, 256)),
    ],
)
def test_experts_must_be_split_alike(gate, up, down):
    weights = WeightMap(MLX_LM, experts={"mlp": dict.fromkeys(GATED, [])})
    cuts = {"mlp.gate_proj": gate, "mlp.up_proj": up, "mlp.down_proj": down}
    with pytest.raises(
        ValueError, match="mlp: gate_proj and up_proj must be split along outputs and down_proj along its"
    ):
        sharding._check_experts(weights, cuts)


def test_experts_that_are_split_alike():
    weights = WeightMap(MLX_LM, experts={"mlp": dict.fromkeys(GATED, [])})
    gate, down = Cut(256, 128, columns=(0,)), Cut(128, 256, rows=(0,))
    sharding._check_experts(weights, {"mlp.gate_proj": gate, "mlp.up_proj": gate, "mlp.down_proj": down})


def test_experts_of_two_matrices_are_split_alike():
    """No model of mlx-lm with such experts has tensor parallelism yet."""
    weights = WeightMap(MLX_LM, experts={"mlp": dict.fromkeys(UNGATED, [])})
    sharding._check_experts(weights, {"mlp.fc1": Cut(256, 128, columns=(0,)), "mlp.fc2": Cut(128, 256, rows=(0,))})
    with pytest.raises(ValueError, match="mlp: fc1 must be split along outputs and fc2 along its inputs, all alike"):
        sharding._check_experts(weights, {"mlp.fc1": Cut(256, 128, columns=(0,)), "mlp.fc2": Cut(128, 256, rows=(1,))})
