"""Conversions of the architectures that name, fuse or use their linears in their own way."""

from dataclasses import replace

import numpy as np
import pytest

from mlx_marlin import TrellisModelLoader, codec
from mlx_marlin.lm.model import load_exl3_model
from mlx_marlin.quantize import convert
from mlx_marlin.quantize.calibration import BUNDLED
from tests.support import architectures
from tests.support.checkpoints import SIZES
from tests.support.generic_checkpoints import logits
from tests.support.paths import MODELS

DOCS_MOE = MODELS / "docs-moe"
VOCABULARY = 2048  # of the tokenizer
# w1, w2, w3; fused and interleaved, with biases; fused beside linear attention; latent attention
SLOW = ("gpt_oss", "qwen3_5_moe", "deepseek_v3", "glm4_moe_lite")
NAMES = ["mixtral", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]


@pytest.mark.parametrize("name", NAMES)
def test_every_linear_is_quantized_and_the_model_runs(name, tmp_path):
    layers = 1 if name == "mixtral" else 2  # the others' first layer is unlike the second
    sizes = replace(SIZES, vocab=VOCABULARY, experts=3, layers=layers)
    checkpoint = architectures.ARCHITECTURES[name](sizes)
    source = checkpoint.write_dense(tmp_path / "source")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (source / file).write_bytes((DOCS_MOE / file).read_bytes())
    text = tmp_path / "calibration.txt"
    text.write_text(BUNDLED.read_text()[20000:24000])
    allocation = convert(source, tmp_path / "exl3", bits=4.5, head_bits=16, calibration=text)
    wanted = {n for n in checkpoint.bits if n != "lm_head" and not n.startswith("mtp.")}
    assert set(allocation.widths) == wanted
    original, loader = (
        TrellisModelLoader(checkpoint.write(tmp_path / "original")),
        TrellisModelLoader(tmp_path / "exl3"),
    )
    assert set(loader.names) == wanted
    for name in loader.names:
        w, truth = loader.load_weight(name), codec.dequantize(original.load_weight(name))
        rows, columns = (min(sizes) for sizes in zip(truth.shape, w.padded_shape))
        found, truth = codec.dequantize(w)[:rows, :columns], truth[:rows, :columns]
        # 1 for this matrix, whatever its width; 0 for another. Padding is 0 in what was found, noise in the original.
        assert np.sum(found * truth) / np.sum(found * found) == pytest.approx(1, abs=0.3), name
    assert np.isfinite(logits(load_exl3_model(tmp_path / "exl3")[0])).all()
