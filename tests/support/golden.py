"""The test vectors in tests/vectors, made by an independent implementation of the format."""

import numpy as np

from mlx_marlin.weights.trellis import TrellisWeight
from tests.support.paths import VECTORS


def names(pattern: str) -> list[str]:
    """Names of the vector files that match, without the suffix; never empty."""
    found = sorted(path.stem for path in VECTORS.glob(f"{pattern}.npz"))
    if not found:
        raise FileNotFoundError(f"no {pattern}.npz in {VECTORS}")
    return found


def load(name: str) -> dict[str, np.ndarray]:
    with np.load(VECTORS / f"{name}.npz") as arrays:
        return dict(arrays)


def weight(arrays: dict[str, np.ndarray], prefix: str = "") -> TrellisWeight:
    """The weight whose tensors carry a prefix; packed sign words as older checkpoints have them."""

    def get(*keys):
        return next((arrays[prefix + key] for key in keys if prefix + key in arrays), None)

    sizes = {
        f"{side}_features": None if get(key) is None else int(get(key))
        for side, key in (("in", "k_logical"), ("out", "n_logical"))
    }
    return TrellisWeight(get("trellis"), get("suh", "su"), get("svh", "sv"), str(get("cb")), get("bias"), **sizes)


def experts(arrays: dict[str, np.ndarray]) -> dict[str, list[TrellisWeight]]:
    """gate, up and down weights of a ``moe_*`` file."""
    count = len(arrays["bits"])
    return {m: [weight(arrays, f"e{e}_{m}_") for e in range(count)] for m in ("gate", "up", "down")}
