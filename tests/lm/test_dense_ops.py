"""What a loaded model changes in MLX on a Linux CPU: the numbers stay, whatever is imported first."""

from __future__ import annotations

import subprocess
import sys

import mlx.core as mx
import numpy as np
import pytest

from mlx_marlin import _ext, set_num_threads
from mlx_marlin.lm import dense_ops
from tests.support.paths import ROOT

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="MLX is changed on Linux only")

# Rows, inner size, columns: one part, parts by rows and by columns, ragged, one row in one part and in several.
SIZES = (
    (1, 1, 1),
    (97, 33, 1000),
    (1000, 33, 97),
    (500, 500, 500),
    (64, 4096, 7),
    (1, 300, 20000),
    (1, 4000, 64),
    (300, 70, 301),
)


@pytest.fixture
def threads():
    dense_ops.install()
    before = _ext.num_threads()
    yield set_num_threads
    set_num_threads(before)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_products(size, threads):
    """Of matrices and of their transposes; the same bits on any number of threads."""
    rows, inner, columns = size
    rng = np.random.default_rng(0)
    for a_back in (False, True):
        for b_back in (False, True):
            a = mx.array(rng.standard_normal((inner, rows) if a_back else (rows, inner), np.float32))
            b = mx.array(rng.standard_normal((columns, inner) if b_back else (inner, columns), np.float32))
            a, b = a.T if a_back else a, b.T if b_back else b
            results = []
            for count in (1, 2, 5):
                threads(count)
                results.append(np.array(a @ b))
            want = np.array(a).astype(np.float64) @ np.array(b).astype(np.float64)
            # Sums of `inner` products of normal values, each rounded once.
            assert np.abs(results[0] - want).max() <= 2e-7 * inner**0.5 * max(np.abs(want).max(), 1)
            assert all((results[0] == other).all() for other in results[1:])


def test_products_in_batches_and_added(threads):
    rng = np.random.default_rng(1)
    a, b, c = (rng.standard_normal(shape, np.float32) for shape in ((3, 2, 130, 40), (3, 1, 40, 90), (130, 90)))
    y = mx.addmm(mx.array(c), mx.array(a), mx.array(b), alpha=0.5, beta=2.0)
    np.testing.assert_allclose(np.array(y), 0.5 * (a.astype(np.float64) @ b) + 2.0 * c, atol=1e-4)


# In a process of its own: what MLX does before, and after, whatever was imported and computed first.
ORDER = """
import sys
import mlx.core as mx
x = mx.random.normal((200, 200), key=mx.random.key(0))
before = mx.array(x @ x)
mx.eval(before)
composed = mx.fast.scaled_dot_product_attention
import mlx_marlin
assert mx.fast.scaled_dot_product_attention is composed, "importing alone changes nothing"
mlx_marlin.load(sys.argv[1])
assert mx.fast.scaled_dot_product_attention is not composed
mlx_marlin.load(sys.argv[1])
after = x @ x
assert not mx.array_equal(before, after), "other sums of other parts: the same bits mean that nothing was replaced"
assert mx.allclose(before, after, atol=1e-4)
q, k = mx.random.normal((1, 4, 9, 16)), mx.random.normal((1, 2, 9, 16))
mine = mx.fast.scaled_dot_product_attention(q, k, k, scale=0.3, mask="causal")
assert mx.allclose(mine, composed(q, k, k, scale=0.3, mask="causal"), atol=1e-5)
try:
    mx.fast.scaled_dot_product_attention(q[0], k[0], k[0], scale=0.3)
except ValueError as error:
    print(error)
try:
    mx.fast.scaled_dot_product_attention(q, k, k, scale=0.3, force_fused=True)
except ValueError as error:
    print(error)
"""


def test_a_process_that_computed_before_it_loads():
    run = subprocess.run(
        [sys.executable, "-c", ORDER, str(ROOT / "models" / "docs-moe-exl3-3.0bpw")], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert "rank 4" in run.stdout and "no fused kernel" in run.stdout, "what is wrong with arguments is MLX's to say"


def test_a_missing_blas_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy_openblas32", None)
    with pytest.raises(ModuleNotFoundError, match=r"scipy-openblas32.*pip install '\.\[lm\]'"):
        dense_ops._replace_products.__wrapped__()


def test_a_libmlx_without_the_symbol_is_warned_about(monkeypatch):
    monkeypatch.setattr(dense_ops.ops, "replace_sgemm", lambda *addresses: False)
    with pytest.warns(RuntimeWarning, match="at its own speed"):
        dense_ops._replace_products.__wrapped__()
