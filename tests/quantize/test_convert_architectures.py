"""Conversions of the architectures that name, fuse or use their linears in their own way."""

from dataclasses import replace

import numpy as np
import pytest

from mlx_marlin import TrellisModelLoader, codec
from mlx_marlin.lm.model import load_exl3_model
from mlx_marlin.quantize import convert
from mlx_marlin.quantize.calibration import BUNDLED
from mlx_marlin.quantize.stored import stored_tensors
from mlx_marlin.quantize.weight import Codes
from mlx_marlin.weights.trellis import TrellisWeight
from tests.support import architectures, generic_checkpoints
from tests.support.checkpoints import SIZES
from tests.support.generic_checkpoints import logits
from tests.support.paths import MODELS
from tests.support.small_conversions import quick_conversions  # noqa: F401

DOCS_MOE = MODELS / "docs-moe"
VOCABULARY = 2048  # of the tokenizer
# w1, w2, w3; fused and interleaved, with biases; fused beside linear attention; latent attention
SLOW = ("gpt_oss", "qwen3_5_moe", "deepseek_v3", "glm4_moe_lite")
NAMES = ["mixtral", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]


@pytest.mark.parametrize("name", NAMES)
def test_every_linear_is_quantized_and_the_model_runs(name, tmp_path, quick_conversions):  # noqa: F811
    layers = 1 if name == "mixtral" else 2  # the others' first layer is unlike the second
    sizes = replace(SIZES, vocab=VOCABULARY, experts=3, layers=layers)
    checkpoint = architectures.ARCHITECTURES[name](sizes)
    source = checkpoint.write_dense(tmp_path / "source")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (source / file).write_bytes((DOCS_MOE / file).read_bytes())
    text = tmp_path / "calibration.txt"
    text.write_text(BUNDLED.read_text()[20000:24000])
    allocation = convert(source, tmp_path / "exl3", bits=4.5, head_bits=16, mtp_bits=16, calibration=text)
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


def test_up_is_stored_divided_where_exllamav3_does_so():
    """By powers of two, so that not a bit is lost."""
    rng = np.random.default_rng(0)
    trellis = rng.integers(-(2**15), 2**15, (8, 8, 48), dtype=np.int16)
    suh, svh = (rng.choice([-1, 1], 128) * rng.uniform(*ends, 128) for ends in ((0.5, 2), (0.001, 0.1)))
    codes = Codes(trellis, suh.astype(np.float16), svh.astype(np.float16), "mul1", 128, 128)
    bias = rng.standard_normal(128).astype(np.float16).astype(np.float32)

    def weight(divisor: int) -> tuple[np.ndarray, np.ndarray]:
        stored = stored_tensors("a", codes, bias, divisor)
        suh, svh, bias_ = (np.frombuffer(stored[f"a.{part}"].data, np.float16) for part in ("suh", "svh", "bias"))
        return codec.dequantize(TrellisWeight(trellis, suh, svh, "mul1")), bias_.astype(np.float32)

    assert all(np.array_equal(128 * divided, whole) for divided, whole in zip(weight(128), weight(1)))


@pytest.mark.slow
def test_up_of_a_converted_model_is_stored_divided(tmp_path):
    checkpoint, _ = generic_checkpoints.make("mistral4", replace(SIZES, vocab=VOCABULARY, dense_width=128))
    source = checkpoint.write_dense(tmp_path / "source")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (source / file).write_bytes((DOCS_MOE / file).read_bytes())
    text = tmp_path / "calibration.txt"
    text.write_text(BUNDLED.read_text()[20000:22000])
    convert(source, tmp_path / "exl3", bits=4.5, head_bits=16, calibration=text)
    loader = TrellisModelLoader(tmp_path / "exl3")
    for part, divisor in (("gate_proj", 1), ("up_proj", 128)):
        name = next(n for n in loader.names if n.endswith(f".experts.1.{part}"))
        truth, found = np.array(checkpoint.dense[f"{name}.weight"]).T, codec.dequantize(loader.load_weight(name))
        found = found[: truth.shape[0], : truth.shape[1]]
        assert np.sum(found * truth) / np.sum(found * found) == pytest.approx(divisor, rel=0.3)
