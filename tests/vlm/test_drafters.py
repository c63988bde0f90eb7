"""Prediction layers as mlx-vlm's drafters: speculation says what plain generation says."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import mlx_vlm
import numpy as np
import pytest
from mlx_vlm.models.cache import make_prompt_cache
from mlx_vlm.speculative.drafters import load_drafter

from mlx_marlin import vlm
from mlx_marlin.layers.experts import TrellisSwitchGLU, TrellisSwitchMLP
from mlx_marlin.layers.linear import TrellisLinear
from mlx_marlin.layers.state import LayerConfigs
from mlx_marlin.lm.model import load_exl3_model
from mlx_marlin.vlm.host import MLX_VLM
from mlx_marlin.vlm.layers import FusedExperts
from tests.support import clients, drafting, generic_checkpoints
from tests.support.architectures_mlp import add_nemotron_h_drafter, nemotron_h_latent
from tests.support.checkpoints import SIZES, Checkpoint
from tests.support.servers import VLM, Server
from tests.support.vlm_checkpoints import PROCESSED, gemma4, qwen3_5_moe, qwen3_vl_moe, write_processor
from tests.support.vlm_latents import add_glm_moe_dsa_drafter, add_hy_v4_drafter, hy_v4
from tests.support.vlm_ngrams import add_qwen4_exp_drafter, qwen4_exp_plain
from tests.support.vlm_originals import add_glm5_next_drafter, deepseek_v4, glm5_next
from tests.vlm.test_load import answer, picture


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """The EXL3 one, and that of the dequantized weights."""
    c, folder = qwen3_5_moe(PROCESSED).checkpoint, tmp_path_factory.mktemp("vlm")
    drafting.add_drafter(c)
    return write_processor(c.write(folder / "exl3", shards=2)), write_processor(c.write_dense(folder / "dense"))


def draft(drafter, tokens: mx.array, width: int, target: nn.Module | None = None) -> np.ndarray:
    """What a drafter makes of hidden states, with embeddings as of a model."""
    embedding = nn.Embedding(PROCESSED.vocab, PROCESSED.hidden)
    embedding.weight = mx.random.normal(embedding.weight.shape, key=mx.random.key(4))
    stands_in = SimpleNamespace(embed_tokens=embedding, model=SimpleNamespace(embed_tokens=embedding), lm_head=None)
    drafter.reset(stands_in if target is None else target)
    hidden = mx.random.normal((1, tokens.shape[1], width), key=mx.random.key(3))
    made = drafter._forward_tokens(tokens, hidden, mx.int32)
    return np.array((made[0] if isinstance(made, tuple) else made).astype(mx.float32))


def assert_drafters_agree(exl3, dense, width: int = PROCESSED.hidden, target: nn.Module | None = None) -> nn.Module:
    drafter = vlm.load_drafter(exl3, "float32")
    theirs, kind = load_drafter(str(dense))
    theirs.set_dtype(mx.float32)
    tokens = mx.array(np.random.default_rng(1).integers(0, SIZES.vocab, (1, 9)))
    got, wanted = (draft(model, tokens, width, target) for model in (drafter, theirs))
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


def glm_moe_dsa() -> Checkpoint:
    """GLM-5 without its layers, of which the drafter needs none."""
    checkpoint = Checkpoint(SIZES, {"model_type": "glm_moe_dsa", **generic_checkpoints.CONFIGS["glm_moe_dsa"]})
    checkpoint.ends()
    return checkpoint


def test_drafters_with_latent_attention(tmp_path):
    for c, add in ((glm_moe_dsa(), add_glm_moe_dsa_drafter), (hy_v4().checkpoint, add_hy_v4_drafter)):
        add(c)
        folder = tmp_path / c.config["model_type"]
        drafter = assert_drafters_agree(c.write(folder / "exl3"), c.write_dense(folder / "dense"), SIZES.hidden)
        assert [m for m in drafter.modules() if isinstance(m, TrellisSwitchGLU)]


def test_a_drafter_with_experts_of_two_matrices(tmp_path):
    c = nemotron_h_latent()
    add_nemotron_h_drafter(c)
    target = MLX_VLM.new_model({**c.config})
    drafter = assert_drafters_agree(c.write(tmp_path / "exl3"), c.write_dense(tmp_path / "dense"), SIZES.hidden, target)
    assert [m for m in drafter.modules() if isinstance(m, TrellisSwitchMLP)]


def test_speculation_says_the_same(directories):
    model, processor = vlm.load(directories[0], "float32")
    plain = answer(model, processor, picture())
    drafter = vlm.load_drafter(directories[0], "float32")
    prompt = mlx_vlm.apply_chat_template(processor, model.config, "What is this?", num_images=1)
    drafted = mlx_vlm.generate(
        model, processor, prompt, [picture()], max_tokens=8, temperature=0.0, draft_model=drafter, draft_kind="mtp"
    )
    assert drafted.text == plain.text and sum(drafter.draft_lens) > 0


@pytest.fixture
def ran(monkeypatch):
    """The layers that ran, by their configs, and with how many rows."""
    seen, choose = [], LayerConfigs.choose

    def count(self, call):
        seen.append((id(self), call.rows))
        return choose(self, call)

    monkeypatch.setattr(LayerConfigs, "choose", count)
    return seen


def test_drafts_are_verified_at_once(ran, tmp_path):
    """As many rows as a draft has tokens, and one; the same text, in fewer steps the more of a draft is right."""
    directory = write_processor(drafting.agreeing(PROCESSED).write(tmp_path / "exl3"))
    (model, processor), drafter = vlm.load(directory, "float32"), vlm.load_drafter(directory, "float32")
    layers = [m for m in model.language_model.modules() if isinstance(m, (TrellisLinear, TrellisSwitchGLU))]
    ours = {id(m._derived.configs) for m in layers}
    prompt = mlx_vlm.apply_chat_template(processor, model.config, "What is this?")
    options = {"max_tokens": 24, "temperature": 0.0}
    plain = mlx_vlm.generate(model, processor, prompt, **options)
    steps = {}
    for rows in (2, 4, 8):
        ran.clear()
        speculation = {"draft_model": drafter, "draft_kind": "mtp", "draft_block_size": rows}
        assert mlx_vlm.generate(model, processor, prompt, **options, **speculation).text == plain.text
        verified = sum(length == rows - 1 for length in drafter.draft_lens)  # the last draft may be shorter
        assert verified > 0 and sum(run in ours and n == rows for run, n in ran) == verified * len(layers)
        steps[rows] = len(drafter.draft_lens)
    assert steps[2] <= 14 and steps[4] <= 9 and steps[8] < 24 / 2


@pytest.mark.slow
def test_the_server_drafts(tmp_path):
    """Alone, and for several at once: the text of generation without a drafter."""
    directory = write_processor(drafting.agreeing(PROCESSED).write(tmp_path / "exl3"))
    model, processor = vlm.load(directory)
    prompt = mlx_vlm.apply_chat_template(processor, model.config, clients.QUESTION)
    wanted = mlx_vlm.generate(model, processor, prompt, max_tokens=24, temperature=0.0).text
    options = ("--model", directory, "--draft-model", directory, "--draft-block-size", 4)
    server = Server(VLM, tmp_path / "log", *options)
    try:
        client = clients.Client(server.port, str(directory))
        with ThreadPoolExecutor() as pool:
            texts = [client.text(max_tokens=24), *pool.map(lambda _: client.streamed(max_tokens=24)[0], range(3))]
    finally:
        server.stop()
    assert "speculative decoding enabled" in server.log.read_text()
    # mlx-vlm's generate leaves out bytes that are no text, its server marks them.
    assert [text.replace("\N{REPLACEMENT CHARACTER}", "") for text in texts] == [wanted] * 4


@pytest.mark.parametrize("make", [glm5_next, deepseek_v4, qwen4_exp_plain, qwen3_5_moe, gemma4])
def test_a_block_gives_what_its_tokens_give_alone(make, ran, tmp_path):
    case, rows = make(), 4
    directory = case.checkpoint.write(tmp_path / "exl3")
    model, _ = load_exl3_model(directory, host=MLX_VLM)
    ids = mx.array(np.random.default_rng(7).integers(0, 150, (1, 24)))
    answers = []
    for block in (1, rows):
        cache = make_prompt_cache(model.language_model)
        mx.eval(model.language_model(ids, cache=cache).logits)
        ran.clear()
        parts = [model.language_model(ids[:, i : i + block], cache=cache).logits for i in range(0, rows, block)]
        answers.append(np.array(mx.concatenate(parts, axis=1)))
    assert np.abs(answers[0] - answers[1]).max() <= 1e-4 * np.abs(answers[0]).max()
    alone = sum(n < rows for _, n in ran)
    # DeepSeek V4 attends one token at a time.
    assert alone == 0 or make is deepseek_v4


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
