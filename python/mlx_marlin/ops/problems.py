"""What a call asks for, from shapes and dtypes, and the config that answers it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from numbers import Real
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from .. import _ext, kernels
from ..kernels import KernelConfig, Problem
from ..weights.experts import ExpertStack
from .runtime import has_accelerators

StreamOrDevice = mx.Stream | mx.ThreadLocalStream | mx.Device | mx.DeviceType | None
"""Where an op runs; ``None`` for the default stream. MLX's stub has it under this name, MLX itself does not."""

Indices = mx.array | np.ndarray | Sequence
"""Experts by slot: integers of MLX or NumPy, or nested lists."""

NativeConfig = _ext.KernelConfig
"""A config as the primitives take it."""

DTYPE_NAMES = {mx.float32: "float32", mx.float16: "float16", mx.bfloat16: "bfloat16"}
"""What x may be made of, by the name that a :class:`~mlx_marlin.Problem` has for it."""


_CLAMPED = ("swiglu_oai", "swiglu_clamped", "swiglu_step")


class Activation(NamedTuple):
    """What stands between gate and up, or up alone, on one side and down on the other.

    Attributes:
        name: One of :data:`kernels.ACTIVATIONS`.
        alpha: For ``"swiglu_oai"`` and ``"situ"``.
        limit: The same, and for ``"swiglu_clamped"`` and ``"swiglu_step"``.
    """

    name: str = "silu"
    alpha: float = 1.702
    limit: float = 7.0

    @classmethod
    def checked(cls, name: str, alpha: float = 1.702, limit: float = 7.0, *, gated: bool = True) -> Activation:
        """From a caller's arguments.

        Raises:
            ValueError: If no activation has this name, it needs a gate and there is none, or a number is none or, where
                it bounds, not positive.
        """
        legal = kernels.ACTIVATIONS if gated else kernels.UNGATED
        if name not in legal:
            without = "" if gated else " without a gate"
            raise ValueError(f"activation{without} must be one of {', '.join(legal)}, got {name!r}")
        for what, value in (("alpha", alpha), ("limit", limit)):
            if not isinstance(value, Real):
                raise ValueError(f"{what} must be a number, got {value!r}")
        bounds = {"alpha": alpha, "limit": limit} if name == "situ" else {"limit": limit} if name in _CLAMPED else {}
        for what, value in bounds.items():
            if not 0 < value < math.inf:
                raise ValueError(f"{what} of {name} must be positive and finite, got {value!r}")
        return cls(name, float(alpha), float(limit))


def device_of(stream: StreamOrDevice) -> str:
    """``"cpu"`` or ``"gpu"``: where an op given this stream runs.

    Raises:
        ValueError: If it is neither a stream nor a device.
    """
    device = mx.default_device() if stream is None else getattr(stream, "device", stream)
    if not isinstance(device, (mx.Device, mx.DeviceType)):
        raise ValueError(f"stream must be a stream or a device such as mx.cpu, got {stream!r}")
    return "gpu" if device in (mx.gpu, mx.Device(mx.gpu)) else "cpu"


@lru_cache(maxsize=4096)
def native_config(config: KernelConfig) -> NativeConfig:
    variant = getattr(_ext.Variant, config.kernel_variant)
    return NativeConfig(variant, config.tile_size_m, config.tile_size_n, config.simdgroups, config.use_fp32_acc)


@lru_cache(maxsize=4096)
def resolve(op: str, problem: Problem, config: KernelConfig | str | None) -> NativeConfig:
    """A config as the primitives take it, its sizes fitted to the problem; ``None`` stands for the default.

    A config with ``use_fp32_acc=False`` allows itself what accuracy ``"half"`` allows.

    Raises:
        ValueError: If it cannot run the problem.
    """
    if config is None:
        config = kernels.default(problem)
    elif isinstance(config, str):
        config = kernels.config_for(problem, config)
    elif not isinstance(config, KernelConfig):
        raise ValueError(f"[{op}] config must be a KernelConfig or a kernel name, got {type(config).__name__}")
    else:
        if not config.use_fp32_acc:
            problem = replace(problem, accuracy="half")
        runnable = kernels.fitted(problem, config)
        if runnable is None:
            raise ValueError(f"[{op}] {config} cannot run this problem: {kernels.feasible(problem, config)}")
        config = runnable
    return native_config(config)


def _dtype_name(dtype: mx.Dtype | str) -> str:
    """The name of a dtype, given itself or its name."""
    name = dtype if isinstance(dtype, str) else DTYPE_NAMES.get(dtype)
    if name not in kernels.DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(kernels.DTYPES)}, got {dtype}")
    return name


def _row_count(rows: int) -> int:
    if not isinstance(rows, (int, np.integer)) or rows < 0:
        raise ValueError(f"rows must be an integer >= 0, got {rows!r}")
    return int(rows)


@lru_cache(maxsize=4096)
def _distinct(*per_expert: tuple) -> tuple:
    """What occurs at the experts, of all projections together; remembered, as a layer asks again and again."""
    return tuple(sorted(set(zip(*per_expert))))


@lru_cache(maxsize=4096)
def _united(*per_expert: tuple) -> tuple:
    """What occurs at the experts, in any projection."""
    return tuple(sorted(set().union(*per_expert)))


def linear_problem(
    stack: ExpertStack, rows: int, dtype: mx.Dtype | str, device: str, accuracy: str = "float32"
) -> Problem:
    """The problem that a linear, or one projection of several experts, poses for a number of rows."""
    return Problem.linear(
        stack.in_features,
        stack.out_features,
        rows=_row_count(rows),
        experts=len(stack.bits),
        bits=_united(stack.bits),
        codebooks=_united(stack.codebooks),
        dtype=_dtype_name(dtype),
        device=device,
        bias=stack.bias is not None,
        accuracy=accuracy,
        accelerators=has_accelerators(device),
    )


def experts_problem(
    stacks: Sequence[ExpertStack],
    rows: int,
    top_k: int,
    activation: str,
    dtype: mx.Dtype | str,
    device: str,
    combine: bool,
    accuracy: str = "float32",
) -> Problem:
    """The problem that a layer of experts poses for a number of rows.

    Args:
        stacks: Gate, up and down; of experts without a gate, up and down.
        rows, top_k, activation, dtype, device, combine, accuracy: As :class:`Problem` has them.
    """
    up = stacks[-2]
    make = Problem.swiglu if len(stacks) == 3 else Problem.mlp
    return make(
        up.in_features,
        up.padded_shape[1],
        rows=_row_count(rows),
        experts=len(up.bits),
        top_k=top_k,
        bits=_distinct(*(stack.bits for stack in stacks)),
        codebooks=_united(*(stack.codebooks for stack in stacks)),
        activation=activation,
        dtype=_dtype_name(dtype),
        device=device,
        combine=combine,
        bias=any(stack.bias is not None for stack in stacks),
        accuracy=accuracy,
        accelerators=has_accelerators(device),
    )
