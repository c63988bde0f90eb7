"""The Metal kernels, run as the Plan says by the simulator, against the codec and the float64 reference.

All of the simulator's checks are on: bounds, races, divergence, address spaces, poisoned memory, 32 KB.
"""

import cases
import metal_executor as metal
import metal_sim
import mlx.core as mx
import numpy as np
import pytest

from mlx_marlin import codec, kernels, metal_rules, ops
from mlx_marlin.kernels import KernelConfig, make_name
from mlx_marlin.weights import ExpertStack, TrellisWeight

pytestmark = pytest.mark.skipif(bool(metal_sim.unavailable()), reason=str(metal_sim.unavailable()))

FORMATS = [(bits, codebook) for bits in range(1, codec.MAX_BITS + 1) for codebook in codec.CODEBOOKS]

# (tile_size_m, tile_size_n, simdgroups) of each variant: with whole Hadamard blocks, and without.
FUSED = {
    "decode": [(1, 128, 16), (1, 128, 4), (2, 128, 8), (3, 128, 12)],
    "prefill4": [(4, 128, 16), (4, 128, 8)],
    "base": [(8, 128, 8), (16, 128, 16)],
    "large_batch": [(64, 128, 16), (64, 128, 8)],
}
SEPARATE = {
    "decode": [(1, 32, 4), (1, 16, 8), (2, 64, 8), (3, 48, 4), (1, 96, 12)],
    "prefill4": [(4, 64, 16), (4, 16, 4), (4, 96, 8)],
    "base": [(8, 64, 4), (16, 48, 12), (8, 96, 16)],
}


def config(variant: str, rows: int, columns: int, simdgroups: int) -> KernelConfig:
    return KernelConfig(make_name(variant), rows, columns, simdgroups, True, variant)


def run(case: cases.Case, inputs: tuple, config: KernelConfig | None = None, **simulator) -> np.ndarray:
    x, indices, scores = inputs
    if case.linear:
        return metal.linear(x, ops._prepare_weight("test", case.weight()), config, **simulator)
    return metal.swiglu(
        x,
        indices,
        case.bank(),
        scores=scores,
        activation=case.activation,
        alpha=case.alpha,
        limit=case.limit,
        config=config,
        **simulator,
    )


def check(case: cases.Case, config: KernelConfig | None, **simulator) -> np.ndarray:
    inputs = case.inputs()
    y = run(case, inputs, config, **simulator)
    error = cases.row_error(y, case.reference(*inputs))
    assert error <= case.tolerance, f"{case} with {config}: a row is {error:.2e} off, allowed are {case.tolerance:.0e}"
    return y


@pytest.mark.parametrize("bits, codebook", FORMATS)
def test_decode_is_bit_exact(bits, codebook):
    # A million random windows: the seed is one that meets all 65536 states.
    words = np.random.default_rng(1).integers(0, 1 << 16, (64, 64, 16 * bits), np.uint16).view(np.int16)
    w = TrellisWeight(words, np.ones(1024, np.float16), np.ones(1024, np.float16), codebook)
    assert np.unique(codec.unpack(words)).size == 1 << 16
    decoded = metal.decode(ops._prepare_weight("test", w))
    np.testing.assert_array_equal(decoded.view(np.uint16), codec.inner(w).view(np.uint16))


def _selection() -> list:
    """Every pair of (kernel, variant, epilogue, K, codebook, dtype, rows); the rest goes round."""
    axes = {
        "kernel": ("linear", "silu"),
        "variant": kernels.VARIANTS,
        "epilogue": ("fused", "separate"),
        "bits": cases.AXES["bits"],
        "codebook": codec.CODEBOOKS,
        "dtype": kernels.DTYPES,
        "rows": (1, 3, 5, 17, 64),
    }
    others = list(kernels.ACTIVATIONS)
    chosen = []

    def legal(values: dict) -> bool:
        return (values.get("variant"), values.get("epilogue")) != ("large_batch", "separate")

    for i, row in enumerate(cases.covering_array(axes, legal)):
        tiles = (FUSED if row["epilogue"] == "fused" else SEPARATE)[row["variant"]]
        linear = row["kernel"] == "linear"
        dims = list(cases.DIMS)[i % len(cases.DIMS)]
        options = (
            {}
            if linear
            else {
                "mix": ("uniform", "uniform", "both")[i % 3],
                "top_k": (1, 2, 5)[i % 3],
                "scores": i % 2 == 0,
                "routing": "one_expert" if i % 7 == 3 else "random",
            }
        )
        case = cases.Case(
            row["bits"],
            row["codebook"],
            row["dtype"],
            row["rows"],
            dims,
            "none" if linear else others[i % len(others)],
            bias=i % 4 == 1,
            **options,
        )
        chosen.append(pytest.param(case, config(row["variant"], *tiles[i % len(tiles)]), id=f"{row['variant']}-{case}"))
    return chosen


@pytest.mark.parametrize("case, config", _selection())
def test_selection(case, config):
    reason = kernels.feasible(case.problem("gpu"), config)
    if reason is not None:  # narrow dims: the variant's default runs instead
        config = kernels.config_for(case.problem("gpu"), config.kernel_name)
    check(case, config)


@pytest.mark.slow
@pytest.mark.parametrize("case", cases.pairwise(), ids=str)
@pytest.mark.parametrize("variant", kernels.VARIANTS)
def test_pairwise(case, variant):
    check(case, kernels.config_for(case.problem("gpu"), make_name(variant)))


