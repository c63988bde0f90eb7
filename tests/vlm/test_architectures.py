"""Models of mlx-vlm: logits of the EXL3 checkpoint against mlx-vlm's own model with the dequantized weights."""

import mlx.core as mx
import numpy as np
import pytest
from mlx_vlm import utils as mlx_vlm_utils

from mlx_marlin.lm.model import load_exl3_model
from mlx_marlin.vlm.host import MLX_VLM
from tests.support import vlm_checkpoints, vlm_originals
from tests.support.checkpoints import HALF_RATES
from tests.support.vlm_checkpoints import logits


def assert_same(got: np.ndarray, wanted: np.ndarray) -> None:
    assert np.isfinite(wanted).all() and wanted.std() > 0.1
    assert np.abs(got - wanted).max() <= 1e-4 * np.abs(wanted).max()
    assert (got.argmax(-1) == wanted.argmax(-1)).all()


def load_dense(case, directory):
    """mlx-vlm's own model of the dense form, in float32."""
    checkpoint = case.checkpoint
    head = checkpoint.dense.pop("lm_head.weight") if case.ties else None
    dense = mlx_vlm_utils.load_model(checkpoint.write_dense(directory))
    dense.set_dtype(mx.float32)
    if head is not None:
        dense.language_model.model.embed_tokens.as_linear = lambda x: x @ head.T
    return dense


CASES = {**vlm_checkpoints.CASES, **vlm_originals.CASES}


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_those_of_the_dequantized_weights(name, tmp_path):
    case = CASES[name]()
    wanted = logits(load_dense(case, tmp_path / "dense"), case)
    model, _ = load_exl3_model(case.checkpoint.write(tmp_path / "exl3", shards=2), host=MLX_VLM)
    assert_same(logits(model, case), wanted)
    assert set(HALF_RATES) <= set(case.checkpoint.bits.values())
