"""From what a dispatch does to how long it takes on an Apple GPU. Pure; predictions, not measurements.

A scheduler issues one 32-lane instruction per clock. The complex pipe, which runs beside it, takes four clocks for each
integer multiply, shift or conversion. The neural accelerators of M5 run beside both. A dispatch takes as long as the
slowest of issue, the complex pipe, the accelerators and memory. Cores that have too few simdgroups to hide latency, or
fewer threadgroups than others, stretch all but memory.

A layer's time is an intercept and a slope: a fixed cost per dependent stage, and the time of the work. Both are ranges,
because published figures disagree (bench/metal/chips.py).

Not in the model: barriers, caches (bytes count once, at the bandwidth of long reads, which reads of a few MB do not
reach), the width of loads, and registers that spill.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from bench.metal.chips import (
    ACCELERATOR,
    ACCELERATOR_CYCLES,
    COMPLEX_CYCLES,
    OTHER_SIMD_CYCLES,
    RANDOM_SHUFFLE_CYCLES,
    SATURATING_SIMDGROUPS,
    SCHEDULERS,
    SIMD_CYCLES,
    SPECIAL_CYCLES,
    STAGE_US,
    WIDE_SHIFT_INSTRUCTIONS,
    WORK,
    Chip,
    End,
)
from mlx_marlin.profile.uncertainty import Range

# Time on the complex pipe in multiples of one multiply, as tests/metal_sim/counting.py counts.
COMPLEX = {"multiply": 1, "shift": 1, "convert": 1, "variable_shift": 2, "wide_variable_shift": 3.5}
PARTS = ("issue", "complex", "memory", "accelerator")
_ACCELERATED = "tensor_multiply"


@dataclass(frozen=True)
class Work:
    """What one dispatch does.

    Attributes:
        operations: Operations by class, summed over lanes.
        simd: Simdgroup operations by name, summed over simdgroups.
        bytes: Device bytes that must come from or go to memory.
        groups: Threadgroups.
        simdgroups: Simdgroups per threadgroup.
        after: Dispatches that must have finished.
    """

    operations: dict[str, float]
    bytes: float
    groups: int
    simdgroups: int
    simd: dict[str, float] = field(default_factory=dict)
    after: tuple[int, ...] = ()


@dataclass(frozen=True)
class Time:
    """Predicted microseconds of a dispatch, and of what it is made.

    Attributes:
        issue: Issuing instructions.
        complex: The complex pipe.
        memory: Moving ``Work.bytes``.
        accelerator: The neural accelerators.
    """

    issue: float
    complex: float
    memory: float
    accelerator: float = 0.0

    @property
    def total(self) -> float:
        """Of the slowest part."""
        return max(getattr(self, part) for part in PARTS)

    @property
    def bound(self) -> str:
        """Which of them is slowest."""
        return max(PARTS, key=lambda part: getattr(self, part))


def scheduler_cycles(
    operations: Mapping[str, float], simd: Mapping[str, float], chip: Chip, end: End = "likely"
) -> tuple[float, float]:
    """(issue, complex pipe) in clocks of a chip, summed over schedulers."""
    wide = operations.get("wide_variable_shift", 0)
    plain = sum(n for name, n in operations.items() if name not in ("special", "wide_variable_shift"))
    plain += SPECIAL_CYCLES * operations.get("special", 0)
    multiples = sum(n * operations.get(name, 0) for name, n in COMPLEX.items() if name != "wide_variable_shift")
    plain += (chip.complex_slots(end) - 1) * multiples
    groups = sum(_simd_cycles(op, chip, end) * n for op, n in simd.items() if op != _ACCELERATED)
    wide_complex = COMPLEX_CYCLES * COMPLEX["wide_variable_shift"] * wide
    factor = getattr(WORK, end)
    return (
        factor * ((plain / 32 + groups) / chip.issue + WIDE_SHIFT_INSTRUCTIONS * wide / 32),
        factor * (COMPLEX_CYCLES * multiples / 32 / chip.issue + wide_complex / 32),
    )


def _simd_cycles(op: str, chip: Chip, end: End) -> float:
    if op == "shuffle":
        return RANDOM_SHUFFLE_CYCLES.get(chip.family, OTHER_SIMD_CYCLES)
    return SIMD_CYCLES.get(op, OTHER_SIMD_CYCLES) * (chip.matrix(end) if op == "matrix_multiply" else 1)


def stretch(chip: Chip, groups: int, simdgroups: int) -> float:
    """How much longer than on evenly and fully loaded cores."""
    if not groups:
        return 1.0
    uneven = math.ceil(groups / chip.cores) * chip.cores / groups
    busiest = math.ceil(groups / chip.cores) * simdgroups
    # The busiest core decides; simdgroups it lacks to hide latency are lost in proportion.
    return uneven * max(1.0, SATURATING_SIMDGROUPS / busiest)


def dispatch_time(work: Work, chip: Chip, end: End = "likely") -> Time:
    """Predicted time of one dispatch, without launching it."""
    issue, complex_pipe = scheduler_cycles(work.operations, work.simd, chip, end)
    clocks_per_us = SCHEDULERS * chip.cores * chip.ghz * 1e3
    factor = stretch(chip, work.groups, work.simdgroups) / clocks_per_us
    accelerator = getattr(ACCELERATOR, end) * ACCELERATOR_CYCLES * work.simd.get(_ACCELERATED, 0)
    memory = chip.read(end) * work.bytes / (chip.read_gbps * 1e3)
    return Time(issue * factor, complex_pipe * factor, memory, accelerator * factor)


def _depths(work: Sequence[Work]) -> list[int]:
    depths: list[int] = []
    for w in work:
        depths.append(1 + max((depths[a] for a in w.after), default=0))
    return depths


def stages(work: Sequence[Work]) -> int:
    """Dependent stages of a list of dispatches."""
    return max(_depths(work), default=0)


def work_time(work: Sequence[Work], chip: Chip, end: End = "likely") -> float:
    """Predicted microseconds of a list of dispatches without what a stage costs by itself.

    Independent dispatches share the machine, dependent ones wait.
    """
    depths, total = _depths(work), 0.0
    for stage in sorted(set(depths)):
        times = [dispatch_time(w, chip, end) for w, depth in zip(work, depths, strict=True) if depth == stage]
        # Sharing the machine: each resource adds up, and no dispatch is faster than alone.
        shared = max(sum(getattr(t, part) for t in times) for part in PARTS)
        total += max([shared, *(t.total for t in times)])
    return total


def layer_time(work: Sequence[Work], chip: Chip) -> float:
    """Predicted microseconds of a list of dispatches."""
    return work_time(work, chip) + stages(work) * STAGE_US.likely


def work_range(work: Sequence[Work], chip: Chip) -> Range:
    """:func:`work_time` at each end."""
    return Range(*(work_time(work, chip, end) for end in Range.__struct_fields__))


def time_range(work: Sequence[Work], chip: Chip) -> Range:
    """:func:`layer_time` with all that is uncertain at each end."""
    slope, count = work_range(work, chip), stages(work)
    return Range(*(getattr(slope, end) + count * getattr(STAGE_US, end) for end in Range.__struct_fields__))


def decode_rate(
    operations: Mapping[str, float], simd: Mapping[str, float], weights: float, bits: float, chip: Chip
) -> float:
    """Weights per second, in 1e9, of a decoding loop that fills the machine."""
    clocks = max(scheduler_cycles(operations, simd, chip))
    seconds = clocks / (SCHEDULERS * chip.cores * chip.ghz * 1e9)
    return min(weights / seconds, chip.read_gbps * 1e9 * 8 / bits) / 1e9
