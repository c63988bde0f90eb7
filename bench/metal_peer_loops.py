"""Count what the peers' decoding loops do (metal_peer_loops.metal), in the simulator; writes metal_peers.json.

python bench/metal_peer_loops.py
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tests"))

import metal_sim  # noqa: E402
from metal_sim.counting import compile_counted  # noqa: E402

RESULT = HERE / "metal_peers.json"
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
    library = compile_counted(str(HERE / "metal_peer_loops.metal"), instantiate=kernels)
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
        "what": "Per lane, for 8 decoded weights: metal_peer_loops.metal, counted by metal_peer_loops.py.",
        "loops": found,
    }


def main() -> None:
    RESULT.write_text(json.dumps(count(), indent=1) + "\n")
    print(RESULT)


if __name__ == "__main__":
    main()
