"""One MoE layer of Qwen3-30B-A3B's shape: mlx_marlin beside mlx-lm's affine SwitchGLU and ggml's K-quants.

All contenders run in one process, interleaved in rounds, each call with another random routing and over more weights
than the last-level cache holds, so that weights come from DRAM. Reported are medians over single calls. Where MLX has a
GPU, ours and the affine layer run there too, with float16 activations.

    python -m bench.cpu.layer --bits 3 --rows 1 16 64 256 --output bench/results/<machine>/layer.json
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
import platform
import statistics
import sys
import time
from datetime import datetime, timezone
from functools import partial
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx
import numpy as np
from msgspec import structs

from bench.cpu import ceilings, peers
from bench.cpu.contenders import Contender, MarlinContender
from bench.cpu.shape import Shape
from mlx_marlin import _ext, codec, device, kernels, set_num_threads
from mlx_marlin.storage import atomic

ROWS = (1, 4, 16, 64, 256)
BITS = ("1.5", "2", "2.5", "3", "3.5", "4", "mixed")
DEVICES = ("cpu", "gpu") if mx.is_available(mx.Device(mx.gpu)) else ("cpu",)
# What each width is measured beside: affine bits, ggml type.
PEERS = dict.fromkeys(("1.5", "2", "2.5"), (2, "Q2_K")) | dict.fromkeys(("3", "3.5", "mixed"), (3, "Q3_K"))
PEERS["4"] = (4, "Q4_K")
# Routings per number of rows: at 64 rows a single one touches nearly every expert.
FEW_ROUTINGS, MANY_ROUTINGS = 6, 32
# Calls of one contender in a round: long enough for the scheduler's accounting of CPU time (ticks of 4 ms).
GROUP_SECONDS, MAX_GROUP = 0.08, 32
# Idle workers of the contender before spin for some milliseconds.
SETTLE_SECONDS = 0.02


def measure_rows(contenders: list[Contender], shape: Shape, rows: int, rng, rounds: int, seconds: float) -> list[dict]:
    """Interleaved rounds of all contenders at a number of rows.

    Args:
        rounds: Rounds, at most.
        seconds: Time that a contender may take before it drops out of further rounds; every one gets 2 calls.
    """
    routings = shape.routings(rng, rows, FEW_ROUTINGS if rows >= 64 else MANY_ROUTINGS)
    x = shape.inputs(rng, rows)
    distinct = statistics.mean(np.unique(r).size for r in routings)
    for contender in contenders:
        contender.prepare(x, routings)
    for r in range(rounds):
        for contender in contenders:
            if r > 1 and sum(s for s, _ in contender.samples) + contender.estimate > seconds:
                continue
            time.sleep(SETTLE_SECONDS)
            contender.call(max(1, min(MAX_GROUP, round(GROUP_SECONDS / contender.estimate))))
    results = []
    for contender in contenders:
        result = {"rows": rows, "contender": contender.name, "bits_per_weight": contender.bits, **contender.summary()}
        time_s, flops = result["median_s"], 2 * rows * shape.top_k * shape.weights_per_expert
        result["distinct_experts"] = distinct
        result["weights_per_s"] = distinct * shape.weights_per_expert / time_s
        result["read_gbs"] = result["weights_per_s"] * contender.bits / 8 / 1e9
        result["gflops"] = flops / time_s / 1e9
        results.append(result)
    return results


def make_contenders(shape: Shape, bits: str, arguments, rng) -> list[Contender]:
    """Ours, one per codebook, instruction set and accuracy, then the peers."""
    affine_bits, ggml_type = PEERS[bits]
    makers = [
        partial(MarlinContender, shape, bits, codebook, instruction_set, rng, arguments.threads, accuracy)
        for codebook in arguments.codebooks
        for instruction_set in arguments.instruction_set
        for accuracy in arguments.accuracy
        if accuracy == "float32" or codebook == "mul1"  # the CPU rounds for no other
    ]
    if "gpu" in arguments.devices:
        makers += [
            partial(MarlinContender, shape, bits, codebook, None, rng, 0, accuracy)
            for codebook in arguments.codebooks
            for accuracy in arguments.accuracy
        ]
    if "affine" in arguments.peers:
        makers += [partial(peers.AffinePeer, shape, affine_bits, rng, where == "gpu") for where in arguments.devices]
    if "ggml" in arguments.peers:
        makers.append(partial(peers.GgmlPeer, shape, ggml_type, rng, arguments.threads))
    return [Contender(make, shape, arguments.cpu_time) for make in makers]


def print_table(bits: str, results: list[dict], contenders: list[Contender], limits: dict | None, heading: str) -> None:
    """Ratios are to the first of ours; a star marks contenders that never had their cores to themselves."""
    print(f"\n{bits} bits{heading}")
    print(
        f"{'rows':>5} {'contender':28} {'ms':>10} {'spread':>7} {'calls':>6} {'cores':>6} {'ratio':>7} "
        f"{'Gweights/s':>11} {'GB/s':>6} {'GFLOP/s':>8}  of the ceilings"
    )
    of = {c.name: c.first for c in contenders}
    base = {r["rows"]: r["median_s"] for r in reversed(results) if not of[r["contender"]].peer}
    for r in results:
        first = of[r["contender"]]
        ratio = f"{r['median_s'] / base[r['rows']]:7.2f}" if r["rows"] in base else " " * 7
        shares = []
        if limits:
            shares = [f"read {r['read_gbs'] / limits['read_gbs']:.0%}", f"FMA {r['gflops'] / limits['fma_gflops']:.0%}"]
            name = getattr(first, "instruction_set", None) or ""
            floats = getattr(first, "accuracy", None) == "float32"
            vector_bits = 512 if name.startswith("avx512") else 256 if name == "avx2" else None
            bound = ceilings.decode_bound(limits, first.codebook, vector_bits) if floats and vector_bits else None
            if bound:
                shares.append(f"decode bound {r['weights_per_s'] / bound:.0%}")
        alone = " " if r["disturbed_calls"] < len(r["samples"]) else "*"
        print(
            f"{r['rows']:5} {r['contender']:28} {1e3 * r['median_s']:10.3f} {r['spread']:7.1%} {r['calls']:6}{alone}"
            f"{r['cores']:6.2f} {ratio} {r['weights_per_s'] / 1e9:11.2f} {r['read_gbs']:6.2f} {r['gflops']:8.1f}  "
            f"{', '.join(shares)}"
        )


def document(shape: Shape, limits: dict) -> dict:
    """The machine, the versions and the shape that results are stored with."""
    fingerprint = structs.asdict(device.fingerprint("cpu"))
    packages = [
        name for name in ("mlx_marlin", "mlx", "mlx_lm", "numpy", "xllamacpp") if importlib.util.find_spec(name)
    ]
    return {
        "machine": {**fingerprint, "last_level_cache": device.last_level_cache(), "python": platform.python_version()},
        "versions": {name: version(name) for name in packages},
        "shape": dataclasses.asdict(shape),
        "ceilings": limits,
        "results": [],
    }


def load(path: Path, stored: dict) -> dict:
    """Results of an earlier run on this machine."""
    before = json.loads(path.read_text())
    chips = [d["machine"]["chip"] for d in (before, stored)]
    if chips[0] != chips[1]:
        raise ValueError(f"{path} holds results of {chips[0]!r}, this is {chips[1]!r}; choose another file")
    return before


def highest(one: dict, other: dict) -> dict:
    """The higher of two measurements of each rate, by number of threads: a ceiling is what was reached once."""
    rates = ("clock_ghz", "fma_gflops", "read_gbs")
    merged = {**other, **one}
    for threads in one.keys() & other.keys():
        merged[threads] = {**one[threads], **{rate: max(one[threads][rate], other[threads][rate]) for rate in rates}}
    return merged


def save(path: Path, stored: dict, results: list[dict]) -> None:
    """Write results, keeping those of an earlier run that were not measured again."""

    def key(r):
        return r["bits"], r["rows"], r["threads"], r["clock"], r["contender"]

    kept = []
    if path.exists():
        before = load(path, stored)
        stored = {**stored, "ceilings": highest(stored["ceilings"], before["ceilings"])}
        kept = [r for r in before["results"] if key(r) not in {key(n) for n in results}]
    head = json.dumps({name: value for name, value in stored.items() if name != "results"}, indent=1)
    lines = ",\n".join(json.dumps(result) for result in sorted(kept + results, key=key))
    text = f'{head[:-2]},\n "results": [\n{lines}\n ]\n}}'
    atomic.write_text(path, text + "\n")


def parse_arguments(argv=None) -> argparse.Namespace:
    sets = _ext.instruction_sets()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=list(ROWS))
    parser.add_argument("--bits", nargs="+", choices=BITS, default=["2", "3", "4", "mixed"])
    parser.add_argument("--codebooks", nargs="+", choices=codec.CODEBOOKS, default=["mul1"])
    parser.add_argument(
        "--instruction-set",
        nargs="+",
        choices=_ext.compiled_instruction_sets(),
        default=sets[-1:],
        help="default: %(default)s",
    )
    parser.add_argument(
        "--accuracy", nargs="+", choices=kernels.ACCURACIES, default=["half", "float32"], help="default: %(default)s"
    )
    parser.add_argument("--devices", nargs="+", choices=DEVICES, default=list(DEVICES), help="default: %(default)s")
    has_ggml = importlib.util.find_spec("xllamacpp") is not None
    peers = ["affine", *["ggml"] * has_ggml]
    parser.add_argument("--peers", nargs="*", choices=("affine", "ggml"), default=peers, help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="for ours and ggml; affine has one")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--seconds", type=float, default=3.0, help="per contender and number of rows, beyond 2 calls")
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="CPU time on one thread: does not depend on who else uses the machine's cores",
    )
    parser.add_argument("--quick", action="store_true", help="few rounds, no ceilings")
    parser.add_argument("--output", type=Path, help="JSON with every sample; results already in it are kept")
    arguments = parser.parse_args(argv)
    if "ggml" in arguments.peers and not has_ggml:
        parser.error("ggml's peer needs xllamacpp: pip install '.[bench]'")
    if missing := [name for name in arguments.instruction_set if name not in sets]:
        parser.error(f"this machine runs the instruction sets {', '.join(sets)}; got {', '.join(missing)}")
    if arguments.cpu_time:
        arguments.threads = 1
    if arguments.quick:
        arguments.rounds, arguments.seconds = 3, 1.0
    return arguments


def main(argv=None) -> None:
    arguments = parse_arguments(argv)
    shape, rng = Shape(), np.random.default_rng(0)
    set_num_threads(arguments.threads)
    threads = str(arguments.threads)
    stored = document(shape, {} if arguments.quick else {threads: ceilings.measure(arguments.threads)})
    if arguments.output and arguments.output.exists():
        stored["ceilings"] = highest(stored["ceilings"], load(arguments.output, stored)["ceilings"])
    limits = stored["ceilings"].get(threads)
    if limits:
        print(
            f"ceilings: {limits['clock_ghz']:.2f} GHz, {limits['fma_gflops']:.0f} GFLOP/s, "
            f"{limits['read_gbs']:.1f} GB/s ({limits['how']})"
        )
    for bits in arguments.bits:
        contenders = make_contenders(shape, bits, arguments, rng)
        results = []
        for rows in sorted(arguments.rows):
            print(f"{bits} bits, {rows} rows ...", file=sys.stderr)
            results += measure_rows(contenders, shape, rows, rng, arguments.rounds, arguments.seconds)
        heading = f", {arguments.threads} threads" if not arguments.cpu_time else ", CPU time on one thread"
        print_table(bits, results, contenders, limits, heading)
        if arguments.output:
            when = datetime.now(timezone.utc).isoformat(timespec="seconds")
            run = {
                "bits": bits,
                "threads": arguments.threads,
                "clock": "cpu" if arguments.cpu_time else "wall",
                "when": when,
                "kernel_hash": stored["machine"]["kernel_hash"],
            }
            save(arguments.output, stored, [{**run, **r} for r in results])


if __name__ == "__main__":
    main()
