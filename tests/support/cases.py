"""The one list of problems that every backend is tested with, and their float64 reference.

Any bit pattern is a valid trellis, so weights are random words with scales of a trained model's size.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cache, lru_cache
from itertools import product

import mlx.core as mx
import numpy as np

from mlx_marlin import codec
from mlx_marlin.kernels import ACTIVATIONS, DTYPES, UNGATED, Problem
from mlx_marlin.ops import trellis_linear, trellis_mlp, trellis_swiglu
from mlx_marlin.weights.experts import ExpertBank
from mlx_marlin.weights.synthetic import random_weight
from mlx_marlin.weights.trellis import TrellisWeight
from tests.support.covering import covering_array
from tests.support.references import reference_experts, reference_linear

TOLERANCE = {"float32": 2e-5, "float16": 5e-4, "bfloat16": 4e-3}
"""Largest relative error of an output row."""

EXPERTS = 5
ROWS = (0, 1, 2, 3, 5, 8, 17, 64, 300)

MLP = {f"mlp_{name}": name for name in UNGATED}
"""Activations of experts without a gate, by what the axis calls them."""

# Logical (hidden, intermediate), or (in, out) of a linear. Files pad both to multiples of 128.
DIMS = {
    "block": (128, 128),
    "blocks": (256, 384),
    "padded": (192, 320),
    "odd": (333, 129),
    "wide": (128, 640),
    "narrow": (640, 128),
}

AXES = {
    "bits": codec.WIDTHS,
    "codebook": codec.CODEBOOKS,
    "dtype": DTYPES,
    "rows": ROWS,
    "dims": tuple(DIMS),
    # In an order whose selection has no case that hides a planted decoder in its rounding.
    "activation": (
        *("silu", "mlp_gelu_tanh", "swiglu_step", "mlp_relu_squared", "swiglu_oai", "mlp_silu"),
        *("swiglu_clamped", "none", "relu_squared", "situ", "gelu_tanh"),
    ),
}
"""The axes of the full product, but for half rates of other codebooks than mul1. Activation "none" is a linear, those
of :data:`MLP` are experts without a gate.
"""

FORMATS = tuple(f for f in product(codec.WIDTHS, codec.CODEBOOKS) if f[1] == "mul1" or not codec.is_half_rate(f[0]))
"""(bits, codebook) pairs that the format has."""

OPTIONS = {
    "mix": ("uniform", "bits", "codebooks", "both"),
    "bias": (False, True),
    "score_dtype": ("float32", "float16", "bfloat16"),
    "top_k": (1, 2, EXPERTS),
    "routing": ("random", "one_expert"),
    "scores": (False, True),
}
"""What varies beside the axes; a linear has the first value of each, except for the bias."""

# Standard deviation of gate and up outputs for normal inputs: high enough to reach the limit of 7.
_GAIN = 3.0


@dataclass(frozen=True)
class Case:
    """One problem: a value of every axis and option."""

    bits: float
    codebook: str
    dtype: str
    rows: int
    dims: str
    activation: str
    mix: str = "uniform"
    bias: bool = False
    top_k: int = 1
    routing: str = "random"
    scores: bool = False
    score_dtype: str = "float32"

    alpha = 1.702
    limit = 7.0

    def __str__(self) -> str:
        name = f"{self.codebook}-{self.bits}bit-{self.dtype}-{self.rows}x{self.dims}-{self.activation}"
        options = [
            str(getattr(self, o)) if type(values[0]) is str else f"{o}{getattr(self, o):d}"
            for o, values in OPTIONS.items()
            if getattr(self, o) != values[0]
        ]
        return "-".join([name, *options])

    @property
    def linear(self) -> bool:
        return self.activation == "none"

    @property
    def gated(self) -> bool:
        return self.activation in ACTIVATIONS

    @property
    def function(self) -> str:
        """The activation as the kernels call it."""
        return MLP.get(self.activation, self.activation)

    @property
    def tolerance(self) -> float:
        return TOLERANCE[self.dtype]

    def weight(self) -> TrellisWeight:
        """The weight of a linear."""
        return _linear(self.bits, self.codebook, self.dims, self.bias)

    def bank(self) -> ExpertBank:
        """The experts of a MoE layer."""
        return _bank(*self._bank_key)[0]

    def experts(self) -> dict[str, list[TrellisWeight]]:
        """The weights in the bank: ``gate`` where there is one, ``up`` and ``down``, a list each."""
        return _bank(*self._bank_key)[1]

    @property
    def _bank_key(self) -> tuple:
        return self.bits, self.codebook, self.dims, self.mix, self.bias, self.gated

    def problem(self, device: str = "cpu") -> Problem:
        """The case as the kernels see it."""
        hidden, intermediate = DIMS[self.dims]
        if self.linear:
            return Problem.linear(
                hidden,
                intermediate,
                rows=self.rows,
                bits=self.bits,
                codebooks=self.codebook,
                dtype=self.dtype,
                device=device,
                bias=self.bias,
            )
        bank = self.bank()
        make = Problem.swiglu if self.gated else Problem.mlp
        return make(
            hidden,
            bank.intermediate,
            rows=self.rows,
            experts=EXPERTS,
            top_k=self.top_k,
            bits=bank.triples,
            codebooks=[c for s in bank.stacks for c in s.codebooks],
            activation=self.function,
            dtype=self.dtype,
            device=device,
            combine=self.scores,
            bias=self.bias,
        )

    def inputs(self) -> tuple[mx.array, mx.array | None, mx.array | None]:
        """x [rows, hidden] in the case's dtype, indices uint32 and scores [rows, top_k] in theirs (or None)."""
        rng = _rng("inputs", self)
        x = random_rows(rng, self.rows, DIMS[self.dims][0], self.dtype)
        if self.linear:
            return x, None, None
        if self.routing == "one_expert":
            indices = np.full((self.rows, self.top_k), EXPERTS - 1)
        else:
            indices = rng.permuted(np.tile(np.arange(EXPERTS), (self.rows, 1)), axis=1)[:, : self.top_k]
        scores = mx.array(rng.dirichlet(np.ones(self.top_k), self.rows).astype(np.float32))
        scores = scores.astype(getattr(mx, self.score_dtype)) if self.scores else None
        return x, mx.array(indices.astype(np.uint32)), scores

    def run(self, x: mx.array, indices=None, scores: mx.array | None = None, **keywords) -> mx.array:
        """The op on inputs such as those of :meth:`inputs`; keywords: ``config`` and ``stream``."""
        if self.linear:
            return trellis_linear(x, self.weight(), **keywords)
        if not self.gated:
            return trellis_mlp(x, indices, self.bank(), scores=scores, activation=self.function, **keywords)
        numbers = {"alpha": self.alpha, "limit": self.limit}
        return trellis_swiglu(x, indices, self.bank(), scores=scores, activation=self.function, **numbers, **keywords)

    def reference(self, x, indices=None, scores=None) -> np.ndarray:
        """The exact result in float64, for x as it is (already rounded to its dtype)."""
        x = np.array(x.astype(mx.float32)).astype(np.float64)
        if self.linear:
            return reference_linear(x, self.weight())
        return reference_experts(
            x,
            np.array(indices),
            self.experts(),
            None if scores is None else np.array(scores.astype(mx.float32)),
            self.function,
            self.alpha,
            self.limit,
        )


