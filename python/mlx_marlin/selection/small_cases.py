"""What the self-test runs: small problems that run the kernels that a config runs, and every loop of them."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import replace
from itertools import product

import mlx.core as mx
import numpy as np

from .. import codec, kernels, ops
from ..kernels import KernelConfig, Problem, metal
from ..ops import reference
from ..weights import synthetic

__all__ = [
    "NoSmallCase",
    "code",
    "decoded_case",
    "embedding_case",
    "expected",
    "in_range",
    "make_case",
    "routing_problems",
    "small_problem",
    "transposed_case",
    "transposed_problems",
]

# Sizes of the small cases. 128 is one Hadamard block; 384 and 640 are no multiple of 16 ranges of k; up to 2048 narrow
# tiles become legal; from 3072 on a product no longer makes its own input, with half operands from 10240 on. Rows are
# rotated by 1 to 8 simdgroups: by 7 at 896, 1664, 2688 and 5376.
_SIZES = (128, 256, 384, 512, 640, 768, 896, 1024, 1280, 1664, 2048, 2688, 3072, 4096, 5120, 5376, 6144, 8192, 10240)
# Elements of a matrix: what the CPU decodes and multiplies for the expected result in a fraction of a second.
_MOST = 2048 * 2048
_EXPERTS = 3
# route.metal has 512 threads: with 127 experts four of them scan for each, with 1100 each has several experts. As many
# slots, most of one expert, so that there are more slots and more unused row tiles than threads. A quarter of them is
# one less than a multiple of the eight that a thread looks at together.
_ROUTED_EXPERTS = (127, 1100)
_ROUTED_SLOTS = 4 * 279 - 2
# As many of them have an index out of range, where a row has one slot: a whole row tile.
_OUTSIDE = max(rows for variant in metal.TILE_ROWS.values() for rows in variant)
# MarlinProductArgs in kernels/args.h.
_PRODUCT_ARGS = struct.Struct("<13I2f")


class NoSmallCase(Exception):
    """No small problem runs the kernels that a config runs."""


def code(plan: dict) -> list:
    """What a plan compiles: each kernel with its constants, once; rows in several passes run the same again."""
    return list(dict.fromkeys((d["kernel"], tuple(sorted(d["constants"].items()))) for d in plan["dispatches"]))


def _loops(plan: dict) -> frozenset[str]:
    """What sizes decide about the loops of a plan's products: which ones go round, and which end early."""
    found = set()
    for dispatch in plan["dispatches"]:
        stem = dispatch["kernel"].split("<")[0]
        if stem not in ("trellis_gate_up", "trellis_linear"):
            continue
        k, n, *_, column_tiles, splits, _, tiles, longer, _, _, _ = _PRODUCT_ARGS.unpack(dispatch["args"])
        constants, columns = dispatch["constants"], codec.TILE * column_tiles
        rows = int(dispatch["kernel"].split("<")[1].split(",")[0])
        blocks = k // codec.HADAMARD_SIZE
        per_block = codec.HADAMARD_SIZE // codec.TILE
        starts = [s * tiles + min(s, longer) for s in range(splits + 1)]
        ranges = list(zip(starts, starts[1:]))
        scaled = constants["half_operands"] or constants["accelerator"]
        reached = {
            "several groups of columns": n > columns,
            "a narrow last group": n % columns > 0,
            "unequal ranges of k": longer > 0,
            "several steps in a range": tiles > 1,
            "several blocks of scales": scaled and any(a // per_block < (b - 1) // per_block for a, b in ranges),
            "one step of a block": scaled and any(a < b - 1 and b % per_block == 1 for a, b in ranges),
            "several blocks of input": (constants["fused_prologue"] or constants.get("activating_input"))
            and rows * blocks > dispatch["threads"][0] // 32,
        }
        found |= {f"{stem}: {what}" for what, is_so in reached.items() if is_so}
    return frozenset(found)


def _distinct_experts(problem: Problem) -> int:
    """Weights that show every width and every codebook."""
    if problem.kind == "linear" and problem.experts == 1:
        return 1
    return max(len(problem.bits), len(problem.codebooks), _EXPERTS)


def small_problem(problem: Problem, config: KernelConfig) -> Problem:
    """The smallest problem whose plan has the same kernels and constants, and whose loops do all that any such problem
    makes them do. One expert has one row more than a tile.

    Raises:
        NoSmallCase: If none of the sizes has such a plan.
    """
    experts = _distinct_experts(problem)
    top_k, others = min(problem.top_k, experts, 2), experts - 1
    rows = config.tile_size_m + 1
    rows = max(rows, others) if top_k > 1 else rows + others
    same = replace(problem, rows=rows, top_k=top_k, experts=experts)
    wanted = code(ops.plan(replace(problem, rows=rows), config))
    found: list[tuple[Problem, frozenset[str]]] = []
    for hidden, intermediate in sorted(product(_SIZES, _SIZES), key=lambda sizes: (sizes[0] * sizes[1], sizes)):
        if hidden * intermediate > _MOST and found:
            break
        small = replace(same, hidden=hidden, intermediate=intermediate)
        if kernels.feasible(small, config) is None:
            plan = ops.plan(small, config)
            if code(plan) == wanted:
                found.append((small, _loops(plan)))
    if not found:
        raise NoSmallCase(f"no small problem runs the kernels that {config} runs for {problem}")
    return max(found, key=lambda pair: len(pair[1]))[0]


def routing_problems(problem: Problem, config: KernelConfig) -> Iterator[Problem]:
    """Problems whose slots are sorted by loops that all go round several times; none where slots are not sorted."""
    if config.tile_size_m == 1 or (problem.kind == "linear" and problem.experts == 1):
        return
    top_k = min(problem.top_k, 2)
    size = codec.padded(config.tile_size_n)
    for experts in _ROUTED_EXPERTS:
        rows = _ROUTED_SLOTS // top_k
        yield replace(problem, rows=rows, top_k=top_k, hidden=size, intermediate=size, experts=experts)


def make_case(problem: Problem) -> dict:
    """Inputs of a problem: every bit width and every codebook of it occurs. The same for every run."""
    rng = np.random.default_rng(0)
    # The first channel of each Hadamard block is an outlier: it lies evenly over the rotated block, where an error that
    # all weights share then adds up.
    x = rng.standard_normal((problem.rows, problem.hidden)).astype(np.float32)
    first = x[:, :: codec.HADAMARD_SIZE]
    first *= 16
    first += np.copysign(12, first)
    distinct = replace(problem, experts=_distinct_experts(problem))
    weights = [synthetic.random_projection(rng, distinct, part) for part in range(len(problem.shapes))]
    weights = [[part[e % distinct.experts] for e in range(problem.experts)] for part in weights]
    indices = _indices(problem, distinct.experts, rng)
    if problem.kind == "linear":
        return {"x": x, "weights": weights[0], "indices": indices[:, 0]}
    scores = rng.random(indices.shape).astype(np.float32) if problem.combine else None
    return {"x": x, "weights": weights, "indices": indices, "scores": scores}


def _indices(problem: Problem, distinct: int, rng: np.random.Generator) -> np.ndarray:
    """uint32 ``[rows, top_k]``: expert 0 in as many rows as there can be, the others in turn; where slots are sorted
    some are of none.
    """
    experts = problem.experts
    others = sorted({*range(1, distinct), experts // 2, experts - 1} - {0})
    outside = [experts] if experts > distinct else []
    indices = np.zeros((problem.rows, problem.top_k), np.uint32)
    if others and problem.top_k > 1:
        indices[:, 1] = np.resize(others + outside, problem.rows)
        indices = rng.permuted(indices, axis=1)
    elif others:
        found = others + outside * _OUTSIDE
        indices[: len(found), 0] = found
        indices = rng.permuted(indices, axis=0)
    return indices


def transposed_problems() -> list[Problem]:
    """Products whose gradient with respect to x is tested: of one weight, and of experts whose rows are sorted.

    384 columns are no multiple of 16 ranges of k, 256 rows of a weight two groups of columns of its transpose.
    """
    return [
        Problem.linear(256, 384, rows=rows, experts=experts, bits=3, codebooks="mcg", dtype="float32", device="gpu")
        for rows, experts in ((5, 1), (7, 3))
    ]


def transposed_case(problem: Problem) -> dict:
    """A case whose x is the gradient of y, and whose result is that of x."""
    case = make_case(problem)
    turned = make_case(replace(problem, hidden=problem.intermediate))
    return case | {"x": turned["x"], "of": "gradient"}


def decoded_case(bits: float, codebook: str) -> tuple[Problem, dict]:
    """A case whose result is the inner matrix of its weight."""
    problem = Problem.linear(128, 256, bits=bits, codebooks=codebook, dtype="float16", device="gpu")
    return problem, make_case(problem) | {"of": "weight"}


def embedding_case(bits: int) -> tuple[Problem, dict]:
    """A case whose result is rows of a quantized embedding, the last one of an id out of range: more of them than a
    block of 256, and no multiple of the eight that a lane decodes.
    """
    table, features = 5, 777
    trellis, signs = synthetic.random_embedding(np.random.default_rng(0), table, features, bits)
    indices = np.array([4, 0, 3, 3, table], np.uint32)
    problem = Problem.linear(
        codec.HADAMARD_SIZE,
        features,
        rows=len(indices),
        experts=table,
        bits=bits,
        codebooks="mul1",
        dtype="float16",
        device="gpu",
    )
    return problem, {"of": "embedding", "trellis": trellis.view(np.uint16), "signs": signs, "indices": indices}


def in_range(problem: Problem, case: dict) -> tuple[dict, np.ndarray]:
    """The case with its indices in range, as CPU kernels want them, and where the result is NaN since they were not."""
    outside = case["indices"] >= problem.experts
    missing = outside if case.get("scores") is None else outside.any(axis=-1)
    return case | {"indices": np.where(outside, 0, case["indices"])}, missing


def expected(problem: Problem, case: dict) -> np.ndarray:
    """What the case must give, by the codec, in float64; NaN where an index is out of range."""
    if case.get("of") == "weight":
        return codec.inner(case["weights"][0]).astype(np.float64)
    if case.get("of") == "embedding":
        case, missing = in_range(problem, case)
        table = codec.decode_embedding(case["trellis"], case["signs"], problem.intermediate)
        y = table.astype(np.float64)[case["indices"]]
        y[missing] = np.nan
        return y
    if case.get("of") == "gradient":
        dense = [codec.dequantize(w).astype(np.float64) for w in case["weights"]]
        return np.stack([row.astype(np.float64) @ dense[e].T for row, e in zip(case["x"], case["indices"])])
    x = np.array(mx.array(case["x"]).astype(getattr(mx, problem.dtype)).astype(mx.float32)).astype(np.float64)
    case, missing = in_range(problem, case)
    if problem.fused:
        y = reference.experts_output(
            x, case["indices"], case["weights"], case["scores"], problem.activation, 1.702, 7.0
        )
    else:
        y = np.zeros((problem.rows, problem.intermediate))
        for e in np.unique(case["indices"]):
            y[case["indices"] == e] = reference.linear(x[case["indices"] == e], case["weights"][e])
    y[missing] = np.nan
    return y
