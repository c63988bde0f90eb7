"""Problems and configs in a few characters, for tables and lines of progress."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace

from ..kernels import KernelConfig, Problem

# Characters of the widths in a table's first column; with them its longest line has 100.
_MOST_BITS = 11


def _sizes(p: Problem) -> str:
    return f"{p.kind} {p.hidden}x{p.intermediate}" + (f" {p.experts}/{p.top_k}" if p.fused else "")


def _bits(p: Problem) -> str:
    return ",".join("_".join(map(str, sorted(set(t)) if len(set(t)) == 1 else t)) for t in p.bits)


def problem_label(p: Problem) -> str:
    """A problem in a few characters: sizes, experts, bit widths."""
    return f"{_sizes(p)} {_bits(p)}"


def names(problems: Iterable[Problem]) -> dict[Problem, str]:
    """Short names by which the problems of a run differ, whatever their rows.

    Many bit widths become a range; problems that would have one name get a number.
    """
    groups: dict[str, dict[Problem, None]] = defaultdict(dict)
    short = {}
    for problem in problems:
        bits = _bits(problem)
        if len(bits) > _MOST_BITS:
            bits = f"{problem.widths[0]}..{problem.widths[-1]}"
        short[problem] = f"{_sizes(problem)} {bits}"
        groups[short[problem]][replace(problem, rows=1)] = None
    numbers = {p: i for group in groups.values() if len(group) > 1 for i, p in enumerate(group, 1)}
    return {p: f"{name} #{i}" if (i := numbers.get(replace(p, rows=1))) else name for p, name in short.items()}


def config_label(c: KernelConfig) -> str:
    """A config in a few characters: variant, rows x columns, simdgroups (threads on the CPU)."""
    return f"{c.kernel_variant} {c.tile_size_m}x{c.tile_size_n} s{c.simdgroups}{'' if c.use_fp32_acc else ' half'}"
