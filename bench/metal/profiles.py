"""The shipped profiles: what the cost model predicts to be fastest on each chip, until somebody measures there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from bench.metal.chips import CHIPS, Chip
from bench.metal.predict import RANKED, choice, default_on, predicted_us, qwen3_30b, ranking, uncertainty
from mlx_marlin import codec
from mlx_marlin.kernels.problem import Problem
from mlx_marlin.profile import json as profile_json
from mlx_marlin.profile.schema import AutotuneConfig, Entry, Measured, Timing
from mlx_marlin.storage import atomic

PROFILES = Path(__file__).resolve().parents[2] / "python/mlx_marlin/profile/predicted"

# Rows of the experts, and the widths that they usually have.
EXPERT_ROWS = (1, 2, 4, 8)
WIDTHS = (1.5, 2, 2.5, 3, 3.5, 4)
# (in, out) of Qwen3-30B-A3B's attention: queries, keys and values, output.
LINEARS = ((2048, 4096), (2048, 512), (4096, 2048))


def problems() -> list[Problem]:
    """The calls of a 30B mixture-of-experts model that are predicted; look-ups take the nearest for others."""
    layers = [
        qwen3_30b(bits, rows, "mul1" if codec.is_half_rate(bits) else "mcg") for rows in EXPERT_ROWS for bits in WIDTHS
    ]
    layers = [replace(p, combine=False) for p in layers]  # as mlx-lm's blocks call their experts
    linears = [Problem.linear(*size, rows=rows, codebooks="mcg", device="gpu") for rows in (1, 4) for size in LINEARS]
    return layers + linears


def _timing(us: float) -> Timing:
    return Timing(0, round(us / 1e3, 4), 0.0)


def profile(chip: Chip) -> AutotuneConfig:
    """The predicted profile of a chip."""
    table = AutotuneConfig(chip.name, chip.family, source="predicted")
    for problem in problems():
        config, default = choice(problem, chip), default_on(problem, chip)
        us, baseline = (predicted_us(problem, c, chip) for c in (config, default))
        ratio, doubt = us / baseline, uncertainty(problem, chip)
        table.add(
            problem,
            Entry(
                config,
                _timing(us),
                default,
                _timing(baseline),
                (ratio, ratio, ratio),
                "default" if config == default else "faster",
                "unchecked",
                timestamp=0.0,
                timings=tuple(Measured(c, _timing(t)) for t, c in ranking(problem, chip)[:RANKED]),
                uncertainty=doubt if doubt.matters else None,
            ),
        )
    return table


def write() -> list[Path]:
    """Write the shipped profiles, one per chip."""
    paths = []
    for chip in CHIPS.values():
        path = PROFILES / f"{chip.name.lower().replace(' ', '_')}.json"
        atomic.write_bytes(path, profile_json.encode(profile(chip)))
        paths.append(path)
    return paths
