"""Predicted times of the Metal kernels on Apple GPUs. Every number that this prints is predicted, none is
measured.

python -m bench.metal.cost calibrate     # the model against the peers' published measurements
python -m bench.metal.cost predict       # our plans, ranked, beside the floors
python -m bench.metal.cost prompts       # a layer of experts at 1 to 2048 rows, beside MLX's affine layer
python -m bench.metal.cost models        # whole models: tokens per second of generation and of prompts
python -m bench.metal.cost stages        # two dependent stages at one row instead of three
python -m bench.metal.cost search        # the encoder's search, in weights per second
python -m bench.metal.cost validate      # published figures that the model was not made from, beside it
python -m bench.metal.cost profiles      # write python/mlx_marlin/profile/predicted/
"""

from __future__ import annotations

import argparse
import importlib
import json
from pathlib import Path

from bench.metal.chips import CHANGES, CHIPS, SOURCES
from bench.metal.model import Work, decode_rate, dispatch_time
from mlx_marlin.storage import atomic

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parent / "results"
CALIBRATION = RESULTS / "cost_model_calibration.json"
PREDICTED = RESULTS / "metal_predicted.json"
PROMPTS = RESULTS / "metal_prompts.json"
VALIDATION = RESULTS / "metal_validation.json"
MODELS = RESULTS / "metal_models.json"
STAGES = RESULTS / "metal_two_stages.json"
SEARCH = RESULTS / "metal_search.json"
RESULT_OF = {"prompts": PROMPTS, "models": MODELS, "stages": STAGES, "search": SEARCH, "validate": VALIDATION}
MODULES = {"models": "whole_model", "stages": "two_stages"}
TOLERANCE = 0.25
EVAL_US = {"M4": 174}  # one synchronous eval, which isolated timings carry (escha-mlx)

# Measured decode rates, 1e9 weights per second.
RATES = [
    ("escha direct K2", "M4", 240),
    ("escha direct K2", "M4 Pro", 417),
    ("escha direct K2", "M4 Max", 880),
    ("escha direct K2", "M5 Pro", 568),
    ("escha direct K3", "M4", 231),
    ("escha direct K3", "M4 Pro", 391),
    ("escha direct K3", "M4 Max", 794),
    ("escha direct K3", "M5 Pro", 426),
    ("pony K4", "M1 Max", 108),
    ("pony K4", "M5 Max", 485),
]
# escha on M4, 256 experts, 2048 -> 1024, K = 2: (loop, row groups, measured microseconds). The times are
# the published ratios 1.21, 1.11, 1.26, 1.19, 1.21 times groups * 8192 tiles * 2c / (cores * GHz) + 174 us,
# c = max(8, 5 + 1.5 R); 183 and 352 are the expected numbers of groups for Poisson rows, 272 is published.
POINTS = [
    ("escha direct K2", 64, 854),
    ("escha direct K2", 256, 2553),
    ("escha rows 2 K2", 183, 2135),
    ("escha rows 4 K2", 352, 4988),
    ("escha rows 12 K2", 272, 8070),
]


def _loop(name):
    return json.loads((HERE / "peers.json").read_text())["loops"][name]


def _peer_rate(name, chip):
    loop = _loop(name)
    operations = {k: 32 * v for k, v in loop["operations"].items()}
    return decode_rate(operations, loop["simd"], 32 * loop["weights"], loop["bits"], chip)


def _peer_point(name, groups):
    """Microseconds of one escha dispatch on M4: groups of rows x (1024 / 128) threadgroups of 8 simdgroups."""
    loop, chip, weights = _loop(name), CHIPS["M4"], groups * 2048 * 1024
    operations = {k: v * weights / loop["weights"] for k, v in loop["operations"].items()}
    work = Work(operations, weights * loop["bits"] / 8, groups * 8, 8)
    return dispatch_time(work, chip).total + EVAL_US["M4"]


def calibration() -> dict:
    """The model beside everything that has been measured."""
    rows = [
        {
            "kernel": kernel,
            "chip": chip,
            "unit": "Gweights/s",
            "measured": rate,
            "model": _peer_rate(kernel, CHIPS[chip]),
        }
        for kernel, chip, rate in RATES
    ]
    rows += [
        {
            "kernel": kernel,
            "chip": "M4",
            "groups": groups,
            "unit": "us",
            "measured": us,
            "model": _peer_point(kernel, groups),
        }
        for kernel, groups, us in POINTS
    ]
    for row in rows:
        row["model"] = round(row["model"], 1)
        row["measured/model"] = round(row["measured"] / row["model"], 3)
        row["held to"] = TOLERANCE
    constants = {name: vars(chip) for name, chip in CHIPS.items()}
    return {"rows": rows, "chips": constants, "sources": SOURCES, "changes since": list(CHANGES)}


def _print_calibration(result) -> None:
    for row in result["rows"]:
        groups = f"{row['groups']:4d} groups" if "groups" in row else ""
        print(
            f"{row['kernel']:17s} {row['chip']:7s} {groups:11s} measured {row['measured']:7.0f}  "
            f"model {row['model']:7.0f} {row['unit']:10s}  measured/model {row['measured/model']:.2f}"
        )


def _write(path: Path, result: dict | list) -> None:
    atomic.write_text(path, json.dumps(result, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=("calibrate", "predict", *RESULT_OF, "profiles"))
    command = parser.parse_args().command
    if command == "calibrate":
        result = calibration()
        _print_calibration(result)
        _write(CALIBRATION, result)
    elif command == "profiles":
        from bench.metal import profiles

        for path in profiles.write():
            print(path)
    else:
        module = importlib.import_module(f"bench.metal.{MODULES.get(command, command)}")
        result = module.validate() if command == "validate" else module.predict()
        module.show(result)
        _write(PREDICTED if command == "predict" else RESULT_OF[command], result)


if __name__ == "__main__":
    main()
