"""What the Metal kernels' inner loops cost, counted in the compiled code."""

from dataclasses import replace

import pytest

from mlx_marlin import codec, kernels
from mlx_marlin.kernels import KernelConfig, Problem, make_name, metal
from tests import metal_sim
from tests.support.metal_counts import count

pytestmark = pytest.mark.skipif(bool(metal_sim.unavailable()), reason=str(metal_sim.unavailable()))

FORMATS = [(bits, codebook) for bits in range(1, codec.MAX_BITS + 1) for codebook in codec.CODEBOOKS]
QUICK = [(3, "mcg"), (4, "3inst"), (3, "mul1"), (6, "mul1")]

# Integer multiplies, shifts and bit-extracts per decoded weight, even and odd K: one multiply per weight (mul1 another
# shift), and for odd K the move of half the lanes' bits by 8.
COMPLEX_LIMIT = {"3inst": (1.25, 2.0), "mcg": (1.25, 2.0), "mul1": (2.25, 3.0)}

# With 96 an M1 still runs 512 threads, with 128, its most, 384 (philipturner/metal-benchmarks). The estimate keeps the
# IR's order of instructions; a compiler that orders them for registers does better.
SLACK = 16


def most_registers(threads: int) -> int:
    return 128 if threads <= 384 else 96


def layer(rows: int, bits: int, codebook: str) -> Problem:
    return Problem.swiglu(
        512, 256, rows=rows, experts=2, top_k=2, bits=bits, codebooks=codebook, device="gpu", combine=True
    )


@pytest.mark.parametrize(
    "bits, codebook",
    [pytest.param(*f, marks=() if f in QUICK else pytest.mark.slow) for f in FORMATS],
)
def test_operations_on_the_multiplier_pipe(bits, codebook):
    products = [(d, result) for d, result in count(layer(1, bits, codebook)) if result.inner_loop.weights]
    assert len(products) == 2
    for dispatch, result in products:
        assert result.operations.weights == result.inner_loop.weights, "every weight is decoded in the inner loop, once"
        counted = result.inner_loop.complex / result.inner_loop.weights
        limit = COMPLEX_LIMIT[codebook][bits % 2]
        assert counted <= limit, f"{dispatch['kernel']}: {counted:.3f} per weight, allowed are {limit}"
        counts = result.inner_loop.counts
        assert counts["variable_shift"] == counts["wide_variable_shift"] == 0
        assert counts["store"] == 0, "sums stay in registers"


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
    "widths, decoders", [(((3, 3, 3),), (1, 1)), (((6, 2, 3),), (2, 1)), (((2, 3, 4), (4, 3, 2)), (3, 2))]
)
def test_only_the_decoders_of_the_widths_are_compiled(widths, decoders):
    """A specialised triple has exactly the decoders of its widths; gate and up share theirs."""
    one = KernelConfig("moe_trellis_swiglu_decode", 1, 32, 4, True, "decode")
    problem = replace(layer(1, 3, "mcg"), bits=widths)
    found = [result.decoders for _, result in count(problem, one) if result.inner_loop.weights]
    assert tuple(found) == decoders
