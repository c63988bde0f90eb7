"""Executors for the self-test: right ones, wrong ones, and ones that fail."""

from dataclasses import replace

import mlx.core as mx
import numpy as np

from mlx_marlin import ops
from mlx_marlin.kernels import Problem
from mlx_marlin.selection import selftest, small_cases
from mlx_marlin.weights.experts import ExpertBank

SWIGLU = Problem.swiglu(
    2048,
    768,
    experts=128,
    top_k=8,
    bits=((2, 3, 2), (3, 3, 4)),
    codebooks=("3inst", "mcg"),
    dtype="float32",
    device="gpu",
)
MLP = Problem.mlp(
    2688,  # Nemotron 3 Nano
    1856,
    experts=128,
    top_k=6,
    bits=((2, 3), (3, 4)),
    codebooks=("3inst", "mcg"),
    dtype="float32",
    device="gpu",
)
# One projection of experts; rows are slots.
GATHERED = Problem.linear(1024, 768, rows=8, experts=64, bits=(2, 3), codebooks=("mcg", "mul1"), device="gpu")
LINEAR = Problem.linear(1024, 1024, rows=4, bits=3, dtype="float32", device="gpu")


def right(problem, config, case):
    """A correct executor: the CPU's kernels."""
    case, missing = small_cases.in_range(problem, case)
    x = mx.array(case["x"]).astype(getattr(mx, problem.dtype))
    if problem.kind == "linear":
        y = selftest.gathered(replace(problem, device="cpu", accuracy="float32"), None, case, x)
    else:
        scores = None if case["scores"] is None else mx.array(case["scores"])
        bank = ExpertBank(*case["weights"]) if problem.kind == "swiglu" else ExpertBank(None, *case["weights"])
        op = ops.trellis_swiglu if problem.kind == "swiglu" else ops.trellis_mlp
        indices = mx.array(case["indices"])
        y = op(x, indices, bank, scores=scores, activation=problem.activation, stream=mx.cpu)
    found = np.array(y.astype(mx.float32))
    found[missing] = np.nan
    return found


class Planted:
    """Wrong for some configs, right for the others; counts its runs."""

    def __init__(self, is_wrong, spoil):
        self.is_wrong, self.spoil, self.runs = is_wrong, spoil, 0

    def __call__(self, problem, config, case):
        self.runs += 1
        y = right(problem, config, case)
        return self.spoil(y) if self.is_wrong(config) else y


def one_column(y):
    y[..., 5] += np.abs(y).max()
    return y


def last_row_of_nan(y):
    y[-1] = np.nan
    return y


def halved(y):
    return y * 0.5


# What csrc/metal/encode.cpp raises.
BUILD_ERROR = "[mlx_marlin] the Metal kernel trellis_gate_up could not be built: a.metal:7:3: error: no such type\n" + (
    "  foo x;\n  ^"
)


def not_compiled(y):
    raise RuntimeError(BUILD_ERROR)


def not_run(y):
    raise RuntimeError("[METAL] out of memory")


def self_test(tmp_path, execute):
    return selftest.SelfTest("cpu", execute, tmp_path / "verdicts.json")
