"""A whole model's token and prompt: attention, router, experts, head, the gaps between dispatches, command buffers.

What runs between the products is MLX's: a fixed cost per dependent stage at one row, bytes at many. Building graphs and
sampling on the CPU are left out: with async_eval they run beside the GPU, which is faster than them on no chip here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

from bench.metal import affine, layer
from bench.metal.chips import CHIPS, STAGE_US, Chip, End
from bench.metal.model import Work, layer_time, stages, work_time
from bench.metal.predict import default_on
from bench.metal.prompts import matrix_rate
from mlx_marlin import codec, kernels
from mlx_marlin.kernels.config import KernelConfig
from mlx_marlin.kernels.problem import Problem
from mlx_marlin.profile.uncertainty import Range

SHOWN = ("M1", "M2 Max", "M4", "M4 Max", "M5", "M5 Max")
BITS = (2.5, 3, 4)
HEAD_BITS = 6  # what EXL3 models have
CONTEXT = 1024  # keys that a token's attention reads
PROMPT = 2048  # tokens, mlx-lm's step
# A commit of MLX's costs the GPU so much; 20 us on M3 Ultra (mlx#4521). High: what each of 144 commits fewer per token
# saved on M1 Ultra (vllm-metal#637). Higher limits bring nothing on M5 Max (mlxcel#358).
BOUNDARY_US = {"M5": Range(0.0, 0.0, 20.0)}
OTHER_BOUNDARY_US = Range(0.0, 20.0, 43.0)
# MLX commits after 40 or 50 operations, or when its inputs have 40 or 50 Mi elements, those of all experts.
OPERATIONS_PER_BUFFER = ELEMENTS_PER_BUFFER = 45
OPERATIONS_PER_LAYER = 28
AFFINE_ELEMENTS = 8  # weights of 4 bits in one element
# Dependent arithmetic per token where a gated delta net walks over a prompt, in clocks: an estimate.
DELTA_CLOCKS = 100
# Stages of a layer's router, sums and residuals: norm, logits, softmax, partition, products with scores, sum, residual.
EXPERT_STAGES = 7
# Another expert beside them, of two linears and an activation, with its gate.
SHARED_STAGES = 3
HEAD_STAGES = 4  # embedding, norm, two of sampling
# Halves that a token's values take between the products, read and written, in multiples of the hidden size: norms 4,
# residuals 6, keys, queries and their rotation 10, the experts' rows by scores and their sum 25.
MOVED = 45
# What is worth looking at for one row, of the tiles that the ranking of predictions takes: columns, simdgroups.
ONE_ROW_TILES = ((32, 8), (64, 12), (128, 8), (128, 16))


@dataclass(frozen=True)
class Attention:
    """One kind of attention.

    Attributes:
        layers: That have it.
        linears: (in, out) side by side, each group waiting for the one before.
        stages: MLX's own: norm, norms of queries and keys, rotation, cache, attention, residual.
        width: Of all heads, where queries see all keys; 0 where a state takes their place.
        cached: Values per token that the cache keeps.
    """

    layers: int
    linears: tuple[tuple[tuple[int, int], ...], ...]
    stages: int
    width: int
    cached: int


@dataclass(frozen=True)
class Model:
    """A mixture-of-experts model."""

    name: str
    hidden: int
    intermediate: int
    experts: int
    top_k: int
    shared: int
    vocabulary: int
    attention: tuple[Attention, ...]

    @property
    def layers(self) -> int:
        return sum(a.layers for a in self.attention)


QWEN3_30B = Model(
    *("Qwen3-30B-A3B", 2048, 768, 128, 8, 0, 151936),
    (Attention(48, (((2048, 4096), (2048, 512), (2048, 512)), ((4096, 2048),)), 6, 4096, 1024),),
)
# Three layers of gated delta nets (norm, concatenation, convolution, activation, two of normalising, the net, two of
# the gated norm, residual) to one of attention with gates.
QWEN35_35B = Model(
    *("Qwen3.5-35B-A3B", 2048, 512, 256, 8, 512, 248320),
    (
        Attention(30, (((2048, 8192), (2048, 4096)), ((4096, 2048),)), 10, 0, 0),
        Attention(10, (((2048, 8192), (2048, 512), (2048, 512)), ((4096, 2048),)), 8, 4096, 1024),
    ),
)
MODELS = (QWEN3_30B, QWEN35_35B)


def _codebook(bits: float) -> str:
    return "mul1" if codec.is_half_rate(bits) else "mcg"


def _candidates(problem: Problem, chip: Chip) -> list[KernelConfig]:
    default = default_on(problem, chip)
    if problem.rows > 1:
        return [default]
    tiles = (KernelConfig(kernels.make_name("decode"), 1, *t, True, "decode") for t in ONE_ROW_TILES)
    return [default, *(c for c in tiles if kernels.feasible(problem, c) is None)]


@cache
def fastest(problem: Problem, chip: Chip) -> tuple[Work, ...]:
    """The dispatches of the config that is predicted fastest, of a few."""
    return min((layer.work(problem, c) for c in _candidates(problem, chip)), key=lambda work: layer_time(work, chip))


def _side_by_side(parts: list[tuple[Work, ...]]) -> list[Work]:
    joined: list[Work] = []
    for works in parts:
        first = len(joined)
        joined += [replace(w, after=tuple(first + a for a in w.after)) for w in works]
    return joined


def _time(work: list[Work] | tuple[Work, ...], chip: Chip, end: End) -> float:
    return work_time(work, chip, end) + stages(work) * getattr(STAGE_US, end)


class Ours:
    """Products with trellis weights of one width; the head has its own."""

    def __init__(self, bits: float, accuracy: str = "float32"):
        self.bits, self.accuracy = bits, accuracy

    def _weight(self, size: tuple[int, int], rows: int, chip: Chip, bits: float) -> tuple[Work, ...]:
        problem = Problem.linear(
            *size,
            rows=rows,
            bits=bits,
            codebooks=_codebook(bits),
            device="gpu",
            accuracy=self.accuracy,
            accelerators=chip.has_accelerators,
        )
        return fastest(problem, chip)

    def linears(self, sizes: tuple[tuple[int, int], ...], rows: int, chip: Chip, end: End) -> float:
        return _time(_side_by_side([self._weight(s, rows, chip, self.bits) for s in sizes]), chip, end)

    def head(self, model: Model, chip: Chip, end: End) -> float:
        return _time(self._weight((model.hidden, model.vocabulary), 1, chip, HEAD_BITS), chip, end)

    def experts(self, model: Model, rows: int, chip: Chip, end: End) -> float:
        problem = Problem.swiglu(
            model.hidden,
            model.intermediate,
            rows=rows,
            experts=model.experts,
            top_k=model.top_k,
            bits=self.bits,
            codebooks=_codebook(self.bits),
            device="gpu",
            accuracy=self.accuracy,
            accelerators=chip.has_accelerators,
        )
        return _time(fastest(problem, chip), chip, end)

    def buffers(self, model: Model) -> float:
        """Commits per layer: experts count with those that a call reads."""
        return OPERATIONS_PER_LAYER / OPERATIONS_PER_BUFFER


class Affine:
    """MLX's affine products of 4 bits, or others of as many bits that read as well."""

    def __init__(self, bits: float = affine.BITS):
        self.bits = bits

    def linears(self, sizes: tuple[tuple[int, int], ...], rows: int, chip: Chip, end: End) -> float:
        return sum(affine.dense_us(k * n, rows, chip, end, self.bits) for k, n in sizes) + getattr(STAGE_US, end)

    def head(self, model: Model, chip: Chip, end: End) -> float:
        return affine.dense_us(model.hidden * model.vocabulary, 1, chip, end, self.bits) + getattr(STAGE_US, end)

    def experts(self, model: Model, rows: int, chip: Chip, end: End) -> float:
        sizes = model.hidden, model.intermediate
        problem = Problem.swiglu(*sizes, rows=rows, experts=model.experts, top_k=model.top_k, device="gpu")
        fixed = affine.stages(problem) * getattr(STAGE_US, end)
        return affine.experts_us(problem, chip, end, self.bits) + fixed

    def buffers(self, model: Model) -> float:
        """Commits per layer: a stack counts with all of its experts."""
        elements = model.experts * 3 * model.hidden * model.intermediate / AFFINE_ELEMENTS / 2**20
        return OPERATIONS_PER_LAYER / OPERATIONS_PER_BUFFER + elements / ELEMENTS_PER_BUFFER


