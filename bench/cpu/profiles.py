"""Measure stored profiles afresh: what a profile gains over default and uniform configs, and whether two agree.

    python -m bench.cpu.profiles A.json            tuned, default and best uniform config, interleaved, per problem
    python -m bench.cpu.profiles A.json B.json     the entries in which two profiles of the same problems differ
    python -m bench.cpu.profiles --twice           the same for two profiles that are tuned first, one after the other

"Uniform" is the one config with the lowest geometric mean of the profile's times over all its problems.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
from pathlib import Path

import mlx.core as mx

from bench.cpu import contest
from mlx_marlin import device, kernels, measure, profile
from mlx_marlin.autotune import cli as tune_cli
from mlx_marlin.autotune import run as tuning_run
from mlx_marlin.autotune.labels import config_label, problem_label
from mlx_marlin.autotune.progress import ProgressBar
from mlx_marlin.autotune.workload import ConfigClock, Workload
from mlx_marlin.kernels.problem import Problem
from mlx_marlin.measure import stats
from mlx_marlin.measure.race import RaceSettings


def sample(problem: Problem, configs, rounds: int) -> dict:
    """Seconds of each config, interleaved, freed of drift; configs that run the same code have one key."""
    workload = Workload.synthetic(problem, memory_limit=device.memory_bytes(problem.device) // 2)
    floor = measure.launch_floor()
    distinct = dict.fromkeys(kernels.effective(problem, config) for config in configs)
    for config in distinct:
        workload.check(config)
    clocks = {config: ConfigClock(workload, config, floor, None) for config in distinct}
    return stats.without_drift(contest.interleaved(clocks, rounds, warmup=5))


def ratio(a: list[float], b: list[float]) -> dict:
    if a is b:
        return {"ratio": 1.0, "low": 1.0, "high": 1.0}
    c = stats.compare(a, b)
    return {"ratio": round(c.ratio, 4), "low": round(c.low, 4), "high": round(c.high, 4)}


def gains(problems: dict, rounds: int) -> list[dict]:
    """Tuned against default and uniform, per problem."""
    timed = {p: {m.config: m.timing.median_ms for m in e.timings} for p, e in problems.items()}
    uniform = contest.uniform_config(timed)
    rows = []
    for problem, entry in problems.items():
        wanted = {"tuned": entry.config, "default": entry.default, "uniform": uniform}
        codes = {role: kernels.effective(problem, c) for role, c in wanted.items() if c is not None}
        times = sample(problem, codes.values(), rounds)
        seconds = {role: times[code] for role, code in codes.items()}
        rows.append(
            {
                "problem": problem_label(problem),
                "rows": problem.rows,
                "decision": entry.decision,
                **{role: config_label(c) for role, c in wanted.items() if c is not None},
                **{f"{role}_ms": round(1e3 * statistics.median(s), 4) for role, s in seconds.items()},
                **{f"tuned_over_{role}": ratio(seconds["tuned"], seconds[role]) for role in list(seconds)[1:]},
            }
        )
    return rows


def differences(first: dict, second: dict, rounds: int) -> dict:
    """The entries of two profiles that run different code, each pair measured again."""
    both = [problem for problem in first if problem in second]
    pairs = []
    for problem in both:
        configs = first[problem].config, second[problem].config
        a, b = (kernels.effective(problem, config) for config in configs)
        if a != b:
            times = sample(problem, (a, b), rounds)
            r = ratio(times[a], times[b])
            labels = dict(zip(("first", "second"), map(config_label, configs)))
            within = {"contains_1": r["low"] <= 1.0 <= r["high"]}
            pairs.append({"problem": problem_label(problem), "rows": problem.rows, **labels, **r, **within})
    return {"entries": len(both), "differing": len(pairs), "pairs": pairs}


def tuned(path: Path, args) -> dict:
    """Tune the layer of the arguments into a new profile."""
    where = device.default_device()
    layer = tune_cli.parser().parse_args(["--shape", args.shape, "--bits", args.bits, "--device", where])
    problems = tuning_run.at_rows(tune_cli.layers(layer, where), args.rows)
    limit = device.memory_bytes(where) // 2
    run = tuning_run.Run(path, where, None, limit, RaceSettings(rounds=args.iterations), quick=args.quick)
    deadline = time.perf_counter() + (args.budget / 2 if args.budget else math.inf)
    with ProgressBar(0, enabled=True, lines=True) as bar:
        return run.tune(problems, mx.distributed.init(), deadline, bar).entries


def twice(args) -> dict:
    """Tune twice, and measure the entries that differ."""
    with tempfile.TemporaryDirectory() as folder:
        first, second = (tuned(Path(folder) / f"{name}.json", args) for name in ("first", "second"))
    return {"shape": args.shape, "bits": args.bits, "rows": args.rows, **differences(first, second, args.rounds)}


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("profiles", nargs="*", help="one or two profiles of this machine")
    parser.add_argument("--rounds", type=int, default=20, help="samples per config")
    parser.add_argument("--twice", action="store_true", help="tune a layer twice and compare the two profiles")
    parser.add_argument("--shape", default="1024,512,32,4", help="with --twice: hidden,intermediate,experts,top_k")
    parser.add_argument("--bits", default="2_3_4,3_4_2,4_2_3", help="with --twice: gate_up_down bits of the experts")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16, 64, 256], help="with --twice: tokens")
    parser.add_argument("--iterations", type=int, default=20, help="with --twice: samples per candidate")
    parser.add_argument("--budget", type=float, help="with --twice: seconds for both together")
    parser.add_argument("--quick", action="store_true", help="with --twice: only candidates one step from the default")
    parser.add_argument("--output", help="also write the result to this file")
    args = parser.parse_args(argv)
    if len(args.profiles) > 2 or bool(args.profiles) == args.twice:
        parser.error("give one profile, two to compare, or --twice")
    return args


def main(argv=None) -> int:
    args = parse_args(argv)
    if args.twice:
        result = twice(args)
    else:
        loaded = [dict(sorted(profile.load(path).problems.items(), key=lambda i: i[0].rows)) for path in args.profiles]
        compare = len(loaded) == 2
        result = differences(*loaded, args.rounds) if compare else {"rows": gains(*loaded, args.rounds)}
    contest.write(args.output, result, device.default_device())
    print(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
