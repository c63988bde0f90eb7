"""Two kernels against each other on one layer: Welch's test on interleaved samples, 95 % interval, verdict.

    python -m bench.kernel_ab_test --iterations 100 \\
        --baseline moe_trellis_swiglu --optimized moe_trellis_swiglu_decode
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys

from bench.cpu import contest
from mlx_marlin import codec, device, kernels, measure
from mlx_marlin.autotune.workload import ConfigClock, Workload
from mlx_marlin.measure import stats


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--baseline", default="moe_trellis_swiglu", help="kernel name")
    parser.add_argument("--optimized", default="moe_trellis_swiglu_decode", help="kernel name")
    parser.add_argument("--iterations", type=int, default=100, help="samples of each kernel, at least 2")
    parser.add_argument("--warmup", type=int, default=5, help="calls before the first sample")
    parser.add_argument("--rows", type=int, default=1, help="tokens of a call")
    parser.add_argument("--shape", default="1024,512,32,4", help="hidden,intermediate,experts,top_k")
    parser.add_argument("--bits", default="mixed", help='"mixed" (2, 3 and 4), one width, or a triple gate,up,down')
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--output", help="also write the result to this file")
    args = parser.parse_args(argv)
    if args.iterations < 2:
        parser.error(f"--iterations must be at least 2, got {args.iterations}")
    return args


def widths(text: str) -> tuple:
    """The experts' (gate, up, down) bits that --bits stands for."""
    if text == "mixed":
        return contest.MIX
    try:
        bits = tuple(codec.as_width(float(b)) for b in text.split(","))
    except ValueError as error:
        raise SystemExit(f"--bits: {error}") from None
    if len(bits) not in (1, 3):
        raise SystemExit(f'--bits must be "mixed", a width such as 2.5, or three of them, got {text!r}')
    return (bits * (3 // len(bits)),)


def compare_kernels(args: argparse.Namespace) -> dict:
    """Time both kernels and compare them."""
    hidden, intermediate, experts, top_k = (int(size) for size in args.shape.split(","))
    where = device.default_device()
    layer = contest.mixed_layer(hidden, intermediate, experts, widths(args.bits), args.seed)
    limit = device.memory_bytes(where) // 2
    workload = Workload.of_layer(layer, args.rows, top_k=top_k, device=where, memory_limit=limit, seed=args.seed)
    floor = measure.launch_floor()
    errors, clocks = {}, {}
    for role in ("baseline", "optimized"):
        config = kernels.config_for(workload.problem, getattr(args, role))
        errors[role] = workload.check(config)
        clocks[role] = ConfigClock(workload, config, floor, limit)
    samples = contest.interleaved(clocks, args.iterations, args.warmup, args.seed)
    steady = stats.without_drift(samples)
    comparison = stats.compare(steady["optimized"], steady["baseline"])
    p = stats.welch_p_value(*([math.log(t) for t in steady[role]] for role in ("optimized", "baseline")))
    verdict = "no significant difference"
    if p < 0.05:
        verdict = "optimized is faster" if comparison.ratio < 1 else "optimized is slower"
    return {
        "baseline": args.baseline,
        "optimized": args.optimized,
        "rows": args.rows,
        "shape": args.shape,
        "bits": args.bits,
        "iterations": args.iterations,
        "median_ms": {role: 1e3 * statistics.median(samples[role]) for role in samples},
        "spread": {role: stats.spread(samples[role]) for role in samples},
        "error_against_codec": errors,
        **contest.as_result(comparison),
        "p_value": p,
        "verdict": verdict,
    }


def main(argv=None) -> int:
    args = parse_args(argv)
    result = compare_kernels(args)
    contest.write(args.output, result, device.default_device())
    if args.json:
        json.dump(result, sys.stdout, indent=1)
        print()
        return 0
    for role in ("baseline", "optimized"):
        print(f"{role:10} {result[role]:44} {result['median_ms'][role]:9.4f} ms  spread {result['spread'][role]:.1%}")
    print(f"optimized / baseline: {result['ratio']:.4f}, 95 % interval {result['low']:.4f} to {result['high']:.4f}")
    print(f"Welch's test: p = {result['p_value']:.3g}: {result['verdict']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
