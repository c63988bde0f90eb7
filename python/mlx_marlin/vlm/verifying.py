"""Blocks of 2 to 8 tokens, as speculation verifies them, through quantized layers at once.

mlx-vlm computes such a block so that each token comes out as it would alone: with kernels for the formats of MLX, and
one token at a time through every other layer. That would read all weights again for each token, which is what
speculation is to save. Here a token of a block comes out as in any batch: the last bits of its sums may differ.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import mlx.core as mx
from mlx_vlm.models import quantized_verifier

from ..layers.experts import TrellisExperts
from ..layers.joined import JoinedTrellisLinear
from ..layers.linear import TrellisLinear


def _through(linear: Any, x: mx.array) -> mx.array:
    return linear(x)


def _through_every_expert(experts: TrellisExperts, x: mx.array, indices: mx.array) -> mx.array:
    """``[batch, tokens, in]`` through each of the experts of its token."""
    return experts(x, indices)


def _through_own_expert(experts: TrellisExperts, x: mx.array, indices: mx.array) -> mx.array:
    """``[batch, tokens, k, in]``, each through its own expert."""
    return experts(mx.expand_dims(x, -2), indices).squeeze(-2)


def _handle(name: str, classes: tuple[type, ...], call: Callable[..., mx.array]) -> None:
    """Let a function of mlx-vlm's verifier handle layers of these classes by a call."""
    others = getattr(quantized_verifier, name)

    @functools.wraps(others)
    def handle(layer: Any, *arguments: Any) -> Any:
        return call(layer, *arguments) if isinstance(layer, classes) else others(layer, *arguments)

    vars(quantized_verifier)[name] = handle


@functools.cache
def install() -> None:
    """Let mlx-vlm verify blocks through quantized layers at once, for the rest of the process."""
    _handle("exact_quantized_linear", (TrellisLinear, JoinedTrellisLinear), _through)
    _handle("exact_quantized_switch_linear", (TrellisExperts,), _through_every_expert)
    _handle("exact_quantized_selected_linear", (TrellisExperts,), _through_own_expert)
