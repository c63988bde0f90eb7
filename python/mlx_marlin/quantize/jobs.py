"""From a layer's taps to the weights to be quantized, their Hessians and their effect on the layer's output."""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from .hessian import Hessian
from .layered import ExpertsTap, LayeredModel, LinearTap, Taps
from .source import KEPT_LINEARS, Source

# Rows of an unrouted prior, against which an expert's own rows are weighed: n rows tell about n of its k input
# dimensions at most, so an expert with k / 8 rows of its own trusts them half.
_PRIOR_SHARE = 8
_PRIOR_ROWS = 512  # tokens that stand for all of them in the prior of a down projection
# An expert that the calibration hardly uses still counts with this share of the average use.
_LEAST_USE = 0.05
_NOISE = 0.05  # relative size of the disturbance that measures an effect: small against the output, far above rounding
_EFFECT_ROWS = 256  # tokens per expert on which its effect is measured


@dataclass
class Job:
    """One linear to be quantized.

    Attributes:
        name: Its name in the checkpoint.
        group: What shares its K when experts may not differ.
        weight: Returns float32 ``[in_features, out_features]``.
        bias: float32 ``[out_features]`` or ``None``.
        shape: ``(in_features, out_features)``.
        hessian: Mean of ``x x^T``, ``[in_features, in_features]``.
        effect: Squared error of the layer's output per token, for each unit of squared error of this linear's
            output per row.
        install: Puts a dequantized weight (and bias) into the running layer.
    """

    name: str
    group: str
    weight: Callable[[], np.ndarray]
    bias: np.ndarray | None
    shape: tuple[int, int]
    hessian: np.ndarray
    effect: float
    install: Callable[[np.ndarray, np.ndarray | None], None]


def wanted(path: str) -> bool:
    """Whether the linear at a module path is one that EXL3 quantizes."""
    return path.rpartition(".")[2] not in KEPT_LINEARS


def seed_of(seed: int, name: str) -> list[int]:
    """The seed of everything random about one tensor."""
    return [seed, zlib.crc32(name.encode())]


def layer_jobs(
    model: LayeredModel, index: int, taps: Taps, source: Source, hidden: list[np.ndarray], seed: int | None
) -> list[Job]:
    """The jobs of a layer whose taps have recorded.

    Args:
        model: The model, with the layer loaded.
        index: The layer.
        taps: Its taps, in place.
        source: Resolves names.
        hidden: The layer's inputs, one array per batch.
        seed: Seed of the disturbances that measure effects; ``None`` leaves all effects 1.
    """
    prefix = model.names[index]
    jobs = []
    for path, tap in taps.linears.items():
        if tap.hessian is None:
            continue
        name = source.base(f"{prefix}.{path}")
        if name is None:  # made by mlx-lm's sanitize: what it was made of is copied
            warnings.warn(f"{prefix}.{path} is not quantized: the checkpoint has no tensor of that name", stacklevel=2)
            continue
        effect = 1.0 if seed is None else _linear_effect(model, index, tap, hidden, seed_of(seed, name))
        jobs.append(_linear_job(name, tap, tap.hessian, effect))
    for path, experts in taps.experts.items():
        block = path.rpartition(".")[0]
        full, parts = source.expert_names(f"{prefix}.{block}")
        jobs += _expert_jobs(full, parts, experts, seed)
    return jobs


def _linear_job(name: str, tap: LinearTap, hessian: Hessian, effect: float) -> Job:
    def install(weight: np.ndarray, bias: np.ndarray | None) -> None:
        tap.weight = weight
        if bias is not None:
            tap.bias = bias

    return Job(name, name, lambda: tap.weight, tap.bias, tap.weight.shape, hessian.mean(), effect, install)


