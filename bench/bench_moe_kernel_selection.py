"""What selection gains on this machine: tuned against default against the best uniform config, per batch size.

"Uniform" is the one config that is best over all batch sizes together. Tuning, picking and comparing use separate
samples: the gains are measured afresh, interleaved, after the picks. What mixed_bpw_autotuning and
mixed_kernel_selection promise is measured beside, and what selecting costs.

    python -m bench.bench_moe_kernel_selection --rows 1 4 16 64 256 --output bench/results/<machine>/selection.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import timeit

import mlx.core as mx

from bench.cpu import contest
from mlx_marlin import device, kernels, measure, ops
from mlx_marlin.autotune.labels import config_label
from mlx_marlin.autotune.workload import ConfigClock, Workload
from mlx_marlin.measure.race import Limits, RaceSettings, race

# mixed_kernel_selection, "Expected Improvements".
CLAIMS = {"uniform": "15 to 20 %", "specialised": "up to 17 %", "large_batch": "20 to 30 %"}


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16, 64, 256], help="tokens of a call")
    parser.add_argument("--shape", default="1024,512,32,4", help="hidden,intermediate,experts,top_k")
    parser.add_argument("--tuning-rounds", type=int, default=6, help="samples per candidate while tuning")
    parser.add_argument("--iterations", type=int, default=20, help="fresh samples per config in the comparison")
    parser.add_argument("--candidates", type=int, help="time only every n-th candidate beside the default")
    parser.add_argument("--budget", type=float, default=600.0, help="seconds; tuning shares them over the batch sizes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--output", help="also write the result to this file")
    return parser.parse_args(argv)


class Bench:
    """A layer of 2, 3 and 4 bit experts, and the clocks of its configs."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.hidden, self.intermediate, self.experts, self.top_k = (int(size) for size in args.shape.split(","))
        self.device = device.default_device()
        self.limit = device.memory_bytes(self.device) // 2
        self.floor = measure.launch_floor()
        self.layer = contest.mixed_layer(self.hidden, self.intermediate, self.experts, seed=args.seed)
        self.workloads = {rows: self.workload(self.layer, rows) for rows in args.rows}

    def workload(self, layer, rows: int) -> Workload:
        return Workload.of_layer(
            layer, rows, top_k=self.top_k, device=self.device, memory_limit=self.limit, seed=self.args.seed
        )

    def clocks(self, workload: Workload, configs) -> dict:
        return {config: ConfigClock(workload, config, self.floor, self.limit) for config in configs}

    def tune(self) -> dict:
        """Race all candidates at each number of rows."""
        races, share = {}, self.args.budget / len(self.workloads)
        settings = RaceSettings(rounds=self.args.tuning_rounds, warmup=2, seed=self.args.seed)
        for rows, workload in self.workloads.items():
            default, *others = kernels.candidates_on(workload.problem, device.hardware(self.device))
            clocks = self.clocks(workload, [default, *others[:: self.args.candidates or 1]])
            races[rows] = race(clocks, default, settings, limits=Limits(share=time.perf_counter() + share))
            print(f"{rows} rows: {len(clocks)} candidates timed", file=sys.stderr)
        return races

    def uniform(self, races: dict) -> kernels.KernelConfig:
        """The candidate with the lowest geometric mean over the batch sizes."""
        timed = {
            self.workloads[rows].problem: {c: statistics.median(times) for c, times in r.samples.items()}
            for rows, r in races.items()
        }
        found = contest.uniform_config(timed)
        if found is None:
            raise SystemExit("no config was timed at every batch size: raise --budget, or --candidates to time fewer")
        return found

    def samples(self, workload: Workload, configs) -> dict:
        """Fresh interleaved seconds of each distinct config."""
        clocks = self.clocks(workload, dict.fromkeys(configs))
        return contest.interleaved(clocks, self.args.iterations, seed=self.args.seed + 1)

    def row(self, rows: int, outcome, uniform) -> dict:
        """Tuned, default and uniform at one number of rows."""
        workload = self.workloads[rows]
        configs = {"tuned": outcome.winner, "default": kernels.default(workload.problem), "uniform": uniform}
        configs = {role: kernels.effective(workload.problem, config) for role, config in configs.items()}
        samples = self.samples(workload, configs.values())
        return {
            "rows": rows,
            "decision": outcome.decision,
            "configs": {role: config_label(config) for role, config in configs.items()},
            "median_ms": {role: 1e3 * statistics.median(samples[config]) for role, config in configs.items()},
            "over_default": contest.saving(samples, configs["tuned"], configs["default"]),
            "over_uniform": contest.saving(samples, configs["tuned"], configs["uniform"]),
        }

    def claim(self, layer, rows: int, ours: str, theirs: str) -> dict:
        """One kernel name against another with their default tiles."""
        workload = self.workload(layer, rows)
        named = [kernels.config_for(workload.problem, name) for name in (ours, theirs)]
        pair = [kernels.effective(workload.problem, config) for config in named]
        samples = self.samples(workload, pair)
        return {
            "rows": rows,
            "ours": ours,
            "theirs": theirs,
            "median_ms": [1e3 * statistics.median(samples[config]) for config in pair],
            **contest.saving(samples, *pair),
        }


