"""The Metal kernels, run as the Plan says, against the codec and the float64 reference: in the simulator, and on the
GPU of a Mac.

All of the simulator's checks are on: bounds, races, divergence, address spaces, poisoned memory, 32 KB.
"""

from dataclasses import replace
from itertools import combinations, product
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest

from mlx_marlin import _ext, codec, kernels, ops
from mlx_marlin.kernels import KernelConfig, make_name, metal
from mlx_marlin.ops import shaders
from mlx_marlin.weights.experts import ExpertBank, ExpertStack
from mlx_marlin.weights.synthetic import random_weight
from tests import metal_sim
from tests.support import cases, metal_executor, metal_selection, references
from tests.support.metal_backends import BACKENDS, Gpu, require, run
from tests.support.metal_selection import TILES, config, key_of, selection, tile

# Half operands and half sums inside a tile: the rounding of both, through three products.
HALF_TOLERANCE = {"float32": 1.5e-3, "float16": 1.5e-3, "bfloat16": 4e-3}


@pytest.fixture(params=list(BACKENDS))
def backend(request):
    found = BACKENDS[request.param]
    if found.unavailable():
        pytest.skip(found.unavailable())
    return found


@pytest.fixture
def simulator():
    found = BACKENDS["simulated"]
    if found.unavailable():
        pytest.skip(found.unavailable())
    return found


def check(backend, case: cases.Case, config: KernelConfig | None, **options) -> np.ndarray:
    inputs = case.inputs()
    y = run(backend, case, inputs, config, **options)
    error = cases.row_error(y, case.reference(*inputs))
    floats = config is None or config.use_fp32_acc
    limit = case.tolerance if floats else HALF_TOLERANCE[case.dtype]
    assert error <= limit, f"{case} with {config}: a row is {error:.2e} off, allowed are {limit:.1e}"
    return y


def problem_of(case: cases.Case, config: KernelConfig) -> kernels.Problem:
    """The case with the accuracy and on the machine that the config is for."""
    accuracy = "float32" if config.use_fp32_acc else "half"
    return metal_executor.allowing(replace(case.problem("gpu"), accuracy=accuracy), config)


@pytest.mark.parametrize("bits, codebook", cases.FORMATS)
def test_decode_is_bit_exact(backend, bits, codebook):
    w, inner = cases.every_state(bits, codebook)
    decoded = backend.decode(ops.prepare_weight("test", w))
    np.testing.assert_array_equal(decoded.view(np.uint16), inner.view(np.uint16))


@pytest.mark.parametrize(
    "case, config", [pytest.param(*pair, id=f"{pair[1].kernel_variant}-{pair[0]}") for pair in selection()]
)
def test_selection(backend, case, config):
    assert kernels.feasible(problem_of(case, config), config) is None
    check(backend, case, config)


def test_selection_covers_every_pair_and_every_tile():
    met, tiles = set(), set()
    for case, chosen in selection():
        key = key_of(chosen)
        kernel = "linear" if case.linear else "combined experts" if case.scores else "experts"
        sums = "float" if chosen.use_fp32_acc else "half"
        values = (kernel, *key, sums, case.bits, case.codebook, case.dtype, case.rows)
        met |= set(combinations(zip(metal_selection.AXES, values), 2))
        tiles.add((chosen.kernel_variant, *tile(chosen)))
    wanted = {
        pair
        for (a, left), (b, right) in combinations(metal_selection.AXES.items(), 2)
        for pair in product(product((a,), left), product((b,), right))
        if metal_selection.legal(dict(pair))
    }
    assert wanted <= met
    mixes = {(chosen.kernel_variant, case.mix) for case, chosen in selection() if not case.linear}
    assert mixes == set(product(kernels.VARIANTS, cases.OPTIONS["mix"]))
    assert set(product(TILES, (True, False))) == {(key_of(c), case.gated) for case, c in selection() if not case.linear}
    assert {case.activation for case, _ in selection()} == set(cases.AXES["activation"])
    assert tiles == {(metal_selection.variant_of(key), *tile) for key, listed in TILES.items() for tile in listed}


