"""From a layer's taps to the weights to be quantized, their Hessians and their effect on the layer's output."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import mlx.core as mx
import numpy as np

from .. import codec
from ..ops import mlx_turn
from .hessian import Hessian
from .layered import LayeredModel
from .names import ExpertNames
from .taps import ExpertsTap, LinearTap, Taps

# Rows of an unrouted prior, against which an expert's own rows are weighed: n rows tell about n of its k input
# dimensions at most, so an expert with k / 8 rows of its own trusts them half.
_PRIOR_SHARE = 8
_PRIOR_ROWS = 512  # tokens that stand for all of them in the prior of a down projection
# Of a job: float64 matrices of the size of its Hessian at a time, and float64 arrays of the size of its weight.
_SQUARES, _MATRICES = 7, 6
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
        hessian: Returns the mean of ``x x^T``, ``[in_features, in_features]``: made when it is asked for, as those of
            all experts together are larger than the layer.
        effect: Returns the squared error of the layer's output per token, for each unit of squared error of this
            linear's output per row.
        install: Puts a dequantized weight (and bias) into the running layer.
    """

    name: str
    group: str
    weight: Callable[[], np.ndarray]
    bias: np.ndarray | None
    shape: tuple[int, int]
    hessian: Callable[[], np.ndarray]
    effect: Callable[[], float]
    install: Callable[[np.ndarray, np.ndarray | None], None]


def job_bytes(job: Job) -> int:
    """What a job holds in memory at most while it is prepared and quantized."""
    rows, columns = map(codec.padded, job.shape)
    return 8 * (_SQUARES * rows * rows + _MATRICES * rows * columns)


def seed_of(seed: int, name: str) -> list[int]:
    """The seed of everything random about one tensor."""
    return [seed, zlib.crc32(name.encode())]


@dataclass
class Original:
    """A layer as it is before it is quantized, for the effects of its linears.

    Attributes:
        model: The model, with the layer loaded.
        index: The layer.
        before: The layer's input for the first batch.
        after: Its output.
        seed: Seed of the disturbances that measure effects.
    """

    model: LayeredModel
    index: int
    before: np.ndarray
    after: np.ndarray
    seed: int


def layer_jobs(model: LayeredModel, index: int, taps: Taps, original: Original | None = None) -> list[Job]:
    """The jobs of a layer whose taps have recorded.

    Args:
        model: The model, with the layer loaded.
        index: The layer.
        taps: Its taps, in place.
        original: What effects are measured by. Default: ``None``, all effects are 1.
    """
    layer = model.paths[index]
    linears, experts = model.names.linears(layer), model.names.experts(layer)
    jobs = []
    for path, tap in taps.linears.items():
        if tap.hessian is not None:
            effect = _no_effect if original is None else partial(_linear_effect, original, taps, tap, linears[path])
            jobs.append(_linear_job(linears[path], tap, tap.hessian, effect))
    for path, bank in taps.experts.items():
        jobs += _expert_jobs(experts[path], bank, None if original is None else original.seed)
    return jobs


def _no_effect() -> float:
    return 1.0


def _linear_job(name: str, tap: LinearTap, hessian: Hessian, effect: Callable[[], float]) -> Job:
    def install(weight: np.ndarray, bias: np.ndarray | None) -> None:
        tap.weight = weight
        if bias is not None:
            tap.bias = bias

    return Job(name, name, lambda: tap.weight, tap.bias, tap.weight.shape, hessian.mean, effect, install)


def _linear_effect(original: Original, taps: Taps, tap: LinearTap, name: str) -> float:
    """Change of the layer's output on the first batch when noise in proportion to each channel is added."""
    rng = np.random.default_rng(seed_of(original.seed, name))
    added = []

    def noise(y: mx.array) -> mx.array:
        values = np.array(y.astype(mx.float32))
        axes = tuple(range(values.ndim - 1))
        rms = np.sqrt(np.mean(np.square(values), axis=axes))
        added.append((_NOISE * rms * rng.standard_normal(values.shape)).astype(np.float32))
        return mx.array(added[-1])

    with mlx_turn(), taps.disturbing(tap, noise):
        after = original.model.output(original.index, original.before, 0)
    return _energy(after - original.after) / max(_energy(added[0]), np.finfo(np.float64).tiny)


def _energy(x: np.ndarray) -> float:
    """Squared length per token, averaged."""
    return float(np.sum(np.square(x, dtype=np.float64)) / max(1, np.prod(x.shape[:-1])))


