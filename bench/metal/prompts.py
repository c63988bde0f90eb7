"""Predicted times of a layer of experts at many rows: on simdgroup matrices and on the accelerators of M5.

What a layer does is put together from one expert: decoding a row tile, multiplying a unit of its rows, and what each
slot takes apart from both. Rows per expert are those of random routing. MLX's affine layer stands beside it, by what
others have measured of it. Sorting the slots is left out, of ours and of MLX's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from typing import NamedTuple

from bench.metal.chips import ACCELERATOR_TFLOPS, CHIPS, Chip, label
from bench.metal.model import Work, dispatch_time, layer_time
from bench.metal.predict import counted, default_on, qwen3_30b
from bench.metal.work import Counted
from mlx_marlin.kernels import metal
from mlx_marlin.kernels.config import KernelConfig

ROWS = (64, 128, 256, 512, 1024, 2048)
SHOWN = ("M5", "M5 Max")
LAYER = qwen3_30b(3)
# MLX's gather_qmm on an M5 reaches 78 to 87 % of the accelerators at 64 rows per expert (mlx#3925). Its tiles have 64
# rows, or 32 where experts have fewer than 64.
AFFINE_FRACTION = 0.82
SORTING = "trellis_route"


class Routing(NamedTuple):
    """What random routing is expected to give.

    Attributes:
        experts: That have rows.
        tiles: Row tiles.
        units: Units of rows, into which tiles are divided.
    """

    experts: float
    tiles: float
    units: float


@cache
def routing(rows: int, tile_rows: int, unit_rows: int) -> Routing:
    """Sums over the layer's experts, whose rows have a binomial distribution."""
    share, found = LAYER.top_k / LAYER.experts, [0.0, 0.0, 0.0]
    for n in range(1, rows + 1):
        ways = math.lgamma(rows + 1) - math.lgamma(n + 1) - math.lgamma(rows - n + 1)
        p = math.exp(ways + n * math.log(share) + (rows - n) * math.log1p(-share))
        for i, parts in enumerate((1, math.ceil(n / tile_rows), math.ceil(n / unit_rows))):
            found[i] += LAYER.experts * p * parts
    return Routing(*found)


def _combined(x: float, a: Mapping[str, float], y: float, b: Mapping[str, float]) -> dict[str, float]:
    return {name: x * a.get(name, 0) + y * b.get(name, 0) for name in a.keys() | b.keys()}


def _work(one: Counted, full: Counted, rows: int, config: KernelConfig, routed: Routing) -> Work:
    """A dispatch of the layer, from those of one expert with one unit of rows and with a full tile."""
    a, b = one.work, full.work
    slots, tile_rows = rows * LAYER.top_k, config.tile_size_m
    if full.operations.weights:
        # A tile decodes once, and multiplies for each of its units.
        y = (routed.units - routed.tiles) / (tile_rows // _unit(config) - 1) if tile_rows > _unit(config) else 0.0
        x, groups = routed.tiles - y, routed.tiles * full.dispatch["grid"][0]
    else:
        x, y, groups = 0.0, slots / tile_rows, b.groups * slots / tile_rows
    moved = {buffer["name"]: buffer["bytes"] for buffer in full.dispatch["buffers"]}
    codes = sum(n for name, n in moved.items() if name.endswith(".codes"))
    by_row = moved.pop("x", 0) + moved.pop("y", 0)
    by_slot = sum(moved.values()) - codes
    bytes_moved = codes * routed.experts + (by_row * rows + by_slot * slots) / tile_rows
    operations, simd = _combined(x, a.operations, y, b.operations), _combined(x, a.simd, y, b.simd)
    # All others wait for the dispatch that sorts, which is not among them.
    after = tuple(i - 1 for i in b.after if i > 0)
    return Work(operations, bytes_moved, round(groups), b.simdgroups, simd, after)


def _unit(config: KernelConfig) -> int:
    return 16 if metal.accelerated(config) else min(8, config.tile_size_m)


def work(rows: int, codebook: str, config: KernelConfig) -> list[Work]:
    """What the layer's dispatches do, without the one that sorts."""
    accuracy = "float32" if config.use_fp32_acc else "half"
    expert = replace(LAYER, codebooks=(codebook,), experts=1, top_k=1, accuracy=accuracy)
    expert = replace(expert, accelerators=metal.accelerated(config))
    one, full = (counted(replace(expert, rows=n), config) for n in (_unit(config), config.tile_size_m))
    routed = routing(rows, config.tile_size_m, _unit(config))
    return [_work(a, b, rows, config, routed) for a, b in zip(one, full, strict=True) if a.kernel != SORTING]


def _affine_rows(rows: int) -> float:
    """Rows that MLX's kernel computes, those of incomplete tiles included."""
    block = 64 if rows * LAYER.top_k / routing(rows, 64, 64).experts >= 64 else 32
    return block * routing(rows, block, block).tiles


def _products_us(rows: float, chip: Chip) -> float:
    """The layer's products for so many slots at the accelerators' rate."""
    m5 = CHIPS["M5"]
    tflops = ACCELERATOR_TFLOPS * chip.cores * chip.ghz / (m5.cores * m5.ghz)
    return 2 * sum(k * n for k, n in LAYER.shapes) * rows / (tflops * 1e6)


def configs(rows: int, codebook: str, chip: Chip) -> dict[str, KernelConfig]:
    """What a layer runs by default, without and with accelerators, by name."""
    problem = replace(LAYER, rows=rows, codebooks=(codebook,))
    accelerators = default_on(replace(problem, accelerators=True), chip)
    return {
        "matrices": default_on(problem, chip),
        "accelerators": accelerators,
        "accelerators, half": replace(accelerators, use_fp32_acc=False),
    }


def _row(rows: int, codebook: str, chip: Chip) -> dict:
    found = {"codebook": codebook, "rows": rows, "chip": chip.name, "us": {}, "config": {}, "bound": {}}
    for form, config in configs(rows, codebook, chip).items():
        dispatches = work(rows, codebook, config)
        products = [w for w in dispatches if {"tensor_multiply", "matrix_multiply"} & w.simd.keys()]
        found["us"][form] = round(layer_time(dispatches, chip), 1)
        found["config"][form] = label(config)
        found["bound"][form] = [dispatch_time(w, chip).bound for w in products]
    found["floor us"] = round(_products_us(rows * LAYER.top_k, chip), 1)
    found["affine us"] = round(_products_us(_affine_rows(rows), chip) / AFFINE_FRACTION, 1)
    return found


def predict(codebooks: tuple[str, ...] = ("mcg", "mul1"), rows: tuple[int, ...] = ROWS) -> dict:
    """Microseconds of the layer, beside MLX's affine layer and the accelerators' floor for the rows that there are."""
    table = [_row(n, codebook, CHIPS[name]) for codebook in codebooks for n in rows for name in SHOWN]
    return {"source": "predicted", "layer": "MoE block of Qwen3-30B-A3B, 3 bits, float16", "rows": table}


def show(result: dict) -> None:
    """Print the predictions."""
    print(f"PREDICTED, not measured: {result['layer']}")
    for row in result["rows"]:
        forms = "; ".join(
            f"{form} {us:.0f} us, {row['config'][form]}, {' and '.join(dict.fromkeys(row['bound'][form]))}"
            for form, us in row["us"].items()
        )
        print(
            f"{row['codebook']:4s} {row['rows']:4d} rows {row['chip']:7s} floor {row['floor us']:.0f} us, affine "
            f"{row['affine us']:.0f} us; {forms}"
        )
