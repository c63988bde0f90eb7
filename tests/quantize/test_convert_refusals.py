"""What a conversion says before it begins."""

import json

import mlx.core as mx
import numpy as np
import pytest

from mlx_marlin.quantize import convert
from tests.support.checkpoints import write_directory
from tests.support.small_conversions import (  # noqa: F401
    add_tokenizer,
    header,
    mark_fp8,
    quick_conversions,
    source_of,
    values,
)

pytestmark = pytest.mark.usefixtures("quick_conversions")


def refused(source, output, match, **arguments):
    with pytest.raises(ValueError, match=match):
        convert(source, output, **{"bits": 6, **arguments})
    assert not output.exists()


def test_what_can_be_known_is_told_before_the_work(tmp_path, text):
    source, _ = source_of(tmp_path)
    output = tmp_path / "exl3"
    refused(source, output, "calibration text .* is a directory", calibration=tmp_path)
    refused(source, output, "calibration text .* is not there", calibration=tmp_path / "none.txt")
    (tmp_path / "empty.txt").write_text("")
    refused(source, output, "has 0 tokens", calibration=tmp_path / "empty.txt")
    refused(source, output, r"1.0 bits per weight cannot be met: .* take 1\.\d+", bits=1, calibration=text)
    refused(source / "config.json", output, "is a file; the directory", calibration=text)
    refused(source, output, "mtp_bits must be one of .* got 9", mtp_bits=9, calibration=text)
    refused(source, output, "vision_bits must be a whole number .* got 2.5", vision_bits=2.5, calibration=text)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (source / name).unlink()
    refused(source, output, "has no tokenizer that loads", calibration=text)


def test_code_of_a_tokenizer_runs_only_when_it_may(tmp_path, text):
    source, _ = source_of(tmp_path)
    add_tokenizer(source, auto_map={"AutoTokenizer": [None, "own.Own"]}, tokenizer_class="Own")
    (source / "own.py").write_text("from transformers import PreTrainedTokenizerFast as Own\n")
    refused(source, tmp_path / "exl3", "trust_remote_code", calibration=text)
    convert(source, tmp_path / "exl3", bits=8, calibration=text, trust_remote_code=True)
    assert (tmp_path / "exl3/own.py").is_file()


def test_only_files_of_the_index_are_read(tmp_path, text):
    source, checkpoint = source_of(tmp_path)
    config = json.loads((source / "config.json").read_text())
    sharded = add_tokenizer(write_directory(tmp_path / "sharded", config, checkpoint.dense, 2))
    stray = {name: mx.zeros(value.shape) for name, value in checkpoint.dense.items()}
    mx.save_safetensors(str(sharded / "model-old.safetensors"), stray)
    convert(sharded, tmp_path / "exl3", bits=8, calibration=text)
    norm = "model.norm.weight"
    assert np.array_equal(values(header(tmp_path / "exl3")[norm]), values(header(source)[norm]))
    (sharded / "model-00002-of-00002.safetensors").unlink()
    refused(sharded, tmp_path / "other", "model-00002-of-00002.safetensors is missing", calibration=text)


def remove_expert(c):
    del c.dense["model.layers.0.block_sparse_moe.experts.1.w2.weight"]


def test_a_missing_tensor_is_named(tmp_path, text):
    source, _ = source_of(tmp_path, "mixtral", remove_expert)
    refused(source, tmp_path / "exl3", r"experts\.1\.w2", calibration=text)


def codes_of(name, dtype):
    def change(c):
        c.dense[name] = mx.zeros(c.dense[name].shape, dtype)

    return change


@pytest.mark.parametrize(
    "architecture, name, dtype, what",
    [
        ("llama", "model.layers.1.mlp.up_proj.weight", mx.int8, r"tensor model\.layers\.1\.mlp\.up_proj\.weight is I8"),
        ("llama", "model.norm.weight", mx.int32, r"tensor model\.norm\.weight is I32"),
        (  # one of a stack, which is of floats all the same
            "qwen2_moe",
            "model.layers.1.mlp.experts.1.up_proj.weight",
            mx.uint8,
            r"tensor model\.layers\.1\.mlp\.experts\.1\.up_proj\.weight is U8",
        ),
        (
            "gpt_oss",
            "model.layers.1.mlp.experts.gate_up_proj.weight",
            mx.int8,
            r"what makes model\.layers\.1\.mlp\.experts\.gate_proj\.weight is int8",
        ),
    ],
)
def test_integers_are_not_taken_for_weights(tmp_path, text, architecture, name, dtype, what):
    source, _ = source_of(tmp_path, architecture, codes_of(name, dtype))
    refused(source, tmp_path / "exl3", f"{what}, .* F16, BF16 or F32 is wanted", calibration=text)


def test_codes_without_scales_are_not_taken_for_weights(tmp_path, text):
    """Weights that were cast to fp8, of which config.json says nothing."""
    name = "model.layers.0.mlp.gate_proj.weight"
    source, _ = source_of(tmp_path, "llama", codes_of(name, mx.uint8))
    mark_fp8(source / "model.safetensors", lambda tensor: tensor == name)
    refused(source, tmp_path / "exl3", r"tensor model\.layers\.0\.mlp\.gate_proj\.weight is F8_E4M3", calibration=text)


def test_a_head_that_is_no_tensor_of_the_checkpoint_is_refused(tmp_path, text, monkeypatch):
    """What model code makes of several tensors, or of a changed one."""
    source, _ = source_of(tmp_path)
    from mlx_lm.models import llama

    plain = llama.Model.sanitize
    monkeypatch.setattr(
        llama.Model, "sanitize", lambda self, w: plain(self, {**w, "lm_head.weight": w["lm_head.weight"] * 2})
    )
    refused(source, tmp_path / "exl3", "made by lm_head, whose weight is no tensor of the checkpoint", calibration=text)


def test_logits_that_no_module_makes_are_refused(tmp_path, text, monkeypatch):
    source, _ = source_of(tmp_path)
    from mlx_lm.models import llama

    call = llama.Model.__call__
    monkeypatch.setattr(llama.Model, "__call__", lambda self, *a, **k: mx.concatenate([call(self, *a, **k)] * 2, -1))
    refused(source, tmp_path / "exl3", "the module that makes the logits .* is not found", calibration=text)


def test_a_second_head_beside_tied_embeddings_is_refused(tmp_path, text):
    source, checkpoint = source_of(tmp_path)
    config = {**json.loads((source / "config.json").read_text()), "tie_word_embeddings": True}
    (source / "config.json").write_text(json.dumps(config))
    refused(source, tmp_path / "exl3", "lm_head.weight is another matrix", calibration=text)


def test_layers_that_hand_on_more_than_the_hidden_state_are_refused(tmp_path, text):
    def share(c):
        text_config = c.config["text_config"]
        text_config.update(num_kv_shared_layers=2, num_hidden_layers=4, enable_moe_block=False)
        text_config["layer_types"] = ["sliding_attention", "full_attention"] * 2
        for key in [key for key in c.dense if "experts" in key or "router" in key or "layernorm_" in key]:
            del c.dense[key]
        for key in [key for key in c.dense if ".layers." in key]:
            for old, new in ((0, 2), (1, 3)):
                if f".layers.{old}." in key:
                    c.dense[key.replace(f".layers.{old}.", f".layers.{new}.")] = c.dense[key]

    source, _ = source_of(tmp_path, "gemma4", share)
    refused(source, tmp_path / "exl3", "uses more of .*layers.0 than its hidden state", calibration=text)
