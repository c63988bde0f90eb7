"""The Metal kernels on a real GPU: the cases that test_metal_kernels.py runs in the simulator, on a Mac."""

import cases
import mlx.core as mx
import numpy as np
import pytest
from test_metal_kernels import FORMATS, SMALL, _selection, config

from mlx_marlin import codec, kernels, ops, selftest
from mlx_marlin.weights import TrellisWeight

pytestmark = pytest.mark.skipif(not mx.is_available(mx.Device(mx.gpu)), reason="no GPU that MLX can use here")


def run(case, inputs, chosen):
    x, indices, scores = inputs
    if case.linear:
        return ops.trellis_linear(x, case.weight(), config=chosen, stream=mx.gpu)
    return ops.trellis_swiglu(
        x,
        indices,
        case.bank(),
        scores=scores,
        activation=case.activation,
        alpha=case.alpha,
        limit=case.limit,
        config=chosen,
        stream=mx.gpu,
    )


@pytest.mark.parametrize("case, chosen", [p.values for p in _selection()], ids=[p.id for p in _selection()])
def test_selection(case, chosen):
    if kernels.feasible(case.problem("gpu"), chosen) is not None:
        chosen = kernels.config_for(case.problem("gpu"), chosen.kernel_name)
    inputs = case.inputs()
    y = np.array(run(case, inputs, chosen).astype(mx.float32))
    assert cases.row_error(y, case.reference(*inputs)) <= case.tolerance


@pytest.mark.parametrize("bits, codebook", FORMATS)
def test_decode_is_bit_exact(bits, codebook):
    words = np.random.default_rng(1).integers(0, 1 << 16, (64, 64, 16 * bits), np.uint16).view(np.int16)
    w = TrellisWeight(words, np.ones(1024, np.float16), np.ones(1024, np.float16), codebook)
    decoded = np.array(ops.trellis_decode(w, stream=mx.gpu))
    np.testing.assert_array_equal(decoded.view(np.uint16), codec.inner(w).view(np.uint16))


@pytest.mark.parametrize("tiles", [("decode", 1, 128, 16), ("prefill4", 4, 64, 16), ("base", 8, 128, 16)], ids=str)
def test_repeated_runs_give_the_same_bits(tiles):
    inputs = SMALL.inputs()
    first, *others = (np.array(run(SMALL, inputs, config(*tiles)).astype(mx.float32)) for _ in range(5))
    for other in others:
        np.testing.assert_array_equal(first, other)


@pytest.mark.parametrize("rows", [1, 4, 16, 64])
def test_every_default_passes_its_self_test(rows, tmp_path):
    test = selftest.SelfTest(path=tmp_path / "verdicts.json")
    for dtype in kernels.DTYPES:
        problem = kernels.Problem(
            "swiglu", rows, 8, 2048, 768, 128, ((2, 3, 2), (4, 4, 4)), codec.CODEBOOKS, "silu", dtype, "gpu"
        )
        assert test.fault(problem, kernels.default(problem)) is None
