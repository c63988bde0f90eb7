"""The ops on the CPU against the float64 reference, on every instruction set."""

import functools

import mlx.core as mx
import numpy as np
import pytest

from mlx_marlin import (
    ExpertBank,
    KernelConfig,
    _ext,
    codec,
    kernels,
    plan,
    set_num_threads,
    trellis_decode,
    trellis_linear,
    trellis_swiglu,
)
from tests.support import cases, golden, references
from tests.support.planted import PLANTED, PLANTED_HALF_RATES


@pytest.fixture
def threads():
    """Set the number of workers; the default returns afterwards."""
    yield set_num_threads
    set_num_threads(kernels.cpu_threads())


def run(case: cases.Case, inputs: tuple, config: KernelConfig | str | None = None) -> mx.array:
    return case.run(*inputs, config=config, stream=mx.cpu)


def bits_of(a: mx.array) -> bytes:
    return bytes(memoryview(a.view(mx.uint8)))


@functools.cache
def reference(case: cases.Case) -> np.ndarray:
    """What every instruction set is compared with; it takes longer than the kernels."""
    return case.reference(*case.inputs())


@pytest.mark.parametrize("case", cases.pairwise(), ids=str)
def test_pairwise(case, instruction_set):
    inputs = case.inputs()
    cases.check(case, run(case, inputs), inputs, reference(case))


@pytest.mark.slow
@pytest.mark.parametrize("bits, codebook", cases.FORMATS)
def test_full_product(bits, codebook, instruction_set):
    selected = [c for c in cases.full() if (c.bits, c.codebook) == (bits, codebook)]
    for case in sorted(selected, key=lambda c: (c.dims, c.mix, c.bias)):  # weights are made once per group
        inputs = case.inputs()
        cases.check(case, run(case, inputs), inputs)


@pytest.mark.parametrize("bits, codebook", cases.FORMATS)
def test_decode_is_bit_exact_for_every_state(bits, codebook, instruction_set):
    w, inner = cases.every_state(bits, codebook)
    decoded = np.array(trellis_decode(w))
    assert (decoded.dtype, decoded.shape) == (np.float16, (1024, 1024))
    np.testing.assert_array_equal(decoded.view(np.uint16), inner.view(np.uint16))


@pytest.mark.parametrize("dtype, tolerance", cases.TOLERANCE.items())
@pytest.mark.parametrize("name", golden.names("linear_*"))
def test_linear_vectors(name, dtype, tolerance, instruction_set):
    z = golden.load(name)
    w = golden.weight(z)
    x = mx.array(z["x"]).astype(getattr(mx, dtype))
    expected = z["y64"] if dtype != "bfloat16" else references.reference_linear(np.array(x.astype(mx.float32)), w)
    assert cases.row_error(trellis_linear(x, w), expected) <= tolerance


@pytest.mark.parametrize("dtype, tolerance", cases.TOLERANCE.items())
@pytest.mark.parametrize("name", golden.names("moe_*"))
def test_moe_vectors(name, dtype, tolerance, instruction_set):
    z = golden.load(name)
    experts = golden.experts(z)
    x = mx.array(z["x"]).astype(getattr(mx, dtype))
    expected = (
        z["y64"]
        if dtype != "bfloat16"
        else references.reference_experts(
            np.array(x.astype(mx.float32)).astype(np.float64), z["ids"], experts, z["probs"]
        )
    )
    y = trellis_swiglu(x, z["ids"], ExpertBank(**experts), scores=mx.array(z["probs"]))
    assert cases.row_error(y, expected) <= tolerance


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("name", [*PLANTED, *PLANTED_HALF_RATES])
def test_the_check_rejects_planted_decoders(name, dtype, monkeypatch):
    """The kernels beside a wrong oracle: what a wrong kernel beside the right oracle would show."""
    function, planted, codebooks = (PLANTED | PLANTED_HALF_RATES)[name]
    bits = 2.5 if name in PLANTED_HALF_RATES else 3
    for codebook in codebooks:
        for activation in cases.AXES["activation"]:
            case = cases.Case(bits, codebook, dtype, 3, "blocks", activation)
            inputs = case.inputs()
            actual = run(case, inputs)
            cases.check(case, actual, inputs)
            with monkeypatch.context() as patch:
                patch.setattr(codec.trellis, function, planted)
                with pytest.raises(AssertionError, match="a row is .* off"):
                    cases.check(case, actual, inputs)