SMALL = cases.Case(3, "mcg", "float16", 5, "blocks", "silu", mix="both", top_k=2, scores=True)


@pytest.mark.slow
@pytest.mark.parametrize("tiles", [(v, *t) for v in kernels.VARIANTS for t in metal_rules.tiles(v)], ids=str)
def test_every_tile(tiles):
    chosen = config(*tiles)
    if kernels.feasible(SMALL.problem("gpu"), chosen) is not None:
        pytest.skip("not feasible for these sizes")
    check(SMALL, chosen)


@pytest.mark.parametrize("tiles", [("decode", 1, 128, 16), ("prefill4", 4, 64, 16), ("base", 8, 128, 16)], ids=str)
def test_schedules_give_the_same_bits(tiles):
    inputs = SMALL.inputs()
    first, *others = (run(SMALL, inputs, config(*tiles), order=order) for order in ("forward", "reverse", "random:5"))
    for other in others:
        np.testing.assert_array_equal(first, other)


@pytest.mark.parametrize("scores", [False, True])
@pytest.mark.parametrize(
    "tiles", [("decode", 1, 128, 16), ("decode", 1, 64, 8), ("prefill4", 4, 128, 16), ("base", 8, 64, 8)], ids=str
)
def test_index_out_of_range_makes_its_slot_nan(tiles, scores):
    case = cases.Case(2, "mul1", "float32", 3, "block", "silu", top_k=2, scores=scores)
    x, indices, weights = case.inputs()
    legal = run(case, (x, indices, weights), config(*tiles))
    wrong = np.array(indices)
    wrong[1, 0] = cases.EXPERTS
    wrong[2, 1] = 0xFFFFFFFF
    y = run(case, (x, mx.array(wrong), weights), config(*tiles))
    hit = (wrong >= cases.EXPERTS).any(axis=1) if scores else wrong >= cases.EXPERTS
    assert np.isnan(y[hit]).all()
    np.testing.assert_array_equal(y[~hit], legal[~hit])


@pytest.mark.parametrize("variant", kernels.VARIANTS)
@pytest.mark.parametrize("activation", ["none", "silu"])
def test_no_rows(variant, activation):
    case = cases.Case(3, "mcg", "float16", 0, "block", activation)
    assert run(case, case.inputs(), kernels.config_for(case.problem("gpu"), make_name(variant))).size == 0


@pytest.mark.parametrize("tiles", [("decode", 1, 128, 16), ("prefill4", 4, 128, 16), ("base", 8, 128, 16)], ids=str)
def test_gathered_linear(tiles):
    rng = np.random.default_rng(0)
    bank = cases.Case(3, "mcg", "float32", 5, "blocks", "silu", mix="both").experts()["gate"]
    stack = ops.prepare(ExpertStack.of("gate", bank))
    x = cases.random_rows(rng, 5, stack.source.in_features)
    indices = rng.integers(0, len(bank), (5, 2))
    y = metal.linear(x, stack, config(*tiles), indices, x_divisor=2)
    expected = np.stack([cases.reference_linear(np.array(x)[[r // 2]], bank[e])[0] for r, e in enumerate(indices.flat)])
    assert cases.row_error(y, expected) <= cases.TOLERANCE["float32"]


@pytest.mark.parametrize("bits", [2, 5])
@pytest.mark.parametrize("dims", ["padded", "narrow"])
@pytest.mark.parametrize("gathered", [False, True])
def test_transposed_linear(bits, dims, gathered):
    """What the gradient with respect to x needs."""
    rng = np.random.default_rng(bits)
    case = cases.Case(bits, "mcg", "float32", 6, dims, "silu", mix="both" if gathered else "uniform")
    bank = case.experts()["up"] if gathered else case.experts()["up"][:1]
    stack = ops.prepare(ExpertStack.of("up", bank))
    cotangent = cases.random_rows(rng, 6, stack.source.out_features)
    indices = rng.integers(0, len(bank), 6)
    y = metal.linear(cotangent, stack, None, indices if gathered else None, transposed=True)
    dense = [codec.dequantize(w).astype(np.float64) for w in bank]
    expected = np.stack([np.array(cotangent)[r].astype(np.float64) @ dense[e].T for r, e in enumerate(indices)])
    assert cases.row_error(y, expected) <= cases.TOLERANCE["float32"]


@pytest.mark.parametrize("scale", [1e-30, 1e30])
@pytest.mark.parametrize("tiles", [("decode", 1, 128, 16), ("prefill4", 4, 64, 16), ("base", 16, 128, 16)], ids=str)
def test_magnitudes_that_half_cannot_hold(tiles, scale):
    case = cases.Case(4, "mul1", "float32", 3, "blocks", "none")
    x, *_ = case.inputs()
    y = run(case, (x * scale, None, None), config(*tiles))
    assert cases.row_error(y / np.float32(scale), case.reference(x)) <= case.tolerance


@pytest.mark.slow
def test_more_than_32768_rows():
    case = cases.Case(2, "mcg", "float16", 32768 + 77, "block", "none")
    check(case, kernels.config_for(case.problem("gpu"), make_name("large_batch")))


@pytest.mark.slow
def test_more_than_32768_slots():
    case = cases.Case(2, "mcg", "float16", 8192 + 77, "block", "silu", top_k=5, scores=True)
    check(case, kernels.config_for(case.problem("gpu"), make_name("large_batch")))
