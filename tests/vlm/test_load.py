"""mlx_marlin.vlm.load: a model and its processor, through which mlx-vlm generates."""

import subprocess
import sys

import mlx.core as mx
import mlx_vlm
import numpy as np
import pytest
from PIL import Image

import mlx_marlin
from mlx_marlin import TrellisLinear, vlm
from mlx_marlin.layers.joined import JoinedTrellisLinear
from mlx_marlin.loader.contents import DRAFT, VISION
from mlx_marlin.vlm.layers import FusedExperts
from tests.support.vlm_checkpoints import PROCESSED, qwen3_5_moe, qwen3_vl_moe, write_processor


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """The EXL3 one, and that of the dequantized weights."""
    checkpoint, folder = qwen3_vl_moe(PROCESSED).checkpoint, tmp_path_factory.mktemp("vlm")
    return write_processor(checkpoint.write(folder / "exl3")), write_processor(checkpoint.write_dense(folder / "dense"))


@pytest.fixture(scope="module")
def directory(directories):
    return directories[0]


def picture(seed: int = 1) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 2, (4, 5, 3), np.uint8) * 255
    return Image.fromarray(coarse.repeat(10, 0).repeat(10, 1))


def test_the_package_is_imported_when_it_is_used():
    code = (
        "import sys, mlx_marlin.vlm, mlx_marlin.__main__; print(*(n for n in sys.modules if n.startswith('mlx_vlm')))"
    )
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert run.stdout.strip() == ""


def answer(model, processor, image: Image.Image) -> mlx_vlm.GenerationResult:
    prompt = mlx_vlm.apply_chat_template(processor, model.config, "What is this?", num_images=1)
    return mlx_vlm.generate(model, processor, prompt, [image], max_tokens=8, temperature=0.0)


def test_mlx_vlm_generates_as_with_the_dequantized_weights(directories):
    dense, processor = mlx_vlm.load(str(directories[1]))
    dense.set_dtype(mx.float32)
    quantized = vlm.load(directories[0], accuracy="float32")
    seen = []
    for image in (picture(), picture(2)):
        wanted, got = answer(dense, processor, image), answer(*quantized, image)
        assert got.token_ids == wanted.token_ids and got.text == wanted.text
        assert np.allclose(np.array(got.logprobs), np.array(wanted.logprobs), rtol=1e-4, atol=1e-4)
        seen.append(np.array(got.logprobs))
    assert not np.allclose(*seen, atol=0.01)


def test_what_stands_where(directory):
    model, _ = vlm.load(directory, accuracy="half")
    assert type(model.vision_tower.blocks[0].attn.qkv) is JoinedTrellisLinear
    assert isinstance(model.vision_tower.merger.linear_fc1, TrellisLinear)
    experts = model.language_model.model.layers[0].mlp.switch_mlp
    assert type(experts) is FusedExperts and experts.experts.top_k == 2 and experts.experts.accuracy == "half"
    # ExLlamaV3 keeps the fused qkv beside the parts that it quantized.
    assert set(model.left_out.tensors) == {VISION}
    assert all(".attn.qkv." in name for name in model.left_out.tensors[VISION])


def test_experts_combine_as_mlx_vlm_s_do(directory):
    experts = vlm.load(directory, accuracy="float32")[0].language_model.model.layers[0].mlp.switch_mlp
    rng = np.random.default_rng(0)
    x, shared = (mx.array(rng.normal(size=(1, 3, PROCESSED.hidden)).astype(np.float32)) for _ in range(2))
    indices = mx.array([[[0, 1], [2, 3], [1, 0]]])
    weights = mx.array(rng.uniform(size=(1, 3, 2)).astype(np.float32))
    wanted = (experts(x, indices) * weights[..., None]).sum(-2) + shared
    assert np.allclose(np.array(experts(x, indices, weights, shared)), np.array(wanted), rtol=1e-5, atol=1e-5)


def test_a_checkpoint_without_its_tower_is_a_text_model(tmp_path):
    checkpoint = qwen3_5_moe(PROCESSED).checkpoint
    checkpoint.exl3 = {name: value for name, value in checkpoint.exl3.items() if ".visual." not in name}
    model, processor = vlm.load(write_processor(checkpoint.write(tmp_path / "exl3")))
    assert model.vision_tower is None and set(model.left_out.tensors) == {DRAFT}
    assert mlx_vlm.generate(model, processor, "The number of", max_tokens=4).generation_tokens == 4


def test_a_tower_with_a_hole_is_refused(tmp_path):
    checkpoint = qwen3_vl_moe(PROCESSED).checkpoint
    del checkpoint.exl3["model.visual.pos_embed.weight"]
    with pytest.raises(ValueError, match=r"no tensor for vision_tower\.pos_embed\.weight"):
        vlm.load(write_processor(checkpoint.write(tmp_path / "exl3")))


def test_code_inside_a_checkpoint_is_not_run(tmp_path):
    directory = write_processor(qwen3_vl_moe(PROCESSED).checkpoint.write(tmp_path / "exl3"))
    (directory / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass P: pass\n")
    config = (directory / "tokenizer_config.json").read_text()
    (directory / "tokenizer_config.json").write_text(
        config.replace("{", '{"auto_map": {"AutoTokenizer": ["evil.P", "evil.P"], "AutoProcessor": "evil.P"}, ', 1)
    )
    try:
        vlm.load(directory, trust_remote_code=True)
    except ValueError:
        pass
    assert not (tmp_path / "ran").exists()


def test_mlx_lm_s_load_names_the_command_for_what_only_mlx_vlm_has(directory):
    with pytest.raises(
        ValueError, match=r"mlx-lm has no qwen4_exp model, mlx-vlm has: .*mlx_marlin\.vlm\.load.*vlm gen"
    ):
        mlx_marlin.load(directory, model_config={"model_type": "qwen4_exp"})
