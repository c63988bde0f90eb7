"""Speed of the encoder's tile search, per thread, against the core's arithmetic peak.

Usage: python -m bench.quality.encoder [--bits 1 1.5 2 2.5 ...] [--output FILE]

The clock is the process's CPU time, so that a shared machine shows the same. A weight costs two passes over 2^16 states
with a subtraction, a fused multiply-add and a minimum each; the peak is the rate of vector instructions that BLAS
reaches in a single-precision matrix product on one thread, measured here. Hours for a model are predicted from the
speed alone: one search per weight, a tenth more for measuring, activations not counted.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from functools import partial
from pathlib import Path

import mlx.core as mx
import numpy as np
from threadpoolctl import threadpool_limits

from mlx_marlin import codec, ops
from mlx_marlin.storage import atomic

OPERATIONS = 2 * 3 * 65536  # per weight, in scalar terms
MODEL_WEIGHTS = 30e9
ROUNDS = 5


def best_rate(work: float, call) -> float:
    """Work per second of CPU time, the best of some rounds: interference only adds time."""
    call()
    times = []
    for _ in range(ROUNDS):
        start = time.process_time()
        call()
        times.append(time.process_time() - start)
    return work / min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bits", type=float, nargs="*", default=[1, 1.5, 2, 2.5, 3, 3.5, 4, 5, 6, 7, 8])
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    mx.set_default_device(mx.cpu)  # where it is a GPU, that searches: bench/first_run/search.py
    tiles = np.random.default_rng(0).standard_normal((16, 256))
    a = np.random.default_rng(0).standard_normal((1024, 1024)).astype(np.float32)
    with threadpool_limits(1, "blas"):
        # A fused multiply-add is one instruction per lane, as are the search's three operations.
        peak = best_rate(1024.0**3, lambda: a @ a)
    rows = []
    print(
        "| K | weights/s per thread | fraction of peak | 30B on 2 cores, h (predicted) | on 16 cores, h (predicted) |"
    )
    print("|---|---|---|---|---|")
    for bits in map(codec.as_width, options.bits):
        rate = best_rate(tiles.size, partial(ops.viterbi_search, tiles, bits, "mul1", threads=1))
        hours = 1.1 * MODEL_WEIGHTS / rate / 3600
        rows.append({"bits": bits, "weights_per_second": rate, "fraction_of_peak": rate * OPERATIONS / peak})
        print(f"| {bits} | {rate:.0f} | {rate * OPERATIONS / peak:.2f} | {hours / 2:.1f} | {hours / 16:.1f} |")
    if options.output:
        atomic.write_text(options.output, json.dumps({"machine": platform.processor(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
