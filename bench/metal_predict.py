"""Predicted times of our Plans on Apple GPUs, beside the floors and the peers' designs; and the shipped
profiles."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

from metal_chips import CHIPS, Chip
from metal_model import COMPLEX, dispatch_time, layer_time
from metal_work import Counted, count, traffic

from mlx_marlin import kernels, profile_io
from mlx_marlin.kernels import KernelConfig, Problem
from mlx_marlin.profile_data import AutotuneConfig, Entry, Measured, Timing

HERE = Path(__file__).resolve().parent
PROFILES = HERE.parent / "python" / "mlx_marlin" / "profiles"
CODEBOOKS = ("3inst", "mcg", "mul1")
# Routed block of Qwen3-30B-A3B, one row: microseconds at the best decode rate that anybody has measured (2
# and 3 bits), and how many times that is the goal.
FLOORS = {"M4": (157, 163, 1.6), "M4 Max": (43, 48, 2.0), "M3 Ultra": (26, 26, 2.0), "M5 Max": (29, 38, 2.0)}
# Routed experts in a peer's model (escha-mlx, W2 35B-A3B): times its own floor.
PEER_TIMES_FLOOR = {"M4": 2.56, "M4 Max": 3.42}
# A shipped config must be predicted this much faster than the default.
MARGIN = 0.98


def qwen3_30b(bits: int, rows: int = 1, codebook: str = "mcg") -> Problem:
    """The MoE block of Qwen3-30B-A3B."""
    return Problem(
        "swiglu", rows, 8, 2048, 768, 128, ((bits,) * 3,), (codebook,), "silu", "float16", "gpu", combine=True
    )


@cache
def _counted(problem: Problem, config: KernelConfig) -> tuple[Counted, ...]:
    return tuple(count(problem, config))


def _time(problem: Problem, config: KernelConfig, chip: Chip) -> float:
    return layer_time([c.work for c in _counted(problem, config)], chip)


def _candidates(problem: Problem) -> list[KernelConfig]:
    """Of the default variant and its neighbours in rows, each kind of tile once."""
    variants = {1: ("decode",), 4: ("decode", "prefill4")}[problem.rows]
    rows = {1: (1,), 4: (2, 3, 4)}[problem.rows]
    tiles = (16, 32, 64, 128, 256)
    found = {
        c
        for c in kernels.candidates(problem)
        if c.kernel_variant in variants and c.tile_size_m in rows and c.tile_size_n in tiles and c.use_fp32_acc
    }
    plain = {(c.kernel_variant, c.tile_size_m, c.tile_size_n, c.simdgroups): c for c in sorted(found, key=repr)}
    return [kernels.default(problem), *plain.values()]


def ranking(problem: Problem, chip: Chip) -> list[tuple[float, KernelConfig]]:
    """Predicted microseconds of every candidate, fastest first; the default before others that are as
    fast."""
    times = {config: _time(problem, config, chip) for config in dict.fromkeys(_candidates(problem))}
    return sorted(((t, c) for c, t in times.items()), key=lambda pair: pair[0])


def _describe(counted: Counted) -> dict:
    d = counted.dispatch
    out = {
        "kernel": counted.kernel,
        "grid": d["grid"],
        "threads": d["threads"][0] * d["threads"][1] * d["threads"][2],
        "threadgroup bytes": d["threadgroup_bytes"],
        "live registers (estimate)": counted.registers,
        "barriers per group": counted.barriers / (d["grid"][0] * d["grid"][1] * d["grid"][2]),
        "simd operations": counted.simd,
        "after": d["after"],
    }
    if counted.operations.weights:
        per_weight = counted.operations.complex / counted.operations.weights
        out["inner loop per weight"] = {k: round(v, 3) for k, v in counted.inner_loop.per_weight().items()}
        out["complex per weight, all"] = round(per_weight, 3)
    return out


def _stages(counted: tuple[Counted, ...]) -> int:
    depth = []
    for c in counted:
        depth.append(1 + max((depth[a] for a in c.dispatch["after"]), default=0))
    return max(depth)


def _one_row(bits: int) -> dict:
    problem = qwen3_30b(bits)
    default = kernels.default(problem)
    counted = _counted(problem, default)
    rows = {}
    for name, (floor2, floor3, goal) in FLOORS.items():
        chip, floor = CHIPS[name], floor2 if bits == 2 else floor3
        best_time, best = ranking(problem, chip)[0]
        ours = _time(problem, default, chip)
        rows[name] = {
            "predicted us, default": round(ours, 1),
            "bound": [dispatch_time(c.work, chip).bound for c in counted],
            "floor us": floor if bits < 4 else None,
            "times floor": round(ours / floor, 2) if bits < 4 else None,
            "goal": goal,
            "peer times floor": PEER_TIMES_FLOOR.get(name),
            "predicted us, best": round(best_time, 1),
            "best": f"{best.kernel_variant} {best.tile_size_m} x {best.tile_size_n}, {best.simdgroups} simdgroups",
        }
    return {
        "dispatches": [_describe(c) for c in counted],
        "stages": _stages(counted),
        "traffic": traffic(problem, default) if bits == 3 else None,
        "chips": rows,
    }


def _inner_loops() -> dict:
    """Complex operations per decoded weight of the gate and up product, by bits and codebook."""
    table = {}
    for codebook in CODEBOOKS:
        for bits in range(1, 9):
            problem = qwen3_30b(bits, codebook=codebook)
            product = next(c for c in _counted(problem, kernels.default(problem)) if c.inner_loop.weights)
            table[f"{codebook} {bits}"] = {k: round(v, 3) for k, v in product.inner_loop.per_weight().items()}
    return table


def _variants() -> dict:
    """Threads, threadgroup memory and live registers of every variant's default, four rows."""
    table = {}
    for variant in kernels.VARIANTS:
        problem = qwen3_30b(3, rows=1 if variant == "decode" else 4)
        config = kernels.config_for(problem, kernels.make_name(variant))
        table[variant] = [_describe(c) for c in _counted(problem, config)]
    return table


