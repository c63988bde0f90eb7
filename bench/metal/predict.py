"""Predicted times of our Plans on Apple GPUs, beside the floors and the peers' designs."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path
from unittest.mock import patch

from bench.metal import layer
from bench.metal.chips import CHIPS, STAGE_US, Chip, label
from bench.metal.model import COMPLEX, dispatch_time, layer_time, stages, time_range, work_range
from bench.metal.work import Counted, count, traffic
from mlx_marlin import codec, kernels
from mlx_marlin.kernels import metal
from mlx_marlin.kernels.config import KernelConfig
from mlx_marlin.kernels.problem import Problem
from mlx_marlin.profile.uncertainty import Range, Uncertainty

HERE = Path(__file__).resolve().parent
CODEBOOKS = ("3inst", "mcg", "mul1")
# 3INST's loop is MCG's: its addition is part of the multiplication.
RANKED_CODEBOOKS = ("mcg", "mul1")
# Routed block of Qwen3-30B-A3B, one row: microseconds at the best decode rate that anybody has measured (2 and 3 bits),
# and how many times that is the goal. M3 Ultra: the middle of 25 to 27.
FLOORS = {"M4": (157, 163, 1.6), "M4 Max": (43, 48, 2.0), "M3 Ultra": (26, 26, 2.0), "M5 Max": (29, 38, 2.0)}
# Peers in a model, times their own floor: escha-mlx's routed experts (W2 35B-A3B), PonyExl3's whole model (4.0 bpw).
PEER_TIMES_FLOOR = {"M4": 2.56, "M4 Max": 3.42, "M5 Max": 2.44}
# What the peers launch per layer of experts and row: their own kernels, besides MLX's.
PEER_DISPATCHES = {"escha-mlx": "4 and about 25 small MLX operations", "PonyExl3": "3, the router and a sum"}
# A config takes the default's place where it is predicted this much faster.
MARGIN = 0.98
# Of the tiles, those that the ranking looks at: the others lie between them.
COLUMNS = (16, 32, 64, 128, 256)
WIDE_COLUMNS, MOST_SIMDGROUPS = (128, 256), 8
RANKED = 5


def qwen3_30b(bits: float, rows: int = 1, codebook: str = "mcg") -> Problem:
    """The MoE block of Qwen3-30B-A3B."""
    return Problem.swiglu(
        2048, 768, rows=rows, experts=128, top_k=8, bits=bits, codebooks=codebook, device="gpu", combine=True
    )


@cache
def counted(problem: Problem, config: KernelConfig) -> tuple[Counted, ...]:
    """Each dispatch of a plan, counted; once per process."""
    return tuple(count(problem, config))


def default_on(problem: Problem, chip: Chip) -> KernelConfig:
    """What a chip runs where nothing else is known: the default follows from its cores."""
    with patch.object(metal, "gpu_cores", lambda: chip.cores):
        return kernels.default(problem)


def predicted_us(problem: Problem, config: KernelConfig, chip: Chip) -> float:
    """Predicted microseconds of a call."""
    return layer_time(layer.work(problem, config), chip)


def candidates(problem: Problem) -> list[KernelConfig]:
    """The default, and the tiles whose rows suit the problem, with fp32 accumulation."""
    found = [
        KernelConfig(kernels.make_name(variant), *tiles, True, variant)
        for variant in kernels.VARIANTS
        for tiles in metal.legal_tiles(variant)
        if _suits(problem, *tiles)
    ]
    return [c for c in found if kernels.feasible(problem, c) is None]


def _suits(problem: Problem, rows: int, columns: int, simdgroups: int) -> bool:
    """One row of x per tile in all widths. More where there are more, for which wide tiles and few simdgroups, which
    need not share their sums, are what is worth a look; a linear's few threadgroups also in narrow ones.
    """
    if problem.rows == 1 or (rows == 1 and problem.experts > 1):
        return rows == 1 and columns in COLUMNS
    suitable = columns in (WIDE_COLUMNS if problem.experts > 1 else COLUMNS)
    return rows in (2, 4) and rows <= problem.rows and suitable and simdgroups <= MOST_SIMDGROUPS


def ranking(problem: Problem, chip: Chip) -> list[tuple[float, KernelConfig]]:
    """Predicted microseconds of every candidate, fastest first; the default before others that are as fast."""
    every = dict.fromkeys([default_on(problem, chip), *candidates(problem)])
    times = ((predicted_us(problem, config, chip), config) for config in every)
    return sorted(times, key=lambda pair: pair[0])


def choice(problem: Problem, chip: Chip) -> KernelConfig:
    """What a layer on a chip runs as long as nothing has been measured there."""
    best_us, best = ranking(problem, chip)[0]
    default = default_on(problem, chip)
    return best if best_us <= MARGIN * predicted_us(problem, default, chip) else default


def uncertainty(problem: Problem, chip: Chip) -> Uncertainty:
    """How far the prediction of the choice can be off, and what is faster somewhere in the range: every stage cost with
    every end of the work.
    """
    chosen, saved = choice(problem, chip), {}
    every = dict.fromkeys([default_on(problem, chip), *candidates(problem)])
    slopes = {c: (stages(w), work_range(w, chip)) for c in every for w in (layer.work(problem, c),)}
    for stage_end, work_end in product(("low", "high"), Range.__struct_fields__):
        us = {c: n * getattr(STAGE_US, stage_end) + getattr(slope, work_end) for c, (n, slope) in slopes.items()}
        best = min(us, key=us.__getitem__)
        if us[best] <= MARGIN * us[chosen]:
            saved[best] = max(saved.get(best, 0.0), 1 - us[best] / us[chosen])
    contenders = sorted(saved, key=saved.__getitem__, reverse=True)
    count, slope = slopes[chosen]
    return Uncertainty(
        count, STAGE_US, _rounded(slope), tuple(contenders), round(saved[contenders[0]], 3) if contenders else 0.0
    )


def _rounded(found: Range, digits: int = 1) -> Range:
    return Range(*(round(getattr(found, end), digits) for end in Range.__struct_fields__))


def _describe(one: Counted) -> dict:
    d = one.dispatch
    groups = d["grid"][0] * d["grid"][1] * d["grid"][2]
    out = {
        "kernel": one.kernel,
        "grid": d["grid"],
        "threads": d["threads"][0] * d["threads"][1] * d["threads"][2],
        "threadgroup bytes": d["threadgroup_bytes"],
        "live registers (estimate)": one.registers,
        "barriers per group": one.barriers / groups,
        "simd operations": one.simd,
        "after": d["after"],
    }
    if one.operations.weights:
        out["inner loop per weight"] = {k: round(v, 3) for k, v in one.inner_loop.per_weight().items()}
        out["complex per weight, all"] = round(one.operations.complex / one.operations.weights, 3)
    return out


def _on_chip(problem: Problem, chip: Chip) -> dict:
    """The config that a layer runs, held against the goal, and what it was chosen from."""
    bits = problem.bits[0][0]
    config, default = choice(problem, chip), default_on(problem, chip)
    dispatches = layer.work(problem, config)
    us = predicted_us(problem, config, chip)
    ends = time_range(dispatches, chip)
    floor2, floor3, goal = FLOORS[chip.name]
    floor = {2: floor2, 3: floor3}.get(bits)
    return {
        "config": label(config),
        "predicted us": round(us, 1),
        "range us": [round(ends.low, 1), round(ends.high, 1)],
        "dispatches": len(dispatches),
        "stages": stages(dispatches),
        "bound": [dispatch_time(w, chip).bound for w in dispatches],
        "floor us": floor,
        "times floor": round(us / floor, 2) if floor else None,
        "goal": goal,
        "peer times floor": PEER_TIMES_FLOOR.get(chip.name),
        "predicted us, default": round(predicted_us(problem, default, chip), 1),
        "ranking": [[label(c), round(t, 1)] for t, c in ranking(problem, chip)[:RANKED]],
    }


def _every_chip() -> dict:
    """What a layer runs on each chip, and how long that and the default take: chip, bits, codebook.

    The default also with half operands and half sums inside a tile.
    """
    table = {}
    for chip in CHIPS.values():
        for bits in (2, 3, 4):
            for codebook in RANKED_CODEBOOKS:
                problem = qwen3_30b(bits, codebook=codebook)
                config, default = choice(problem, chip), default_on(problem, chip)
                times = {
                    "predicted us": config,
                    "predicted us, default": default,
                    "predicted us, default, half sums": replace(default, use_fp32_acc=False),
                }
                row = {what: round(predicted_us(problem, c, chip), 1) for what, c in times.items()}
                ends = time_range(layer.work(problem, config), chip)
                row["range us"] = [round(ends.low, 1), round(ends.high, 1)]
                table.setdefault(chip.name, {}).setdefault(str(bits), {})[codebook] = {"config": label(config)} | row
    return table


def _one_row(bits: int) -> dict:
    problem = qwen3_30b(bits)
    default = kernels.default(problem)
    dispatches = counted(problem, default)
    return {
        "default": {
            "config": label(default),
            "dispatches": [_describe(c) for c in dispatches],
            "stages": stages([c.work for c in dispatches]),
            "traffic": traffic(problem, default) if bits == 3 else None,
        },
        "chips": {
            codebook: {name: _on_chip(replace(problem, codebooks=(codebook,)), CHIPS[name]) for name in FLOORS}
            for codebook in RANKED_CODEBOOKS
        },
    }


def _inner_loops() -> dict:
    """Complex operations per decoded weight of the gate and up product, by bits and codebook."""
    table = {}
    for codebook in CODEBOOKS:
        for bits in codec.WIDTHS:
            if (bits, codebook) not in codec.FORMATS:
                continue
            problem = qwen3_30b(bits, codebook=codebook)
            one = replace(problem, experts=1, top_k=1, combine=False)
            first = layer.products(one, kernels.default(problem))[0]
            table[f"{codebook} {bits}"] = {k: round(v, 3) for k, v in first.inner_loop.per_weight().items()}
    return table


def _variants() -> dict:
    """Threads, threadgroup memory and live registers of every variant's default, four rows of one expert."""
    table = {}
    for variant in kernels.VARIANTS:
        problem = qwen3_30b(3, rows=1 if variant == "decode" else 4)
        config = kernels.config_for(problem, kernels.make_name(variant))
        table[variant] = [_describe(c) for c in counted(replace(problem, experts=1, top_k=1), config)]
    return table


