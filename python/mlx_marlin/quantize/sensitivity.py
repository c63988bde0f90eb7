"""How much a layer's error changes the model's output: KL divergence, from disturbed hidden states.

Errors of different layers compete for bits, and equal errors of two hidden states do not harm equally. A disturbance
of a layer's output is carried through the layers above it; what it does to the next token's distribution, per unit of
its energy, is what the layer's losses are weighted with.
"""

from __future__ import annotations

import numpy as np

from .layered import LayeredModel
from .spill import States

_NOISE = 0.1  # of what the layer adds to each channel: the size of a 3-bit layer's error
_STRIDE = 4  # the output is looked at after every fourth token: rows of a whole vocabulary are the costly part


def disturbed(before: np.ndarray, after: np.ndarray, seed: list[int]) -> tuple[np.ndarray, float]:
    """A layer's output with noise in proportion to what the layer adds to each channel.

    Args:
        before: The layer's input, float32 ``[windows, length, hidden]``.
        after: Its output.
        seed: Seed of the noise.

    Returns:
        The disturbed output, and the noise's energy per token.
    """
    rms = np.sqrt(np.mean(np.square(after - before), axis=(0, 1)))
    noise = (_NOISE * rms * np.random.default_rng(seed).standard_normal(after.shape)).astype(np.float32)
    return after + noise, float(np.mean(np.sum(np.square(noise, dtype=np.float64), axis=-1)))


def sensitivities(model: LayeredModel, hidden: np.ndarray, streams: States, energies: list[float]) -> list[float]:
    """KL divergence of the output per token and unit of energy, for each stream.

    Args:
        model: The model; its layers are not used.
        hidden: Original states after the last layer, ``[windows, length, hidden]``.
        streams: Disturbed ones, one per layer.
        energies: Energy of each disturbance.
    """
    totals = np.zeros(len(streams))
    for window in range(len(hidden)):
        states = [x[window : window + 1, ::_STRIDE] for x in (hidden, *streams)]
        outputs = (_log_softmax(logits) for logits in model.logits(states))
        original = next(outputs)
        weights = np.exp(original)
        totals += [np.mean(np.sum(weights * (original - changed), axis=-1)) for changed in outputs]
    # A layer that adds nothing leaves nothing to disturb.
    return [float(t / len(hidden) / e) if e else 0.0 for t, e in zip(totals, energies)]


def _log_softmax(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64)
    x -= x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))
