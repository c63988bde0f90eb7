"""One rank of a ring: loads an EXL3 model split over the ranks and saves its logits. Run by test_distributed.py."""

import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx_lm import utils as mlx_lm_utils

from mlx_marlin.lm.sharding import sharded_load
from tests.support.checkpoints import SIZES

directory, output, kind = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
mlx_lm_utils.load_tokenizer = lambda *_, **__: None  # the checkpoints of the tests have none
group = mx.distributed.init(strict=True)
model, _ = sharded_load(str(directory), group if kind == "pipeline" else None, group if kind == "tensor" else None)
ids = np.random.default_rng(7).integers(0, SIZES.vocab, (2, 24))
np.save(output / f"{group.rank()}.npy", np.array(model(mx.array(ids)).astype(mx.float32)))