def _attention(model: Model, products: Ours | Affine, rows: int, chip: Chip, end: End) -> float:
    total = 0.0
    for a in model.attention:
        us = sum(products.linears(group, rows, chip, end) for group in a.linears) + a.stages * getattr(STAGE_US, end)
        if rows == 1:
            us += affine.reading_us(2 * a.cached * CONTEXT, chip, end)
        elif a.width:
            us += rows * rows * a.width / matrix_rate(chip)  # half of all pairs, twice
        else:
            us += rows * DELTA_CLOCKS / (chip.ghz * 1e3)
        total += a.layers * us
    return total


def _shared(model: Model, products: Ours | Affine, rows: int, chip: Chip, end: End) -> float:
    """An expert for all rows, beside the others: what it waits for is in their time."""
    if not model.shared:
        return 0.0
    inward, outward = (model.hidden, model.shared), (model.shared, model.hidden)
    return sum(products.linears(group, rows, chip, end) for group in ((inward, inward), (outward,))) + (
        SHARED_STAGES - 2
    ) * getattr(STAGE_US, end)


def call_us(model: Model, products: Ours | Affine, rows: int, chip: Chip, end: End) -> float:
    """Microseconds of a call of the model with so many tokens, the head for the last of them."""
    stage = getattr(STAGE_US, end)
    boundary = getattr(BOUNDARY_US.get(chip.family, OTHER_BOUNDARY_US), end)
    by_layer = (
        products.experts(model, rows, chip, end)
        + _shared(model, products, rows, chip, end)
        + EXPERT_STAGES * stage
        + products.buffers(model) * boundary
        + affine.reading_us(2 * MOVED * model.hidden * rows, chip, end)
    )
    head = products.head(model, chip, end) + HEAD_STAGES * stage
    return _attention(model, products, rows, chip, end) + model.layers * by_layer + head


