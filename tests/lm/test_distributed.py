"""Models split over two ranks of a ring on this machine, against one rank."""

import subprocess
import sys
from collections import deque
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_marlin import trellis_linear
from mlx_marlin.layers import sharded
from mlx_marlin.layers.experts import TrellisExperts, TrellisSwitchGLU
from mlx_marlin.layers.sharded import AllToShardedTrellisLinear, LocalExperts, ShardedToAllTrellisLinear
from mlx_marlin.lm import sharding
from mlx_marlin.lm.expert_parallel import PARALLEL
from mlx_marlin.lm.host import GATED, UNGATED, Host
from mlx_marlin.lm.mapping import WeightMap
from mlx_marlin.lm.mlx_lm_host import MLX_LM
from mlx_marlin.lm.model import build, fill, load_exl3_model, open_checkpoint
from mlx_marlin.lm.sharding import Cut, open_sharded, split
from mlx_marlin.loader.exl3 import QuantizedLinear
from mlx_marlin.vlm.host import MLX_VLM
from mlx_marlin.vlm.layers import FusedExperts, LocalVlmExperts
from mlx_marlin.weights.synthetic import random_weight
from tests.lm.test_architectures import assert_same
from tests.lm.test_real_directories import leave_unquantized
from tests.support import architectures
from tests.support.cases import row_error
from tests.support.checkpoints import SIZES, SPLITTABLE
from tests.support.paths import ROOT
from tests.support.servers import free_port
from tests.support.vlm_checkpoints import qwen3_5_moe, qwen3_vl_moe
from tests.support.vlm_latents import hy_v4
from tests.support.vlm_towers import minimax_m3_vl


def launch(*command: str) -> subprocess.CompletedProcess:
    launcher = "from mlx._distributed_utils.launch import main; main()"
    ring = ["-n", "2", "--backend", "ring", "--starting-port", str(free_port())]
    return subprocess.run(
        [sys.executable, "-c", launcher, *ring, "--", sys.executable, *command],
        capture_output=True, text=True, stdin=subprocess.DEVNULL, cwd=ROOT,
    )  # fmt: skip


NO_TENSOR_PARALLELISM = architectures.needs_new_mlx_lm("has no tensor parallelism for qwen3_moe")


def assert_ranks_equal_one(folder: Path, jobs: list[tuple[Path, Host, str]]) -> None:
    """Models split over two ranks of one ring, against one rank: logits of a prompt and of a token more."""
    names = [("lm" if host is MLX_LM else "vlm") for _, host, _ in jobs]
    arguments = [str(a) for (directory, _, way), name in zip(jobs, names) for a in (directory, name, way)]
    result = launch("-m", "tests.support.ring_logits", str(folder), *arguments)
    for (directory, host, way), name in zip(jobs, names):
        model, _ = load_exl3_model(directory, host=host)
        ids = mx.array(np.random.default_rng(7).integers(0, SIZES.vocab, (2, 24)))
        cache = host.make_cache(model)
        parts = [host.logits(model, tokens, cache) for tokens in (ids, ids[:, :1])]
        wanted = np.array(mx.concatenate(parts, axis=1).astype(mx.float32))
        experts = [m for m in model.modules() if isinstance(m, TrellisExperts)]
        size = sum(array.nbytes for m in experts for _, array in tree_flatten(m.parameters()))
        for rank in range(1 if way == "pipeline" else 2):
            file = folder / f"{directory.name}-{name}-{way}-{rank}.npz"
            assert file.exists(), result.stdout + result.stderr
            saved = np.load(file)
            assert_same(saved["logits"], wanted)
            if way != "pipeline":  # of whole ones, the widths differ
                assert abs(saved["experts"] / size - 1 / 2) < (0.2 if way == "experts" else 0.02)


@NO_TENSOR_PARALLELISM
def test_logits_of_two_ranks_equal_those_of_one(tmp_path):
    """Of a model of each host, with parts of every expert and with whole ones; of one that shares nothing else."""
    directory = architectures.qwen3_moe(SPLITTABLE).write(tmp_path / "qwen3_moe")
    other = qwen3_vl_moe(SPLITTABLE).checkpoint.write(tmp_path / "qwen3_vl_moe")
    jobs = [(d, host, way) for d, host in ((directory, MLX_LM), (other, MLX_VLM)) for way in PARALLEL]
    whole = qwen3_5_moe().checkpoint.write(tmp_path / "qwen3_5_moe")
    assert_ranks_equal_one(tmp_path, [*jobs, (whole, MLX_VLM, "experts")])


