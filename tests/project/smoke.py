"""Whether an installed wheel works: small layers on MLX's default device, beside the codec.

python tests/project/smoke.py
"""

from pathlib import Path

import mlx.core as mx
import numpy as np

import mlx_marlin
from mlx_marlin import TrellisLinear, TrellisModelLoader, TrellisSwitchGLU, codec

MODEL = Path(__file__).parents[2] / "models" / "docs-moe-exl3-mixed"
# Far above what float32 sums differ by, far below what a wrong weight does.
TOLERANCE = 1e-3


def error(y: mx.array, expected: np.ndarray) -> float:
    """Of a result, relative to the expected one's norm."""
    return float(np.linalg.norm(np.array(y) - expected) / np.linalg.norm(expected))


def errors() -> dict[str, float]:
    """Of a linear and of a layer of experts, three rows each."""
    loader = TrellisModelLoader(MODEL)
    rng = np.random.default_rng(0)
    query = loader.load_weight("layers.0.self_attn.q_proj")
    x = rng.standard_normal((3, query.in_features)).astype(np.float32)
    found = {"linear": error(TrellisLinear(query)(mx.array(x)), x @ codec.dequantize(query))}

    gate, up, down = (
        [loader.load_weight(f"layers.0.mlp.experts.{e}.{name}_proj") for e in range(4)]
        for name in ("gate", "up", "down")
    )
    indices = np.array([[0, 3], [2, 1], [3, 0]], np.uint32)
    expected = np.empty((*indices.shape, x.shape[1]))
    for row, slot in np.ndindex(indices.shape):
        g, u, d = (codec.dequantize(weights[indices[row, slot]]) for weights in (gate, up, down))
        activated = x[row] @ g
        expected[row, slot] = (activated / (1 + np.exp(-activated)) * (x[row] @ u)) @ d
    y = TrellisSwitchGLU(gate=gate, up=up, down=down)(mx.array(x), mx.array(indices))
    return found | {"experts": error(y, expected)}


if __name__ == "__main__":
    print(f"mlx_marlin {mlx_marlin.__version__} of {Path(mlx_marlin.__file__).parent} on {mx.default_device()}")
    for what, value in errors().items():
        print(f"{what}: relative error {value:.1e}")
        if not value < TOLERANCE:
            raise SystemExit(f"{what}: the result is wrong, the relative error should be below {TOLERANCE}")
