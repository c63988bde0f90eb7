"""Runs a Plan in the Metal simulator: the shader files that the package ships, dispatch by dispatch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_marlin import _ext, codec, kernels, ops
from mlx_marlin.kernels import metal
from tests.metal_sim import Result, compile
from tests.support.paths import ROOT

SHADERS = ROOT / "kernels"

_SCALARS = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}


def stem(kernel: str) -> str:
    """The kernel's file: ``trellis_linear<1, 4, false>`` is in linear.metal."""
    return kernel.removeprefix("trellis_").split("<")[0]


def compile_options(kernel: str, constants: tuple) -> dict:
    """How the host would build a dispatch's kernel: constants of the source as macros, the others by name."""
    values = dict(constants)
    return {
        "include_dirs": [str(ROOT / "csrc")],
        "defines": {f"MARLIN_SOURCE_{name}": values.get(name, 0) for name in _ext.SOURCE_CONSTANTS},
        "function_constants": {name: v for name, v in values.items() if name not in _ext.SOURCE_CONSTANTS},
        "instantiate": {kernel: kernel} if "<" in kernel else None,
        "kernels": [kernel],
        "metal_version": 400 if values.get("accelerator") else 310,  # the least that each needs
    }


@cache
def library(kernel: str, constants: tuple, directory: Path = SHADERS):
    """The compiled shader of a dispatch; its only kernel is called by the function's full name."""
    return compile(str(directory / f"{stem(kernel)}.metal"), **compile_options(kernel, constants))


def launch(lib, dispatch: dict, memory: dict[str, np.ndarray], **simulator) -> Result:
    """Run a dispatch of a plan.

    Args:
        lib: Its compiled shader.
        dispatch: As the plan has it.
        memory: The bytes of each buffer by name. Codes of mixed widths may end early: a plan knows an upper bound only.
        simulator: Keywords of the simulator's ``run``.
    """
    buffers = {b["slot"]: memory[b["name"]][b["offset"] : b["offset"] + b["bytes"]] for b in dispatch["buffers"]}
    shared = {0: dispatch["threadgroup_bytes"]} if dispatch["threadgroup_bytes"] else None
    return lib.run(
        dispatch["kernel"],
        {0: dispatch["args"], **buffers},
        grid=dispatch["grid"],
        threads=dispatch["threads"],
        threadgroup_memory=shared,
        **simulator,
    )


def viterbi_plan(tiles: int, bits: float, codebook: str, **bound) -> dict:
    """The plan of a search; bound: ``history_bytes``, of the scratch, in the place of the plan's own."""
    return _ext.plan_viterbi(tiles, codec.half_bits(bits), codec.CODEBOOKS.index(codebook), **bound)


def _poison(name: str, size: int) -> np.ndarray:
    return np.full(size, 0xFF, np.uint8)


def execute(
    plan: dict,
    inputs: dict[str, np.ndarray],
    y_bytes: int,
    directory: Path = SHADERS,
    stale: Callable[[str, int], np.ndarray] = _poison,
    **simulator,
) -> tuple[np.ndarray, dict]:
    """Run a plan's dispatches in order.

    Args:
        plan: As :func:`mlx_marlin.plan` returns it.
        inputs: Arrays by the names of the plan's bindings.
        y_bytes: Size of y.
        directory: Where the shaders are.
        stale: What y and a scratch buffer hold before, as bytes, by name and size. Default: 0xFF.
        simulator: Keywords of the simulator's ``run``: ``order``, ``races``, ``workers``, ...

    Returns:
        y as bytes, and the scratch buffers by name.
    """
    memory = {name: stale(name, size) for name, size in {**plan["scratch"], "y": y_bytes}.items()}
    memory |= {name: np.ascontiguousarray(array).reshape(-1).view(np.uint8) for name, array in inputs.items()}
    for dispatch in plan["dispatches"]:
        lib = library(dispatch["kernel"], tuple(dispatch["constants"].items()), directory)
        launch(lib, dispatch, memory, **simulator)
    return memory.pop("y"), memory


def _to_numpy(array: mx.array) -> np.ndarray:
    return np.array(array.view(mx.uint16)) if array.dtype == mx.bfloat16 else np.array(array)


