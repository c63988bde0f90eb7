"""What is asked: one call, from shapes and dtypes only."""

from __future__ import annotations

from dataclasses import dataclass

ACTIVATIONS = ("silu", "gelu_tanh", "swiglu_oai")
"""What the fused kernels compute of gate and up; the position is the id that the kernels use."""

DTYPES = ("float32", "float16", "bfloat16")
"""Names of the dtypes of x; the position is the id that the kernels use."""

DEVICES = ("cpu", "gpu")
"""Names of what runs a call."""


@dataclass(frozen=True)
class Problem:
    """One call, described by shapes and dtypes only.

    Attributes:
        kind: ``"linear"`` or ``"swiglu"``.
        rows: Tokens, before top-k. May be 0.
        top_k: Experts per token; 1 for a linear.
        hidden: Logical input size.
        intermediate: Padded width between gate/up and down; for a linear, the logical output size.
        experts: Experts in the bank; 1 for a linear, more for one projection of experts, whose rows are slots.
        bits: Sorted distinct (gate, up, down) bits present; for a linear, ``((K,),)``.
        codebooks: Sorted distinct codebooks present.
        activation: One of :data:`ACTIVATIONS`; ``"none"`` for a linear.
        dtype: Dtype of x, one of :data:`DTYPES`.
        device: ``"cpu"`` or ``"gpu"``.
        combine: Whether scores are given, so that the top-k sum happens inside.
        bias: Whether any projection has a bias.
    """

    kind: str
    rows: int
    top_k: int
    hidden: int
    intermediate: int
    experts: int
    bits: tuple[tuple[int, ...], ...]
    codebooks: tuple[str, ...]
    activation: str
    dtype: str
    device: str
    combine: bool = False
    bias: bool = False

    @property
    def widths(self) -> tuple[int, ...]:
        """Sorted distinct bit widths over all projections."""
        return tuple(sorted({b for group in self.bits for b in group}))

    @classmethod
    def of(cls, layer, rows: int, dtype, device: str, *, combine: bool = False) -> Problem:
        """The problem that a layer (or weight, or bank) poses for a number of rows.

        Args:
            layer: Anything with a ``problem(rows, dtype, device, combine)`` method: TrellisLinear, TrellisSwitchGLU.
            rows: Tokens, before top-k.
            dtype: Dtype of x: an ``mx.Dtype`` or its name.
            device: ``"cpu"`` or ``"gpu"``.
        """
        return layer.problem(rows, dtype, device, combine=combine)