@pytest.mark.slow
def test_logits_of_two_ranks_of_more_models(tmp_path):
    """With biases of experts; with shared ones; with no tensor parallelism, also of two matrices; as a pipeline."""
    gpt_oss = architectures.gpt_oss(SPLITTABLE).write(tmp_path / "gpt_oss")
    deepseek = architectures.deepseek_v3().write(tmp_path / "deepseek_v3")
    glm = architectures.glm4_moe(SPLITTABLE).write(tmp_path / "glm4_moe")
    mixtral = architectures.mixtral().write(tmp_path / "mixtral")
    nemotron = architectures.ARCHITECTURES["nemotron_h_latent"]().write(tmp_path / "nemotron_h")
    jobs = [(directory, way) for directory in (gpt_oss, glm) for way in PARALLEL]
    jobs += [(mixtral, "experts"), (nemotron, "experts"), (deepseek, "pipeline")]
    whole = [make().checkpoint.write(tmp_path / make.__name__) for make in (hy_v4, minimax_m3_vl)]
    experts = [(directory, MLX_VLM, "experts") for directory in whole]
    assert_ranks_equal_one(tmp_path, [*((directory, MLX_LM, way) for directory, way in jobs), *experts])


@NO_TENSOR_PARALLELISM
@pytest.mark.slow
@pytest.mark.parametrize("parallel", PARALLEL)
def test_the_benchmark_command_runs_on_two_ranks(parallel, tmp_path):
    shipped = ROOT / "models" / "random-qwen3_moe"
    model = architectures.qwen3_moe(replace(SPLITTABLE, vocab=512)).write(tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):  # of 512 tokens
        (model / name).write_bytes((shipped / name).read_bytes())
    options = ("--parallel", parallel, "-p", "8", "-g", "4", "-n", "1")
    result = launch("-m", "mlx_marlin", "benchmark", "--model", str(model), *options)
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


@NO_TENSOR_PARALLELISM
@pytest.mark.parametrize("ranks", [2, 4])
def test_whole_experts_are_read_by_their_rank_alone(ranks, tmp_path, monkeypatch):
    """Of a width that could not be split; their number need not be a multiple of the ranks'."""
    sizes = replace(SPLITTABLE, heads=8, kv_heads=8, dense_width=512, width=96, experts=6)
    directory = architectures.qwen3_moe(sizes).write(tmp_path / "model")
    read, numbers, fill_one = [], [], QuantizedLinear.fill
    monkeypatch.setattr(QuantizedLinear, "fill", lambda s, *a, **k: read.append(s.name) or fill_one(s, *a, **k))
    for rank in range(ranks):
        read.clear()
        model, config, mapping, makers = open_sharded(directory, None, Rank(rank, ranks), "experts")
        assert read == []
        fill(model, mapping, config, None, "float32", **makers)
        experts = model.model.layers[architectures.MOE_LAYER].mlp.switch_mlp
        whole = [name.split(".experts.")[1] for name in read if ".experts." in name]
        mine = sorted({int(name.split(".")[0]) for name in whole})
        assert len(mine) == experts.experts.gate_proj.num_experts and len(whole) == 3 * len(mine)
        numbers += mine
    assert numbers == list(range(6))


@NO_TENSOR_PARALLELISM
@pytest.mark.parametrize("name, dense", [("qwen3_moe", "up_proj"), ("gpt_oss", None)])
def test_whole_experts_of_all_ranks_add_up(name, dense, tmp_path):
    """Those that were left unquantized, and biases, too."""
    sizes = replace(SPLITTABLE, width=SIZES.width)
    directory = architectures.ARCHITECTURES[name](sizes).write(tmp_path / "model")
    if dense:
        leave_unquantized(directory, [f"model.layers.{architectures.MOE_LAYER}.mlp.experts.3.{dense}"])
    x = mx.array(np.random.default_rng(1).standard_normal((5, SPLITTABLE.hidden)).astype(np.float32))
    indices = mx.array(np.random.default_rng(2).integers(0, 4, (5, 2)).astype(np.uint32))
    sums = []
    for ranks in (1, 2):
        parts = []
        for rank in range(ranks):
            model, config, mapping, makers = open_sharded(directory, None, Rank(rank, ranks), "experts")
            fill(model, mapping, config, None, "float32", **makers)
            block = model.model.layers[architectures.MOE_LAYER].mlp
            parts.append((block.switch_mlp if "switch_mlp" in block else block.experts)(x, indices))
        sums.append(np.array(sum(parts)))
    assert np.abs(sums[0]).max() > 0.1 and np.allclose(*sums, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "name, ranks, message",
    [
        ("llama", 2, "the model has no quantized experts to share among the ranks; use tensor parallelism"),
        ("qwen3_moe", 8, "mlp.switch_mlp has 4 experts, fewer than 8 ranks; use fewer ranks"),
    ],
)
def test_whole_experts_that_cannot_be_shared_are_refused(name, ranks, message, tmp_path, no_reading):
    directory = architectures.ARCHITECTURES[name](SPLITTABLE).write(tmp_path / "model")
    with pytest.raises(ValueError, match=message):
        open_sharded(directory, None, Rank(0, ranks), "experts")
    with pytest.raises(ValueError, match="parallel must be one of tensor, experts, got 'whole'"):
        split(None, None, WeightMap(MLX_LM), Rank(0, 2), "whole")


