"""Count what the peers' decoding loops do (peer_loops.metal), in the simulator; writes peers.json.

python -m bench.metal.peer_loops
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from mlx_marlin.storage import atomic
from tests import metal_sim
from tests.metal_sim.counting import compile_counted

HERE = Path(__file__).resolve().parent


RESULT = HERE / "peers.json"
TILES = 64
# Name: (kernel, rows, bits).
LOOPS = {
    "escha direct K2": ("escha<2, 1>", 1, 2),
    "escha direct K3": ("escha<3, 1>", 1, 3),
    "escha rows 2 K2": ("escha<2, 2>", 2, 2),
    "escha rows 4 K2": ("escha<2, 4>", 4, 2),
    "escha rows 12 K2": ("escha<2, 12>", 12, 2),
    "pony K4": ("pony", 1, 4),
}


def count() -> dict:
    """Operations per lane and simdgroup operations, for 8 decoded weights, by loop."""
    kernels = {kernel: kernel for kernel, _, _ in LOOPS.values() if "<" in kernel}
    library = compile_counted(str(HERE / "peer_loops.metal"), instantiate=kernels)
    codes = np.zeros(TILES * 32 + 64, np.uint32)
    found = {}
    for name, (kernel, rows, bits) in LOOPS.items():
        x, y = np.zeros(rows * TILES * 16, np.float32), metal_sim.Out(rows * 64, "f4")
        places = [np.zeros(32 * 16, np.uint16)] if kernel == "pony" else []
        result = library.run(kernel, [codes, x, y, np.uint32(TILES), *places], grid=1, threads=32)
        simd = {op: round(n / TILES, 3) for op, n in result.stats["simd"].items() if n}
        counts = dict(result.inner_loop.counts)
        operations = {op: round(8 * n / result.inner_loop.weights, 3) for op, n in sorted(counts.items()) if n}
        found[name] = {"weights": 8, "rows": rows, "bits": bits, "operations": operations, "simd": simd}
    return {
        "what": "Per lane, for 8 decoded weights: peer_loops.metal, counted by peer_loops.py.",
        "loops": found,
    }


def main() -> None:
    atomic.write_text(RESULT, json.dumps(count(), indent=1) + "\n")
    print(RESULT)


if __name__ == "__main__":
    main()
