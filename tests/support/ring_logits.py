"""One rank of a ring: loads EXL3 models split over the ranks and saves their logits. Run by tests of both hosts.

Arguments: where to, then a directory, a host (lm, vlm) and a way to split (tensor, experts, pipeline) for each model.
"""

import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from mlx_marlin import vlm
from mlx_marlin.layers.experts import TrellisExperts
from mlx_marlin.lm import sharding
from mlx_marlin.lm.mlx_lm_host import MLX_LM
from tests.support.checkpoints import SIZES

output, arguments = Path(sys.argv[1]), sys.argv[2:]
# The checkpoints of the tests have no tokenizer.
sharding.load_tokenizer = sharding.check_tokenizer = lambda *_, **__: None
group = mx.distributed.init(strict=True)
for directory, name, way in zip(arguments[::3], arguments[1::3], arguments[2::3]):
    pipeline, tensor = (group, None) if way == "pipeline" else (None, group)
    options = {"parallel": "experts" if way == "experts" else "tensor", "accuracy": "float32"}
    if name == "lm":
        host, (model, _) = MLX_LM, sharding.sharded_load(directory, pipeline, tensor, **options)
    else:
        from mlx_marlin.vlm import processor
        from mlx_marlin.vlm.host import MLX_VLM as host

        processor.load_processor = processor.check_processor = lambda *_, **__: None
        model, _ = vlm.sharded_load(directory, tensor, pipeline, **options)
    ids = mx.array(np.random.default_rng(7).integers(0, SIZES.vocab, (2, 24)))
    cache = host.make_cache(model)
    first = host.logits(model, ids, cache)
    mx.eval(first)  # what ranks send each other has no order otherwise
    second = host.logits(model, ids[:, :1], cache)
    experts = [m for m in model.modules() if isinstance(m, TrellisExperts)]
    size = sum(array.nbytes for m in experts for _, array in tree_flatten(m.parameters()))
    saved = np.array(mx.concatenate([first, second], axis=1).astype(mx.float32))
    np.savez(output / f"{Path(directory).name}-{name}-{way}-{group.rank()}.npz", logits=saved, experts=size)
