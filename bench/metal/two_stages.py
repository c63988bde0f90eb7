"""What two dependent stages instead of three would cost and bring at one row, by the ranges of the model.

Today gate and up, down, and the sum over a token's experts wait for each other. Two forms without the third stage: the
last threadgroup that finishes a block of 128 columns transforms and sums it, known by an atomic counter (a fence of the
whole device: Metal 3.2, macOS 15); or a threadgroup takes a block of columns of all of a token's experts, one after the
other, which leaves a block of 128 columns per threadgroup: 16 in this layer.
"""

from __future__ import annotations

from dataclasses import replace

from bench.metal import layer
from bench.metal.chips import CHIPS, Chip, label
from bench.metal.model import Work, layer_time, time_range
from bench.metal.predict import candidates, qwen3_30b
from bench.metal.whole_model import QWEN3_30B, SHOWN
from mlx_marlin import codec
from mlx_marlin.kernels.problem import Problem
from mlx_marlin.profile.uncertainty import Range

FORMATS = ((2.5, "mul1"), (3, "mcg"), (3, "mul1"), (4, "mcg"))
# The counter and its fence, in microseconds: an estimate, nobody has published one. Not in the form without it.
HAND_OVER = Range(0.3, 1.0, 2.0)


def _last_sums(work: tuple[Work, ...]) -> list[Work]:
    first, down, combine = work
    operations = {
        k: down.operations.get(k, 0) + combine.operations.get(k, 0) for k in down.operations | combine.operations
    }
    return [first, replace(down, operations=operations, bytes=down.bytes + combine.bytes)]


def _one_after_the_other(work: tuple[Work, ...], problem: Problem) -> list[Work]:
    first, joined = _last_sums(work)
    return [first, replace(joined, groups=problem.rows * problem.hidden // codec.HADAMARD_SIZE)]


def _plus(found: Range, more: Range) -> Range:
    return Range(*(getattr(found, end) + getattr(more, end) for end in Range.__struct_fields__))


def _row(bits: float, codebook: str, chip: Chip) -> dict:
    problem = qwen3_30b(bits, codebook=codebook)
    works = {c: w for c in candidates(problem) for w in (layer.work(problem, c),) if len(w) == 3}
    today = min(works, key=lambda c: layer_time(works[c], chip))
    # Only whole Hadamard blocks finish their columns in the product.
    whole = [w for c, w in works.items() if c.tile_size_n % codec.HADAMARD_SIZE == 0]
    serial = min((_one_after_the_other(w, problem) for w in whole), key=lambda w: layer_time(w, chip))
    forms = {
        "today": time_range(works[today], chip),
        "the last sums": _plus(time_range(_last_sums(works[today]), chip), HAND_OVER),
        "one after the other": time_range(serial, chip),
    }
    us = {name: [round(getattr(found, end), 1) for end in Range.__struct_fields__] for name, found in forms.items()}
    saved = [round(a - b, 1) for a, b in zip(us["today"], us["the last sums"], strict=True)]
    return {
        "chip": chip.name,
        "bits": bits,
        "codebook": codebook,
        "config": label(today),
        "us": us,
        "saved us": saved,
        "saved of today's": [round(s / t, 3) for s, t in zip(saved, us["today"], strict=True)],
        "saved per token us": [round(QWEN3_30B.layers * s) for s in saved],
    }


def predict(formats=FORMATS, chips: tuple[str, ...] = SHOWN) -> list[dict]:
    """Both forms beside today's."""
    return [_row(bits, codebook, CHIPS[chip]) for bits, codebook in formats for chip in chips]


def show(rows: list[dict]) -> None:
    """Print the table."""
    print("PREDICTED, not measured: one row of Qwen3-30B-A3B's experts with their sum, us, low / likely / high")
    for row in rows:
        us = {name: " / ".join(f"{x:.1f}" for x in found) for name, found in row["us"].items()}
        shares = " / ".join(f"{100 * s:.0f}" for s in row["saved of today's"])
        print(
            f"{row['codebook']:4s} {row['bits']} {row['chip']:7s} today {us['today']}; the last sums "
            f"{us['the last sums']}, saves {shares} %; one after the other {us['one after the other']}"
        )
