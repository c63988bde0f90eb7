"""One layer of experts from 1 to 2048 rows: time, share of the floor, beside MLX's affine layer by the same model, and
which goals that meets.
"""

from __future__ import annotations

from dataclasses import replace

from bench.metal import affine, layer
from bench.metal.chips import CHIPS, SIMD_CYCLES, Chip, label
from bench.metal.model import time_range
from bench.metal.predict import choice, default_on, qwen3_30b
from mlx_marlin.kernels.config import KernelConfig
from mlx_marlin.kernels.problem import Problem
from mlx_marlin.profile.uncertainty import Range

ROWS = (1, 4, 16, 64, 256, 512, 2048)
SHOWN = ("M1", "M2 Max", "M4", "M4 Max", "M5", "M5 Max")
LAYER = replace(qwen3_30b(3), combine=False)  # as mlx-lm's blocks call their experts
# The best rates that anybody has measured at 3 bits, in weights per core and nanosecond at 1.578 GHz: escha-mlx on M4
# and M5 Pro.
BEST_RATE = {"M5": 26.6}
OTHER_BEST_RATE = 23.1
BEST_GHZ = 1.578
# Of rows of the predicted profiles the last answers up to 16.
PREDICTED_ROWS = (1, 2, 4, 8)
LAST_PREDICTED = 16
# Goals: times the floor at one row, on up to 20 cores and on more; times the matrix units' floor from so many rows on.
ONE_ROW, FEW_CORES, ONE_ROW_OF_MANY = 1.6, 20, 2.0
MANY_ROWS, OF_MATRICES = 512, 1.35
ACCURACIES = ("float32", "half")


def runs(problem: Problem, chip: Chip) -> KernelConfig:
    """What a layer runs: the predicted profile's config of the nearest rows, else the default."""
    if problem.rows > LAST_PREDICTED:
        return default_on(problem, chip)
    nearest = min(PREDICTED_ROWS, key=lambda rows: (abs(rows - problem.rows), rows))
    asked = replace(problem, rows=nearest, accuracy="float32", accelerators=False)
    return choice(asked, chip)


def floor_us(problem: Problem, chip: Chip) -> float:
    """The least time: every expert that has rows decoded once, at the best rate that anybody has measured, and read
    once; real rows only on the matrix units.
    """
    weights = sum(k * n for k, n in problem.shapes)
    experts = layer.routing(problem.experts, problem.top_k, problem.rows, 1, 1).experts
    rate = BEST_RATE.get(chip.family, OTHER_BEST_RATE) / BEST_GHZ * chip.ghz * chip.cores * 1e3
    read = experts * weights * max(problem.widths) / 8 / (chip.read_gbps * 1e3)
    matrices = weights * problem.rows * problem.top_k / matrix_rate(chip)
    return max(experts * weights / rate, read, matrices)


def matrix_rate(chip: Chip) -> float:
    """Multiply-adds per microsecond of the matrix units."""
    if chip.has_accelerators:
        return affine.accelerator_rate(chip) / 2
    return affine.lane_rate(chip) * (8 * 8 * 8 / 32) / SIMD_CYCLES["matrix_multiply"]


def goals(rows: int, chip: Chip, us: float, floor: float, affine_us: float) -> dict[str, bool]:
    """Which goals a time meets."""
    found = {"affine": us <= affine_us}
    if rows == 1:
        found["one row"] = us <= (ONE_ROW if chip.cores <= FEW_CORES else ONE_ROW_OF_MANY) * floor
    if rows >= MANY_ROWS:
        found["matrices"] = us <= OF_MATRICES * floor
    return found


def _rounded(found: Range) -> list[float]:
    return [round(getattr(found, end), 1) for end in Range.__struct_fields__]


def _row(rows: int, codebook: str, chip: Chip, accuracy: str) -> dict:
    problem = replace(LAYER, rows=rows, codebooks=(codebook,), accuracy=accuracy, accelerators=chip.has_accelerators)
    config = runs(problem, chip)
    us, beside, floor = (
        time_range(layer.work(problem, config), chip),
        affine.experts_range(problem, chip),
        floor_us(problem, chip),
    )
    return {
        "codebook": codebook,
        "rows": rows,
        "chip": chip.name,
        "accuracy": accuracy,
        "us": _rounded(us),
        "config": label(config),
        "floor us": round(floor, 1),
        "share of floor": round(floor / us.likely, 3),
        "affine us": _rounded(beside),
        "goals": goals(rows, chip, us.likely, floor, beside.likely),
        "goals at the high end": goals(rows, chip, us.high, floor, beside.high),
    }


def predict(
    codebooks: tuple[str, ...] = ("mcg", "mul1"), rows: tuple[int, ...] = ROWS, chips: tuple[str, ...] = SHOWN
) -> dict:
    """The table. Accuracy "half" is another form on the accelerators only, where rows are many."""
    table = [
        _row(n, codebook, CHIPS[name], accuracy)
        for codebook in codebooks
        for n in rows
        for name in chips
        for accuracy in ACCURACIES
        if accuracy == "float32" or (CHIPS[name].has_accelerators and n > LAST_PREDICTED)
    ]
    return {
        "source": "predicted",
        "layer": "Experts of Qwen3-30B-A3B, 3 bits, float16, without scores",
        "us": "low, likely, high",
        "rows": table,
    }


def show(result: dict) -> None:
    """Print the table."""
    print(f"PREDICTED, not measured: {result['layer']}")
    for row in result["rows"]:
        low, us, high = row["us"]
        missed = [goal for goal, met in row["goals"].items() if not met]
        print(
            f"{row['codebook']:4s} {row['rows']:4d} rows {row['chip']:7s} {us:9.1f} us ({low:.1f} to {high:.1f}), "
            f"{100 * row['share of floor']:3.0f} % of the floor, affine {row['affine us'][1]:9.1f}; {row['config']}"
            f"{', half' if row['accuracy'] == 'half' else ''}{'; missed: ' + ', '.join(missed) if missed else ''}"
        )
