"""The kernels, the encoder's search, the plan and the pool under the address, undefined and thread sanitizers.

Standalone programs, without Python and MLX. Arrays have exactly the sizes that the package hands over.
"""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from mlx_marlin import _ext, codec, kernels, ops
from mlx_marlin.kernels import DTYPES
from tests.cross.test_neon import FORMATS, KINDS, SHAPES, Cases, add_attention, projections
from tests.metal import test_plan
from tests.sanitize import build
from tests.support import attention, metal_executor
from tests.support.cases import random_experts, random_rows, random_weight

pytestmark = pytest.mark.slow

SETS = [
    pytest.param(
        name, marks=[] if name in _ext.instruction_sets() else pytest.mark.skip(reason="this machine lacks it")
    )
    for name in _ext.compiled_instruction_sets()
]
# Those that the search has code of its own for.
SEARCH_SETS = [s for s in _ext.instruction_sets() if s in ("baseline", "avx2", "avx512", "neon")]


def need(sanitizer: str) -> None:
    if reason := build.unavailable(sanitizer):
        pytest.skip(reason)


@pytest.fixture(scope="module")
def kernels_program():
    need("address")
    sources = dict.fromkeys([*build.KERNELS, "tests/cross/kernels_driver.cpp"], [])
    return build.program("kernels", "address", sources, build.tier_flags())


# One is enough for what threads share, and the thread sanitizer's code takes long to compile: the first with vectors.
CONCURRENT_SET = _ext.instruction_sets()[:2][-1]


@pytest.fixture(scope="module", params=list(build.SANITIZERS))
def concurrency_program(request):
    need(request.param)
    drivers = ["tests/sanitize/concurrency_driver.cpp", "tests/sanitize/tiers_left_out.cpp"]
    sources = dict.fromkeys([*build.KERNELS, *drivers], []) | build.search_sources()
    return build.program("concurrency", request.param, sources, {CONCURRENT_SET: build.tier_flags()[CONCURRENT_SET]})


def add_every_format(cases: Cases) -> None:
    """Decoded whole, and multiplied as one row, as few rows and as panels, both ways."""
    rng = np.random.default_rng(0)
    for i, (bits, codebook) in enumerate(FORMATS):
        cases.decode(random_weight(rng, 256, 128, bits, codebook))
        w = random_weight(rng, 192, 320, bits, codebook, bias=i % 2 == 0)
        for j, (rows, panel_rows) in enumerate(SHAPES):
            dtype, transposed = DTYPES[(i + j) % len(DTYPES)], (i + j) % 2 == 1
            cases.product(w, random_rows(rng, rows, (192, 320)[transposed], dtype), dtype, panel_rows, transposed)


def add_edges(cases: Cases) -> None:
    """No rows, odd sizes, rows of several experts and of one, ids that are refused."""
    rng = np.random.default_rng(1)
    odd = [random_weight(rng, 333, 129, *FORMATS[(5 * e) % len(FORMATS)], bias=True) for e in range(4)]
    for dtype in DTYPES:
        cases.product(odd[0], random_rows(rng, 0, 333, dtype), dtype, 4)
        cases.product(odd[1], random_rows(rng, 9, 333, dtype), dtype, 4)
        for transposed in (False, True):
            x = random_rows(rng, 11, (333, 129)[transposed], dtype)
            divisor = 1 if transposed else 3
            cases.product(odd, x, dtype, 4, transposed, rng.integers(0, 4, 11 * divisor).astype(np.uint32), divisor)
    for i, (activation, gated) in enumerate(KINDS):
        formats = [[FORMATS[(7 * e + 5 * p + i) % len(FORMATS)] for p in range(3)] for e in range(4)]
        experts = projections(random_experts(rng, 192, 96, formats, bias=i % 2 == 0), gated)
        for rows, panel_rows, ids in ((0, 4, None), (1, 1, None), (33, 8, None), (33, 64, 3), (7, 4, 0)):
            for combine in (False, True):
                dtype = DTYPES[(rows + i + combine) % len(DTYPES)]
                chosen = rng.permuted(np.tile(np.arange(4), (rows, 1)), axis=1)[:, :2].astype(np.uint32)
                if ids is not None:  # all of them
                    chosen[:] = ids
                scores = rng.dirichlet(np.ones(2), rows).astype(np.float32) if combine else None
                cases.swiglu(experts, random_rows(rng, rows, 192, dtype), chosen, scores, dtype, panel_rows, activation)
        for share in (0.5, 1.0):  # of slots whose expert is not here
            chosen = np.where(rng.random((9, 2)) < share, 4, rng.integers(0, 4, (9, 2))).astype(np.uint32)
            cases.swiglu(experts, random_rows(rng, 9, 192, DTYPES[i % 3]), chosen, None, DTYPES[i % 3], 4, activation)
    for ids in ([], [0, 3, 1], [4], [0, 4, 9, 9, 5], [0xFFFFFFFF, 0]):
        cases.bad_ids(np.array(ids, np.uint32), 4)