def _linear_effect(model: LayeredModel, index: int, tap: LinearTap, hidden: list[np.ndarray], seed: list[int]) -> float:
    """Change of the layer's output on the first batch when noise in proportion to each channel is added."""
    rng = np.random.default_rng(seed)
    added = []

    def noise(y: mx.array) -> mx.array:
        values = np.array(y.astype(mx.float32))
        axes = tuple(range(values.ndim - 1))
        rms = np.sqrt(np.mean(np.square(values), axis=axes))
        added.append((_NOISE * rms * rng.standard_normal(values.shape)).astype(np.float32))
        return mx.array(added[-1])

    before = model.run(index, hidden[:1])[0]
    tap.noise = noise
    after = model.run(index, hidden[:1])[0]
    tap.noise = None
    return _energy(after - before) / max(_energy(added[0]), np.finfo(np.float64).tiny)


def _energy(x: np.ndarray) -> float:
    """Squared length per token, averaged."""
    return float(np.sum(np.square(x, dtype=np.float64)) / max(1, np.prod(x.shape[:-1])))


def _expert_jobs(full: str, parts: dict[str, str], tap: ExpertsTap, seed: int | None) -> list[Job]:
    x, indices, scores = tap.rows.joined()
    experts = len(tap.weights["gate_proj"][0])
    importance = np.square(scores.astype(np.float64))
    used = np.bincount(indices.ravel(), importance.ravel(), experts)
    use = np.maximum(used, _LEAST_USE * np.mean(used)) / len(x)
    typical = float(np.mean(importance)) or 1.0
    prior_x = x[:: max(1, len(x) // _PRIOR_ROWS)][:_PRIOR_ROWS]
    prior = Hessian(x.shape[1])
    prior.add(x)
    jobs = []
    for e in range(experts):
        token, slot = np.nonzero(indices == e)
        rows, weight = x[token], importance[token, slot]
        hidden, prior_hidden = (
            tap.activate(tap.project("up_proj", e, r), tap.project("gate_proj", e, r)) for r in (rows, prior_x)
        )
        entry, middle, middle_prior = Hessian(x.shape[1]), Hessian(hidden.shape[1]), Hessian(hidden.shape[1])
        entry.add(rows, weight)
        middle.add(hidden, weight)
        middle_prior.add(prior_hidden)
        shared = entry.with_prior(prior.mean(), typical * x.shape[1] / _PRIOR_SHARE)
        down = middle.with_prior(middle_prior.mean(), typical * hidden.shape[1] / _PRIOR_SHARE)
        sample = np.concatenate(
            [rows[:: max(1, len(rows) // _EFFECT_ROWS)][:_EFFECT_ROWS], prior_x[: 1 + len(prior_x) // 8]]
        )
        for part in ("gate_proj", "up_proj", "down_proj"):
            effect = 1.0
            if seed is not None and part != "down_proj":
                effect = _expert_effect(tap, part, e, sample, seed_of(seed, f"{full}.{e}.{part}"))
            h = down if part == "down_proj" else shared
            jobs.append(_expert_job(full, parts[part], tap, part, e, h, effect * use[e]))
    return jobs


def _expert_effect(tap: ExpertsTap, part: str, e: int, x: np.ndarray, seed: list[int]) -> float:
    """Squared change of the expert's output for each unit of squared disturbance of gate or up."""
    outputs = {name: tap.project(name, e, x) for name in ("gate_proj", "up_proj")}
    before = tap.activate(outputs["up_proj"], outputs["gate_proj"])
    rms = np.sqrt(np.mean(np.square(outputs[part]), axis=0))
    noise = _NOISE * rms * np.random.default_rng(seed).standard_normal(outputs[part].shape)
    outputs[part] = outputs[part] + noise.astype(np.float32)
    change = tap.activate(outputs["up_proj"], outputs["gate_proj"]) - before
    return _energy(change @ tap.weights["down_proj"][0][e]) / max(_energy(noise), np.finfo(np.float64).tiny)


def _expert_job(full: str, stored: str, tap: ExpertsTap, part: str, e: int, h: np.ndarray, effect: float) -> Job:
    weights, biases = tap.weights[part]

    def install(weight: np.ndarray, bias: np.ndarray | None) -> None:
        weights[e] = weight
        if bias is not None and biases is not None:
            biases[e] = bias

    bias = None if biases is None else biases[e]
    return Job(
        f"{full}.{e}.{stored}", f"{full}.{stored}", lambda: weights[e], bias, weights.shape[1:], h, effect, install
    )
