"""Models of mlx-vlm: logits of the EXL3 checkpoint against mlx-vlm's own model with the dequantized weights."""

import re
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx_vlm import utils as mlx_vlm_utils
from mlx_vlm.models import switch_layers

from mlx_marlin.layers.experts import TrellisSwitch
from mlx_marlin.lm.model import load_exl3_model
from mlx_marlin.vlm.host import MLX_VLM
from tests.support import (
    architectures,
    generic_checkpoints,
    vlm_checkpoints,
    vlm_latents,
    vlm_ngrams,
    vlm_originals,
    vlm_towers,
)
from tests.support.checkpoints import HALF_RATES, SIZES
from tests.support.vlm_checkpoints import logits


def assert_same(got: np.ndarray, wanted: np.ndarray) -> None:
    assert np.isfinite(wanted).all() and wanted.std() > 0.1
    assert np.abs(got - wanted).max() <= 1e-4 * np.abs(wanted).max()
    assert (got.argmax(-1) == wanted.argmax(-1)).all()


def assert_experts_are_fused(model) -> None:
    modules = model.modules()
    assert [m for m in modules if isinstance(m, TrellisSwitch)]
    assert not [m for m in modules if isinstance(m, switch_layers.SwitchLinear)]


def load_dense(case, directory):
    """mlx-vlm's own model of the dense form, in float32."""
    checkpoint = case.checkpoint
    head = checkpoint.dense.pop("lm_head.weight") if case.ties else None
    dense = mlx_vlm_utils.load_model(checkpoint.write_dense(directory))
    dense.set_dtype(mx.float32)
    if head is not None:
        dense.language_model.model.embed_tokens.as_linear = lambda x: x @ head.T
    return dense


CASES = {
    **vlm_checkpoints.CASES,
    **vlm_originals.CASES,
    **vlm_ngrams.CASES,
    **vlm_latents.CASES,
    **vlm_towers.CASES,
}


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_those_of_the_dequantized_weights(name, tmp_path):
    case = CASES[name]()
    wanted = logits(load_dense(case, tmp_path / "dense"), case)
    directory = case.checkpoint.write(tmp_path / "exl3", shards=2)
    if case.tables:
        mx.save_safetensors(str(directory / "ngram_embedding.safetensors"), case.tables)
    model, _ = load_exl3_model(directory, host=MLX_VLM)
    assert_same(logits(model, case), wanted)
    assert_experts_are_fused(model)
    assert set(HALF_RATES) <= set(case.checkpoint.bits.values())


# Text models, in mlx-vlm's own names, by what their config.json is called in the tests of mlx-lm.
GENERIC = {
    **{
        name: name
        for name in (
            "afmoe bailing_moe bailing_moe_linear deepseek deepseek_v2 deepseek_v3 deepseek_v32 dots1 ernie4_5_moe "
            "exaone_moe glm4_moe glm4_moe_lite glm_moe_dsa gpt_oss granitemoe granitemoehybrid hunyuan jamba kimi_k3 "
            "kimi_linear laguna lfm2_moe longcat_flash mellum mimo_v2_flash minimax mixtral nemotron_h olmoe phimoe "
            "phixtral qwen2_moe qwen3_moe qwen3_next solar_open step3p5"
        ).split()
    },
    "gemma4_unified": "gemma4",
    "klear": "Klear",
    "nemotron_h_nano_omni": "nemotron_h",
}
# Whose text model has a config of its own.
NESTED = {"nemotron_h_nano_omni"}


def generic_config(name: str) -> dict:
    if name in generic_checkpoints.CONFIGS:
        return generic_checkpoints.CONFIGS[name]
    config, common = architectures.ARCHITECTURES[name]().config, SIZES.config()
    return {key: value for key, value in config.items() if key != "model_type" and value != common.get(key, ...)}


@pytest.mark.parametrize("name", GENERIC)
def test_logits_of_further_architectures(name, tmp_path):
    config = generic_config(GENERIC[name])
    if name in NESTED:
        config = {"text_config": {**SIZES.config(), **config, "model_type": GENERIC[name]}}
    checkpoint, dense = generic_checkpoints.make(name, host=MLX_VLM, config=config)
    model, _ = load_exl3_model(checkpoint.write(tmp_path / "exl3", shards=2), host=MLX_VLM)
    tokens = mx.array(np.random.default_rng(7).integers(0, SIZES.vocab, (1, 24)))
    got, wanted = (np.array(MLX_VLM.logits(m, tokens, MLX_VLM.make_cache(m))) for m in (model, dense))
    assert_same(got, wanted)
    assert_experts_are_fused(model)


# What mlx-vlm 0.7.10 has experts in, its own or those of a module that it imports, and no test here: why.
_NO_FILES = "ExLlamaV3 1.6.5 does not convert it"
NOT_TESTED = {
    **dict.fromkeys(
        (
            "cohere2_moe d1 d1_omni deepseek_v41 deepseek_vl_v2 deepseekocr deepseekocr_2 diffusion_gemma "
            "ernie4_5_moe_vl flint inkling kimi_k25 kimi_vl kolibri1 llada2_moe llama4 longcat_flash_ngram "
            "longcat_flash_sparse minicpmv4_7 mistral_large3 moondream2 moondream3 nemotron_voicechat "
            "openai_privacy_filter qwen3_omni_moe unlimited_ocr xing4_0 youtu_vl zaya1_vl"
        ).split(),
        _NO_FILES,
    ),
    **dict.fromkeys(("llada_image", "ming_image"), "makes pictures"),
    **dict.fromkeys(("embedding_gemma2", "lfm2_colbert", "lfm2_embedding", "lfm2_encoder"), "makes embeddings"),
    "muse_spark": "its attention is a Metal kernel",
    "gemma4_text": "a part of gemma4",
    "qwen3_5_moe_text": "a part of qwen3_5_moe",
    "minimax_m3": "a part of minimax_m3_vl",
    "lfm2": "the code of lfm2_moe",
    "lfm2_vl": "its text model is lfm2_moe's, or has no experts",
    "mistral3": "its text model with experts is mistral4",
}


def modules_with_experts(folder: Path) -> set[str]:
    """Names of mlx-vlm's modules that make experts, or import what may make some from one that does."""
    sources: dict[str, str] = {}
    for file in sorted(folder.glob("*/*.py")):
        sources[file.parent.name] = sources.get(file.parent.name, "") + file.read_text("utf-8")
    found = {name for name, text in sources.items() if re.search(r"\bSwitch(GLU|MLP|Linear)\b", text)}
    imports = {name: set(re.findall(r"from \.\.(\w+)(?:\.\w+)? import", text)) for name, text in sources.items()}
    while more := {name for name, others in imports.items() if others & found} - found:
        found |= more
    return found


def test_every_module_of_mlx_vlm_with_experts_is_tested_or_named():
    """A new version of mlx-vlm shows here what is new in it."""
    modules, tested = modules_with_experts(Path(switch_layers.__file__).parent), {*CASES, *GENERIC}
    assert modules - tested == set(NOT_TESTED) and not tested & set(NOT_TESTED)