@pytest.fixture(scope="module")
def cases():
    made = Cases()
    add_every_format(made)
    add_edges(made)
    add_attention(made)
    return made


@pytest.mark.parametrize("name", SETS)
def test_kernels(kernels_program, cases, name, tmp_path):
    cases.write(tmp_path / "cases")
    build.run(kernels_program, name, tmp_path / "cases", tmp_path / "results")
    cases.check((tmp_path / "results").read_bytes())


@pytest.fixture(scope="module")
def search_program():
    need("address")
    pool = ("instruction_set", "pool")
    sources = {f"csrc/cpu/{name}.cpp": [] for name in pool} | build.search_sources()
    return build.program("search", "address", sources | {"tests/cross/viterbi_driver.cpp": []})


@pytest.mark.parametrize("bits", codec.WIDTHS)
@pytest.mark.parametrize("name", SEARCH_SETS)
def test_search(search_program, name, bits, tmp_path):
    """A number of tiles that fills no batch."""
    tiles = np.random.default_rng(codec.half_bits(bits)).standard_normal((1, codec.TILE_SIZE)).astype(np.float16)
    files = [tmp_path / part for part in ("values", "tiles", "states")]
    codec.codebook_values("mul1").astype(np.float32).tofile(files[0])
    tiles.astype(np.float32).tofile(files[1])
    build.run(search_program, name, codec.half_bits(bits), *files)
    found = np.fromfile(files[2], np.uint16).reshape(tiles.shape)
    np.testing.assert_array_equal(found, ops.viterbi_search(tiles, bits, "mul1"))


def native(config) -> list[int]:
    variant = kernels.VARIANTS.index(config.kernel_variant)
    return [variant, config.tile_size_m, config.tile_size_n, config.simdgroups, int(config.use_fp32_acc)]


def stack_numbers(k: int, n: int, problem, widths) -> list[int]:
    """As `StackInfo` has them: a bit for each width, in half bits, and for each codebook."""
    books = sum(1 << codec.CODEBOOKS.index(c) for c in problem.codebooks)
    return [problem.experts, k, n, int(problem.bias), sum(1 << round(2 * b) for b in set(widths)), books]


def call_numbers(problem, config) -> list[int]:
    k, n = test_plan.padded(problem.hidden), test_plan.padded(problem.intermediate)
    dtype = DTYPES.index(problem.dtype)
    widths = list(zip(*problem.bits))
    if problem.kind == "linear":
        sizes = [problem.hidden, problem.intermediate, 1, 0, 0]
        return [0, problem.rows, dtype, *sizes, *stack_numbers(k, n, problem, widths[0]), *native(config)]
    *reading, down = widths
    stacks = [*(stack_numbers(k, n, problem, w) for w in reading), stack_numbers(n, k, problem, down)]
    gated = problem.side_by_side == 2
    head = [problem.rows, problem.top_k, dtype, problem.hidden, 0, int(problem.combine), int(gated)]
    return [1, *head, *(number for stack in stacks for number in stack), *native(config)]