def _rng(purpose: str, key) -> np.random.Generator:
    """A generator that depends on its arguments only, the same in every process."""
    return np.random.default_rng(list(f"{purpose} {key}".encode()))


def random_rows(rng: np.random.Generator, rows: int, size: int, dtype: str = "float32") -> mx.array:
    """Normal activations whose first channel of each 128 is an outlier, as trained models have them.

    The Hadamard transform spreads that channel evenly over its block, so a decoder that is wrong by a small
    constant (mul1 with offset 510 is 0.0018 off) is wrong by 1 % in every row, above the tolerance of all dtypes.
    """
    x = rng.standard_normal((rows, size), np.float32)
    x[:, :: codec.HADAMARD_SIZE] *= 16
    x[:, :: codec.HADAMARD_SIZE] += np.copysign(12, x[:, :: codec.HADAMARD_SIZE])
    return mx.array(x).astype(getattr(mx, dtype))


def random_experts(
    rng: np.random.Generator, hidden: int, intermediate: int, formats, bias: bool = False, gain: float = _GAIN
) -> dict[str, list[TrellisWeight]]:
    """Gate, up and down weights.

    Args:
        rng: Source of everything random.
        hidden, intermediate: Logical sizes.
        formats: Per expert, three (bits, codebook) pairs: gate, up, down.
        bias: Whether every projection has one.
        gain: Standard deviation of the gate and up outputs.
    """
    sizes = {
        "gate": (hidden, intermediate, gain),
        "up": (hidden, intermediate, gain),
        "down": (intermediate, hidden, 1.0),
    }
    return {
        name: [random_weight(rng, m, n, *expert[i], bias, g) for expert in formats]
        for i, (name, (m, n, g)) in enumerate(sizes.items())
    }