def per_second(model: Model, products: Ours | Affine, rows: int, chip: Chip) -> Range:
    """Tokens per second: the slowest, the likely and the fastest end."""
    return Range(*(1e6 * rows / call_us(model, products, rows, chip, end) for end in ("high", "likely", "low")))


def _rounded(found: Range) -> list[float]:
    return [round(getattr(found, end), 1) for end in Range.__struct_fields__]


def predict(bits: tuple[float, ...] = BITS, chips: tuple[str, ...] = SHOWN) -> list[dict]:
    """Tokens per second of generation and of a prompt, ours and MLX's affine 4 bits."""
    rows = []
    for model in MODELS:
        for chip in map(CHIPS.__getitem__, chips):
            beside = {"token": _rounded(per_second(model, Affine(), 1, chip))}
            beside["prompt"] = _rounded(per_second(model, Affine(), PROMPT, chip))
            for width in bits:
                row = {"model": model.name, "chip": chip.name, "bits": width}
                row["token"] = _rounded(per_second(model, Ours(width), 1, chip))
                row["prompt"] = _rounded(per_second(model, Ours(width), PROMPT, chip))
                if chip.has_accelerators:
                    row["prompt, half"] = _rounded(per_second(model, Ours(width, "half"), PROMPT, chip))
                rows.append(row | {"affine 4 bits": beside})
    return rows


def show(rows: list[dict]) -> None:
    """Print the table."""
    print("PREDICTED, not measured: tokens per second, low to high")
    for row in rows:
        half = f", half {row['prompt, half'][1]:.0f}" if "prompt, half" in row else ""
        text = {k: "{1:.0f} ({0:.0f} to {2:.0f})".format(*row[k]) for k in ("token", "prompt")}
        mlx = row["affine 4 bits"]
        print(
            f"{row['model']:16s} {row['chip']:7s} {row['bits']} bits: token {text['token']}, prompt {text['prompt']}"
            f"{half}; MLX affine 4 bits {mlx['token'][1]:.0f} and {mlx['prompt'][1]:.0f}"
        )