def test_selection_has_the_stages_that_it_names():
    for case, chosen in selection():
        problem = problem_of(case, chosen)
        if problem.rows == 0:
            continue
        key = key_of(chosen)
        stems = [d["kernel"].split("<")[0] for d in ops.plan(problem, chosen)["dispatches"]]
        assert ("trellis_rotate" in stems) == (key[1] == "separate"), (case, chosen)
        constants = ops.plan(problem, chosen)["dispatches"][-1 if "trellis_combine" not in stems else -2]["constants"]
        assert constants["fused_epilogue"] == (key[2] == "fused"), (case, chosen)


@pytest.mark.parametrize(
    "bits, codebook",
    [
        pytest.param(*f, marks=[] if f[1] == codec.CODEBOOKS[int(f[0]) % 3] or f[0] % 1 else [pytest.mark.slow])
        for f in cases.FORMATS
    ],
)
def test_one_row_by_default(backend, bits, codebook):
    """The config that most calls take, in the quick tests at each width with one of the codebooks."""
    check(backend, cases.Case(bits, codebook, "float16", 1, "blocks", "silu", top_k=2, scores=True), None)


ORDERS = ("forward", "reverse", "random:5")


@pytest.mark.slow
@pytest.mark.parametrize("number, case", list(enumerate(cases.pairwise())), ids=str)
@pytest.mark.parametrize("fp32_acc", [True, False])
@pytest.mark.parametrize("variant", kernels.VARIANTS)
def test_pairwise(backend, number, case, variant, fp32_acc):
    """Each case meets each schedule, with other variants."""
    chosen = kernels.config_for(case.problem("gpu"), make_name(variant))
    order = ORDERS[(number + 2 * kernels.VARIANTS.index(variant) + fp32_acc) % len(ORDERS)]
    options = {"order": order} if backend.name == "simulated" else {}
    check(backend, case, config(variant, *tile(chosen), fp32_acc), **options)


SMALL = cases.Case(2.5, "mul1", "float16", 5, "blocks", "silu", mix="both", top_k=2, scores=True)
# The order of threads changes nothing in how a state is decoded: a quick run schedules kernels of one format, which
# take a tenth of the time to compile, and of all formats in one variant only.
UNIFORM = replace(SMALL, mix="uniform")


@pytest.mark.slow
@pytest.mark.parametrize("fp32_acc", [True, False])
@pytest.mark.parametrize("tiles", [(v, *t) for v in kernels.VARIANTS for t in metal.legal_tiles(v)], ids=str)
def test_every_tile(backend, tiles, fp32_acc):
    chosen = config(*tiles, fp32_acc)
    reason = kernels.feasible(problem_of(SMALL, chosen), chosen)
    if reason is not None:
        pytest.skip(f"not feasible: {reason}")
    check(backend, SMALL, chosen)


SOME_TILES = [
    *(("decode", 1, 128, 16), ("prefill4", 4, 64, 16), ("base", 8, 128, 16)),
    *(("base", 32, 128, 16), ("large_batch", 64, 128, 16)),
]
MIXED_TILES = SOME_TILES[1]  # whose calls have every stage: route, rotate, gate_up, activate, linear, combine


SCHEDULED = [(case, tiles, floats) for case in (UNIFORM, SMALL) for tiles in SOME_TILES for floats in (True, False)]


@pytest.mark.parametrize(
    "case, tiles, fp32_acc",
    [
        pytest.param(*s, marks=[] if s[0] is UNIFORM or s[1:] == (MIXED_TILES, True) else [pytest.mark.slow])
        for s in SCHEDULED
    ],
    ids=str,
)
def test_schedules_give_the_same_bits(simulator, case, tiles, fp32_acc):
    inputs = case.inputs()
    chosen = config(*tiles, fp32_acc)
    first, *others = (run(simulator, case, inputs, chosen, order=order) for order in ORDERS)
    for other in others:
        np.testing.assert_array_equal(first, other)


