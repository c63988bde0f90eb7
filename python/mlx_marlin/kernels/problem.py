"""What is asked: one call, from shapes and dtypes only."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol

import msgspec

from .. import codec
from .config import Triple

ACTIVATIONS = ("silu", "gelu_tanh", "swiglu_oai", "relu_squared", "swiglu_clamped", "swiglu_step", "situ")
"""What the fused kernels apply to the gate, or without one to up; the position is the id that the kernels use."""

UNGATED = ("silu", "gelu_tanh", "relu_squared")
"""Those that need no gate."""

PROJECTIONS = {"linear": ("weight",), "mlp": ("up", "down"), "swiglu": ("gate", "up", "down")}
"""The weights of each kind of problem: those that read x, then, of experts, the one that reads what they make of it."""

DTYPES = ("float32", "float16", "bfloat16")
"""Names of the dtypes of x; the position is the id that the kernels use."""

DEVICES = ("cpu", "gpu")
"""Names of what runs a call."""

USUAL_DTYPE = {"cpu": "float32", "gpu": "float16"}
"""Dtype of the activations on a device, where nothing else is asked for."""

ACCURACIES = ("float32", "half")
"""What a call may round: nothing but its result, or also activations and sums inside a tile, about as float16 does."""

USUAL_ACCURACY = {"cpu": "half", "gpu": "float32"}
"""Accuracy of a loaded model on a device, where nothing else is asked for; of calls without a model it is float32."""

# Names come from users and from loops over the tuples above, so that they are str to a type checker; files are held to
# these.
if TYPE_CHECKING:
    Kind = str
    Codebook = str
    Activation = str
    Dtype = str
    Device = str
    Accuracy = str
else:
    Kind = Literal[tuple(PROJECTIONS)]
    Codebook = Literal[codec.CODEBOOKS]
    Activation = Literal[("none", *ACTIVATIONS)]
    Dtype = Literal[DTYPES]
    Device = Literal[DEVICES]
    Accuracy = Literal[ACCURACIES]
_Rows = Annotated[int, msgspec.Meta(ge=0, le=1 << 31)]
_Size = Annotated[int, msgspec.Meta(ge=1, le=1 << 24)]
_Width = Annotated[int, msgspec.Meta(ge=1, le=codec.MAX_BITS)] | Annotated[float, msgspec.Meta(ge=1, le=codec.MAX_BITS)]


def activations_of(kind: str) -> tuple[str, ...]:
    """Names of the activations that a kind of problem may have."""
    return {"linear": ("none",), "mlp": UNGATED}.get(kind, ACTIVATIONS)


def rows_label(rows: int) -> str:
    """Such as "1 row"."""
    return f"{rows} row{'' if rows == 1 else 's'}"


def checked_accuracy(accuracy: str) -> str:
    """An accuracy from a caller: itself.

    Raises:
        ValueError: If there is no such accuracy.
    """
    if accuracy not in ACCURACIES:
        raise ValueError(f"accuracy must be one of {', '.join(ACCURACIES)}, got {accuracy!r}")
    return accuracy


class Asks(Protocol):
    """What a problem can be asked of: TrellisLinear, TrellisSwitchGLU, TrellisSwitchMLP."""

    def problem(self, rows: int, dtype: Any, device: str, *, combine: bool = False) -> Problem: ...


@dataclass(frozen=True)
class Problem:
    """One call, described by shapes and dtypes only. Limits in annotations are checked where one is read from a file.

    Attributes:
        kind: ``"linear"``; or, of experts, ``"swiglu"`` (gate, up, down) or ``"mlp"`` (up, down).
        rows: Tokens, before top-k. May be 0.
        top_k: Experts per token; 1 for a linear.
        hidden: Logical input size.
        intermediate: Padded width between up and down; for a linear, the logical output size.
        experts: Experts in the bank; 1 for a linear, more for one projection of experts, whose rows are slots.
        bits: Sorted distinct (gate, up, down) bits present, without a gate (up, down); for a linear, ``((K,),)``. Ints,
            half rates floats.
        codebooks: Sorted distinct codebooks present.
        activation: One of :data:`ACTIVATIONS`; ``"none"`` for a linear.
        dtype: Dtype of x, one of :data:`DTYPES`.
        device: ``"cpu"`` or ``"gpu"``.
        combine: Whether scores are given, so that the top-k sum happens inside.
        bias: Whether any projection has a bias.
        accuracy: One of :data:`ACCURACIES`. Configs with ``use_fp32_acc=False`` run ``"half"`` only.
        accelerators: Whether the GPU has neural accelerators that its system lets kernels use: tiles for them run only
            there.
    """

    kind: Kind
    rows: _Rows
    top_k: Annotated[int, msgspec.Meta(ge=1, le=1 << 12)]
    hidden: _Size
    intermediate: _Size
    experts: Annotated[int, msgspec.Meta(ge=1, le=1 << 16)]
    bits: Annotated[tuple[tuple[_Width, ...], ...], msgspec.Meta(min_length=1, max_length=len(codec.WIDTHS) ** 3)]
    codebooks: Annotated[tuple[Codebook, ...], msgspec.Meta(min_length=1)]
    activation: Activation
    dtype: Dtype
    device: Device
    combine: bool = False
    bias: bool = False
    accuracy: Accuracy = "float32"
    accelerators: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "bits", _checked_bits(self.kind, self.bits, self.codebooks))
        if self.activation not in activations_of(self.kind):
            raise ValueError(f"kind {self.kind!r} does not go with activation {self.activation!r}")

    @property
    def widths(self) -> tuple[float, ...]:
        """Sorted distinct bit widths over all projections."""
        return tuple(sorted({b for group in self.bits for b in group}))

    @property
    def projections(self) -> tuple[str, ...]:
        """Names of the weights, in the order of ``bits``."""
        return PROJECTIONS[self.kind]

    @property
    def fused(self) -> bool:
        """Whether these are experts with all that they compute, not a linear."""
        return len(self.projections) > 1

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        """(inputs, outputs) of each of the projections."""
        first = self.hidden, self.intermediate
        return (first,) * self.side_by_side + ((first[::-1],) if self.fused else ())

    @property
    def outputs(self) -> tuple[int, ...]:
        """Padded columns of each product: of what reads x, then of down; for a linear, of itself."""
        sizes = (self.intermediate, self.hidden) if self.fused else (self.intermediate,)
        return tuple(map(codec.padded, sizes))

    @property
    def side_by_side(self) -> int:
        """Weights that the first product has for each column: gate and up, or one."""
        return len(self.projections) - self.fused

    @property
    def rows_per_matrix(self) -> float:
        """Rows that share a weight: all of them, or their mean over the experts that even routing reaches."""
        if self.experts == 1:
            return float(self.rows * self.top_k)
        reached = self.experts * (1 - (1 - min(self.top_k, self.experts) / self.experts) ** max(1, self.rows))
        return max(1.0, self.rows * self.top_k / reached)

    @classmethod
    def linear(
        cls,
        hidden: int,
        out: int,
        *,
        rows: int = 1,
        experts: int = 1,
        bits: float | Iterable[float] = 4,
        codebooks: str | Iterable[str] = "mul1",
        dtype: str | None = None,
        device: str = "cpu",
        bias: bool = False,
        accuracy: str = "float32",
        accelerators: bool = False,
    ) -> Problem:
        """The product with one weight, or with one projection of several experts.

        Args:
            hidden: Logical input size.
            out: Logical output size.
            rows: Rows of x; of several experts: slots. Default: ``1``.
            experts: Weights, of which each row takes one. Default: ``1``.
            bits: The bit width, or all that occur. Default: ``4``.
            codebooks: The codebook, or all that occur. Default: ``"mul1"``.
            dtype: Dtype of x. Default: ``None``, the usual one of the device, see :data:`USUAL_DTYPE`.
            device: ``"cpu"`` or ``"gpu"``. Default: ``"cpu"``.
            bias: Whether there is a bias. Default: ``False``.
            accuracy: One of :data:`ACCURACIES`. Default: ``"float32"``.
            accelerators: See :class:`Problem`. Default: ``False``.
        """
        widths = bits if isinstance(bits, Iterable) else (bits,)
        return cls(
            "linear",
            rows,
            1,
            hidden,
            out,
            experts,
            _distinct((width,) for width in widths),
            _distinct([codebooks] if isinstance(codebooks, str) else codebooks),
            "none",
            dtype or USUAL_DTYPE[device],
            device,
            bias=bias,
            accuracy=accuracy,
            accelerators=accelerators,
        )

    @classmethod
    def swiglu(
        cls,
        hidden: int,
        intermediate: int,
        *,
        rows: int = 1,
        experts: int = 1,
        top_k: int = 1,
        bits: float | Iterable[Triple] = 4,
        codebooks: str | Iterable[str] = "mul1",
        activation: str = "silu",
        dtype: str | None = None,
        device: str = "cpu",
        combine: bool = False,
        bias: bool = False,
        accuracy: str = "float32",
        accelerators: bool = False,
    ) -> Problem:
        """The experts of a layer, of three matrices.

        Args:
            hidden: Logical hidden size.
            intermediate: Size between gate/up and down; its padded size is what the kernels see.
            rows: Tokens, before top-k. Default: ``1``.
            experts: Experts of the layer. Default: ``1``.
            top_k: Experts per token. Default: ``1``.
            bits: The width of all weights, or all (gate, up, down) that occur. Default: ``4``.
            codebooks: The codebook, or all that occur. Default: ``"mul1"``.
            activation: One of :data:`ACTIVATIONS`. Default: ``"silu"``.
            dtype: Dtype of x. Default: ``None``, the usual one of the device, see :data:`USUAL_DTYPE`.
            device: ``"cpu"`` or ``"gpu"``. Default: ``"cpu"``.
            combine: Whether scores are given. Default: ``False``.
            bias: Whether any projection has a bias. Default: ``False``.
            accuracy: One of :data:`ACCURACIES`. Default: ``"float32"``.
            accelerators: See :class:`Problem`. Default: ``False``.
        """
        return cls(
            "swiglu",
            rows,
            top_k,
            hidden,
            codec.padded(intermediate),
            experts,
            _distinct(map(tuple, bits) if isinstance(bits, Iterable) else [(bits,) * 3]),
            _distinct([codebooks] if isinstance(codebooks, str) else codebooks),
            activation,
            dtype or USUAL_DTYPE[device],
            device,
            combine=combine,
            bias=bias,
            accuracy=accuracy,
            accelerators=accelerators,
        )

    @classmethod
    def mlp(
        cls,
        hidden: int,
        intermediate: int,
        *,
        bits: float | Iterable[tuple[float, float]] = 4,
        activation: str = "relu_squared",
        **others: Any,
    ) -> Problem:
        """The experts of a layer, of two matrices.

        Args:
            hidden: Logical hidden size.
            intermediate: Size between up and down; its padded size is what the kernels see.
            bits: The width of all weights, or all (up, down) that occur. Default: ``4``.
            activation: One of :data:`UNGATED`. Default: ``"relu_squared"``.
            others: What else :meth:`swiglu` takes.
        """
        pairs = _distinct(map(tuple, bits) if isinstance(bits, Iterable) else [(bits,) * 2])
        return replace(cls.swiglu(hidden, intermediate, **others), kind="mlp", bits=pairs, activation=activation)

    @classmethod
    def of(cls, layer: Asks, rows: int, dtype: object, device: str, *, combine: bool = False) -> Problem:
        """The problem that a layer (or weight, or bank) poses for a number of rows.

        Args:
            layer: Anything with a ``problem(rows, dtype, device, combine)`` method: TrellisLinear, TrellisSwitchGLU.
            rows: Tokens, before top-k.
            dtype: Dtype of x: an ``mx.Dtype`` or its name.
            device: ``"cpu"`` or ``"gpu"``.
        """
        return layer.problem(rows, dtype, device, combine=combine)


@lru_cache(maxsize=4096)
def _checked_bits(kind: str, bits: tuple, codebooks: tuple[str, ...]) -> tuple[tuple[float, ...], ...]:
    """The widths of a problem as ``codec.WIDTHS`` writes them."""
    if kind not in PROJECTIONS:
        raise ValueError(f"kind must be one of {', '.join(PROJECTIONS)}, got {kind!r}")
    wanted = len(PROJECTIONS[kind])
    if any(len(group) != wanted for group in bits):
        raise ValueError(f"each element of bits must have {wanted} widths for kind {kind!r}")
    for name, values in (("bits", bits), ("codebooks", codebooks)):
        if list(values) != sorted(set(values)):
            raise ValueError(f"{name} must be sorted and distinct")
    written = tuple(tuple(codec.as_width(width) for width in group) for group in bits)
    halves = [width for group in written for width in group if codec.is_half_rate(width)]
    if halves and "mul1" not in codebooks:
        raise ValueError(f"half rates exist for mul1 only, got {halves[0]} bits with codebooks {', '.join(codebooks)}")
    return written


def _distinct(values: Iterable) -> tuple:
    return tuple(sorted(set(values)))
