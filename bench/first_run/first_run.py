"""Collect what a first run on a Mac shows into one JSON file; FIRST_RUN_ON_A_MAC.md says what to look at.

python -m bench.first_run.first_run            # writes first_run_<chip>.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx
import numpy as np
from msgspec import structs

from bench.first_run import search
from bench.metal.chips import CHIPS, label
from mlx_marlin import ExpertBank, TrellisSwitchGLU, _ext, codec, device, kernels, measure, ops
from mlx_marlin.kernels import metal
from mlx_marlin.kernels.config import KernelConfig
from mlx_marlin.kernels.problem import Problem
from mlx_marlin.measure import stats
from mlx_marlin.selection import choices, selftest, small_cases
from mlx_marlin.storage import atomic
from mlx_marlin.weights.synthetic import random_projection

ROOT = Path(__file__).resolve().parents[2]
PREDICTED = ROOT / "bench" / "results" / "metal_predicted.json"
SAMPLES = 9
# After so many nothing begins: what all parts are predicted to take.
MINUTES = 45
DECODE_STAGES = 3  # gate and up, down, the sum over experts
# Random indices per timing: enough that consecutive calls use other experts.
ROUTINGS = 16
TESTS = (
    "metal/test_kernels.py",
    "ops/test_gpu.py",
    "ops/test_search.py",
    "ops/test_ops.py",
    "layers/test_layers.py",
    "ops/test_numeric_robustness.py",
)


def machine(where: str) -> dict:
    """What the numbers depend on."""
    stream = mx.Device(mx.gpu if where == "gpu" else mx.cpu)
    return {
        "fingerprint": structs.asdict(device.fingerprint(where)),
        "mlx": version("mlx"),
        "python": platform.python_version(),
        "macos": platform.mac_ver()[0],
        "device_info": {k: str(v) for k, v in mx.device_info(stream).items()},
        "environment": {k: v for k, v in os.environ.items() if k.startswith(("MLX_", "MTL_"))},
        "eval floor us": round(1e6 * measure.launch_floor(), 1),
        "accelerators": ops.has_accelerators(where),
    }


def run_tests(names: tuple[str, ...], validated: bool = False) -> dict:
    """Run pytest; counts, and every failure with its message.

    Args:
        names: Files in tests/.
        validated: Under Metal's validation, quick tests only: also what that reports. It names accesses outside
            buffers, which a GPU otherwise ignores.
    """
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    environment = dict(os.environ)
    if validated:
        command += ["-s", "-m", "not slow"]
        environment |= {
            "MTL_SHADER_VALIDATION": "1",
            "MTL_SHADER_VALIDATION_REPORT_TO_STDERR": "1",
            "MTL_DEBUG_LAYER": "1",
            "MTL_DEBUG_LAYER_ERROR_MODE": "nslog",  # the default ends the process
        }
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "junit.xml"
        command += [f"--junitxml={report}", *(f"tests/{name}" for name in names)]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        output = done.stdout + done.stderr
        found = validation(output) if validated else {}
        if not report.exists():
            return found | {"crashed": done.returncode, "errors": told(output), "output": output[-4000:]}
        suite = ElementTree.parse(report).getroot().find("testsuite")
    failures = {}
    for case in suite.iter("testcase"):
        for kind in ("failure", "error"):
            problem = case.find(kind)
            if problem is not None:
                failures[f"{case.get('classname')}::{case.get('name')}"] = told(problem.get("message") or "")
    counts = {name: int(suite.get(name)) for name in ("tests", "failures", "errors", "skipped")}
    return found | counts | {"failed": failures}


def told(message: str) -> str:
    """A failure's message; of a compiler's output the errors, whole."""
    return _ext.build_errors(message) if "error:" in message else message[:1000]


def validation(output: str) -> dict:
    """Whether Metal validated, and each message once: its line and the next two, which have buffer and source."""
    # NSLog begins with date, time, process and thread.
    lines = [re.sub(r"^\d{4}-\d\d-\d\d \S+ \S+\[\d+:\w+\] ", "", line).strip() for line in output.splitlines()]
    messages = {}
    for i, line in enumerate(lines):
        if re.search(r"Invalid (device|threadgroup|constant)|[Ff]ailed assertion|[Vv]alidation error", line):
            if not line.startswith(("E ", ">")):  # pytest's
                messages["\n".join(lines[i : i + 3])[:600]] = None
    return {"validation on": "Validation Enabled" in output, "reported": list(messages)[:100]}


def self_tests(where: str, small: bool) -> dict:
    """The verdicts: every config at 3 bits with all codebooks, and each variant's default at all widths and dtypes."""
    every = replace(_problem(3, 1, "gpu"), codebooks=codec.CODEBOOKS)
    configs = {c: None for rows in (1, 4, 16, 64) for c in kernels.candidates(replace(every, rows=rows))}
    calls = [(every, config) for config in (list(configs)[:4] if small else configs)]
    for bits in (3,) if small else codec.WIDTHS:
        codebook = "mul1" if codec.is_half_rate(bits) else "mcg"
        for dtype in kernels.DTYPES:
            for variant, rows in zip(kernels.VARIANTS, (1, 4, 17, 64)):
                problem = replace(_problem(bits, rows, "gpu", codebook), dtype=dtype, combine=rows == 1)
                for machine in dict.fromkeys((problem, replace(problem, accelerators=False))):
                    calls.append((machine, kernels.config_for(machine, kernels.make_name(variant))))
    wrong = {}
    with tempfile.TemporaryDirectory() as folder:
        execute = selftest.run_on_gpu if where == "gpu" else _run_on_cpu
        test = selftest.SelfTest(where, execute, Path(folder) / "verdicts.json")
        for problem, config in calls:
            fault = test.fault(problem, config)
            if fault is not None:
                wrong[f"{config} for {problem}"] = fault
        if where == "gpu":
            wrong |= test.others() | search.faults()
    return {"calls": len(calls), "wrong": wrong}