@pytest.mark.parametrize(
    "tiles", [pytest.param(t, marks=[] if t == MIXED_TILES else [pytest.mark.slow]) for t in SOME_TILES], ids=str
)
def test_what_a_mac_compiles_gives_the_same_bits(simulator, monkeypatch, tiles):
    """The text that the host hands to Metal: macros, a file with its includes in it, and the instance of a template."""
    inputs, chosen, files = SMALL.inputs(), config(*tiles), shaders.sources(ops.SHADERS)
    expected = run(simulator, SMALL, inputs, chosen)

    def library(kernel, constants, directory):
        name, text = _ext.kernel_library(kernel, dict(constants), files[metal_executor.stem(kernel)])
        given = metal_executor.compile_options(kernel, constants)["function_constants"]
        compiled = metal_sim.compile(text, function_constants=given, kernels=[name])
        return SimpleNamespace(run=lambda kernel, *arguments, **options: compiled.run(name, *arguments, **options))

    monkeypatch.setattr(metal_executor, "library", library)
    np.testing.assert_array_equal(run(simulator, SMALL, inputs, chosen), expected)


@pytest.mark.parametrize("tiles", SOME_TILES[:4], ids=str)
def test_repeated_runs_give_the_same_bits(backend, tiles):
    case = SMALL if tiles == MIXED_TILES else UNIFORM
    inputs = case.inputs()
    first, *others = (run(backend, case, inputs, config(*tiles)) for _ in range(3))
    for other in others:
        np.testing.assert_array_equal(first, other)


INDEXED = [
    *(("decode", 1, 128, 16), ("decode", 1, 64, 8), ("decode", 2, 32, 4)),
    *(("prefill4", 4, 128, 16), ("base", 8, 64, 8), ("base", 32, 64, 8)),
]


@pytest.mark.parametrize(
    "tiles, scores",
    [
        pytest.param(tiles, scores, marks=[] if scores == (i % 2 == 0) else [pytest.mark.slow])
        for i, tiles in enumerate(INDEXED)
        for scores in (False, True)
    ],
    ids=str,
)
def test_index_out_of_range_makes_its_slot_nan(backend, tiles, scores):
    case = cases.Case(2, "mul1", "float32", 3, "block", "silu", top_k=2, scores=scores)
    x, indices, weights = case.inputs()
    legal = run(backend, case, (x, indices, weights), config(*tiles))
    wrong = np.array(indices)
    wrong[1, 0] = cases.EXPERTS
    wrong[2, 1] = 0xFFFFFFFF
    y = run(backend, case, (x, mx.array(wrong), weights), config(*tiles))
    hit = (wrong >= cases.EXPERTS).any(axis=1) if scores else wrong >= cases.EXPERTS
    assert np.isnan(y[hit]).all()
    np.testing.assert_array_equal(y[~hit], legal[~hit])


@pytest.mark.parametrize("tiles", [("decode", 1, 128, 16), ("decode", 1, 32, 4), ("base", 8, 128, 8)], ids=str)
def test_scores_are_added_in_slot_order(backend, tiles):
    case = cases.Case(4, "mcg", "float32", 3, "block", "silu", top_k=5, scores=True)
    x, indices, scores = case.inputs()
    slots = run(backend, case, (x, indices, None), config(*tiles))
    # Powers of two: products are exact, so that the order of the additions is all that rounds.
    powers = np.exp2(np.random.default_rng(0).integers(-3, 4, indices.shape)).astype(np.float32)
    y = run(backend, case, (x, indices, mx.array(powers)), config(*tiles))

    def added(order):
        total = np.zeros_like(y)
        for slot in order:
            total += powers[:, slot, None] * slots[:, slot]
        return total

    np.testing.assert_array_equal(y, added(range(5)))
    assert not np.array_equal(y, added(reversed(range(5)))), "the order must matter for these numbers"


@pytest.mark.parametrize("variant", kernels.VARIANTS)
@pytest.mark.parametrize("activation", ["none", "silu", "mlp_relu_squared"])
def test_no_rows(backend, variant, activation):
    case = cases.Case(3, "mcg", "float16", 0, "block", activation)
    assert run(backend, case, case.inputs(), kernels.config_for(case.problem("gpu"), make_name(variant))).size == 0