MOE = cases.Case(3, "mul1", "float32", 17, "padded", "silu", mix="both", bias=True, top_k=2, scores=True)
LINEAR = cases.Case(3, "mcg", "bfloat16", 17, "padded", "none", bias=True)


@pytest.mark.parametrize("case", [MOE, LINEAR], ids=["moe", "linear"])
def test_every_candidate_config_gives_the_result(case):
    inputs = case.inputs()
    candidates = kernels.candidates(case.problem())
    assert {c.kernel_variant for c in candidates} == set(kernels.VARIANTS)
    for config in candidates:
        cases.check(case, run(case, inputs, config), inputs)


@pytest.mark.parametrize("rows", (1, 17))
@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("variant", kernels.VARIANTS)
def test_one_config_gives_the_same_bits_for_any_thread_count(variant, dtype, rows, threads, instruction_set):
    case = cases.Case(2, "3inst", dtype, rows, "blocks", "silu", mix="both", top_k=2, scores=True)
    inputs = case.inputs()
    config = kernels.config_for(case.problem(), kernels.make_name(variant))
    results = set()
    for n in (1, 2, 3, 5):
        threads(n)
        results.add(bits_of(run(case, inputs, config)))
    assert len(results) == 1


def test_names_that_differ_in_nothing_on_the_cpu():
    """fp32 sums are the rule there, and an expert's own bit widths are read with its words."""
    inputs = MOE.inputs()
    decode = bits_of(run(MOE, inputs, "moe_trellis_swiglu_decode"))
    assert bits_of(run(MOE, inputs, "moe_trellis_swiglu_decode_6_2_3_fp32acc")) == decode
    assert bits_of(run(MOE, inputs, "moe_trellis_mixed_swiglu_decode")) == decode
    for variant in kernels.VARIANTS:
        names = [kernels.make_name(variant, fp32acc=f) for f in (False, True)]
        assert bits_of(run(MOE, inputs, names[0])) == bits_of(run(MOE, inputs, names[1]))


def test_a_row_does_not_depend_on_the_rows_beside_it_in_value():
    case = cases.Case(4, "mul1", "float32", 64, "blocks", "silu", top_k=2)
    x, indices, _ = case.inputs()
    whole = run(case, (x, indices, None))
    for row in (0, 31, 63):
        alone = run(case, (x[row : row + 1], indices[row : row + 1], None))
        assert cases.row_error(alone, np.array(whole[row : row + 1]).astype(np.float64)) < 1e-5


# Bad input: every message says what was given and what is wanted.


def good():
    case = cases.Case(2, "mul1", "float32", 3, "block", "silu", top_k=2)
    x, indices, _ = case.inputs()
    return x, indices, case.bank()


@pytest.mark.parametrize(
    "x, message",
    [
        (mx.zeros((3, 127)), r"\[trellis_swiglu\] x must have shape \[..., 128\], got \[3, 127\]"),
        (mx.zeros((3, 128), mx.int32), r"x must be float32, float16 or bfloat16, got .*int32"),
        (mx.zeros((3, 128), mx.complex64), r"x must be float32, float16 or bfloat16, got .*complex64"),
        (np.zeros((3, 128), np.float32), r"x must be an mx.array, got ndarray"),
        (mx.array(1.0), r"x must have shape \[..., 128\], got \[\]"),
    ],
)
def test_bad_x(x, message):
    _, indices, bank = good()
    with pytest.raises(ValueError, match=message):
        trellis_swiglu(x, indices, bank)
    with pytest.raises(ValueError, match=message.replace("swiglu", "linear")):
        trellis_linear(x, cases.Case(2, "mul1", "float32", 3, "block", "none").weight())


