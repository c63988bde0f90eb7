"""What runs the Metal kernels: the simulator on Linux, MLX on a Mac. Both take the same cases."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_marlin import _ext, kernels, ops
from mlx_marlin.kernels import metal
from tests import metal_sim
from tests.support import metal_executor


class Simulated:
    """The Plan's dispatches in the simulator, with all of its checks."""

    name = "simulated"

    @staticmethod
    def unavailable() -> str:
        """Why it cannot run here, or ``""``."""
        return metal_sim.unavailable() or ""

    linear = staticmethod(metal_executor.linear)
    experts = staticmethod(metal_executor.experts)
    decode = staticmethod(metal_executor.decode)


class Gpu:
    """The primitives on the GPU."""

    name = "gpu"

    @staticmethod
    def unavailable() -> str:
        return "" if mx.is_available(mx.Device(mx.gpu)) else "no GPU that MLX can use here"

    @staticmethod
    def linear(x, stack, config=None, indices=None, x_divisor: int = 1, transposed: bool = False) -> np.ndarray:
        """As :func:`metal_executor.linear`; the transposed product is the gradient with respect to x."""
        source = stack.source

        def product(x):
            problem = ops.linear_problem(source, x.shape[0] * x_divisor, x.dtype, ops.device_of(mx.gpu))
            native = ops.resolve("test", problem, config)
            sizes = source.in_features, source.out_features
            if indices is None:
                return _ext.trellis_linear(x, stack.arrays, stack.info, *sizes, native, mx.gpu)
            ids = mx.array(np.asarray(indices, np.uint32).reshape(-1))
            return _ext.trellis_gather_linear(x, ids, stack.arrays, stack.info, *sizes, native, mx.gpu)

        if transposed:
            _, (y,) = mx.vjp(product, [mx.zeros((x.shape[0], source.in_features), x.dtype)], [x])
        else:
            y = product(x)
        return np.array(y.astype(mx.float32))

    @staticmethod
    def experts(x, indices, bank, **keywords) -> np.ndarray:
        """As :func:`metal_executor.experts`. The indices are not known yet when the op checks them."""
        lazy = mx.array(np.array(indices)) + mx.array(0, mx.uint32)
        if bank.gate is None:
            keywords = {name: value for name, value in keywords.items() if name not in ("alpha", "limit")}
        op = ops.trellis_mlp if bank.gate is None else ops.trellis_swiglu
        return np.array(op(x, lazy, bank, stream=mx.gpu, **keywords).astype(mx.float32))

    @staticmethod
    def decode(stack, expert: int = 0) -> np.ndarray:
        """As :func:`metal_executor.decode`."""
        return np.array(_ext.trellis_decode(stack.arrays, stack.info, expert, mx.gpu))


BACKENDS = {backend.name: backend for backend in (Simulated, Gpu)}


def require(backend, config: kernels.KernelConfig | None) -> None:
    """Skip what is for accelerators that this GPU does not have."""
    wanted = config is not None and metal.accelerated(config)
    if backend is Gpu and wanted and not ops.has_accelerators("gpu"):
        pytest.skip("no neural accelerators that kernels can use here")


def run(backend, case, inputs: tuple, config: kernels.KernelConfig | None = None, **options) -> np.ndarray:
    """A case of ``cases.py`` on a backend; float32."""
    require(backend, config)
    x, indices, scores = inputs
    if case.linear:
        return backend.linear(x, ops.prepare_weight("test", case.weight()), config, **options)
    return backend.experts(
        x,
        indices,
        case.bank(),
        scores=scores,
        activation=case.function,
        alpha=case.alpha,
        limit=case.limit,
        config=config,
        **options,
    )
