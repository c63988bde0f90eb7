"""What the selection benchmarks share: a layer of mixed widths, interleaved samples, and how a result is written."""

from __future__ import annotations

import json
import math
import random
import statistics
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from msgspec import structs

from mlx_marlin import TrellisSwitchGLU, device, kernels
from mlx_marlin.measure import stats
from mlx_marlin.storage import atomic
from mlx_marlin.weights.synthetic import random_weight

# An expert's (gate, up, down) bits, in turn over the experts: 2, 3 and 4 bits in every projection.
MIX = ((2, 3, 4), (3, 4, 2), (4, 2, 3))


def mixed_layer(hidden: int, intermediate: int, experts: int, mix=MIX, seed: int = 0) -> TrellisSwitchGLU:
    """A layer of random trellis words: times do not depend on their values."""
    rng = np.random.default_rng(seed)
    sizes = ((hidden, intermediate), (hidden, intermediate), (intermediate, hidden))
    gate, up, down = (
        [random_weight(rng, *size, mix[e % len(mix)][part]) for e in range(experts)] for part, size in enumerate(sizes)
    )
    return TrellisSwitchGLU(gate, up, down)


def interleaved(clocks: Mapping, rounds: int, warmup: int = 3, seed: int = 0) -> dict:
    """Seconds per clock: in each round every clock once, in a random order, so that drift hits all alike."""
    for clock in clocks.values():
        clock.warm_up(warmup)
    rng, order, samples = random.Random(seed), list(clocks), {key: [] for key in clocks}
    for _ in range(rounds):
        rng.shuffle(order)
        for key in order:
            samples[key].append(clocks[key]())
    return samples


def uniform_config(timed: Mapping) -> kernels.KernelConfig | None:
    """The one config with the lowest geometric mean of its times over all problems.

    Args:
        timed: ``{problem: {config: time}}``. At some problems several configs run the same code: one time stands for
            all of them.

    Returns:
        ``None`` if no config was timed at every problem.
    """
    codes = {
        problem: {kernels.effective(problem, config): time for config, time in times.items()}
        for problem, times in timed.items()
    }
    logs = {
        config: [math.log(codes[p][code]) for p in codes if (code := kernels.effective(p, config)) in codes[p]]
        for config in dict.fromkeys(config for times in timed.values() for config in times)
        if all(kernels.feasible(problem, config) is None for problem in timed)
    }
    common = {config: values for config, values in logs.items() if len(values) == len(codes)}
    return min(common, key=lambda config: statistics.fmean(common[config])) if common else None


def as_result(comparison: stats.Comparison) -> dict:
    """A ratio of times as part of a result file."""
    return {"ratio": comparison.ratio, "low": comparison.low, "high": comparison.high}


def saving(samples: Mapping, ours, theirs) -> dict:
    """What one config saves of another's time, with the 95 % interval: "12.3 % (10.1 to 14.4)"."""
    if ours == theirs:
        return {"ratio": 1.0, "low": 1.0, "high": 1.0, "saved": "nothing (the same code)"}
    steady = stats.without_drift({config: samples[config] for config in (ours, theirs)})
    comparison = stats.compare(steady[ours], steady[theirs])
    saved = [100 * (1 - r) for r in (comparison.ratio, comparison.high, comparison.low)]
    return {**as_result(comparison), "saved": "{:.1f} % ({:.1f} to {:.1f})".format(*saved)}


def write(path: str | None, result, name: str) -> None:
    """Write a result with the machine it was measured on."""
    if path is not None:
        document = {"machine": structs.asdict(device.fingerprint(name)), **result}
        atomic.write_text(Path(path), json.dumps(document, indent=1) + "\n")