def peers() -> dict:
    """Complex operations and loads per weight in the peers' loops."""
    loops = json.loads((HERE / "peers.json").read_text())["loops"]
    return {
        name: {
            "complex": round(sum(n * loop["operations"].get(o, 0) for o, n in COMPLEX.items()) / loop["weights"], 3),
            "load": round(loop["operations"].get("load", 0) / loop["weights"], 3),
        }
        for name, loop in loops.items()
    }


def predict() -> dict:
    """Everything that is predicted of one row of Qwen3-30B-A3B's MoE block."""
    return {
        "source": "predicted",
        "layer": "MoE block of Qwen3-30B-A3B, one row, float16",
        "bits": {bits: _one_row(bits) for bits in (2, 3, 4)},
        "every chip": _every_chip(),
        "inner loops": _inner_loops(),
        "peers": peers(),
        "peers' dispatches": PEER_DISPATCHES,
        "variants": _variants(),
    }


def _show_bits(bits: int, found: dict) -> None:
    default = found["default"]
    count = len(default["dispatches"])
    print(f"\n{bits} bits. Default, {default['config']}: {count} dispatches in {default['stages']} stages")
    for codebook, chips in found["chips"].items():
        for name, row in chips.items():
            floor = f" {row['times floor']:.2f} x floor (goal {row['goal']})" if row["times floor"] else ""
            peer = f", a peer's is {row['peer times floor']} x its own" if row["peer times floor"] else ""
            low, high = row["range us"]
            us = f"{row['predicted us']:.1f} us ({low:.1f} to {high:.1f})"
            print(
                f"  {codebook:4s} {name:8s} {us} in {row['stages']} stages{floor}{peer}: {row['config']}; default "
                f"{row['predicted us, default']:.1f} us"
            )
            print("       ", "; ".join(f"{config} {us}" for config, us in row["ranking"]))
    if default["traffic"]:
        print("  device bytes:", json.dumps(default["traffic"]["summary"]))
        for r in default["traffic"]["repeated"]:
            print(
                f"  read by several groups: {r['kernel']} {r['buffer']}: {r['read']} bytes, "
                f"{r['read by groups']} in all"
            )


def show(result: dict) -> None:
    """Print the predictions."""
    print(f"PREDICTED, not measured: {result['layer']}")
    for bits, found in result["bits"].items():
        _show_bits(bits, found)
    print("\ncomplex operations per weight:", {k: v["complex"] for k, v in result["inner loops"].items()})
    print("peers' complex operations per weight:", {k: v["complex"] for k, v in result["peers"].items()})
    print("peers' dispatches:", result["peers' dispatches"])
    for variant, dispatches in result["variants"].items():
        for d in dispatches:
            print(
                f"{variant:12s} {d['kernel']:32s} {d['threads']:4d} threads, {d['threadgroup bytes']:6d} bytes of "
                f"threadgroup memory, about {d['live registers (estimate)']} registers"
            )