def _run_on_cpu(problem: Problem, config: KernelConfig, case: dict) -> np.ndarray:
    """Stands in for the GPU where this script is tried without one."""
    case, missing = small_cases.in_range(problem, case)
    x = mx.array(case["x"]).astype(getattr(mx, problem.dtype))
    scores = None if case["scores"] is None else mx.array(case["scores"])
    bank, indices = ExpertBank(*case["weights"]), mx.array(case["indices"])
    y = ops.trellis_swiglu(x, indices, bank, scores=scores, activation=problem.activation, stream=mx.cpu)
    found = np.array(y.astype(mx.float32))
    found[missing] = np.nan
    return found


def _problem(
    bits: float,
    rows: int,
    where: str,
    codebook: str = "mcg",
    hidden: int = 2048,
    intermediate: int = 768,
    experts: int = 128,
):
    return Problem.swiglu(
        hidden,
        intermediate,
        rows=rows,
        experts=experts,
        top_k=8,
        bits=bits,
        codebooks=codebook,
        device=where,
        combine=True,
        accelerators=ops.has_accelerators(where),
    )


def _bank(rng, problem: Problem) -> ExpertBank:
    return ExpertBank(*(random_projection(rng, problem, part) for part in range(3)))


def _configs(problem: Problem) -> list[KernelConfig]:
    """What section 5 of FIRST_RUN_ON_A_MAC.md asks about.

    The chosen config, and each variant's default with and without fp32 accumulation, on an M5 also those without
    accelerators. For one row also every width with 4, 8 and 16 simdgroups.
    """
    found = [kernels.default(problem), choices.choose(problem).config]
    for variant in kernels.VARIANTS:
        for machine in (problem, replace(problem, accelerators=False)):
            default = kernels.config_for(machine, kernels.make_name(variant))
            found += [default, replace(default, use_fp32_acc=not default.use_fp32_acc)]
    if problem.rows == 1:
        found += [
            replace(found[0], tile_size_n=columns, simdgroups=simdgroups)
            for columns in metal.TILE_COLUMNS
            for simdgroups in (4, 8, 16)
        ]
    half = replace(problem, accuracy="half")
    return [c for c in dict.fromkeys(found) if kernels.feasible(half, c) is None]


def layer_times(
    where: str,
    formats: list[tuple[int, str]],
    rows: tuple[int, ...],
    sizes: dict,
    configs: Callable[[Problem], list[KernelConfig]] | None = None,
) -> list[dict]:
    """Microseconds per call of the MoE layer, by format, rows and config: medians over samples.

    configs: Those of a problem. Default: what section 5 of FIRST_RUN_ON_A_MAC.md asks about.
    """
    rng, floor, found = np.random.default_rng(0), measure.launch_floor(), []
    mx.set_default_device(mx.gpu if where == "gpu" else mx.cpu)
    for width, codebook in formats:
        layer = TrellisSwitchGLU(bank=_bank(rng, _problem(width, 1, where, codebook, **sizes)))
        for count in rows:
            problem = _problem(width, count, where, codebook, **sizes)
            draws = rng.random((ROUTINGS, count, problem.experts)).argpartition(problem.top_k, axis=2)
            routings = [mx.array(d[:, : problem.top_k].astype(np.uint32)) for d in draws]
            x = mx.array(rng.standard_normal((count, problem.hidden))).astype(getattr(mx, problem.dtype))
            scores = mx.full((count, problem.top_k), 1 / problem.top_k)
            mx.eval(x, routings, scores)
            for config in (configs or _configs)(problem):

                def step(x, i, layer=layer, config=config, routings=routings, scores=scores):
                    return layer.run(x, routings[i % ROUTINGS], scores, config=config)

                clock = measure.Chain(step, x, floor)
                clock.warm_up(5)
                samples = [1e6 * clock() for _ in range(SAMPLES)]
                found.append(
                    {
                        "bits": width,
                        "codebook": codebook,
                        "rows": count,
                        "config": asdict(config),
                        "us": round(statistics.median(samples), 1),
                        "spread": round(stats.spread(samples), 3),
                    }
                )
    return found


