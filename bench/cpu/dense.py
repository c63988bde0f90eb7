"""Attention and float32 products on the CPU: MLX's own and what a loaded model replaces them by, in one process.

    python -m bench.cpu.dense [--instruction-set avx2] [--output dense.json]

On Linux only; elsewhere nothing is replaced.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_marlin import _ext, device
from mlx_marlin.lm import dense_ops
from mlx_marlin.storage import atomic

# Queries and keys of Qwen3-30B-A3B's attention: 32 heads of 128, 4 of keys.
ATTENTION = ((1, 512), (1, 2048), (1, 8192), (8, 2048), (128, 128), (512, 512), (1024, 1024))
# Rows, inputs, outputs: the router of that model at one row and at a prompt, square matrices, an unquantized head.
PRODUCTS = ((1, 2048, 128), (512, 2048, 128), (512, 2048, 2048), (1024, 1024, 1024), (1, 2048, 16384), (8, 2048, 16384))


def best_of(run: Callable[[], mx.array], seconds: float = 1.0) -> float:
    """The shortest of at least three runs, in seconds."""
    mx.eval(run())
    best, begin, count = float("inf"), time.perf_counter(), 0
    while count < 3 or time.perf_counter() - begin < seconds:
        start = time.perf_counter()
        mx.eval(run())
        best, count = min(best, time.perf_counter() - start), count + 1
    return best


def cases() -> list[tuple[str, float, Callable[[], mx.array]]]:
    """Name, floating-point operations and call; the functions of MLX are looked up at each call."""
    rng, made = np.random.default_rng(0), []

    def normal(*shape: int) -> mx.array:
        return mx.array(rng.standard_normal(shape, np.float32))

    for queries, keys in ATTENTION:
        q, k, v = normal(1, 32, queries, 128), normal(1, 4, keys, 128), normal(1, 4, keys, 128)
        work = (
            4.0 * 32 * queries * keys * 128 * (0.5 if queries == keys else 1)
        )  # causal: half of a square is looked at

        def attend(q=q, k=k, v=v):
            return mx.fast.scaled_dot_product_attention(q, k, v, scale=128**-0.5, mask="causal")

        made.append((f"attention, {queries} queries, {keys} keys", work, attend))
    for rows, inputs, outputs in PRODUCTS:
        x, w = normal(rows, inputs), normal(outputs, inputs)
        made.append(
            (f"product, {rows} x {inputs} x {outputs}", 2.0 * rows * inputs * outputs, lambda x=x, w=w: x @ w.T)
        )
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--instruction-set", choices=_ext.instruction_sets(), default=_ext.instruction_sets()[-1])
    parser.add_argument("--output", type=Path, help="JSON")
    arguments = parser.parse_args()
    mx.set_default_device(mx.cpu)
    _ext.set_instruction_set(arguments.instruction_set)
    all_cases = cases()
    before = [best_of(run) for _, _, run in all_cases]
    dense_ops.install()
    after = [best_of(run) for _, _, run in all_cases]
    print(f"{'':36} {'MLX, ms':>10} {'here, ms':>10} {'GFLOP/s':>8} {'times':>7}")
    results = []
    for (name, work, _), mlx, here in zip(all_cases, before, after):
        print(f"{name:36} {mlx * 1e3:10.3f} {here * 1e3:10.3f} {work / here / 1e9:8.1f} {mlx / here:7.1f}")
        results.append({"case": name, "mlx_s": mlx, "here_s": here})
    if arguments.output:
        machine = {"chip": device.fingerprint("cpu").chip, "threads": _ext.num_threads()}
        stored = {"machine": machine, "instruction_set": arguments.instruction_set, "cases": results}
        atomic.write_text(arguments.output, json.dumps(stored, indent=1) + "\n")


if __name__ == "__main__":
    main()