@pytest.mark.parametrize(
    "indices, message",
    [
        (mx.zeros((2, 2), mx.uint32), r"shape \[..., k\] .* leading dimensions of x \[3\], got \[2, 2\]"),
        (mx.zeros((3,), mx.uint32), r"indices must have shape .*got \[3\]"),
        (mx.zeros((3, 0), mx.uint32), r"k >= 1.*got \[3, 0\]"),
        (mx.zeros((3, 2)), r"indices must be integers, got .*float32"),
        (np.zeros((3, 2)), r"indices must be integers, got float64"),
        (mx.zeros((3, 2), mx.bool_), r"indices must be integers, got .*bool"),
        (None, r"indices must be integers, got NoneType"),
        ([[0, 1], [2]], r"indices must be integers, got list"),
        ("012", r"indices must be integers, got <U3"),
    ],
)
def test_bad_indices(indices, message):
    x, _, bank = good()
    with pytest.raises(ValueError, match=message):
        trellis_swiglu(x, indices, bank)


def test_other_bad_arguments():
    x, indices, bank = good()
    with pytest.raises(ValueError, match=r"scores must have the shape of indices \[3, 2\], got \[3, 1\]"):
        trellis_swiglu(x, indices, bank, scores=mx.ones((3, 1)))
    with pytest.raises(ValueError, match="scores must be a floating point mx.array, got .*int32"):
        trellis_swiglu(x, indices, bank, scores=mx.ones((3, 2), mx.int32))
    with pytest.raises(ValueError, match="scores must be a floating point mx.array, got ndarray|got float32"):
        trellis_swiglu(x, indices, bank, scores=np.ones((3, 2), np.float32))
    with pytest.raises(ValueError, match="activation must be one of silu, .*, situ, got 'relu'"):
        trellis_swiglu(x, indices, bank, activation="relu")
    with pytest.raises(ValueError, match="limit must be a number, got '7'"):
        trellis_swiglu(x, indices, bank, limit="7")
    with pytest.raises(ValueError, match="alpha must be a number, got None"):
        trellis_swiglu(x, indices, bank, alpha=None)
    with pytest.raises(ValueError, match="stream must be a stream or a device such as mx.cpu, got 'cpu'"):
        trellis_swiglu(x, indices, bank, stream="cpu")
    with pytest.raises(ValueError, match="problem must be a Problem, got NoneType"):
        plan(None)
    with pytest.raises(ValueError, match="bank must be an ExpertBank, got list"):
        trellis_swiglu(x, indices, [bank])
    with pytest.raises(ValueError, match="w must be a TrellisWeight, got ExpertBank"):
        trellis_linear(x, bank)
    with pytest.raises(ValueError, match="w must be a TrellisWeight, got NoneType"):
        trellis_decode(None)


@pytest.mark.parametrize(
    "config, message",
    [
        ("moe_trellis", "no kernel is called 'moe_trellis'"),
        (7, "config must be a KernelConfig or a kernel name, got int"),
        (KernelConfig("moe_trellis_swiglu", 7, 128, 1), "a base panel on the CPU has 8 or 16 rows, got tile_size_m=7"),
        (KernelConfig("moe_trellis_swiglu", 8, 100, 1), "16, 32, 64, 128 or 256 columns, got tile_size_n=100"),
        (KernelConfig("moe_trellis_swiglu", 8, 128, 0), "simdgroups is the number of worker threads"),
        (
            KernelConfig("moe_trellis_swiglu", 8, 128, 1, True, "decode"),
            "is a base kernel, but kernel_variant is 'decode'",
        ),
    ],
)
def test_bad_configs(config, message):
    x, indices, bank = good()
    with pytest.raises(ValueError, match=message):
        trellis_swiglu(x, indices, bank, config=config, stream=mx.cpu)


@pytest.mark.parametrize("n", (0, -1, 1.5, "2", None, True, np.int64(0)))
def test_bad_thread_counts(n):
    with pytest.raises(ValueError, match="number of threads must be an integer >= 1, got"):
        set_num_threads(n)


def test_thread_counts_of_numpy(threads):
    threads(np.int64(2))
    assert _ext.num_threads() == 2


def test_an_unknown_instruction_set_is_named():
    with pytest.raises(ValueError, match="avx1024"):
        _ext.set_instruction_set("avx1024")
