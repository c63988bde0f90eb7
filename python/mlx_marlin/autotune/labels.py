"""Problems and configs in a few characters, for tables and lines of progress."""

from __future__ import annotations

from ..kernels import KernelConfig, Problem


def name_of(problem: Problem) -> str:
    """A problem in a line of progress."""
    return f"{problem.kind} {problem.hidden}x{problem.intermediate}, {problem.rows} rows"


def problem_label(p: Problem) -> str:
    """A problem in a few characters: sizes, experts, bit widths."""
    bits = ",".join("_".join(map(str, sorted(set(t)) if len(set(t)) == 1 else t)) for t in p.bits)
    if p.kind == "linear":
        return f"linear {p.hidden}x{p.intermediate} {bits}"
    return f"swiglu {p.hidden}x{p.intermediate} {p.experts}/{p.top_k} {bits}"


def config_label(c: KernelConfig) -> str:
    """A config in a few characters: variant, rows x columns, simdgroups (threads on the CPU)."""
    return f"{c.kernel_variant} {c.tile_size_m}x{c.tile_size_n} s{c.simdgroups}{'' if c.use_fp32_acc else ' half'}"