def selection_overhead_us(layer, top_k: int) -> dict:
    """Microseconds of Python per layer call at one row: for the selection alone, and for building the lazy call."""
    x = mx.zeros((1, layer.gate_proj.input_dims))
    indices = mx.zeros((1, top_k), mx.uint32)
    layer(x, indices)
    call = ops.check_experts(x, indices, layer.stacks, layer.activation)
    configs = layer._derived.configs

    def best(call) -> float:
        return min(timeit.repeat(call, number=2000, repeat=7)) / 2000 * 1e6

    return {"selection": best(lambda: configs.choose(call)), "whole lazy call": best(lambda: layer(x, indices))}


def run(args: argparse.Namespace) -> dict:
    bench = Bench(args)
    overhead = selection_overhead_us(bench.layer, bench.top_k)
    races = bench.tune()
    uniform = bench.uniform(races)
    rows_results = [bench.row(rows, outcome, uniform) for rows, outcome in races.items()]
    special = contest.mixed_layer(bench.hidden, bench.intermediate, bench.experts, ((6, 2, 3),), args.seed)
    name = "moe_trellis_swiglu"
    claims = {"specialised": [bench.claim(special, 1, f"{name}_decode_6_2_3", f"{name}_decode")]}
    large = [rows for rows in args.rows if rows > 32]
    claims["large_batch"] = [bench.claim(bench.layer, rows, f"{name}_large_batch", name) for rows in large]
    return {
        "shape": args.shape,
        "bits": "mixed 2, 3, 4",
        "device": bench.device,
        "uniform": config_label(uniform),
        "iterations": args.iterations,
        "rows": rows_results,
        "claims": claims,
        "overhead_us": overhead,
    }


def report(result: dict) -> None:
    print(
        f"{result['shape']} (hidden, intermediate, experts, top-k), {result['bits']} bits; "
        f"best uniform config: {result['uniform']}"
    )
    for row in result["rows"]:
        for role, config in row["configs"].items():
            print(f"{row['rows']:5} rows, {role:8} {row['median_ms'][role]:9.3f} ms  {config}")
        print(
            f"{'':12}tuned saves {row['over_default']['saved']} of default, {row['over_uniform']['saved']} of uniform"
        )
    print(f"mixed_kernel_selection promises {CLAIMS['uniform']} over uniform selection")
    for key, entries in result["claims"].items():
        for entry in entries:
            print(
                f"{entry['ours']} at {entry['rows']} rows saves {entry['saved']} of {entry['theirs']}; "
                f"mixed_kernel_selection promises {CLAIMS[key]}"
            )
    overhead = result["overhead_us"]
    print(
        f"selection costs {overhead['selection']:.2f} us per layer call, building the lazy call "
        f"{overhead['whole lazy call']:.2f} us in all"
    )


def main(argv=None) -> int:
    args = parse_args(argv)
    result = run(args)
    contest.write(args.output, result, device.default_device())
    if args.json:
        json.dump(result, sys.stdout, indent=1)
        print()
    else:
        report(result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
