"""Runs a Plan without checks, counting what each dispatch does."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np

from mlx_marlin import codec, kernels, ops
from mlx_marlin.kernels import KernelConfig, Problem
from tests.metal_sim import Result
from tests.metal_sim.counting import CountedResult, compile_counted
from tests.support.metal_executor import SHADERS, compile_options, launch, stem, viterbi_plan


@cache
def library(kernel: str, constants: tuple):
    return compile_counted(str(SHADERS / f"{stem(kernel)}.metal"), **compile_options(kernel, constants))


def _contents(problem: Problem, name: str, size: int) -> np.ndarray:
    """A buffer that makes every expert legal and active in turn; everything else is zeros."""
    part = name.split(".")[-1]
    experts = np.arange(problem.experts)
    names, owner = kernels.PROJECTIONS[problem.kind], name.split(".")[0]
    index = names.index(owner) if owner in names else None
    if part == "indices":
        return (np.arange(size // 4) % problem.experts).astype(np.uint32).view(np.uint8)
    bits = [problem.bits[e % len(problem.bits)][index] for e in experts] if index is not None else []
    if part == "formats":
        codebooks = [problem.codebooks[e % len(problem.codebooks)] for e in experts]
        words = [codec.format_word(b, "mul1" if codec.is_half_rate(b) else c) for b, c in zip(bits, codebooks)]
        return np.array(words, np.uint32).view(np.uint8)
    if part == "offsets":
        padded = [-(-width // 128) * 128 for width in (problem.hidden, problem.intermediate)]
        words = np.array(list(map(codec.half_bits, bits))) * (padded[0] * padded[1] // 64)
        return np.concatenate([[0], np.cumsum(words)[:-1]]).astype(np.int64).view(np.uint8)
    return np.zeros(size, np.uint8)


def run(
    problem: Problem,
    config: KernelConfig | None,
    library,
    wanted: Callable[[str], bool] = lambda kernel: True,
    routing: np.ndarray | None = None,
    **simulator,
) -> list[tuple[dict, Result]]:
    """(dispatch, result) of each dispatch; `library(kernel, constants)` compiles, the rest goes to its run.

    wanted: Which kernels run, by their stem; the others leave zeros to those that follow.
    routing: The expert of each slot; by default the experts in turn.
    """
    plan = ops.plan(problem, config)
    memory = {name: np.zeros(size, np.uint8) for name, size in plan["scratch"].items()}
    if routing is not None:
        memory["indices"] = routing.astype(np.uint32).view(np.uint8)
    found = []
    for dispatch in plan["dispatches"]:
        for b in dispatch["buffers"]:
            end = b["offset"] + b["bytes"]
            if b["name"] not in memory or len(memory[b["name"]]) < end:
                memory[b["name"]] = _contents(problem, b["name"], end)
        if wanted(stem(dispatch["kernel"])):
            lib = library(dispatch["kernel"], tuple(dispatch["constants"].items()))
            found.append((dispatch, launch(lib, dispatch, memory, **simulator)))
    return found


def count(
    problem: Problem,
    config: KernelConfig | None = None,
    wanted: Callable[[str], bool] = lambda kernel: True,
    routing: np.ndarray | None = None,
) -> list[tuple[dict, CountedResult]]:
    """(dispatch, result with operation and register counts) of each dispatch of a problem that is wanted.

    routing: The expert of each slot; by default the experts in turn.
    """
    return run(problem, config, library, wanted, routing)


def viterbi(bits: float, codebook: str) -> list[tuple[dict, CountedResult]]:
    """(dispatch, result) of each dispatch of the encoder's search of one tile."""
    plan = viterbi_plan(1, bits, codebook)
    target = np.random.default_rng(0).standard_normal(codec.TILE_SIZE).astype(np.float16).astype(np.float32)
    memory = {name: np.zeros(size, np.uint8) for name, size in plan["scratch"].items()}
    memory |= {"tiles": target.view(np.uint8), "values": codec.codebook_values(codebook).view(np.uint8)}
    memory["y"] = np.zeros(2 * codec.TILE_SIZE, np.uint8)
    return [(d, launch(library(d["kernel"], tuple(d["constants"].items())), d, memory)) for d in plan["dispatches"]]
