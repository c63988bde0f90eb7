"""What stands for the linears of a checkpoint while a host's ``sanitize`` moves tensors about.

A placeholder has one column, and row r of linear number j holds ``j << 32 | r``, so that what comes out of
``sanitize`` tells which rows of which linear ended where. Nothing of the weights is read meanwhile.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from ..codec import HADAMARD_SIZE, padded
from ..loader.directory import TrellisModelLoader
from ..loader.exl3 import PlainLinear, QuantizedLinear

# Phixtral calls them moe.mlp.
EXPERT = re.compile(r"(?P<block>(?P<layer>.+)\.(?:experts|moe\.mlp))\.(?P<expert>\d{1,9})\.(?P<projection>\w+)")

# Placeholders that one operation makes: each of its outputs keeps a list of the others.
_AT_ONCE = 128


@dataclass(frozen=True)
class LinearSource:
    """The rows (outputs) of a linear that make a weight of the model.

    Attributes:
        linear: The linear.
        blocks: Blocks of 128 outputs to take, or ``None`` for all.
        factor: What the stored outputs are to be multiplied with, the bias not: a power of two.
    """

    linear: QuantizedLinear | PlainLinear
    blocks: tuple[int, ...] | None
    factor: int = 1

    @property
    def quantized(self) -> QuantizedLinear:
        """The linear, for what only quantized ones have.

        Raises:
            ValueError: If it was left unquantized.
        """
        if isinstance(self.linear, PlainLinear):
            raise ValueError(f"{self.linear.name} is not quantized, but it must be here")
        return self.linear


class Placeholders:
    """Makes the placeholders and reads them back.

    Args:
        loader: The checkpoint.
        host: Name of the host, for error messages.
    """

    def __init__(self, loader: TrellisModelLoader, host: str):
        self.host = host
        self.directory = loader.directory
        self.plain = _plain_experts(loader)
        self.linears: list[QuantizedLinear | PlainLinear] = [*loader.linears.values(), *self.plain]

    def make(self) -> dict[str, mx.array]:
        alike: dict[int, list[int]] = {}
        for number, linear in enumerate(self.linears):
            alike.setdefault(linear.padded_shape[1], []).append(number)
        made: dict[int, mx.array] = {}
        for count, numbers in alike.items():
            for begin in range(0, len(numbers), _AT_ONCE):
                some = numbers[begin : begin + _AT_ONCE]
                codes = mx.array(np.array(some, np.uint64) << 32)[:, None] + mx.arange(count, dtype=mx.uint64)
                made.update(zip(some, mx.split(codes.reshape(-1, 1), len(some))))
        mx.eval(list(made.values()))
        return {f"{linear.name}.weight": made[number] for number, linear in enumerate(self.linears)}

    def read_joined(self, path: str, codes: np.ndarray, logical: int) -> list[tuple[LinearSource, int]]:
        """The sources of a weight that the host joins of several, in the order of its rows, and how many each has.

        Args:
            path: Of the weight.
            codes: Its rows.
            logical: How many it has in the model.
        """
        parts = np.split(codes, np.flatnonzero(np.diff(codes >> 32)) + 1)
        if len(codes) != logical and len({len(part) for part in parts}) == 1:
            parts = [part[: logical // len(parts)] for part in parts]  # the host joined them with their padding
        if sum(map(len, parts)) != logical:
            names = ", ".join(self.linears[int(part[0] >> 32)].name for part in parts)
            raise ValueError(f"{self.directory}: {names} have {len(codes)} outputs, but {path} wants {logical}")
        return [(self.read(path, part, len(part)), len(part)) for part in parts]

    def read_experts(self, path: str, codes: np.ndarray, logical: int) -> list[LinearSource]:
        """The sources of a projection of experts with these codes ``[experts, rows]``, by expert.

        All are looked at at once: as a rule each is a linear as it is stored, and there are thousands.
        """
        count = codes.shape[1]
        firsts = codes[:, :1]
        in_order = (codes - firsts == np.arange(count, dtype=codes.dtype)).all(axis=1) & (firsts[:, 0] % 2**32 == 0)
        sources = []
        for e, (number, is_whole) in enumerate(zip((firsts[:, 0] >> 32).tolist(), in_order.tolist())):
            linear = self.linears[number]
            if is_whole and linear.padded_shape[1] == count == logical:
                sources.append(LinearSource(linear, None))
            else:
                sources.append(self.read(f"{path}[{e}]", codes[e], logical))
        return sources

    def read(self, path: str, codes: np.ndarray, logical: int) -> LinearSource:
        """The source of a weight with these codes that has ``logical`` rows in the model."""
        numbers, rows = codes >> 32, (codes & 0xFFFFFFFF).astype(np.int64)
        if (numbers != numbers[0]).any():
            names = [self.linears[n].name for n in np.unique(numbers)]
            raise ValueError(
                f"{self.directory}: {self.host} joins {names[0]} and {names[1]} into {path}; linears that are "
                "quantized separately cannot be joined"
            )
        linear = self.linears[int(numbers[0])]
        where = f"{self.directory}: {linear.name}, which {self.host} puts at {path},"
        start, count = int(rows[0]), len(rows)
        if not np.array_equal(rows, np.arange(start, start + count)):
            raise ValueError(f"{where} has its outputs reordered there; a trellis cannot be reordered")
        stored = linear.padded_shape[1]
        if start == 0 and count in (stored, logical) and stored == padded(logical):
            return LinearSource(linear, None)
        if start % HADAMARD_SIZE or count != logical or (count % HADAMARD_SIZE and start + count != stored):
            raise ValueError(
                f"{where} gives outputs {start} to {start + count} of {stored} where the model wants {logical}; "
                f"EXL3 pads a model's size to the next multiple of {HADAMARD_SIZE} and can be cut there only"
            )
        first = start // HADAMARD_SIZE
        return LinearSource(linear, tuple(range(first, first + padded(count) // HADAMARD_SIZE)))


def _plain_experts(loader: TrellisModelLoader) -> list[PlainLinear]:
    """The unquantized projections of experts in layers of which others are quantized, checked.

    Raises:
        ValueError: If experts of such a layer are missing, or differ in size.
    """
    first: dict[tuple[str, str], QuantizedLinear | PlainLinear] = {}
    present: dict[tuple[str, str], set[int]] = {}
    blocks = {match["block"] for match in map(EXPERT.fullmatch, loader.quantized) if match}
    plain = []
    for name in loader.unquantized:
        match = EXPERT.fullmatch(name.removesuffix(".weight"))
        if name.endswith(".weight") and match and match["block"] in blocks:
            stem = name.removesuffix(".weight")
            found = {suffix: loader.unquantized.get(f"{stem}.{suffix}") for suffix in ("weight", "bias")}
            plain.append(PlainLinear(stem, {suffix: info for suffix, info in found.items() if info is not None}))
            plain[-1].check()
    linears: list[QuantizedLinear | PlainLinear] = [*loader.linears.values(), *plain]
    for linear in linears:
        match = EXPERT.fullmatch(linear.name)
        if match:
            group = (match["block"], match["projection"])
            present.setdefault(group, set()).add(int(match["expert"]))
            like = first.setdefault(group, linear)
            if linear.padded_shape != like.padded_shape:
                raise ValueError(
                    f"{loader.directory}: {linear.name} is a {list(linear.padded_shape)} matrix, but {like.name} is "
                    f"{list(like.padded_shape)}; the experts of a layer have one size"
                )
    _check_complete(loader, present)
    return plain


def _check_complete(loader: TrellisModelLoader, present: dict[tuple[str, str], set[int]]) -> None:
    in_block: dict[str, set[int]] = {}
    for (block, _), experts in present.items():
        in_block.setdefault(block, set()).update(experts)
    for (block, projection), experts in present.items():
        if len(experts) != max(in_block[block]) + 1:  # numbers may be anything up to 10^9
            missing = next(i for i in range(len(experts) + 1) if i not in experts)
            name = f"{block}.{missing}.{projection}"
            raise ValueError(f"{loader.directory}: {name}.trellis is missing, but other experts of the layer are there")
