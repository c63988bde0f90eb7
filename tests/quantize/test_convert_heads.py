"""The converter and the loader as a pair: logits of what is converted and loaded against those of the source."""

import json

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm import utils as mlx_lm_utils

from mlx_marlin.lm.model import load_exl3_model
from mlx_marlin.quantize import convert
from tests.support import architectures, architectures_gemma, generic_checkpoints, generic_configs
from tests.support.generic_checkpoints import logits
from tests.support.small_conversions import SMALL, add_tokenizer, correlation, quick_conversions, small, write_text  # noqa: F401

# Whose every combination is quick.
QUICK_PAIRS = {"qwen3_5_moe", "gemma2"}
# For whose experts mlx-lm knows other names than generic_checkpoints gives: written as mlx-lm holds them.
STACKED = {"granitemoe", "phimoe", "step3p5"}


def checkpoint_of(name):
    if name in architectures.ARCHITECTURES:
        return small(name)
    if name == "gemma2":
        return architectures_gemma.gemma2(SMALL)
    checkpoint, model = generic_checkpoints.make(name, SMALL)
    if name in STACKED:
        checkpoint.dense = dict(tree_flatten(model.parameters()))
    return checkpoint


NAMES = [*architectures.ARCHITECTURES, "gemma2", *generic_configs.CONFIGS, *generic_checkpoints.HEADS]
# Whose models always have a head of their own, or never; seed_oss multiplies with the table itself.
UNTIED = {
    "qwen2_moe", "glm4_moe", "glm4_moe_lite", "deepseek_v3", "gpt_oss", "glm4", "deepseek_v2", "solar_open", "phimoe",
    "Klear", "step3p5", "seed_oss", "nemotron_h", "nemotron_h_latent", "phixtral",
}  # fmt: skip
TIED = {"gemma", "gemma2", "cohere", "lfm2_moe"}


def cases():
    """Every architecture with every kind of head; quick is one of each fifth architecture and of each odd head."""
    for number, name in enumerate(NAMES):
        ties = [tied for tied in (False, True) if name not in (UNTIED if tied else TIED)]
        combinations = [(tied, bits) for tied in ties for bits in (6, 16)]
        lacks = {"phimoe": architectures.needs_new_mlx_lm("cannot build phimoe without rope_scaling")}
        for i, (tied, bits) in enumerate(combinations):
            marks = [lacks[name]] if name in lacks else []
            often = name in generic_checkpoints.HEADS or number % 5 == 2
            is_quick = name in QUICK_PAIRS or (often and i == number % len(combinations))
            kind = "tied" if tied else "untied"
            marks += [] if is_quick else [pytest.mark.slow]
            yield pytest.param(name, tied, bits, id=f"{name}-{kind}-{bits}", marks=marks)


def test_a_tied_head_that_no_module_applies_is_refused(tmp_path, quick_conversions):  # noqa: F811
    checkpoint = checkpoint_of("seed_oss")
    checkpoint.drop_head()
    source = add_tokenizer(checkpoint.write_dense(tmp_path / "source"))
    with pytest.raises(ValueError, match="the module that makes the logits of mlx_lm.models.seed_oss is not found"):
        convert(source, tmp_path / "exl3", bits=8, calibration=write_text(tmp_path / "text"))


@pytest.mark.parametrize("name, tied, head_bits", list(cases()))
def test_logits(name, tied, head_bits, tmp_path, quick_conversions):  # noqa: F811
    checkpoint = checkpoint_of(name)
    head = next((n for n in ("language_model.lm_head", "lm_head", "output") if f"{n}.weight" in checkpoint.dense), None)
    if tied and head:
        checkpoint.drop_head(head)
    source = add_tokenizer(checkpoint.write_dense(tmp_path / "source"))
    config = json.loads((source / "config.json").read_text())
    for part in (config, config.get("text_config", {})):
        part["tie_word_embeddings"] = tied
    (source / "config.json").write_text(json.dumps(config))
    dense, _ = mlx_lm_utils.load_model(source)
    dense.set_dtype(mx.float32)
    convert(source, tmp_path / "exl3", bits=8, head_bits=head_bits, calibration=write_text(tmp_path / "text"))
    assert not json.loads((tmp_path / "exl3/config.json").read_text())["tie_word_embeddings"]
    model, _ = load_exl3_model(tmp_path / "exl3")
    found = logits(model)
    # Another head gives about 0, the search that only steps at least 0.68: routing may flip.
    assert found.std() > 0.01 and correlation(found, logits(dense)) > 0.6
    # Nothing of the text model is left over.
    assert not model.left_out or model.left_out.expected, str(model.left_out)
