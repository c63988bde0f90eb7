"""Measure stored profiles afresh: what a profile gains over default and uniform configs, and whether two agree.

    python bench/profiles.py A.json            tuned, default and best uniform config, interleaved, per problem
    python bench/profiles.py A.json B.json     the entries in which two profiles of the same problems differ

"Uniform" is the one config with the lowest geometric mean of the profile's times over all its problems.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys

from mlx_marlin import measure, profile
from mlx_marlin.tune_cli import config_label
from mlx_marlin.workload import ConfigClock, Workload


def sample(problem, configs, rounds: int) -> dict:
    """Seconds of each config, interleaved, freed of drift."""
    workload = Workload.synthetic(problem)
    floor = measure.launch_floor()
    clocks = {config: ConfigClock(workload, config, floor, None) for config in dict.fromkeys(configs)}
    for config, clock in clocks.items():
        workload.check(config)
        clock.warm_up(5)
    times = {config: [] for config in clocks}
    for _ in range(rounds):
        for config, clock in clocks.items():
            times[config].append(clock())
    return measure.without_drift(times)


def ratio(a: list[float], b: list[float]) -> dict:
    c = measure.compare(a, b)
    return {"ratio": round(c.ratio, 4), "low": round(c.low, 4), "high": round(c.high, 4)}


def uniform_config(problems: dict):
    """The config with the lowest mean log time among those that were timed for every problem."""
    logs: dict = {}
    for entry in problems.values():
        for m in entry.timings:
            logs.setdefault(m.config, []).append(math.log(m.timing.median_ms))
    common = {config: values for config, values in logs.items() if len(values) == len(problems)}
    return min(common, key=lambda config: statistics.fmean(common[config]))


def gains(problems: dict, rounds: int) -> list[dict]:
    uniform = uniform_config(problems)
    rows = []
    for problem, entry in problems.items():
        times = sample(problem, (entry.config, entry.default, uniform), rounds)
        tuned = times[entry.config]
        rows.append(
            {
                "kind": problem.kind,
                "rows": problem.rows,
                "tuned": config_label(entry.config),
                "default": config_label(entry.default),
                "uniform": config_label(uniform),
                "decision": entry.decision,
                "tuned_ms": round(1e3 * statistics.median(tuned), 4),
                "tuned_over_default": ratio(tuned, times[entry.default]),
                "tuned_over_uniform": ratio(tuned, times[uniform]),
            }
        )
    return rows


def differences(first: dict, second: dict, rounds: int) -> dict:
    both = [problem for problem in first if problem in second]
    differing = [problem for problem in both if first[problem].config != second[problem].config]
    rows = []
    for problem in differing:
        a, b = first[problem].config, second[problem].config
        times = sample(problem, (a, b), rounds)
        r = ratio(times[a], times[b])
        rows.append(
            {
                "rows": problem.rows,
                "first": config_label(a),
                "second": config_label(b),
                **r,
                "contains_1": r["low"] <= 1.0 <= r["high"],
            }
        )
    return {"entries": len(both), "differing": len(differing), "pairs": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("profiles", nargs="+", help="one or two profiles of this machine")
    parser.add_argument("--rounds", type=int, default=20, help="samples per config")
    args = parser.parse_args()
    if len(args.profiles) > 2:
        sys.exit("profiles.py: give one profile, or two to compare")
    loaded = [dict(sorted(profile.load(path).problems.items(), key=lambda i: i[0].rows)) for path in args.profiles]
    result = gains(*loaded, args.rounds) if len(loaded) == 1 else differences(*loaded, args.rounds)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