def peers() -> dict:
    """Complex operations and loads per weight in the peers' loops."""
    loops = json.loads((HERE / "metal_peers.json").read_text())["loops"]
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
        "layer": "MoE block of Qwen3-30B-A3B, one row, mcg, float16",
        "bits": {bits: _one_row(bits) for bits in (2, 3, 4)},
        "inner loops": _inner_loops(),
        "peers": peers(),
        "variants": _variants(),
    }


def show(result: dict) -> None:
    """Print the table of predictions."""
    print(f"PREDICTED, not measured: {result['layer']}")
    for bits, layer in result["bits"].items():
        print(f"{bits} bits: {len(layer['dispatches'])} dispatches in {layer['stages']} stages")
        for name, row in layer["chips"].items():
            floor = f"{row['times floor']:.2f} x floor (goal {row['goal']})" if row["times floor"] else ""
            peer = f", a peer's is {row['peer times floor']} x" if row["peer times floor"] else ""
            print(
                f"  {name:9s} predicted {row['predicted us, default']:6.1f} us {floor}{peer}; "
                f"best {row['predicted us, best']:6.1f} us: {row['best']}"
            )
        if layer["traffic"]:
            print("  device bytes:", json.dumps(layer["traffic"]["summary"]))
    print("complex operations per weight:", {k: v["complex"] for k, v in result["inner loops"].items()})
    print("peers:", {k: v["complex"] for k, v in result["peers"].items()})


def _timing(us: float) -> Timing:
    return Timing(0, round(us / 1e3, 4), 0.0)


def profile(chip: Chip) -> AutotuneConfig:
    """The predicted profile of a chip: one and four rows, 2 to 4 bits."""
    table = AutotuneConfig(chip.name, chip.family, source="predicted")
    for problem in [qwen3_30b(bits) for bits in (2, 3, 4)] + [qwen3_30b(3, rows=4)]:
        ranked = ranking(problem, chip)
        default = kernels.default(problem)
        baseline = _time(problem, default, chip)
        best_time, best = ranked[0]
        if best_time > MARGIN * baseline:
            best_time, best = baseline, default
        ratio = best_time / baseline
        table.add(
            problem,
            Entry(
                best,
                _timing(best_time),
                default,
                _timing(baseline),
                (ratio, ratio, ratio),
                "default" if best == default else "faster",
                timings=tuple(Measured(c, _timing(t)) for t, c in ranked[:5]),
            ),
        )
    return table


def write_profiles() -> list[Path]:
    """Write the shipped profiles, one per chip."""
    PROFILES.mkdir(exist_ok=True)
    paths = []
    for chip in CHIPS.values():
        path = PROFILES / f"{chip.name.lower().replace(' ', '_')}.json"
        path.write_bytes(profile_io.encode(profile(chip)))
        paths.append(path)
    return paths
