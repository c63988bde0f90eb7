"""Layers of random sizes, formats, routings and configs, beyond the classes of the case list."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_marlin import (
    Problem,
    TrellisSwitchGLU,
    TrellisSwitchMLP,
    kernels,
    trellis_linear,
    trellis_mlp,
    trellis_swiglu,
)
from mlx_marlin.weights.synthetic import random_weight
from tests.support import cases, references


def random_config(rng, problem: Problem) -> kernels.KernelConfig | None:
    candidates = kernels.candidates(problem)
    return None if rng.random() < 0.3 else candidates[rng.integers(len(candidates))]


def random_format(rng) -> tuple[float, str]:
    return cases.FORMATS[rng.integers(len(cases.FORMATS))]


def check_random_layer(seed: int) -> None:
    rng = np.random.default_rng(seed)
    experts, top_k = (int(v) for v in rng.integers(1, 10, 2))  # top_k above the experts: some come twice
    hidden, intermediate = (int(v) for v in rng.integers(1, 420, 2))
    rows = int(rng.choice([1, 2, 4, 7, 16, 33, 65, 130]))
    dtype = cases.DTYPES[rng.integers(3)]
    gated = bool(rng.integers(2))
    activations = kernels.ACTIVATIONS if gated else kernels.UNGATED
    activation = activations[rng.integers(len(activations))]
    formats = [[random_format(rng) for _ in range(3)] for _ in range(experts)]
    weights = cases.random_experts(rng, hidden, intermediate, formats, bias=bool(rng.integers(2)))
    if not gated:
        del weights["gate"]
    bank = cases.bank_of(weights)
    x = cases.random_rows(rng, rows, hidden, dtype)
    # A skewed routing, as trained routers have it: some experts get many rows, some none.
    popularity = rng.dirichlet(np.full(experts, 0.5))
    indices = rng.choice(experts, (rows, top_k), p=popularity).astype(np.uint32)
    scores = rng.standard_normal((rows, top_k)).astype(np.float32) if rng.integers(2) else None
    layer = TrellisSwitchGLU if gated else TrellisSwitchMLP
    problem = layer(bank=bank, activation=activation).problem(rows, x.dtype, "cpu", top_k=top_k)
    y = (trellis_swiglu if gated else trellis_mlp)(
        x,
        indices,
        bank,
        scores=None if scores is None else mx.array(scores),
        activation=activation,
        config=random_config(rng, problem),
        stream=mx.cpu,
    )
    x64 = np.array(x.astype(mx.float32)).astype(np.float64)
    slots = references.reference_experts(x64, indices, weights, None, activation)
    if scores is None:
        error = np.linalg.norm(np.array(y.astype(mx.float32)) - slots, axis=-1)
        # A slot of few outputs may be near zero by chance; all slots together are not.
        scale = np.maximum(np.linalg.norm(slots, axis=-1), np.sqrt(hidden * np.mean(np.square(slots))))
        assert (error <= cases.TOLERANCE[dtype] * scale).all()
        return
    # Scores of both signs may cancel: the error is measured against the slots that were added.
    slots *= scores[..., None]
    error = np.linalg.norm(np.array(y.astype(mx.float32)) - slots.sum(axis=1), axis=-1)
    assert (error <= cases.TOLERANCE[dtype] * np.linalg.norm(slots, axis=-1).sum(axis=-1)).all()


def check_random_linear(seed: int) -> None:
    rng = np.random.default_rng(seed)
    w = random_weight(rng, *(int(v) for v in rng.integers(1, 900, 2)), *random_format(rng), bias=bool(rng.integers(2)))
    rows, dtype = int(rng.integers(1, 140)), cases.DTYPES[rng.integers(3)]
    x = cases.random_rows(rng, rows, w.in_features, dtype)
    problem = Problem.linear(
        w.in_features,
        w.out_features,
        rows=rows,
        bits=w.bits,
        codebooks=w.codebook,
        dtype=dtype,
        bias=w.bias is not None,
    )
    y = trellis_linear(x, w, config=random_config(rng, problem), stream=mx.cpu)
    expected = references.reference_linear(np.array(x.astype(mx.float32)), w)
    # One output may be near zero by chance; a row of many is not.
    scale = np.maximum(np.linalg.norm(expected, axis=-1), np.sqrt(w.out_features))
    error = np.linalg.norm(np.array(y.astype(mx.float32)) - expected, axis=-1)
    assert (error <= cases.TOLERANCE[dtype] * scale).all()


@pytest.mark.parametrize("seed", range(24))
def test_random_layers(seed):
    check_random_layer(seed)
    check_random_linear(seed)


@pytest.mark.slow
def test_many_random_layers(instruction_set):
    for seed in range(24, 324):
        check_random_layer(seed)
        check_random_linear(seed)
