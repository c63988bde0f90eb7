"""What the dispatches of a Plan do, counted by running the shaders in the simulator (tests/metal_sim)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from bench.metal.model import Work
from mlx_marlin.kernels.config import KernelConfig
from mlx_marlin.kernels.problem import Problem
from tests.metal_sim.counting import Operations
from tests.support import metal_counts, metal_executor

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Counted:
    """One dispatch.

    Attributes:
        kernel: Its name.
        operations: Of the whole dispatch.
        inner_loop: Of the loop that decodes.
        simd: Simdgroup operations by name.
        barriers: Times a threadgroup passed a barrier.
        registers: Estimate of live 32-bit registers in the inner loop.
        dispatch: As ``ops.plan`` returns it.
    """

    kernel: str
    operations: Operations
    inner_loop: Operations
    simd: dict[str, int]
    barriers: int
    registers: int
    dispatch: dict

    @property
    def work(self) -> Work:
        """For the cost model. All bytes that are bound count once: with as many experts as slots, all are
        used."""
        bytes_moved = sum(b["bytes"] for b in self.dispatch["buffers"]) + len(self.dispatch["args"])
        groups, threads = np.prod(self.dispatch["grid"]), np.prod(self.dispatch["threads"])
        return Work(
            dict(self.operations.counts),
            bytes_moved,
            int(groups),
            -(-int(threads) // 32),
            self.simd,
            tuple(self.dispatch["after"]),
        )


def _few_experts(problem: Problem, routing: np.ndarray | None = None) -> Problem:
    """As many experts as have slots: memory stays small, and the plan does not depend on the rest."""
    used = problem.rows * problem.top_k if routing is None else int(routing.max()) + 1
    return replace(problem, experts=min(problem.experts, used))


def count(
    problem: Problem,
    config: KernelConfig,
    wanted: Callable[[str], bool] = lambda kernel: True,
    routing: np.ndarray | None = None,
) -> list[Counted]:
    """Run a problem's plan and count its dispatches.

    Args:
        problem: What is asked.
        config: How it runs.
        wanted: Which kernels run and are counted, by their stem. Default: all.
        routing: The expert of each slot, of those that have one. Default: ``None``, every slot has an expert of its
            own.
    """
    return [
        Counted(
            dispatch["kernel"],
            result.operations,
            result.inner_loop,
            {k: v for k, v in result.stats["simd"].items() if k not in ("barrier", "matrix_lane")},
            result.stats["barriers"],
            result.loop_registers,
            dispatch,
        )
        for dispatch, result in metal_counts.count(_few_experts(problem, routing), config, wanted, routing)
    ]


def traffic(problem: Problem, config: KernelConfig) -> dict:
    """Device bytes of a plan, by buffer: distinct, and how often a threadgroup reads what another has read."""
    rows, codes, others = [], 0, 0
    library = metal_executor.library
    for dispatch, result in metal_counts.run(_few_experts(problem), config, library, races=False, count=True):
        names = {b["slot"]: b["name"] for b in dispatch["buffers"]}
        for slot, t in result.traffic.items():
            name = names.get(slot, "args")
            row = {
                "kernel": dispatch["kernel"],
                "buffer": name,
                "read": t.read_distinct,
                "written": t.written_distinct,
            }
            row["read by groups"] = t.read_per_group
            rows.append(row)
            moved = t.read_distinct + t.written_distinct
            codes, others = (codes + moved, others) if name.endswith(".codes") else (codes, others + moved)
    summary = {"codes": codes, "others": others, "others / codes": round(others / codes, 4)}
    repeated = [r for r in rows if r["read by groups"] > r["read"]]
    return {"summary": summary, "repeated": repeated, "buffers": rows}
