"""Predictions beside figures that the model was not made from (those that a range was made from are marked).

Of a peer's kernels ours are predicted for the same work; of MLX and llama.cpp their own products.
"""

from __future__ import annotations

from dataclasses import replace

from bench.metal import layer
from bench.metal.chips import CHIPS, Chip
from bench.metal.model import layer_time, time_range, work_time
from bench.metal.predict import default_on
from bench.metal.whole_model import MODELS, PROMPT, Affine, fastest, per_second
from mlx_marlin import kernels
from mlx_marlin.kernels.config import KernelConfig
from mlx_marlin.kernels.problem import Problem
from mlx_marlin.profile.uncertainty import Range

# What a layer of two and a half rows per tile and less may run.
FEW_ROW_TILES = ((1, 128, 8), (1, 128, 16), (1, 64, 12), (1, 32, 8), (2, 128, 8))
# sushi 1.2.1. Its third of 2.25 bits is a mixture: half of 2, half of 2.5 bits here.
SMALL = Problem.swiglu(2560, 640, experts=512, top_k=10, bits=3, codebooks="mcg", device="gpu")
WIDE = Problem.swiglu(4096, 2048, experts=256, top_k=8, bits=2, codebooks="mul1", device="gpu")
WIDE_US = {1: 146, 2: 276, 4: 498, 8: 912}
# A product that takes 10.9 ms at 6.2 TFLOPS with 2048 rows.
SQUARE = Problem.linear(4096, 4096, rows=2048, bits=3, codebooks="mcg", device="gpu")
# (chip, tokens per second: lowest, highest published, products): models of 30 to 35 B parameters, 3 B of them active.
TOKENS = (
    ("MLX 4 bit", "M5 Max", 133, 133, Affine()),
    ("MLX 4 bit", "M4 Max", 113, 113, Affine()),
    ("MLX 4 bit", "M4 Pro", 79, 79, Affine()),
    ("MLX 4 bit", "M2 Max", 70, 80, Affine()),
    ("MLX 4 bit", "M4", 42.9, 42.9, Affine()),
    ("MLX 6 bit", "M3 Ultra", 84.5, 84.5, Affine(6.5)),
    ("llama.cpp Q4_K_M", "M5 Max", 110, 110, Affine(4.85)),
)
PROMPTS = (("MLX 4 bit", "M5 Max", 2757), ("MLX 4 bit", "M4 Max", 1754))


# Where a published figure is outside of the predicted range, and why.
OUTSIDE = {
    "the same, 7 rows": "a peer's kernels, whose chain of three takes 97 us per row there; ours issue less per weight "
    "by count, which nobody has timed on an M2",
    "mul1 over mcg, 1 row": "of the peer's own two loops, whose byte sum may have more operations than ours",
    "mul1 over mcg, prompt": "the peer's products wait for decoding, ours for the accelerators by this model",
    "a linear of 4096 x 4096, simdgroup matrices, 2048 rows": "the peer stages its operands in threadgroup memory; the "
    "model has neither that nor waits. Ours may be as far below their prediction",
    "MLX 4 bit, prompt, M5 Max": "27 % of the accelerators' rate: MLX's version, the prompt's length and whether the "
    "accelerators were used are not said. Our prompts on M5 may be as far below their prediction",
}


def _fastest_few(problem: Problem, chip: Chip):
    configs = [KernelConfig(kernels.make_name("decode"), *tiles, True, "decode") for tiles in FEW_ROW_TILES]
    legal = [default_on(problem, chip), *(c for c in configs if kernels.feasible(problem, c) is None)]
    return min((layer.work(problem, c) for c in legal), key=lambda work: layer_time(work, chip))


def _few_us(problem: Problem, chip: Chip) -> Range:
    return time_range(_fastest_few(problem, chip), chip)


def _mean(a: Range, b: Range) -> Range:
    return Range(*((getattr(a, end) + getattr(b, end)) / 2 for end in Range.__struct_fields__))


def _row(
    what: str, chip: str, unit: str, published: tuple[float, float], found: Range, made_from: bool = False
) -> dict:
    low, high = published
    within = found.low <= high and low <= found.high
    return {
        "what": what,
        "chip": chip,
        "unit": unit,
        "published": list(published),
        "predicted": [float(f"{getattr(found, end):.4g}") for end in Range.__struct_fields__],
        "within": within,
        "note": "" if within else OUTSIDE.get(what) or OUTSIDE.get(f"{what}, {chip}", ""),
        "a range was made from it": made_from,
    }


