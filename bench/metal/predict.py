"""Predicted times of our Plans on Apple GPUs, beside the floors and the peers' designs."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from unittest.mock import patch

from bench.metal.chips import CHIPS, Chip, label
from bench.metal.model import COMPLEX, dispatch_time, layer_time
from bench.metal.work import Counted, count, traffic
from mlx_marlin import codec, kernels
from mlx_marlin.kernels import metal
from mlx_marlin.kernels.config import KernelConfig
from mlx_marlin.kernels.problem import Problem

HERE = Path(__file__).resolve().parent
CODEBOOKS = ("3inst", "mcg", "mul1")
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
    return layer_time([c.work for c in counted(problem, config)], chip)


def candidates(problem: Problem) -> list[KernelConfig]:
    """The tiles whose rows suit the problem, with fp32 accumulation."""
    rows = {1: (1,), 2: (1, 2), 4: (2, 3, 4), 8: (2, 4, 8)}[problem.rows]
    found = [
        KernelConfig(kernels.make_name(variant), *tiles, True, variant)
        for variant in kernels.VARIANTS
        for tiles in metal.legal_tiles(variant)
        if tiles[0] in rows and tiles[1] in COLUMNS
    ]
    return [c for c in found if kernels.feasible(problem, c) is None]


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


def _stages(dispatches: tuple[Counted, ...]) -> int:
    depth = []
    for c in dispatches:
        depth.append(1 + max((depth[a] for a in c.dispatch["after"]), default=0))
    return max(depth)


def _on_chip(problem: Problem, chip: Chip) -> dict:
    """The config that a layer runs, held against the goal, and what it was chosen from."""
    bits = problem.bits[0][0]
    config, default = choice(problem, chip), default_on(problem, chip)
    dispatches = counted(problem, config)
    us = predicted_us(problem, config, chip)
    floor2, floor3, goal = FLOORS[chip.name]
    floor = {2: floor2, 3: floor3}.get(bits)
    return {
        "config": label(config),
        "predicted us": round(us, 1),
        "dispatches": len(dispatches),
        "stages": _stages(dispatches),
        "bound": [dispatch_time(c.work, chip).bound for c in dispatches],
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
            for codebook in CODEBOOKS:
                problem = qwen3_30b(bits, codebook=codebook)
                config, default = choice(problem, chip), default_on(problem, chip)
                times = {
                    "predicted us": config,
                    "predicted us, default": default,
                    "predicted us, default, half sums": replace(default, use_fp32_acc=False),
                }
                row = {what: round(predicted_us(problem, c, chip), 1) for what, c in times.items()}
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
            "stages": _stages(dispatches),
            "traffic": traffic(problem, default) if bits == 3 else None,
        },
        "chips": {
            codebook: {name: _on_chip(replace(problem, codebooks=(codebook,)), CHIPS[name]) for name in FLOORS}
            for codebook in CODEBOOKS
        },
    }


def _inner_loops() -> dict:
    """Complex operations per decoded weight of the gate and up product, by bits and codebook."""
    table = {}
    for codebook in CODEBOOKS:
        for bits in codec.WIDTHS:
            if codec.is_half_rate(bits) and codebook != "mul1":
                continue
            problem = qwen3_30b(bits, codebook=codebook)
            product = next(c for c in counted(problem, kernels.default(problem)) if c.inner_loop.weights)
            table[f"{codebook} {bits}"] = {k: round(v, 3) for k, v in product.inner_loop.per_weight().items()}
    return table


def _variants() -> dict:
    """Threads, threadgroup memory and live registers of every variant's default, four rows."""
    table = {}
    for variant in kernels.VARIANTS:
        problem = qwen3_30b(3, rows=1 if variant == "decode" else 4)
        config = kernels.config_for(problem, kernels.make_name(variant))
        table[variant] = [_describe(c) for c in counted(problem, config)]
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


def _show_bits(bits: int, layer: dict) -> None:
    default = layer["default"]
    count = len(default["dispatches"])
    print(f"\n{bits} bits. Default, {default['config']}: {count} dispatches in {default['stages']} stages")
    for codebook, chips in layer["chips"].items():
        for name, row in chips.items():
            floor = f" {row['times floor']:.2f} x floor (goal {row['goal']})" if row["times floor"] else ""
            peer = f", a peer's is {row['peer times floor']} x its own" if row["peer times floor"] else ""
            print(
                f"  {codebook:4s} {name:8s} {row['predicted us']:6.1f} us in {row['stages']} stages{floor}{peer}: "
                f"{row['config']}; default {row['predicted us, default']:.1f} us"
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
    for bits, layer in result["bits"].items():
        _show_bits(bits, layer)
    print("\ncomplex operations per weight:", {k: v["complex"] for k, v in result["inner loops"].items()})
    print("peers' complex operations per weight:", {k: v["complex"] for k, v in result["peers"].items()})
    print("peers' dispatches:", result["peers' dispatches"])
    for variant, dispatches in result["variants"].items():
        for d in dispatches:
            print(
                f"{variant:12s} {d['kernel']:32s} {d['threads']:4d} threads, {d['threadgroup bytes']:6d} bytes of "
                f"threadgroup memory, about {d['live registers (estimate)']} registers"
            )