@pytest.mark.parametrize(
    "name, pipeline, ranks, message",
    [
        ("llama", False, 2, "self_attn.k_proj: 128 is split into 64 per rank here; .* at multiples of 128 only"),
        pytest.param(
            *("qwen3_moe", False, 3, "mlx_lm.models.qwen3_moe cannot be split over 3 ranks: ValueError"),
            marks=NO_TENSOR_PARALLELISM,
        ),
        ("mixtral", False, 2, "mlx_lm.models.mixtral has no tensor parallelism; its experts can be shared"),
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
    monkeypatch.setattr(sharded, "sum_gradients", lambda group: lambda x: 2 * x)
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


class Noting(TrellisSwitchGLU):
    """Notes the indices of its calls."""

    def __init__(self, *banks):
        super().__init__(*banks)
        self.seen = deque()  # no list: those are parameters

    def __call__(self, x, indices, scores=None):
        self.seen.append(np.array(indices))
        return super().__call__(x, indices, scores)


@pytest.mark.parametrize("is_fused", (True, False), ids=("fused", "by projection"))
def test_whole_experts_give_zeros_for_those_of_others(is_fused):
    """As mlx-lm calls them, and as mlx-vlm does; a fused layer is told which slots are of others."""
    rng = np.random.default_rng(0)
    banks = [[random_weight(rng, k, n, 3) for _ in range(6)] for k, n in ((256, 128), (256, 128), (128, 256))]
    x = mx.array(rng.standard_normal((2, 3, 256)).astype(np.float32))
    indices = mx.array(rng.integers(0, 6, (2, 3, 2)).astype(np.uint32))
    scores = mx.array(rng.uniform(size=(2, 3, 2)).astype(np.float32))
    wanted = TrellisSwitchGLU(*banks)(x, indices)
    slots, sums = [], []
    for first, last in ((0, 1), (1, 4), (4, 6)):
        inner = [bank[first:last] for bank in banks]
        glu = Noting(*inner)
        layer = LocalExperts(glu if is_fused else glu.__call__, first, last - first)
        slots.append(layer(x, indices))
        sums.append(LocalVlmExperts(FusedExperts(*inner), first, last - first)(x, indices, scores))
        theirs = (np.array(indices) < first) | (np.array(indices) >= last)
        assert not np.array(slots[-1])[theirs].any()
        (taken,) = glu.seen
        if is_fused:
            assert (taken == np.where(theirs, last - first, np.array(indices) - first)).all()
        for places, numbers, others in zip(*(a.reshape(-1, 2) for a in (taken, np.array(indices), theirs))):
            # No expert is read that a token does not take, but one where it takes none.
            assert is_fused or set(places) == (set(numbers[~others] - first) or {0})
    assert np.allclose(np.array(sum(slots)), np.array(wanted), rtol=1e-5, atol=1e-5)
    combined = (wanted * scores[..., None]).sum(-2)
    assert np.allclose(np.array(sum(sums)), np.array(combined), rtol=1e-5, atol=1e-5)


def test_experts_of_two_matrices_are_split_alike():
    """No model of mlx-lm with such experts has tensor parallelism yet."""
    weights = WeightMap(MLX_LM, experts={"mlp": dict.fromkeys(UNGATED, [])})
    sharding._check_experts(weights, {"mlp.fc1": Cut(256, 128, columns=(0,)), "mlp.fc2": Cut(128, 256, rows=(0,))})
    with pytest.raises(ValueError, match="mlp: fc1 must be split along outputs and fc2 along its inputs, all alike"):
        sharding._check_experts(weights, {"mlp.fc1": Cut(256, 128, columns=(0,)), "mlp.fc2": Cut(128, 256, rows=(1,))})