class _Block:
    """What the experts of a block saw, and the Hessians that this gives, made one at a time."""

    def __init__(self, tap: ExpertsTap):
        self.tap = tap
        self.indices, scores = np.concatenate(tap.rows.indices), np.concatenate(tap.rows.scores)
        self.importance = np.square(scores.astype(np.float64))
        self.typical = float(np.mean(self.importance)) or 1.0
        x = tap.rows.x.all()
        self.tokens, self.features = x.shape
        self.prior_x = x[:: max(1, len(x) // _PRIOR_ROWS)][:_PRIOR_ROWS].copy()
        prior = Hessian(self.features)
        prior.add(x)
        self.prior = prior.mean()

    def seen(self, e: int) -> tuple[np.ndarray, np.ndarray]:
        """The rows of an expert and their importance."""
        token, slot = np.nonzero(self.indices == e)
        return self.tap.rows.x.some(token), self.importance[token, slot]

    def sample(self, e: int) -> np.ndarray:
        """Some rows of an expert, and some of all tokens, by which its effects are measured."""
        token, _ = np.nonzero(self.indices == e)
        some = self.tap.rows.x.some(token[:: max(1, len(token) // _EFFECT_ROWS)][:_EFFECT_ROWS])
        return np.concatenate([some, self.prior_x[: 1 + len(self.prior_x) // 8]])

    def use(self) -> np.ndarray:
        """Importance per token of each expert."""
        experts = len(self.tap.weights[self.tap.last])
        used = np.bincount(self.indices.ravel(), self.importance.ravel(), experts)
        return np.maximum(used, _LEAST_USE * np.mean(used)) / self.tokens

    def entry(self, e: int) -> np.ndarray:
        """The Hessian of the projections that read x."""
        hessian = Hessian(self.features)
        hessian.add(*self.seen(e))
        return hessian.with_prior(self.prior, self.typical * self.features / _PRIOR_SHARE)

    def middle(self, e: int) -> np.ndarray:
        """The Hessian of the last projection."""
        rows, importance = self.seen(e)
        hidden, prior_hidden = self._hidden(e, rows), self._hidden(e, self.prior_x)
        hessian, prior = Hessian(hidden.shape[1]), Hessian(hidden.shape[1])
        hessian.add(hidden, importance)
        prior.add(prior_hidden)
        return hessian.with_prior(prior.mean(), self.typical * hidden.shape[1] / _PRIOR_SHARE)

    def _hidden(self, e: int, rows: np.ndarray) -> np.ndarray:
        outputs = self.tap.outputs(e, rows)
        with mlx_turn():
            return self.tap.activate(outputs)


def _expert_jobs(names: ExpertNames, tap: ExpertsTap, seed: int | None) -> list[Job]:
    block = _Block(tap)
    use = block.use()
    return [_expert_job(names, block, part, e, float(use[e]), seed) for e in range(len(use)) for part in tap.weights]


def _expert_effect(block: _Block, part: str, e: int, seed: list[int]) -> float:
    """Squared change of the expert's output for each unit of squared disturbance of one that reads x."""
    tap, x = block.tap, block.sample(e)
    outputs = tap.outputs(e, x)
    rms = np.sqrt(np.mean(np.square(outputs[part]), axis=0))
    noise = _NOISE * rms * np.random.default_rng(seed).standard_normal(outputs[part].shape)
    changed = {**outputs, part: outputs[part] + noise.astype(np.float32)}
    with mlx_turn():
        change = tap.activate(changed) - tap.activate(outputs)
    return _energy(change @ tap.weights[tap.last].weight(e)) / max(_energy(noise), np.finfo(np.float64).tiny)


def _expert_job(names: ExpertNames, block: _Block, part: str, e: int, use: float, seed: int | None) -> Job:
    weights = block.tap.weights[part]

    def effect() -> float:
        if seed is None or part not in block.tap.reading:
            return use
        return use * _expert_effect(block, part, e, seed_of(seed, f"{names.prefix}.{e}.{part}"))

    return Job(
        name=names.name(e, part),
        group=names.group(part),
        weight=lambda: weights.weight(e),
        bias=None if weights.bias is None else weights.bias[e],
        shape=weights.shape,
        hessian=lambda: block.middle(e) if part == block.tap.last else block.entry(e),
        effect=effect,
        install=lambda weight, bias: weights.install(e, weight, bias),
    )
