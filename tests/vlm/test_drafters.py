"""Prediction layers as mlx-vlm's drafters: speculation says what plain generation says."""

import json
import shutil
from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import mlx_vlm
import numpy as np
import pytest
from mlx_vlm.speculative.drafters import load_drafter

from mlx_marlin import vlm
from mlx_marlin.layers.linear import TrellisLinear
from mlx_marlin.vlm.layers import FusedExperts
from tests.support.checkpoints import SIZES
from tests.support.left_out_parts import draft_in_front
from tests.support.vlm_checkpoints import PROCESSED, qwen3_5_moe, qwen3_vl_moe, write_processor
from tests.support.vlm_ngrams import add_qwen4_exp_drafter, qwen4_exp_plain
from tests.support.vlm_originals import add_glm5_next_drafter, glm5_next
from tests.vlm.test_load import answer, picture


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """The EXL3 one, and that of the dequantized weights."""
    c, folder = qwen3_5_moe(PROCESSED).checkpoint, tmp_path_factory.mktemp("vlm")
    c.config["text_config"]["mtp_num_hidden_layers"] = 1
    draft_in_front(c)
    c.norm("mtp.pre_fc_norm_embedding", PROCESSED.hidden, 0.0)
    c.gated_mlp("mtp.layers.0.mlp.shared_expert", 128)
    c.plain("mtp.layers.0.mlp.shared_expert_gate.weight", 1, PROCESSED.hidden, spread=0.1, dtype=mx.float16)
    return write_processor(c.write(folder / "exl3", shards=2)), write_processor(c.write_dense(folder / "dense"))


def draft(drafter, tokens: mx.array, width: int) -> np.ndarray:
    """What a drafter makes of hidden states, with embeddings as of a model."""
    embedding = nn.Embedding(PROCESSED.vocab, PROCESSED.hidden)
    embedding.weight = mx.random.normal(embedding.weight.shape, key=mx.random.key(4))
    drafter.reset(SimpleNamespace(embed_tokens=embedding, lm_head=None))
    hidden = mx.random.normal((1, tokens.shape[1], width), key=mx.random.key(3))
    made = drafter._forward_tokens(tokens, hidden, mx.int32)
    return np.array((made[0] if isinstance(made, tuple) else made).astype(mx.float32))


def assert_drafters_agree(exl3, dense, width: int = PROCESSED.hidden) -> nn.Module:
    drafter = vlm.load_drafter(exl3, "float32")
    theirs, kind = load_drafter(str(dense))
    theirs.set_dtype(mx.float32)
    tokens = mx.array(np.random.default_rng(1).integers(0, SIZES.vocab, (1, 9)))
    got, wanted = (draft(model, tokens, width) for model in (drafter, theirs))
    assert kind == "mtp" and wanted.std() > 0.1
    assert np.abs(got - wanted).max() <= 1e-4 * np.abs(wanted).max()
    return drafter


def test_a_drafter_equals_that_of_the_dequantized_weights(directories):
    drafter = assert_drafters_agree(*directories)
    assert isinstance(drafter.fc, TrellisLinear) and isinstance(drafter.layers[0].mlp.switch_mlp, FusedExperts)


def test_drafters_of_models_with_streams(tmp_path):
    for make, add, streams in (
        (glm5_next, add_glm5_next_drafter, 1),
        (qwen4_exp_plain, add_qwen4_exp_drafter, 2),
    ):
        c, folder = make().checkpoint, tmp_path / make.__name__
        add(c)
        assert_drafters_agree(c.write(folder / "exl3"), c.write_dense(folder / "dense"), streams * SIZES.hidden)


def test_speculation_says_the_same(directories):
    model, processor = vlm.load(directories[0], "float32")
    plain = answer(model, processor, picture())
    drafter = vlm.load_drafter(directories[0], "float32")
    prompt = mlx_vlm.apply_chat_template(processor, model.config, "What is this?", num_images=1)
    drafted = mlx_vlm.generate(
        model, processor, prompt, [picture()], max_tokens=8, temperature=0.0, draft_model=drafter, draft_kind="mtp"
    )
    assert drafted.text == plain.text and sum(drafter.draft_lens) > 0


def test_a_checkpoint_without_prediction_layers_is_refused(tmp_path):
    directory = qwen3_vl_moe(PROCESSED).checkpoint.write(tmp_path / "exl3")
    with pytest.raises(ValueError, match="mlx-vlm has no drafter for the prediction layers of qwen3_vl_moe"):
        vlm.load_drafter(directory)
    c = qwen3_5_moe(PROCESSED).checkpoint
    c.exl3 = {name: value for name, value in c.exl3.items() if not name.startswith("mtp.")}
    with pytest.raises(ValueError, match="the checkpoint has no tensor for fc.weight"):
        vlm.load_drafter(c.write(tmp_path / "other"))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "config.json"),
        ([], "config.json"),
        ({"model_type": ["qwen3_5_moe"]}, "model_type must name an architecture"),
        ({"text_config": "x"}, "mlx-vlm cannot choose a drafter by it"),
        ({"text_config": {"num_hidden_layers": [1]}}, "mlx-vlm cannot choose a drafter by it"),
        ({"model_file": "x.py"}, "model_file, code inside the checkpoint, is not run"),
    ],
)
def test_a_config_that_is_none_is_refused(config, message, directories, tmp_path):
    directory = shutil.copytree(directories[0], tmp_path / "exl3")
    file = directory / "config.json"
    content = json.loads(file.read_text())
    if isinstance(config, dict):
        for key, value in config.items():
            content[key] = {**content[key], **value} if isinstance(value, dict) else value
        config = content
    file.unlink()
    if config is None:
        file.mkdir()
    else:
        file.write_text(json.dumps(config))
    with pytest.raises((ValueError, FileNotFoundError), match=f"{directory}.*{message}"):
        vlm.load_drafter(directory)