def test_plan_of_every_config(tmp_path):
    """Those that are refused among them; what the extension plans is the expected result."""
    need("address")
    program = build.program("plan", "address", dict.fromkeys([*build.PLAN, "tests/sanitize/plan_driver.cpp"], []))
    calls, expected = [], []
    for problem in test_plan.PROBLEMS:
        for floats in (True, False):
            # Which accuracy asks for which sums is no question to the plan.
            problem = replace(problem, accuracy="float32" if floats else "half")
            for tiles in test_plan.ALL_TILES:
                config = test_plan.config(*tiles, floats)
                calls.append(call_numbers(problem, config))
                # A plan is the same whether or not the machine has what it is for.
                allowed = metal_executor.allowing(problem, config)
                if kernels.feasible(allowed, config) is None:
                    plan = ops.plan(allowed, config)
                    expected.append(f"{len(plan['dispatches'])} {sum(plan['scratch'].values())}")
                else:
                    expected.append(None)
    info = stack_numbers(256, 384, test_plan.PROBLEMS[0], (3, 5))
    calls += [[2, 0, *info], [0, -1, 0, 128, 128, 1, 0, 0, *info, *native(test_plan.config(*test_plan.ALL_TILES[0]))]]
    expected += ["1 0", None]
    for half_bits in range(18):
        for count in (0, 1, 5000):
            calls.append([3, count, half_bits, 2])
            if half_bits in map(codec.half_bits, codec.WIDTHS):
                plan = _ext.plan_viterbi(count, half_bits, 2)
                expected.append(f"{len(plan['dispatches'])} {sum(plan['scratch'].values())}")
            else:
                expected.append(None)
    (tmp_path / "calls").write_text("\n".join(" ".join(map(str, call)) for call in calls))
    lines = build.run(program, tmp_path / "calls").splitlines()
    assert len(lines) == len(expected) > 1000
    for call, line, wanted in zip(calls, lines, expected):
        if wanted is None:
            assert not line[0].isdigit(), (call, line)
        else:
            assert line == wanted, call


@pytest.fixture(scope="module")
def few_cases(tmp_path_factory):
    """Small products and experts of several tasks: what the callers of the pool take turns at."""
    cases, rng = Cases(), np.random.default_rng(2)
    w = random_weight(rng, 256, 384, 3, "mcg")
    cases.decode(w)
    for rows in (1, 5):
        cases.product(w, mx.ones((rows, 256)), "float32", 4)
    experts = random_experts(rng, 128, 256, [[(2, "mul1"), (3, "mcg"), (4, "3inst")]] * 3)
    ids = np.array([[0, 1], [2, 0], [1, 2]], np.uint32)
    scores = np.full((3, 2), 0.5, np.float32)
    for given in (None, scores):
        cases.swiglu(experts, mx.ones((3, 128)), ids, given, "float16", 4, "silu")
    cases.attention(attention.SHAPES[3], "float32", "causal", True)
    path = tmp_path_factory.mktemp("few") / "cases"
    cases.write(path)
    return path


@pytest.mark.parametrize("mode", ["resize", "fork", "exit"])
def test_concurrent_callers(concurrency_program, few_cases, mode):
    assert "every result is that of one thread" in build.run(concurrency_program, CONCURRENT_SET, few_cases, mode)


@pytest.mark.parametrize(
    "sanitizer, fault, report",
    [
        ("address", "heap", "heap-buffer-overflow"),
        ("address", "undefined", "runtime error: shift exponent"),
        ("thread", "race", "data race"),
    ],
)
def test_planted_faults_are_reported(sanitizer, fault, report):
    need(sanitizer)
    program = build.program("planted", sanitizer, {"tests/sanitize/planted.cpp": []})
    with pytest.raises(AssertionError, match=report):
        build.run(program, fault)


def test_flags_are_found_for_every_instruction_set():
    assert list(build.tier_flags()) == _ext.compiled_instruction_sets()
    assert all(flags for flags in build.tier_flags().values())
