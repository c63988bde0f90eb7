"""Collect what a first run on a Mac shows into one JSON file. bench/FIRST_RUN_ON_A_MAC.md says what to look
at.

python bench/first_run.py            # writes first_run_<chip>.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx
import numpy as np
from metal_chips import CHIPS

from mlx_marlin import (
    ExpertBank,
    TrellisSwitchGLU,
    TrellisWeight,
    choices,
    device,
    kernels,
    measure,
    ops,
    selftest,
    stats,
)
from mlx_marlin.kernels import KernelConfig, Problem

ROOT = Path(__file__).resolve().parents[1]
PREDICTED = ROOT / "bench" / "results" / "metal_predicted.json"
SAMPLES = 9
# Random indices per timing: enough that consecutive calls use other experts.
ROUTINGS = 16
TESTS = ("tests/test_gpu.py", "tests/test_ops.py", "tests/test_layers.py", "tests/test_selftest.py")


def machine(where: str) -> dict:
    """What the numbers depend on."""
    stream = mx.Device(mx.gpu if where == "gpu" else mx.cpu)
    return {
        "fingerprint": asdict(device.fingerprint(where)),
        "mlx": version("mlx"),
        "python": platform.python_version(),
        "macos": platform.mac_ver()[0],
        "device_info": {k: str(v) for k, v in mx.device_info(stream).items()},
        "eval floor us": round(1e6 * measure.launch_floor(), 1),
    }


def run_tests(files: tuple[str, ...]) -> dict:
    """Run pytest; counts, and every failure with its message."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "junit.xml"
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            f"--junitxml={report}",
            *files,
        ]
        # Shader validation reports accesses outside buffers, which a GPU otherwise ignores.
        environment = {**os.environ, "MTL_SHADER_VALIDATION": "1", "MTL_DEBUG_LAYER": "1"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        if not report.exists():
            return {"crashed": done.returncode, "output": (done.stdout + done.stderr)[-4000:]}
        suite = ElementTree.parse(report).getroot().find("testsuite")
    failures = {}
    for case in suite.iter("testcase"):
        for kind in ("failure", "error"):
            problem = case.find(kind)
            if problem is not None:
                failures[f"{case.get('classname')}::{case.get('name')}"] = (problem.get("message") or "")[:1000]
    return {name: int(suite.get(name)) for name in ("tests", "failures", "errors", "skipped")} | {"failed": failures}


def self_tests(where: str, rows: tuple[int, ...]) -> dict:
    """The verdict on every candidate config, by rows."""
    verdicts = {}
    with tempfile.TemporaryDirectory() as folder:
        execute = selftest.run_on_gpu if where == "gpu" else _run_on_cpu
        test = selftest.SelfTest(where, execute, Path(folder) / "verdicts.json")
        for count in rows:
            problem = replace(_problem(3, count, where), codebooks=("3inst", "mcg", "mul1"))
            wrong = {str(c): f for c in kernels.candidates(problem) if (f := test.fault(problem, c))}
            verdicts[count] = {"candidates": len(kernels.candidates(problem)), "wrong": wrong}
    return verdicts


def _run_on_cpu(problem: Problem, config: KernelConfig, case: dict) -> np.ndarray:
    bank = ExpertBank(*case["weights"])
    y = ops.trellis_swiglu(mx.array(case["x"]), mx.array(case["indices"]), bank, config=config, stream=mx.cpu)
    return np.array(y.astype(mx.float32))


def _problem(bits: int, rows: int, where: str, hidden: int = 2048, intermediate: int = 768, experts: int = 128):
    dtype = "float16" if where == "gpu" else "float32"
    return Problem("swiglu", rows, 8, hidden, intermediate, experts, ((bits,) * 3,), ("mcg",), "silu", dtype, where)


def _bank(rng, problem: Problem) -> ExpertBank:
    shapes = [(problem.hidden, problem.intermediate)] * 2 + [(problem.intermediate, problem.hidden)]
    return ExpertBank(
        *(
            [
                TrellisWeight(
                    rng.integers(-(1 << 15), 1 << 15, (k // 16, n // 16, 16 * bits), np.int16),
                    np.ones(k, np.float16),
                    np.ones(n, np.float16),
                    "mcg",
                )
                for _ in range(problem.experts)
            ]
            for (k, n), bits in zip(shapes, problem.bits[0])
        )
    )


def _configs(problem: Problem) -> list[KernelConfig]:
    """The default, the chosen one, and one of every tile width."""
    chosen = [kernels.default(problem), choices.choose(problem).config]
    widths = {}
    for config in kernels.candidates(problem):
        if config.kernel_variant == chosen[0].kernel_variant:
            widths.setdefault((config.tile_size_m, config.tile_size_n), config)
    return list(dict.fromkeys([*chosen, *widths.values()]))


def layer_times(where: str, bits: tuple[int, ...], rows: tuple[int, ...], sizes: dict) -> list[dict]:
    """Microseconds per call of the MoE layer, by bits, rows and config: medians over samples."""
    rng, floor, found = np.random.default_rng(0), measure.launch_floor(), []
    mx.set_default_device(mx.gpu if where == "gpu" else mx.cpu)
    for width in bits:
        layer = TrellisSwitchGLU(bank=_bank(rng, _problem(width, 1, where, **sizes)))
        for count in rows:
            problem = _problem(width, count, where, **sizes)
            draws = rng.random((ROUTINGS, count, problem.experts)).argpartition(problem.top_k, axis=2)
            routings = [mx.array(d[:, : problem.top_k].astype(np.uint32)) for d in draws]
            x = mx.array(rng.standard_normal((count, problem.hidden))).astype(getattr(mx, problem.dtype))
            mx.eval(x, routings)
            for config in _configs(problem):

                def step(x, i, layer=layer, config=config, routings=routings):
                    return layer.run(x, routings[i % ROUTINGS], config=config)[:, 0]

                clock = measure.Chain(step, x, floor)
                clock.warm_up(5)
                samples = [1e6 * clock() for _ in range(SAMPLES)]
                found.append(
                    {
                        "bits": width,
                        "rows": count,
                        "config": asdict(config),
                        "us": round(statistics.median(samples), 1),
                        "spread": round(stats.spread(samples), 3),
                    }
                )
    return found


def beside_predictions(times: list[dict], chip: str) -> list[dict]:
    """The default's measured time of one row beside the prediction, where there is one."""
    layers = json.loads(PREDICTED.read_text())["bits"]
    out, seen = [], set()
    for t in times:
        row = layers.get(str(t["bits"]), {}).get("chips", {}).get(chip)
        if row is None or t["rows"] != 1 or t["bits"] in seen:
            continue
        seen.add(t["bits"])
        predicted = row["predicted us, default"]
        out.append(
            {
                "bits": t["bits"],
                "measured": t["us"],
                "predicted": predicted,
                "ratio": round(t["us"] / predicted, 2),
            }
        )
    return out


def collect(where: str, small: bool) -> dict:
    """Everything, in the order of FIRST_RUN_ON_A_MAC.md."""
    sizes = {"hidden": 256, "intermediate": 128, "experts": 16} if small else {}
    rows, bits = ((1, 4), (3,)) if small else ((1, 4, 16, 64), (2, 3, 4))
    report = {"machine": machine(where)}
    chip = report["machine"]["fingerprint"]["chip"]
    report["known chip"] = chip in CHIPS
    if not small:
        report["tests"] = run_tests(TESTS)
    report["self-tests"] = self_tests(where, rows[:2])
    report["layer"] = layer_times(where, bits, rows, sizes)
    report["beside predictions"] = beside_predictions(report["layer"], chip)
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("gpu", "cpu"), default="gpu")
    parser.add_argument(
        "--small", action="store_true", help="a layer of toy size and no test suite: checks this script"
    )
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    if arguments.device == "gpu" and not mx.is_available(mx.Device(mx.gpu)):
        parser.error("MLX finds no GPU here; this script is for a Mac (--device cpu --small tries it elsewhere)")
    report = collect(arguments.device, arguments.small)
    chip = report["machine"]["fingerprint"]["chip"]
    path = arguments.output or Path("first_run_" + "_".join(chip.lower().split()) + ".json")
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()
