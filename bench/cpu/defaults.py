"""The default config beside the candidates, on this machine: what tuning would save.

    python -m bench.cpu.defaults [--rounds 40] [--output FILE]

Linears and experts at 1 to 64 rows. All panels at the default's columns, and its own panel at the other columns, are
timed in turn, in a random order. Of the one with the lowest median stands how much time it saves of the default's, with
the 95 % interval: an upper bound, since the samples that choose the best of several are those that show it.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator
from dataclasses import replace

from bench.cpu import contest
from mlx_marlin import device, kernels, measure
from mlx_marlin.autotune.labels import config_label, problem_label
from mlx_marlin.autotune.workload import ConfigClock, Workload
from mlx_marlin.kernels import KernelConfig, Problem, cpu

ROWS = (1, 2, 4, 8, 12, 16, 32, 64)
# A projection of attention, the experts of Qwen3-30B-A3B, and a layer of few experts.
PROBLEMS = (
    Problem.linear(2048, 4096, bits=3),
    Problem.swiglu(2048, 768, experts=128, top_k=8, bits=3),
    Problem.swiglu(1024, 512, experts=8, top_k=2, bits=3),
)


def configs(problem: Problem) -> list[KernelConfig]:
    """The default, and what differs from it in the panel or in the columns."""
    default = kernels.default(problem)
    found = [default]
    for variant, panels in cpu.TILE_ROWS.items():
        for panel in panels:
            name = kernels.make_name(variant)
            found.append(replace(default, kernel_name=name, tile_size_m=panel, kernel_variant=variant))
    found += [replace(default, tile_size_n=columns) for columns in cpu.TILE_COLUMNS]
    return list(dict.fromkeys(kernels.effective(problem, config) for config in found))


def measured(problem: Problem, rounds: int) -> dict:
    """Default and best config of a problem."""
    workload = Workload.synthetic(problem, memory_limit=device.memory_bytes("cpu") // 2)
    floor = measure.launch_floor()
    clocks = {config: ConfigClock(workload, config, floor, None) for config in configs(problem)}
    samples = contest.interleaved(clocks, rounds)
    default = kernels.effective(problem, kernels.default(problem))
    best = min(samples, key=lambda config: statistics.median(samples[config]))
    return {
        "problem": problem_label(problem),
        "rows": problem.rows,
        "default": config_label(default),
        "default_ms": round(1e3 * statistics.median(samples[default]), 4),
        "best": config_label(best),
        "best_ms": round(1e3 * statistics.median(samples[best]), 4),
        "best_over_default": contest.saving(samples, best, default),
    }


def run(rounds: int, problems: tuple[Problem, ...] = PROBLEMS, rows: tuple[int, ...] = ROWS) -> Iterator[dict]:
    """What :func:`measured` gives for each problem at each number of rows."""
    for problem in problems:
        for count in rows:
            yield measured(replace(problem, rows=count), rounds)


def main() -> None:
    """Print a table, a line as soon as it is measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=40, help="samples of each config; default 40")
    parser.add_argument("--output", metavar="FILE", help="JSON")
    options = parser.parse_args()
    print("| problem | rows | default | ms | best | ms | saves |\n|---|---|---|---|---|---|---|")
    results = []
    for row in run(options.rounds):
        results.append(row)
        saved = row["best_over_default"]["saved"]
        cells = [row[key] for key in ("problem", "rows", "default", "default_ms", "best", "best_ms")]
        print("|", " | ".join(map(str, [*cells, saved])), "|", flush=True)
    contest.write(options.output, {"rounds": options.rounds, "rows": results}, "cpu")


if __name__ == "__main__":
    main()