def expert_formats(bits: float, codebook: str, mix: str, experts: int = EXPERTS) -> list[tuple[tuple[float, str], ...]]:
    """(bits, codebook) of gate, up and down of each expert; a mix starts from the given values and goes round.

    Mixed bits of one codebook are its own; where codebooks are mixed too, a half rate brings mul1 with it.
    """
    widths = [w for w in codec.WIDTHS if mix == "both" or (w, codebook) in FORMATS]
    first = codec.CODEBOOKS.index(codebook)

    def chosen(e: int, p: int) -> tuple[float, str]:
        # 3 and 2 steps per expert: gate, up and down of one expert differ, and so do the experts.
        step = 3 * e + 2 * p if mix in ("bits", "both") else 0
        width = widths[(widths.index(bits) + step) % len(widths)]
        other = codec.CODEBOOKS[(first + e + p) % 3] if mix in ("codebooks", "both") else codebook
        return width, other if (width, other) in FORMATS else "mul1"

    return [tuple(chosen(e, p) for p in range(3)) for e in range(experts)]


@cache
def every_state(bits: float, codebook: str) -> tuple[TrellisWeight, np.ndarray]:
    """A weight that meets all 65536 states, and its inner matrix: a million random windows, from a seed that does."""
    words = np.random.default_rng(1).integers(0, 1 << 16, (64, 64, codec.words_per_tile(bits)), np.uint16)
    assert np.unique(codec.unpack(words.view(np.int16))).size == 1 << 16
    w = TrellisWeight(words.view(np.int16), np.ones(1024, np.float16), np.ones(1024, np.float16), codebook)
    return w, codec.inner(w)


@lru_cache(maxsize=32)
def _linear(bits: float, codebook: str, dims: str, bias: bool) -> TrellisWeight:
    rng = _rng("linear", (bits, codebook, dims, bias))
    return random_weight(rng, *DIMS[dims], bits, codebook, bias)


@lru_cache(maxsize=32)
def _bank(bits: float, codebook: str, dims: str, mix: str, bias: bool, gated: bool):
    rng = _rng("bank", (bits, codebook, dims, mix, bias))
    experts = random_experts(rng, *DIMS[dims], expert_formats(bits, codebook, mix), bias)
    if not gated:
        del experts["gate"]
    return bank_of(experts), experts


def bank_of(experts: dict[str, list[TrellisWeight]]) -> ExpertBank:
    """Of gate, up and down, or of up and down."""
    return ExpertBank(experts.get("gate"), experts["up"], experts["down"])


