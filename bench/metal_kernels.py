"""Threads, threadgroup memory, registers and operations of every variant of the Metal kernels, counted in the
code that the simulator's compiler makes. Apple's compiler allocates registers its own way: an estimate of what is
live in the inner loop.

python bench/metal_kernels.py [--bits 3] [--codebook mcg]
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from metal_counts import count  # noqa: E402

from mlx_marlin import codec, kernels  # noqa: E402
from mlx_marlin.kernels import KernelConfig, Problem, make_name  # noqa: E402

RESULTS = Path(__file__).resolve().parent / "results" / "metal_kernels.json"

# (variant, tile_size_m, tile_size_n, simdgroups): the defaults, and the extremes of rows and columns.
CONFIGS = (
    ("decode", 1, 128, 16),
    ("decode", 1, 32, 8),
    ("decode", 1, 16, 4),
    ("decode", 2, 128, 16),
    ("decode", 3, 128, 16),
    ("prefill4", 4, 128, 16),
    ("prefill4", 4, 256, 8),
    ("base", 8, 128, 16),
    ("base", 16, 128, 16),
    ("base", 16, 128, 4),
    ("large_batch", 64, 128, 16),
    ("large_batch", 64, 128, 8),
)


def _matrix_floats(kernel: str) -> int:
    """Floats that a lane holds in matrices: 2 in each of the sums, the tiles' weights and x."""
    units, tiles = map(int, re.findall(r"(\d+),", kernel))
    return 2 * (2 * units * tiles + 4 * tiles + 1)


def _layer(tokens: int, bits: int, codebook: str) -> Problem:
    return Problem("swiglu", tokens, 2, 512, 256, 2, ((bits,) * 3,), (codebook,), "silu", "float16", "gpu")


def rows(bits: int, codebook: str) -> list[dict]:
    """One entry per product kernel of a small layer with 64 tokens."""
    # The simulator keeps matrices in memory, so their registers are added up, to those of the smallest decoding loop.
    smallest = KernelConfig(make_name("decode"), 1, 16, 4, True, "decode")
    decoder = count(_layer(1, bits, codebook), smallest)[1][1].loop_registers
    found = []
    for variant, *tiles in CONFIGS:
        tokens = 1 if variant == "decode" else 64
        problem = _layer(tokens, bits, codebook)
        config = KernelConfig(make_name(variant), *tiles, True, variant)
        if kernels.feasible(problem, config) is not None:
            continue
        for dispatch, result in count(problem, config):
            if "<" in dispatch["kernel"]:
                loop = result.inner_loop
                registers = result.loop_registers
                if variant in ("base", "large_batch"):
                    registers = decoder + _matrix_floats(dispatch["kernel"])
                found.append(
                    {
                        "variant": variant,
                        "rows": tiles[0],
                        "columns": tiles[1],
                        "kernel": dispatch["kernel"],
                        "threads": dispatch["threads"][0],
                        "threadgroup_bytes": dispatch["threadgroup_bytes"],
                        "registers": registers,
                        "per_weight": {name: round(n, 3) for name, n in loop.per_weight().items()},
                    }
                )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bits", type=int, default=3, choices=range(1, codec.MAX_BITS + 1))
    parser.add_argument("--codebook", default="mcg", choices=codec.CODEBOOKS)
    arguments = parser.parse_args()
    table = rows(arguments.bits, arguments.codebook)
    columns = ("complex", "integer", "half", "float", "load")
    print(
        f"{'variant':12s} {'rows':>4s} {'cols':>4s} {'kernel':36s} {'threads':>7s} {'shared':>6s} {'regs':>4s}  "
        + " ".join(f"{c:>7s}" for c in columns)
        + "   per decoded weight, inner loop"
    )
    for row in table:
        print(
            f"{row['variant']:12s} {row['rows']:4d} {row['columns']:4d} {row['kernel']:36s} {row['threads']:7d} "
            f"{row['threadgroup_bytes']:6d} {row['registers']:4d}  "
            + " ".join(f"{row['per_weight'][c]:7.2f}" for c in columns)
        )
    RESULTS.parent.mkdir(exist_ok=True)
    contents = {"source": "counted", "bits": arguments.bits, "codebook": arguments.codebook, "kernels": table}
    RESULTS.write_text(json.dumps(contents, indent=1) + "\n")


if __name__ == "__main__":
    main()