def _peer_layers() -> list[dict]:
    m2, m5 = CHIPS["M2 Max"], CHIPS["M5 Max"]
    rows = [
        _row("experts 2560 x 640, top 10, 3 bits, 1 row", "M5 Max", "us", (48.8, 50.8), _few_us(SMALL, m5)),
        _row("the same", "M2 Max", "us", (149, 149), _few_us(SMALL, m2), True),
        _row("the same, 7 rows", "M2 Max", "us", (730, 730), _few_us(replace(SMALL, rows=7), m2)),
    ]
    wide, by_rows = replace(WIDE, bits=((2.5, 2.5, 2.5),)), {}
    for count, us in WIDE_US.items():
        found = _mean(*(_few_us(replace(p, rows=count), m5) for p in (WIDE, wide)))
        by_rows[count] = found
        what = f"experts 4096 x 2048, top 8, 2.25 bits, {count} row{'s' * (count > 1)}"
        rows.append(_row(what, "M5 Max", "us", (us, us), found, count == 1))
    return rows


def _ratio(mcg: Problem, mul1: Problem, chip: Chip, configs) -> Range:
    """Time with mul1 over that with mcg: of the work alone, at the ends where it is least and most."""
    times = [work_time(configs(p, chip), chip) for p in (mcg, mul1)]
    total = [layer_time(configs(p, chip), chip) for p in (mcg, mul1)]
    found = sorted((times[1] / times[0], total[1] / total[0]))
    return Range(found[0], total[1] / total[0], found[1])


def _codebooks() -> list[dict]:
    chip = CHIPS["M5 Max"]
    many = replace(SQUARE, accelerators=True, accuracy="half")
    few = _ratio(SMALL, replace(SMALL, codebooks=("mul1",)), chip, _fastest_few)
    prompt = _ratio(many, replace(many, codebooks=("mul1",)), chip, fastest)
    return [
        _row("mul1 over mcg, 1 row", "M5 Max", "times", (1.15, 1.18), few),
        _row("mul1 over mcg, prompt", "M5 Max", "times", (1.25, 1.32), prompt),
    ]


def _products() -> list[dict]:
    teraflop = 2e-6 * SQUARE.hidden * SQUARE.intermediate * SQUARE.rows
    m2, m5 = CHIPS["M2 Max"], CHIPS["M5 Max"]
    on_matrices = time_range(fastest(SQUARE, m2), m2)
    many = replace(SQUARE, accelerators=True, accuracy="half")
    accelerated = time_range(fastest(many, m5), m5)
    return [
        _row(f"{what}, 2048 rows", chip, "TFLOPS", published, _rate(teraflop, found))
        for what, chip, published, found in (
            ("a linear of 4096 x 4096, simdgroup matrices", "M2 Max", (6.2, 6.2), on_matrices),
            ("a linear of 4096 x 4096, accelerators", "M5 Max", (29, 49), accelerated),
        )
    ]


def _rate(amount: float, us: Range) -> Range:
    return Range(amount / us.high, amount / us.likely, amount / us.low)


def _hull(ranges: list[Range]) -> Range:
    likely = sum(r.likely for r in ranges) / len(ranges)
    return Range(min(r.low for r in ranges), likely, max(r.high for r in ranges))


def _whole_models() -> list[dict]:
    """Which of both models is not said everywhere: from the lowest to the highest of both."""
    rows = []
    for what, chip, low, high, products in TOKENS:
        found = _hull([per_second(model, products, 1, CHIPS[chip]) for model in MODELS])
        rows.append(_row(f"{what}, generation", chip, "tokens/s", (low, high), found))
    for what, chip, published in PROMPTS:
        found = _hull([per_second(model, Affine(), PROMPT, CHIPS[chip]) for model in MODELS])
        rows.append(_row(f"{what}, prompt", chip, "tokens/s", (published, published), found))
    return rows


def validate() -> list[dict]:
    """Published figures beside the predicted ranges."""
    return [*_peer_layers(), *_codebooks(), *_products(), *_whole_models()]


def show(rows: list[dict]) -> None:
    """Print the table."""
    for row in rows:
        low, high = row["published"]
        published = f"{low:g}" if low == high else f"{low:g} to {high:g}"
        low, likely, high = row["predicted"]
        note = "" if row["within"] else f"  OUTSIDE: {row['note']}"
        made = "  (a range was made from it)" if row["a range was made from it"] else ""
        print(
            f"{row['chip']:8s} {row['what']:52s} published {published:12s} predicted {likely:7.4g} ({low:.4g} to "
            f"{high:.4g}) {row['unit']}{note}{made}"
        )
