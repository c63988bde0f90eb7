"""What only a GPU can show. Its kernels run the cases of test_metal_kernels.py there."""

import mlx.core as mx
import pytest

from mlx_marlin import codec, kernels
from mlx_marlin.selection import selftest

pytestmark = pytest.mark.skipif(not mx.is_available(mx.Device(mx.gpu)), reason="no GPU that MLX can use here")


@pytest.mark.parametrize("rows", [1, 4, 16, 64])
def test_every_default_passes_its_self_test(rows, tmp_path):
    test = selftest.SelfTest(path=tmp_path / "verdicts.json")
    for dtype in kernels.DTYPES:
        problem = kernels.Problem.swiglu(
            2048,
            768,
            rows=rows,
            experts=128,
            top_k=8,
            bits=((2, 3, 2), (4, 4, 4)),
            codebooks=codec.CODEBOOKS,
            dtype=dtype,
            device="gpu",
        )
        assert test.fault(problem, kernels.default(problem)) is None
