"""One rank of a ring: loads an EXL3 model split over the ranks and saves its logits. Run by test_distributed.py."""

import sys
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_marlin.lm import sharding
from tests.support.checkpoints import SIZES

directory, output, kind = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
# The checkpoints of the tests have no tokenizer.
sharding.load_tokenizer = sharding.check_tokenizer = lambda *_, **__: None
group = mx.distributed.init(strict=True)
groups = {"pipeline": (group, None), "tensor": (None, group)}[kind]
model, _ = sharding.sharded_load(str(directory), *groups, accuracy="float32")
ids = np.random.default_rng(7).integers(0, SIZES.vocab, (2, 24))
np.save(output / f"{group.rank()}.npy", np.array(model(mx.array(ids)).astype(mx.float32)))