def row_error(actual, expected: np.ndarray) -> float:
    """Largest ``||actual - expected|| / ||expected||`` over the rows (last axis); infinite where that is not finite."""
    actual = np.array(actual.astype(mx.float32)) if isinstance(actual, mx.array) else np.asarray(actual)
    if actual.shape != expected.shape:
        raise AssertionError(f"the result has shape {list(actual.shape)}, expected {list(expected.shape)}")
    if not expected.size:
        return 0.0
    error = np.linalg.norm(actual.astype(np.float64) - expected, axis=-1)
    norm = np.linalg.norm(expected, axis=-1)
    ratio = np.divide(error, norm, out=np.where(error == 0, 0.0, np.inf), where=norm > 0)
    return float(np.where(np.isfinite(ratio), ratio, np.inf).max())


def check(case: Case, actual: mx.array, inputs: tuple, expected: np.ndarray | None = None) -> None:
    """Assert that a backend's result for ``case.inputs()`` has the right dtype, shape and values.

    expected: The reference, where it is known already.
    """
    assert actual.dtype == inputs[0].dtype, f"{case}: the result is {actual.dtype}, x is {inputs[0].dtype}"
    error = row_error(actual, case.reference(*inputs) if expected is None else expected)
    assert error <= case.tolerance, f"{case}: a row is {error:.2e} off, allowed are {case.tolerance:.0e}"


def legal(values: dict) -> bool:
    """Whether a (partial) choice of values is a case: a linear has no experts to mix or to choose.

    Scores that are not given have no dtype. Half rates exist for mul1 only.
    """
    if (values.get("bits", 1), values.get("codebook", "mul1")) not in FORMATS:
        return False
    if codec.is_half_rate(values.get("bits", 1)) and values.get("mix") == "codebooks":
        return False
    if values.get("scores") is False and values.get("score_dtype", "float32") != "float32":
        return False
    if values.get("activation") != "none":
        return True
    return all(values.get(o, OPTIONS[o][0]) == OPTIONS[o][0] for o in OPTIONS if o != "bias")


@lru_cache(maxsize=1)
def pairwise() -> tuple[Case, ...]:
    """A selection that covers every pair of values of any two axes or options.

    A case without rows computes nothing, so it counts only for the pairs that it alone can have.
    """
    axes = {**AXES, **OPTIONS}
    rows = covering_array({**axes, "rows": ROWS[1:]}, legal)
    for i in range(max(len(values) for axis, values in axes.items() if axis != "rows")):
        row = {axis: values[i % len(values)] for axis, values in axes.items()} | {"rows": 0}
        if (row["bits"], row["codebook"]) not in FORMATS:
            row["codebook"] = "mul1"
        if not legal(row):
            row |= {o: OPTIONS[o][0] for o in OPTIONS if o != "bias"}
        rows.append(row)
    return tuple(Case(**row) for row in rows)


@lru_cache(maxsize=1)
def full() -> tuple[Case, ...]:
    """Every combination of the axes; the options are drawn at random, the same in every run."""
    rng = np.random.default_rng(0)
    moe = [options for values in product(*OPTIONS.values()) if legal(options := dict(zip(OPTIONS, values)))]

    @cache
    def choices(**axes) -> list[dict]:
        """What options may be, by the axes that a restriction names: few of thousands of combinations."""
        return [options for options in moe if legal({**axes, **options})]

    cases = []
    for values in product(*AXES.values()):
        axes = dict(zip(AXES, values))
        if legal(axes):
            options = choices(**{a: axes[a] for a in ("bits", "codebook", "activation")})
            cases.append(Case(**axes, **options[rng.integers(len(options))]))
    return tuple(cases)


assert {f.name for f in fields(Case)} == {*AXES, *OPTIONS}
assert {*AXES["activation"]} == {"none", *ACTIVATIONS, *MLP}
