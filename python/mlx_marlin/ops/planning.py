"""What a GPU would run, computed without one."""

from __future__ import annotations

from .. import _ext, codec, kernels
from ..kernels import KernelConfig, Problem
from .problems import resolve
from .stacks import stack_info

# Scratch of a call on the CPU: csrc/cpu/segments.h and swiglu.cpp bound both parts.
_ROTATED_BYTES, _COMBINED_BYTES = 32 << 20, 64 << 20


def scratch_bytes(problem: Problem) -> int:
    """What a call with the default config takes at most beside inputs, weights and output."""
    if problem.device == "gpu":
        return sum(plan(problem)["scratch"].values())
    slots, inner = problem.rows * problem.top_k, problem.intermediate if problem.fused else 0
    rotated = min(_ROTATED_BYTES, 4 * slots * (problem.side_by_side * codec.padded(problem.hidden) + inner))
    return rotated + (min(_COMBINED_BYTES, 4 * slots * problem.hidden) if problem.combine else 0)


def plan(
    problem: Problem, config: KernelConfig | str | None = None, *, alpha: float = 1.702, limit: float = 7.0
) -> dict:
    """What the GPU would run: the list of dispatches, computed without a GPU.

    Args:
        problem: With device ``"gpu"``.
        config: A :class:`KernelConfig` or a kernel name. Default: ``None``, the default for this problem.
        alpha, limit: Of the activation.

    Returns:
        ``{"dispatches": [...], "scratch": {name: bytes}}``. A dispatch has ``kernel`` (a function of
        ``kernels/<stem>.metal`` called ``trellis_<stem>``, with its template arguments), ``constants``, ``grid``
        (in threadgroups), ``threads``, ``args`` (bytes for slot 0), ``buffers`` (``slot``, ``name``, ``offset``,
        ``bytes``, ``access``, ``alignment`` of its address in bytes), ``threadgroup_bytes`` and ``after``, the
        dispatches it waits for. Bytes of ``codes`` of mixed widths are an upper bound.

    Raises:
        ValueError: If the problem is not for a GPU or has a size that no call has, or the config is not feasible.
    """
    if not isinstance(problem, Problem):
        raise ValueError(f"[plan] problem must be a Problem, got {type(problem).__name__}")
    if problem.device != "gpu":
        raise ValueError(f"[plan] only a GPU runs plans, but the problem's device is {problem.device!r}")
    for name, least in ("rows", 0), ("top_k", 1), ("hidden", 1), ("intermediate", 1), ("experts", 1):
        if getattr(problem, name) < least:
            raise ValueError(f"[plan] {name} must be at least {least}, got {getattr(problem, name)}")
    native = resolve("plan", problem, config)
    dtype = kernels.DTYPES.index(problem.dtype)
    k, n = codec.padded(problem.hidden), codec.padded(problem.intermediate)

    def stack(part: int, k: int, n: int) -> _ext.StackInfo:
        bits = [group[part] for group in problem.bits]
        return stack_info(problem.experts, k, n, bias=problem.bias, bits=bits, codebooks=problem.codebooks)

    if not problem.fused:
        return _ext.plan_linear(
            problem.rows,
            dtype,
            stack(0, k, n),
            problem.hidden,
            problem.intermediate,
            1,
            problem.experts > 1,
            False,
            native,
        )
    return _ext.plan_swiglu(
        problem.rows,
        problem.top_k,
        dtype,
        stack(0, k, n) if problem.side_by_side == 2 else None,
        stack(problem.side_by_side - 1, k, n),
        stack(problem.side_by_side, n, k),
        problem.hidden,
        kernels.ACTIVATIONS.index(problem.activation),
        alpha,
        limit,
        problem.combine,
        native,
    )
