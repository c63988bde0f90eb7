"""The experts of a layer: one projection of all of them (:class:`ExpertStack`), and all (:class:`ExpertBank`)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import mlx.core as mx
import numpy as np

from .. import codec
from .trellis import TrellisWeight, logical_size

_FORMATS = {codec.format_word(*pair): pair for pair in codec.FORMATS}


class ExpertStack:
    """One projection (gate, up or down) of all experts of a layer, stacked once for the kernels.

    Its arrays are contiguous and evaluated: they belong to no later graph, trace or thread.

    Attributes:
        codes: uint32, flat: the experts' trellis words one after the other, each in EXL3's own tile order.
        offsets: int64 ``[experts]``: where each expert begins in ``codes``, in words.
        formats: uint32 ``[experts]``, see :func:`codec.format_word`.
        suh: float16 ``[experts, k]``.
        svh: float16 ``[experts, n]``.
        bias: float32 ``[experts, n]`` or ``None``.
        bits: Bits per weight of each expert.
        codebooks: Codebook of each expert.
        in_features, out_features: Logical sizes.

    Args:
        codes, formats, suh, svh, bias: As above.
        in_features, out_features: Logical sizes. Default: the padded ones.

    Raises:
        ValueError: If the arrays do not fit together.
    """

    bits: tuple[float, ...]
    codebooks: tuple[str, ...]
    _prepared: object  # what ops make of it; absent until then

    def __init__(
        self,
        codes: mx.array,
        formats: mx.array,
        suh: mx.array,
        svh: mx.array,
        bias: mx.array | None = None,
        in_features: int | None = None,
        out_features: int | None = None,
    ):
        experts, k, n = _stack_sizes(codes, formats, suh, svh, bias)
        self.in_features = logical_size("in_features", in_features, k)
        self.out_features = logical_size("out_features", out_features, n)
        words = np.array(formats).tolist()
        if not _FORMATS.keys() >= set(words):
            raise ValueError(
                f"formats must be 2 * bits | codebook id << 8 with bits one of {', '.join(map(str, codec.WIDTHS))} "
                f"(half rates with mul1 only), got {words}"
            )
        self.bits, self.codebooks = zip(*(_FORMATS[word] for word in words))
        sizes = np.array([_code_words(bits, k, n) for bits in self.bits], np.int64)
        if codes.size != sizes.sum():
            raise ValueError(
                f"codes has {codes.size} words, but {experts} experts of [{k}, {n}] at {list(self.bits)} bits "
                f"have {sizes.sum()}"
            )
        self.codes, self.formats, self.suh, self.svh = (mx.contiguous(a) for a in (codes, formats, suh, svh))
        self.bias = None if bias is None else mx.contiguous(bias)
        self.offsets = mx.array(np.concatenate([[0], np.cumsum(sizes)[:-1]]).astype(np.int64))
        mx.eval(self.arrays)

    @property
    def arrays(self) -> list[mx.array]:
        """Codes, offsets, formats, suh, svh and, where there is one, the bias: in the order of the kernels."""
        arrays = [self.codes, self.offsets, self.formats, self.suh, self.svh]
        return arrays if self.bias is None else [*arrays, self.bias]

    @classmethod
    def of(cls, name: str, weights: Sequence[TrellisWeight]) -> ExpertStack:
        """Stack one weight per expert; ``name`` is used in errors."""
        first = _same_sizes(name, weights)
        formats = [codec.format_word(w.bits, w.codebook) for w in weights]
        return cls(
            mx.concatenate([w.trellis.reshape(-1).view(mx.uint32) for w in weights]),
            mx.array(np.array(formats, np.uint32)),
            mx.stack([w.suh for w in weights]),
            mx.stack([w.svh for w in weights]),
            stacked_biases([w.bias for w in weights], first.padded_shape[1]),
            first.in_features,
            first.out_features,
        )

    @property
    def padded_shape(self) -> tuple[int, int]:
        """``(k, n)`` as stored."""
        return self.suh.shape[1], self.svh.shape[1]

    def __getitem__(self, e: int) -> TrellisWeight:
        """The weight of one expert."""
        k, n = self.padded_shape
        bits = self.bits[e]  # IndexError beyond the last
        start = int(np.array(self.offsets)[e])
        codes = self.codes[start : start + _code_words(bits, k, n)].view(mx.int16)
        trellis = codes.reshape(k // 16, n // 16, codec.words_per_tile(bits))
        bias = None if self.bias is None else self.bias[e]
        sizes = self.in_features, self.out_features
        return TrellisWeight(trellis, self.suh[e], self.svh[e], self.codebooks[e], bias, *sizes)

    def __getstate__(self) -> dict:
        """Without what ops keep here, which a copy makes again."""
        return {name: value for name, value in self.__dict__.items() if name != "_prepared"}


def stacked_biases(biases: Sequence[mx.array | None], n: int) -> mx.array | None:
    """float32 ``[experts, n]``, zero where an expert has none; ``None`` if none has."""
    if all(bias is None for bias in biases):
        return None
    return mx.stack([mx.zeros((n,), mx.float32) if b is None else b.astype(mx.float32) for b in biases])


def _code_words(bits: float, k: int, n: int) -> int:
    """32-bit words of an expert's codes."""
    return codec.words_per_tile(bits) * k * n // (2 * codec.TILE_SIZE)