def _rows(y: np.ndarray, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    """y's bytes as float32."""
    values = y.view(_SCALARS[dtype])
    if dtype == "bfloat16":
        values = (values.astype(np.uint32) << 16).view(np.float32)
    return values.reshape(shape).astype(np.float32)


def allowing(problem: kernels.Problem, config) -> kernels.Problem:
    """The problem on a machine that has what the config is for."""
    wanted = isinstance(config, kernels.KernelConfig) and metal.accelerated(config)
    return replace(problem, accelerators=wanted)


def stack_arrays(name: str, stack: ops.Stack) -> dict[str, np.ndarray]:
    """The arrays of a prepared stack by binding name."""
    parts = ("codes", "offsets", "formats", "suh", "svh", "bias")
    return {f"{name}.{part}": np.array(array) for part, array in zip(parts, stack.arrays)}


def decode(stack: ops.Stack, expert: int = 0, **simulator) -> np.ndarray:
    """The inner matrix of an expert, float16."""
    plan = _ext.plan_decode(stack.info, expert)
    k, n = stack.source.padded_shape
    y, _ = execute(plan, stack_arrays("weight", stack), k * n * 2, **simulator)
    return y.view(np.float16).reshape(k, n)


def embedding(
    ids: np.ndarray,
    trellis: np.ndarray,
    signs: np.ndarray,
    features: int,
    bits: int,
    dtype: str = "float16",
    **simulator,
) -> np.ndarray:
    """Rows of a quantized embedding, float32 ``[ids, features]``; trellis: 16-bit integers ``[rows, words]``."""
    plan = _ext.plan_embedding(len(ids), kernels.DTYPES.index(dtype), len(trellis), features, bits)
    inputs = {"indices": ids, "embedding.codes": trellis, "embedding.signs": signs}
    size = np.dtype(_SCALARS[dtype]).itemsize
    y, _ = execute(plan, inputs, len(ids) * features * size, **simulator)
    return _rows(y, dtype, (len(ids), features))


def viterbi(tiles: np.ndarray, bits: float, codebook: str, history_bytes: int | None = None, **simulator) -> np.ndarray:
    """The states of float32 tiles ``[count, 256]``, whose values are halves.

    history_bytes: bound of the scratch, in the place of the plan's own.
    """
    bound = {} if history_bytes is None else {"history_bytes": history_bytes}
    plan = viterbi_plan(len(tiles), bits, codebook, **bound)
    y, _ = execute(plan, {"tiles": tiles, "values": codec.codebook_values(codebook)}, 2 * tiles.size, **simulator)
    return y.view(np.uint16).reshape(tiles.shape)


def linear(
    x: mx.array,
    stack: ops.Stack,
    config=None,
    indices=None,
    x_divisor: int = 1,
    transposed: bool = False,
    codes: np.ndarray | None = None,
    offsets: np.ndarray | None = None,
    **simulator,
) -> np.ndarray:
    """x [rows, in] -> float32 [rows, out]; indices: [rows * x_divisor, out]; transposed: [rows, out] -> [rows, in].

    codes, offsets: in the place of the stack's.
    """
    source = stack.source
    slots = x.shape[0] * x_divisor
    problem = allowing(ops.linear_problem(source, slots, x.dtype, "gpu"), config)
    native = ops.resolve("test", problem, config)
    plan = _ext.plan_linear(
        x.shape[0],
        kernels.DTYPES.index(problem.dtype),
        stack.info,
        source.in_features,
        source.out_features,
        x_divisor,
        indices is not None,
        transposed,
        native,
    )
    inputs = {"x": _to_numpy(x), **stack_arrays("weight", stack)}
    if indices is not None:
        inputs["indices"] = np.asarray(indices, np.uint32)
    if codes is not None:
        inputs |= {"weight.codes": codes, "weight.offsets": offsets}
        for b in (b for d in plan["dispatches"] for b in d["buffers"] if b["name"] == "weight.codes"):
            b["bytes"] = codes.nbytes
    size = 4 if problem.dtype == "float32" else 2
    columns = source.in_features if transposed else source.out_features
    y, _ = execute(plan, inputs, slots * columns * size, **simulator)
    return _rows(y, problem.dtype, (slots, columns))


def experts(
    x: mx.array,
    indices: mx.array,
    bank,
    *,
    scores: mx.array | None = None,
    activation: str = "silu",
    alpha: float = 1.702,
    limit: float = 7.0,
    config=None,
    **simulator,
) -> np.ndarray:
    """x [rows, hidden], indices [rows, k] -> float32 [rows, k, hidden], or [rows, hidden] with scores."""
    names = kernels.PROJECTIONS["mlp" if bank.gate is None else "swiglu"]
    stacks = {name: ops.prepare(getattr(bank, name)) for name in names}
    rows, top_k = indices.shape
    hidden = bank.hidden
    problem = ops.experts_problem(bank.stacks, rows, top_k, activation, x.dtype, "gpu", scores is not None)
    plan = _ext.plan_swiglu(
        rows,
        top_k,
        kernels.DTYPES.index(problem.dtype),
        *(stacks[name].info if name in stacks else None for name in ("gate", "up", "down")),
        hidden,
        kernels.ACTIVATIONS.index(activation),
        alpha,
        limit,
        scores is not None,
        ops.resolve("test", allowing(problem, config), config),
    )
    inputs = {"x": _to_numpy(x), "indices": np.array(indices).astype(np.uint32)}
    for name, stack in stacks.items():
        inputs |= stack_arrays(name, stack)
    if scores is not None:
        inputs["scores"] = np.array(scores.astype(mx.float32))  # as ops casts them
    shape = (rows, hidden) if scores is not None else (rows, top_k, hidden)
    size = 4 if problem.dtype == "float32" else 2
    y, _ = execute(plan, inputs, int(np.prod(shape)) * size, **simulator)
    return _rows(y, problem.dtype, shape)