@pytest.mark.parametrize("tiles", SOME_TILES[:4], ids=str)
def test_gathered_linear(backend, tiles):
    rng = np.random.default_rng(0)
    bank = cases.Case(3, "mcg", "float32", 5, "blocks", "silu", mix="both").experts()["gate"]
    stack = ops.prepare(ExpertStack.of("gate", bank))
    x = cases.random_rows(rng, 5, stack.source.in_features)
    indices = rng.integers(0, len(bank), (5, 2))
    require(backend, config(*tiles))
    y = backend.linear(x, stack, config(*tiles), indices, x_divisor=2)
    expected = np.stack(
        [references.reference_linear(np.array(x)[[r // 2]], bank[e])[0] for r, e in enumerate(indices.flat)]
    )
    assert cases.row_error(y, expected) <= cases.TOLERANCE["float32"]


def transposed(rows, bank, indices) -> np.ndarray:
    """float64 ``[rows, in]``: each row times its expert's W^T."""
    rows = np.array(rows).astype(np.float64)
    return np.stack(
        [row @ codec.dequantize(bank[e]).astype(np.float64).T for row, e in zip(rows, indices, strict=True)]
    )


@pytest.mark.parametrize("bits, codebook", [(2, "mcg"), (5, "mcg"), (1.5, "mul1"), (3.5, "mul1")])
@pytest.mark.parametrize("dims", ["padded", "narrow"])
@pytest.mark.parametrize("gathered", [False, True])
def test_transposed_linear(backend, bits, codebook, dims, gathered):
    """What the gradient with respect to x needs."""
    rng = np.random.default_rng(codec.half_bits(bits))
    case = cases.Case(bits, codebook, "float32", 6, dims, "silu", mix="both" if gathered else "uniform")
    bank = case.experts()["up"] if gathered else case.experts()["up"][:1]
    stack = ops.prepare(ExpertStack.of("up", bank))
    cotangent = cases.random_rows(rng, 6, stack.source.out_features)
    indices = rng.integers(0, len(bank), 6)
    y = backend.linear(cotangent, stack, None, indices if gathered else None, transposed=True)
    assert cases.row_error(y, transposed(cotangent, bank, indices)) <= cases.TOLERANCE["float32"]


@pytest.mark.parametrize("out", [128, pytest.param(5120, marks=pytest.mark.slow)], ids=["local", "rotated apart"])
def test_transposed_linear_of_more_experts_than_can_be_sorted(backend, out):
    rng = np.random.default_rng(0)
    bank = [random_weight(rng, 128, out, 1) for _ in range(3)] * 800
    stack = ops.prepare(ExpertStack.of("up", bank))
    cotangent = cases.random_rows(rng, 3, out)
    indices = np.array([2399, 0, 1234])
    y = backend.linear(cotangent, stack, None, indices, transposed=True)
    assert cases.row_error(y, transposed(cotangent, bank, indices)) <= cases.TOLERANCE["float32"]


def test_the_calls_of_the_gpu_backend_fit_the_extension(monkeypatch):
    """Without a GPU nothing else runs them; here on the CPU, with its configs."""
    if Gpu.unavailable():
        monkeypatch.setattr(mx, "gpu", mx.cpu)
    case = cases.Case(3, "mcg", "float32", 5, "blocks", "silu", mix="both", top_k=2, scores=True)
    assert cases.row_error(run(Gpu, case, case.inputs()), case.reference(*case.inputs())) <= case.tolerance
    bank = case.experts()["gate"]
    stack = ops.prepare(ExpertStack.of("gate", bank))
    x, indices, _ = case.inputs()
    y = Gpu.linear(x, stack, None, np.array(indices), x_divisor=2)
    pairs = list(enumerate(np.array(indices).flat))
    expected = np.stack([references.reference_linear(np.array(x)[[r // 2]], bank[e])[0] for r, e in pairs])
    assert cases.row_error(y, expected) <= case.tolerance
    back = Gpu.linear(mx.array(y), stack, None, np.array(indices).reshape(-1), transposed=True)
    assert cases.row_error(back, transposed(y, bank, [e for _, e in pairs])) <= case.tolerance
    np.testing.assert_array_equal(Gpu.decode(stack, 1).view(np.uint16), codec.inner(bank[1]).view(np.uint16))


@pytest.mark.parametrize("fp32_acc", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_one_row_of_a_wide_layer(backend, fp32_acc):
    """Two rotated copies are too many for a threadgroup: a decode product that reads them from memory."""
    rng = np.random.default_rng(0)
    hidden = 4096 if fp32_acc else 8192
    experts = cases.random_experts(rng, hidden, 128, cases.expert_formats(3, "mcg", "uniform", 2))
    x = cases.random_rows(rng, 1, hidden, "float16")
    indices, scores = mx.array([[1, 0]], mx.uint32), mx.array([[0.25, 0.75]])
    chosen = config("decode", 1, 128, 16, fp32_acc)
    bank = ExpertBank(**experts)
    problem = ops.experts_problem(bank.stacks, 1, 2, "silu", x.dtype, "gpu", True)
    assert [d["kernel"].split("<")[0] for d in ops.plan(problem, chosen)["dispatches"]][0] == "trellis_rotate"
    y = backend.experts(x, indices, bank, scores=scores, config=chosen)
    expected = references.reference_experts(
        np.array(x.astype(mx.float32)).astype(np.float64), np.array(indices), experts, np.array(scores)
    )
    assert cases.row_error(y, expected) <= (cases.TOLERANCE["float16"] if fp32_acc else HALF_TOLERANCE["float16"])


@pytest.mark.parametrize("fp32_acc", [True, False])
@pytest.mark.parametrize("scale", [1e-30, 1e30])
@pytest.mark.parametrize(
    "tiles", [("decode", 1, 128, 16), ("prefill4", 4, 64, 16), ("base", 16, 128, 16), ("base", 32, 64, 8)], ids=str
)
def test_magnitudes_that_half_cannot_hold(backend, tiles, scale, fp32_acc):
    case = cases.Case(4, "mul1", "float32", 3, "blocks", "none")
    x, *_ = case.inputs()
    y = run(backend, case, (x * scale, None, None), config(*tiles, fp32_acc))
    limit = case.tolerance if fp32_acc else HALF_TOLERANCE["float32"]
    assert cases.row_error(y / np.float32(scale), case.reference(x)) <= limit


@pytest.mark.parametrize("fp32_acc", [True, False])
@pytest.mark.parametrize("tiles", [("decode", 1, 32, 8), ("base", 8, 128, 16), ("base", 32, 128, 8)], ids=str)
def test_a_row_that_is_not_finite_stays_alone(backend, tiles, fp32_acc):
    case = cases.Case(3, "mcg", "float32", 5, "blocks", "silu", top_k=2, scores=True)
    x, indices, scores = case.inputs()
    chosen = config(*tiles, fp32_acc)
    clean = run(backend, case, (x, indices, scores), chosen)
    for value in (np.nan, np.inf):
        spoiled = np.array(x)
        spoiled[2, 7] = value
        y = run(backend, case, (mx.array(spoiled), indices, scores), chosen)
        assert not np.isfinite(y[2]).any()
        others = [0, 1, 3, 4]
        np.testing.assert_array_equal(y[others], clean[others])


@pytest.mark.parametrize("tiles", SOME_TILES[:4], ids=str)
def test_offsets_beyond_32_bits(simulator, tiles, tmp_path):
    """An expert's codes 2^32 words into the stack, in a sparse file: 32 bits would lead to the zeros at its start."""
    w = cases.Case(3, "mcg", "float32", 3, "block", "none").weight()
    stack = ops.prepare_weight("test", w)
    words = np.array(stack.arrays[0])
    far = np.memmap(tmp_path / "codes", np.uint32, "w+", shape=(1 << 32) + words.size)
    far[1 << 32 :] = words
    x = cases.random_rows(np.random.default_rng(0), 3, w.in_features)
    y = simulator.linear(
        x, stack, config(*tiles), np.zeros(3, np.uint32), codes=far, offsets=np.array([1 << 32], np.int64)
    )
    assert cases.row_error(y, references.reference_linear(np.array(x), w)) <= cases.TOLERANCE["float32"]


@pytest.mark.slow
def test_more_than_32768_rows(backend):
    case = cases.Case(2, "mcg", "float16", 32768 + 77, "block", "none")
    check(backend, case, kernels.config_for(case.problem("gpu"), make_name("large_batch")))


@pytest.mark.slow
def test_more_than_32768_slots(backend):
    case = cases.Case(2, "mcg", "float16", 8192 + 77, "block", "silu", top_k=5, scores=True)
    check(backend, case, kernels.config_for(case.problem("gpu"), make_name("large_batch")))