def _stack_sizes(
    codes: mx.array, formats: mx.array, suh: mx.array, svh: mx.array, bias: mx.array | None
) -> tuple[int, int, int]:
    """(experts, k, n) of a stack's arrays, after checking that they agree."""
    if formats.dtype != mx.uint32 or formats.ndim != 1 or not formats.size:
        raise ValueError(f"formats must be uint32 [experts], got {formats.dtype} {list(formats.shape)}")
    if codes.dtype != mx.uint32 or codes.ndim != 1:
        raise ValueError(f"codes must be flat uint32, got {codes.dtype} {list(codes.shape)}")
    experts = formats.size
    for name, scale in (("suh", suh), ("svh", svh)):
        aligned = scale.ndim == 2 and scale.shape[0] == experts and scale.shape[1] % codec.HADAMARD_SIZE == 0
        if scale.dtype != mx.float16 or not aligned or not scale.size:
            raise ValueError(
                f"{name} must be float16 [{experts}, a positive multiple of {codec.HADAMARD_SIZE}], "
                f"got {scale.dtype} {list(scale.shape)}"
            )
    if bias is not None and (bias.dtype != mx.float32 or bias.shape != svh.shape):
        raise ValueError(f"bias must be float32 {list(svh.shape)}, got {bias.dtype} {list(bias.shape)}")
    return experts, suh.shape[1], svh.shape[1]


def _listed(name: str, weights: Iterable[TrellisWeight]) -> list[TrellisWeight]:
    if not isinstance(weights, Iterable):
        raise ValueError(f"{name} must be a list with one TrellisWeight per expert, got {type(weights).__name__}")
    return list(weights)


def _same_sizes(name: str, weights: Sequence[TrellisWeight]) -> TrellisWeight:
    if not weights:
        raise ValueError(f"{name} needs at least one expert")
    for i, w in enumerate(weights):
        if not isinstance(w, TrellisWeight):
            raise ValueError(f"{name}[{i}] must be a TrellisWeight, got {type(w).__name__}")
        sizes, wanted = ((v.in_features, v.out_features, *v.padded_shape) for v in (w, weights[0]))
        if sizes != wanted:
            raise ValueError(f"{name}[{i}] is {w}, but all experts must have the sizes of {name}[0]: {weights[0]}")
    return weights[0]


Experts = ExpertStack | Iterable[TrellisWeight]
"""One projection of all experts: a weight for each, or stacked already."""


class ExpertBank:
    """The gate, up and down weights of all experts of a layer. Bits and codebook may differ per expert and projection.

    Args:
        gate: One :class:`TrellisWeight` per expert, hidden to intermediate; or all of them, stacked. ``None`` for
            experts of two matrices, which have no gate.
        up: The same.
        down: The same, intermediate to hidden.

    Raises:
        ValueError: If the numbers of experts or the sizes do not fit together.
    """

    def __init__(self, gate: Experts | None, up: Experts, down: Experts):
        given = {"up": up, "down": down} if gate is None else {"gate": gate, "up": up, "down": down}
        listed = {name: w if isinstance(w, ExpertStack) else _listed(name, w) for name, w in given.items()}
        counts = [len(w.bits if isinstance(w, ExpertStack) else w) for w in listed.values()]
        if len(set(counts)) > 1:
            raise ValueError(f"{_enumerated(given)} must have one weight per expert, got {', '.join(map(str, counts))}")
        stacks = {name: w if isinstance(w, ExpertStack) else ExpertStack.of(name, w) for name, w in listed.items()}
        self.gate, self.up, self.down = stacks.get("gate"), stacks["up"], stacks["down"]
        check_projections(*stacks.values())

    @property
    def stacks(self) -> tuple[ExpertStack, ...]:
        """Gate where there is one, up and down."""
        return (self.up, self.down) if self.gate is None else (self.gate, self.up, self.down)

    @property
    def num_experts(self) -> int:
        return len(self.up.bits)

    @property
    def hidden(self) -> int:
        """Logical hidden size."""
        return self.up.in_features

    @property
    def intermediate(self) -> int:
        """Padded intermediate size: the padded width flows from gate and up into down."""
        return self.up.padded_shape[1]

    @property
    def triples(self) -> tuple[tuple[float, ...], ...]:
        """(gate, up, down) bits of each expert; (up, down) where there is no gate."""
        return tuple(zip(*(stack.bits for stack in self.stacks)))


def _enumerated(names: Iterable[str]) -> str:
    *most, last = names
    return f"{', '.join(most)} and {last}"


def check_projections(*stacks: ExpertStack) -> None:
    """Raise ValueError unless gate and up map hidden to one intermediate size, and down maps it back.

    Args:
        stacks: Gate, up and down; of experts without a gate, up and down.
    """
    *reading, down = stacks
    up = reading[-1]

    def sizes(stack: ExpertStack) -> str:
        return (
            f"{len(stack.bits)} experts of [{stack.in_features}, {stack.out_features}] "
            f"(stored as {list(stack.padded_shape)})"
        )

    same_inputs = all((s.in_features, s.padded_shape) == (up.in_features, up.padded_shape) for s in reading)
    maps_back = (down.out_features, down.padded_shape) == (up.in_features, up.padded_shape[::-1])
    if not same_inputs or not maps_back or len({len(stack.bits) for stack in stacks}) > 1:
        names = ("gate", "up", "down")[-len(stacks) :]
        found = ", ".join(f"{name} {sizes(stack)}" for name, stack in zip(names, stacks))
        raise ValueError(
            f"{' and '.join(names[:-1])} must map hidden to one intermediate size and down must map it back, for the "
            f"same experts; got {found}"
        )
