"""What the dispatches of a Plan do, counted by running the shaders in the simulator (tests/metal_sim)."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import metal_executor  # noqa: E402
from metal_sim.counting import Operations, compile_counted  # noqa: E402

from metal_model import Work  # noqa: E402
from mlx_marlin import ops  # noqa: E402
from mlx_marlin.kernels import KernelConfig, Problem  # noqa: E402
from mlx_marlin.weights import ExpertBank, TrellisWeight  # noqa: E402


@dataclass(frozen=True)
class Counted:
    """One dispatch.

    Attributes:
        kernel: Its name.
        operations: Of the whole dispatch.
        inner_loop: Of the loop that decodes.
        simd: Simdgroup operations by name.
        barriers: Times a threadgroup passed a barrier.
        registers: Estimate of live 32-bit registers.
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


@lru_cache(maxsize=4)
def _inputs(problem: Problem) -> dict[str, np.ndarray]:
    """Random inputs; row r uses experts top_k * r, top_k * r + 1, ... modulo the number of experts."""
    rng = np.random.default_rng(0)
    shapes = [(problem.hidden, problem.intermediate)] * 2 + [(problem.intermediate, problem.hidden)]
    lists = []
    for part, (k, n) in enumerate(shapes):
        bits = problem.bits[0][part]
        lists.append(
            [
                TrellisWeight(
                    rng.integers(-(1 << 15), 1 << 15, (k // 16, n // 16, 16 * bits), np.int16),
                    np.ones(k, np.float16),
                    np.ones(n, np.float16),
                    problem.codebooks[0],
                )
                for _ in range(problem.experts)
            ]
        )
    bank = ExpertBank(*lists)
    indices = np.arange(problem.rows * problem.top_k, dtype=np.uint32) % problem.experts
    inputs = {
        "x": rng.standard_normal((problem.rows, problem.hidden)).astype(np.float16),
        "indices": indices.reshape(problem.rows, problem.top_k),
        "scores": np.ones((problem.rows, problem.top_k), np.float32),
    }
    for name in ("gate", "up", "down"):
        inputs |= metal_executor.stack_arrays(name, ops.prepare(getattr(bank, name)))
    return inputs


@lru_cache(maxsize=None)
def _library(kernel: str, constants: tuple):
    return compile_counted(
        str(metal_executor.SHADERS / f"{metal_executor.stem(kernel)}.metal"),
        include_dirs=[str(ROOT / "csrc")],
        function_constants=dict(constants),
        instantiate={kernel: kernel} if "<" in kernel else None,
        kernels=[kernel],
    )


def _memory(problem: Problem, plan: dict) -> dict[str, np.ndarray]:
    """Every buffer of a plan by name, as bytes; scratch and y are poisoned."""
    memory = {name: np.full(size, 0xFF, np.uint8) for name, size in plan["scratch"].items()}
    memory["y"] = np.full(2 * problem.rows * problem.hidden * problem.top_k, 0xFF, np.uint8)
    return memory | {
        k: np.ascontiguousarray(v).reshape(-1).view(np.uint8) for k, v in _inputs(problem).items()
    }


def _launch(dispatch: dict, memory: dict[str, np.ndarray]) -> dict:
    """A dispatch as keywords of ``Library.run``."""
    buffers = {
        b["slot"]: memory[b["name"]][b["offset"] : b["offset"] + b["bytes"]] for b in dispatch["buffers"]
    }
    return {
        "buffers": {0: dispatch["args"], **buffers},
        "grid": dispatch["grid"],
        "threads": dispatch["threads"],
        "threadgroup_memory": {0: dispatch["threadgroup_bytes"]} if dispatch["threadgroup_bytes"] else None,
    }


def count(problem: Problem, config: KernelConfig) -> list[Counted]:
    """Run a fused MoE layer's plan and count every dispatch.

    Args:
        problem: Of kind "swiglu", float16, uniform bits, one codebook. Only as many experts as there are
    slots take
            part, so that memory stays small; the plan does not depend on the rest.
        config: How it runs.
    """
    problem = replace(problem, experts=min(problem.experts, problem.rows * problem.top_k))
    plan = ops.plan(problem, config)
    memory = _memory(problem, plan)
    counted = []
    for dispatch in plan["dispatches"]:
        library = _library(dispatch["kernel"], tuple(dispatch["constants"].items()))
        result = library.run(dispatch["kernel"], **_launch(dispatch, memory))
        counted.append(
            Counted(
                dispatch["kernel"],
                result.operations,
                result.inner_loop,
                {k: v for k, v in result.stats["simd"].items() if k not in ("barrier", "matrix_lane")},
                result.stats["barriers"],
                library.registers[dispatch["kernel"]],
                dispatch,
            )
        )
    return counted


def traffic(problem: Problem, config: KernelConfig) -> dict:
    """Device bytes of a plan, by buffer: distinct, and how often a threadgroup reads what another has read.

    Args:
        problem: As for :func:`count`.
        config: How it runs.
    """
    problem = replace(problem, experts=min(problem.experts, problem.rows * problem.top_k))
    plan = ops.plan(problem, config)
    memory = _memory(problem, plan)
    rows, codes, others = [], 0, 0
    for dispatch in plan["dispatches"]:
        library = metal_executor.library(dispatch["kernel"], tuple(dispatch["constants"].items()))
        result = library.run(dispatch["kernel"], **_launch(dispatch, memory), races=False, count=True)
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
