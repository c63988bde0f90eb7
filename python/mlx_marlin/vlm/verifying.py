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

_LINEARS = (TrellisLinear, JoinedTrellisLinear)


def _handled(of: type | tuple[type, ...], call: Callable[..., mx.array], name: str) -> Callable[..., Any]:
    """A function of mlx-vlm's verifier, with these layers handled."""
    others = getattr(quantized_verifier, name)

    @functools.wraps(others)
    def handle(layer: Any, *arguments: Any) -> Any:
        return call(layer, *arguments) if isinstance(layer, of) else others(layer, *arguments)

    return handle


def _every_expert(experts: TrellisExperts, x: mx.array, indices: mx.array) -> mx.array:
    """``[batch, tokens, in]`` through each of the experts of its token."""
    return experts(x, indices)


def _own_expert(experts: TrellisExperts, x: mx.array, indices: mx.array) -> mx.array:
    """``[batch, tokens, k, in]``, each through its own expert."""
    return experts(mx.expand_dims(x, -2), indices).squeeze(-2)


@functools.cache
def install() -> None:
    """Let mlx-vlm verify blocks through quantized layers at once, for the rest of the process."""
    replacements = {
        "exact_quantized_linear": (_LINEARS, lambda linear, x: linear(x)),
        "exact_quantized_switch_linear": (TrellisExperts, _every_expert),
        "exact_quantized_selected_linear": (TrellisExperts, _own_expert),
    }
    made = {name: _handled(of, call, name) for name, (of, call) in replacements.items()}
    vars(quantized_verifier).update(made)
