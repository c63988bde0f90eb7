"""Models of mlx-vlm that have in one piece what checkpoints quantize in several."""

import mlx.core as mx
import numpy as np
import pytest
from mlx_vlm.models.minimax_m3_vl.language import MiniMaxMLP

from mlx_marlin.layers.experts import TrellisSwitchGLU
from mlx_marlin.layers.partial import PartlyQuantizedSwitchGLU
from mlx_marlin.lm.model import load_exl3_model
from mlx_marlin.lm.sharding import open_sharded
from mlx_marlin.vlm.host import MLX_VLM
from mlx_marlin.vlm.layers import DescribedLinear
from tests.lm.test_distributed import Rank
from tests.lm.test_real_directories import leave_unquantized
from tests.support.checkpoints import SIZES
from tests.support.vlm_checkpoints import logits
from tests.support.vlm_latents import hy_v4
from tests.support.vlm_towers import minimax_m3_vl

EXPERTS = "model.layers.1.mlp.experts"
PROJECTIONS = TrellisSwitchGLU.PROJECTIONS


@pytest.fixture
def directory(tmp_path):
    return hy_v4().checkpoint.write(tmp_path / "exl3")


def load(directory):
    return load_exl3_model(directory, host=MLX_VLM)[0]


@pytest.mark.parametrize(
    "names",
    [
        [f"{EXPERTS}.2.up_proj"],
        [f"{EXPERTS}.1.{p}" for p in PROJECTIONS],
        [f"{EXPERTS}.{e}.{p}" for e in range(SIZES.experts) for p in PROJECTIONS],
    ],
    ids=("up alone", "an expert", "a layer"),
)
def test_experts_of_a_joined_class_that_were_left_unquantized(directory, names):
    wanted = logits(load(directory), hy_v4())
    leave_unquantized(directory, names)
    model = load(directory)
    got = logits(model, hy_v4())
    assert np.abs(got - wanted).max() <= 1e-4 * np.abs(wanted).max() and (got.argmax(-1) == wanted.argmax(-1)).all()
    partly = isinstance(model.language_model.model.layers[1].mlp.switch_mlp, PartlyQuantizedSwitchGLU)
    assert partly == (len(names) < 3 * SIZES.experts)


def test_a_missing_half_is_told(directory):
    checkpoint = hy_v4().checkpoint
    for name in [name for name in checkpoint.exl3 if name.startswith(EXPERTS) and ".up_proj." in name]:
        del checkpoint.exl3[name]
    with pytest.raises(ValueError, match="up_proj is not in the checkpoint"):
        load(checkpoint.write(directory))


def test_a_pipeline_that_hands_nothing_over_is_refused(directory):
    with pytest.raises(ValueError, match=r"mlx_vlm\.models\.hy_v4\.hy_v4 has no pipeline parallelism"):
        open_sharded(directory, Rank(0, 2), None, host=MLX_VLM)


def test_a_split_of_heads_that_choose_together_is_refused(tmp_path):
    directory = minimax_m3_vl().checkpoint.write(tmp_path / "exl3")
    with pytest.raises(ValueError, match=r"minimax_m3_vl has no tensor parallelism; its experts can be shared"):
        open_sharded(directory, None, Rank(0, 2), host=MLX_VLM)


def test_a_shared_expert_stays_apart_from_the_others(tmp_path):
    model = load(minimax_m3_vl().checkpoint.write(tmp_path / "exl3"))
    block = model.language_model.model.layers[1].block_sparse_moe
    assert block.switch_mlp.experts.num_experts == SIZES.experts
    assert type(block.shared_experts) is MiniMaxMLP and type(block.shared_experts.up_proj) is DescribedLinear


def test_a_shared_expert_stays_apart_in_the_text_model_alone(tmp_path):
    checkpoint = minimax_m3_vl().checkpoint
    text = checkpoint.config["text_config"]
    checkpoint.exl3 = {name: value for name, value in checkpoint.exl3.items() if name.startswith("language_model.")}
    whole = load(checkpoint.write(tmp_path / "whole"))
    checkpoint.exl3 = {name.removeprefix("language_model."): value for name, value in checkpoint.exl3.items()}
    checkpoint.config = {**text, "model_type": "minimax_m3"}
    alone = load(checkpoint.write(tmp_path / "alone"))
    tokens = mx.arange(24)[None]
    got, wanted = (np.array(MLX_VLM.logits(m, tokens, MLX_VLM.make_cache(m))) for m in (alone, whole))
    assert type(alone.language_model.model.layers[1].block_sparse_moe.shared_experts) is MiniMaxMLP
    np.testing.assert_array_equal(got, wanted)
