"""What the Metal kernels' inner loops cost, counted in the compiled code."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from mlx_marlin import codec, kernels
from mlx_marlin.kernels import KernelConfig, Problem, make_name, metal
from tests import metal_sim
from tests.support import cases
from tests.support.metal_counts import count, library, viterbi

pytestmark = pytest.mark.skipif(bool(metal_sim.unavailable()), reason=str(metal_sim.unavailable()))

QUICK = [(3, "mcg"), (4, "3inst"), (3, "mul1"), (6, "mul1"), (2.5, "mul1"), (3.5, "mul1")]


def complex_limit(bits: float, codebook: str) -> float:
    """Integer multiplies, shifts and bit-extracts per decoded weight.

    One multiply per weight, for mul1 another; for odd K half the lanes' bits move by 8, and at half rates those of
    three lanes in four by 4, 8 or 12.
    """
    even, odd, half = 1 / 4, 3 / 4, 1 / 2
    moves = half if codec.is_half_rate(bits) else odd if bits % 2 else even
    return (2 if codebook == "mul1" else 1) + moves


# With 96 an M1 still runs 512 threads, with 128, its most, 384 (philipturner/metal-benchmarks). The estimate keeps the
# IR's order of instructions; a compiler that orders them for registers does better.
SLACK = 16


def most_registers(threads: int) -> int:
    return 128 if threads <= 384 else 96


def layer(rows: int, bits: float, codebook: str) -> Problem:
    return Problem.swiglu(
        512, 256, rows=rows, experts=2, top_k=2, bits=bits, codebooks=codebook, device="gpu", combine=True
    )


@pytest.mark.parametrize(
    "bits, codebook",
    [pytest.param(*f, marks=() if f in QUICK else pytest.mark.slow) for f in cases.FORMATS],
)
def test_operations_on_the_multiplier_pipe(bits, codebook):
    products = [(d, result) for d, result in count(layer(1, bits, codebook)) if result.inner_loop.weights]
    assert len(products) == 2
    for dispatch, result in products:
        assert result.operations.weights == result.inner_loop.weights, "every weight is decoded in the inner loop, once"
        counted = result.inner_loop.complex / result.inner_loop.weights
        limit = complex_limit(bits, codebook)
        assert counted <= limit, f"{dispatch['kernel']}: {counted:.3f} per weight, allowed are {limit}"
        counts = result.inner_loop.counts
        assert counts["variable_shift"] == counts["wide_variable_shift"] == 0
        assert counts["store"] == 0, "sums stay in registers"
        # One branch per pass of the loop, which decodes eight weights of two tiles or four.
        assert counts["branch"] / result.inner_loop.weights <= 1 / 16, "no load depends on a condition"


@pytest.mark.parametrize("rows", [1, 4, 48])
def test_nothing_is_decoded_of_an_expert_that_is_not_here(rows):
    """As where other ranks have some of the experts: their slots have the index of the number of experts."""
    problem = replace(layer(rows, 3, "mul1"), combine=False)
    both, one = (
        sum(result.operations.weights for _, result in count(problem, routing=np.tile(experts, rows)))
        for experts in ([0, 1], [0, problem.experts])
    )
    assert one == both / 2 > 0


@pytest.mark.parametrize("bits, codebook", [(2, "mcg"), (2.5, "mul1"), (3, "mul1"), (4, "mcg")])
@pytest.mark.parametrize("rows", [1, 4])
def test_no_pointer_moves_in_the_inner_loop(rows, bits, codebook):
    """Loads take an offset of 32 bits; a pointer that moves is an addition of 64 bits for each."""
    for dispatch, result in count(layer(rows, bits, codebook)):
        if result.inner_loop.weights:
            compiled = library(dispatch["kernel"], tuple(dispatch["constants"].items()))
            blocks = [compiled.module.blocks[b] for b in compiled.hottest_loop(result.blocks)]
            phis = [i for b in blocks for i in b.instructions if i.op == "phi"]
            assert phis and not [i for i in phis if i.rest.lstrip().startswith("ptr")]


@pytest.mark.slow
@pytest.mark.parametrize("fp32_acc", [True, False])
@pytest.mark.parametrize("tiles", [(v, *t) for v in kernels.VARIANTS for t in metal.legal_tiles(v)], ids=str)
def test_registers(tiles, fp32_acc):
    variant, *sizes = tiles
    config = KernelConfig(make_name(variant), *sizes, fp32_acc, variant)
    problem = layer(17, 3, "mcg")
    if kernels.feasible(problem, config) is not None:
        pytest.skip("not feasible for these sizes")
    for dispatch, result in count(problem, config):
        # 64 rows need what only M3 and later give to 512 threads; FIRST_RUN_ON_A_MAC.md asks for it on M1, M2.
        limit = 128 if variant == "large_batch" else most_registers(dispatch["threads"][0])
        limit += SLACK
        assert result.loop_registers <= limit, f"{dispatch['kernel']}: {result.loop_registers} registers"


@pytest.mark.parametrize(
    "widths, codebooks, decoders",
    [
        (((3, 3, 3),), ("mcg",), (1, 1)),
        (((6, 2, 3),), ("mcg",), (2, 1)),
        (((2, 3, 4), (4, 3, 2)), ("mcg",), (3, 2)),
        (((2.5, 2.5, 3.5),), ("mul1",), (1, 1)),
        (((2.5, 2, 3.5),), ("mcg", "mul1"), (3, 1)),
    ],
)
def test_only_the_decoders_of_the_widths_are_compiled(widths, codebooks, decoders):
    """A specialised triple has exactly the decoders of its widths; gate and up share theirs.

    A half rate has the decoder of one codebook.
    """
    one = KernelConfig("moe_trellis_swiglu_decode", 1, 32, 4, True, "decode")
    problem = replace(layer(1, 3, "mcg"), bits=widths, codebooks=codebooks)
    found = [result.decoders for _, result in count(problem, one) if result.inner_loop.weights]
    assert tuple(found) == decoders


def test_the_searchs_values_stay_halves():
    """They become floats where they are used: converted outside of the loop over steps they would take twice the
    registers, 128 of the 104 that a thread has.
    """
    ((dispatch, _), *_) = viterbi(3, "mul1")
    module = library(dispatch["kernel"], tuple(dispatch["constants"].items())).module
    blocks = [Counter(i.op for i in block.instructions) for block in module.blocks]
    (steps,) = [block for block in blocks if block["fsub"]]
    assert steps["fsub"] == steps["fpext"] == sum(block["fpext"] for block in blocks) == 128