def beside_predictions(times: list[dict], chip: str) -> list[dict]:
    """The measured times of one row, of the default and of the predicted choice, beside their predictions."""
    predictions = json.loads(PREDICTED.read_text())["every chip"].get(chip, {})
    out = []
    for t in times:
        row = predictions.get(str(t["bits"]), {}).get(t["codebook"])
        if row is None or t["rows"] != 1:
            continue
        config = KernelConfig(**t["config"])
        default = kernels.default(_problem(t["bits"], 1, "gpu", t["codebook"]))
        for what, matches in (
            ("predicted us", label(config) == row["config"]),
            ("predicted us, default", config == default),
        ):
            if matches and config.use_fp32_acc:
                found = {"bits": t["bits"], "codebook": t["codebook"], "config": label(config), "measured": t["us"]}
                out.append(found | {what: row[what], "ratio": round(t["us"] / row[what], 2)})
    return out


def straight_line(times: dict[int, float], stages: int) -> dict:
    """Intercept and slope of microseconds over rows, by least squares, and the intercept by stage.

    Args:
        times: Microseconds by rows, of one config that decodes for every slot by itself.
        stages: Dependent stages of a call.
    """
    slope, intercept = np.polyfit(list(times), list(times.values()), 1)
    return {
        "us": {str(rows): us for rows, us in times.items()},
        "intercept us": round(float(intercept), 2),
        "slope us per row": round(float(slope), 2),
        "us per stage": round(float(intercept) / stages, 2),
    }


def rows_apart(where: str, formats: list[tuple[int, str]], rows: tuple[int, ...], sizes: dict) -> list[dict]:
    """Intercept and slope of the decode kernel with tiles of 128 columns: what stages cost, and what the work does."""
    found = []
    for bits, codebook in formats:
        problem = _problem(bits, rows[0], where, codebook, **sizes)
        config = kernels.config_for(problem, kernels.make_name("decode"))
        times = layer_times(where, [(bits, codebook)], rows, sizes, lambda _, config=config: [config])
        line = straight_line({t["rows"]: t["us"] for t in times}, DECODE_STAGES)
        found.append({"bits": bits, "codebook": codebook, "config": asdict(config)} | line)
    return found


def collect(where: str, small: bool, minutes: float = MINUTES):
    """Yields the report after each of its parts, the most important first, while there is time to begin one."""
    end = time.monotonic() + 60 * minutes
    sizes = {"hidden": 256, "intermediate": 128, "experts": 16} if small else {}
    one_row = [(3, "mcg")] if small else [(3, "mcg"), (3, "mul1"), (2, "mcg"), (4, "mcg")]
    few = (1, 4) if small else (1, 2, 4, 8)
    report = {"machine": machine(where)}
    here = report["machine"]["fingerprint"]
    report["known chip"] = here["chip"] in CHIPS and CHIPS[here["chip"]].cores == here["cores"]
    yield "machine", report
    # Accelerators serve more rows than the others are asked about.
    many = (256, 1024) if report["machine"]["accelerators"] else (256,)

    def one_row_times() -> list[dict]:
        report["layer"] = layer_times(where, one_row, (1,), sizes)
        return beside_predictions(report["layer"], here["chip"]) if report["known chip"] else []

    def prompts() -> list[dict]:
        found = layer_times(where, one_row[:2], (4,) if small else (16, 64, *many), sizes)
        return report.setdefault("layer", []) + found

    parts = {
        "self-tests": lambda: self_tests(where, small),
        "intercept and slope": lambda: rows_apart(where, one_row[:2], few, sizes),
        "beside predictions": one_row_times,
        "layer": prompts,
    }
    if where == "gpu":
        parts["search"] = lambda: search.times(here["cores"], here["chip"])
    if not small:
        parts["tests"] = lambda: run_tests(TESTS)
        parts["validated tests"] = lambda: run_tests(TESTS[:2], validated=True)
    for name, part in parts.items():
        if time.monotonic() > end:
            report.setdefault("no time for", []).append(name)
            continue
        report[name] = part()
        yield name, report
    if "no time for" in report:
        yield "what there was no time for", report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("gpu", "cpu"), default="gpu")
    parser.add_argument(
        "--small", action="store_true", help="a layer of toy size and no test suite: checks this script"
    )
    parser.add_argument("--output", type=Path)
    parser.add_argument(
        "--minutes", type=float, default=MINUTES, help="after these no further part begins (default: 45)"
    )
    arguments = parser.parse_args()
    if arguments.device == "gpu" and not mx.is_available(mx.Device(mx.gpu)):
        parser.error("MLX finds no GPU here; this script is for a Mac (--device cpu --small tries it elsewhere)")
    chip = device.fingerprint(arguments.device).chip
    path = arguments.output or Path("first_run_" + "_".join(chip.lower().split()) + ".json")
    for part, report in collect(arguments.device, arguments.small, arguments.minutes):  # a later part may crash
        atomic.write_text(path, json.dumps(report, indent=1) + "\n")
        print(f"{part} written", file=sys.stderr)
    print(path)


if __name__ == "__main__":
    main()
