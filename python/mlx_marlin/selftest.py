"""Before a config first runs on a GPU, one small case runs against the codec: compilers have miscompiled
kernels that were right elsewhere. A config that is wrong is refused, and the next feasible one is tried.

This happens where a config is chosen, in Python: never inside a primitive and never inside a trace.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
import threading
import warnings
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path

import mlx.core as mx
import numpy as np

from . import choices, codec, kernels, ops, profile_io
from .choices import Choice
from .device import fingerprint
from .kernels import KernelConfig, Problem
from .weights import ExpertBank, TrellisWeight

__all__ = ["SelfTest", "fault", "select"]

_log = logging.getLogger("mlx_marlin")

# A row's error over the row's norm. Rounding stays below 4e-3 in every dtype; a wrong kernel is wrong by 1.
LIMIT = 2e-2
# Sizes of the small case: the first at which the config is legal. 128 is one Hadamard block.
_SIZES = (128, 256, 384, 512, 640, 768, 1024, 1280, 2048)
_EXPERTS = 3
_MAX_FILE_BYTES = 1 << 20

Executor = Callable[[Problem, KernelConfig, dict], np.ndarray]


def small_problem(problem: Problem, config: KernelConfig) -> Problem:
    """The same kind of call with the fewest rows and the smallest sizes at which the config's kernels run.

    Raises:
        ValueError: If the config is not legal at any of the sizes.
    """
    rows = min(problem.rows, config.tile_size_m + 1)
    experts = max(len(problem.bits), _EXPERTS) if problem.kind == "swiglu" else 1
    top_k = min(problem.top_k, experts, 2)
    for hidden in _SIZES:
        small = replace(problem, rows=rows, top_k=top_k, hidden=hidden, intermediate=max(hidden, 256), experts=experts)
        if kernels.feasible(small, config) is None:
            return small
    raise ValueError(f"{config} runs at none of the sizes {_SIZES} that the self-test knows")


def _weight(rng, k: int, n: int, bits: int, codebook: str, bias: bool) -> TrellisWeight:
    words = rng.integers(-(1 << 15), 1 << 15, (k // 16, n // 16, 16 * bits), np.int16)
    suh, svh = (rng.choice([-1.0, 1.0], size).astype(np.float16) for size in (k, n))
    return TrellisWeight(words, suh, svh, codebook, rng.standard_normal(n).astype(np.float32) if bias else None)


def make_case(problem: Problem) -> dict:
    """Inputs of a problem: every bit width and every codebook of it occurs. The same for every run."""
    rng = np.random.default_rng(0)
    codebooks = [problem.codebooks[e % len(problem.codebooks)] for e in range(problem.experts)]
    x = rng.standard_normal((problem.rows, problem.hidden)).astype(np.float32)
    if problem.kind == "linear":
        (bits,) = problem.bits[0]
        w = _weight(rng, problem.hidden, problem.intermediate, bits, codebooks[0], problem.bias)
        return {"x": x, "weight": w}
    shapes = [(problem.hidden, problem.intermediate)] * 2 + [(problem.intermediate, problem.hidden)]
    lists = [
        [
            _weight(rng, k, n, problem.bits[e % len(problem.bits)][part], codebooks[e], problem.bias)
            for e in range(problem.experts)
        ]
        for part, (k, n) in enumerate(shapes)
    ]
    indices = np.stack([rng.permutation(problem.experts)[: problem.top_k] for _ in range(problem.rows)])
    scores = rng.random(indices.shape).astype(np.float32) if problem.combine else None
    return {"x": x, "weights": lists, "indices": indices.astype(np.uint32), "scores": scores}


def _activate(name: str, gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    if name == "gelu_tanh":
        return up * 0.5 * gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
    if name == "swiglu_oai":
        gate, up = np.minimum(gate, 7.0), np.clip(up, -7.0, 7.0)
        return (up + 1) * gate / (1 + np.exp(-1.702 * gate))
    return up * gate / (1 + np.exp(-gate))


def _product(x: np.ndarray, w: TrellisWeight) -> np.ndarray:
    y = x @ codec.dequantize(w).astype(np.float64)
    return y if w.bias is None else y + np.asarray(w.bias, np.float64).reshape(-1)


def reference(problem: Problem, case: dict) -> np.ndarray:
    """What the case must give, by the codec, in float64."""
    x = np.array(mx.array(case["x"]).astype(getattr(mx, problem.dtype)).astype(mx.float32)).astype(np.float64)
    if problem.kind == "linear":
        return _product(x, case["weight"])
    gate, up, down = case["weights"]
    out = np.zeros((*case["indices"].shape, problem.hidden))
    for row, slots in enumerate(case["indices"]):
        for slot, e in enumerate(slots):
            inner = _activate(problem.activation, _product(x[row], gate[e]), _product(x[row], up[e]))
            out[row, slot] = _product(inner, down[e])
    return out if case["scores"] is None else np.einsum("rsh,rs->rh", out, case["scores"])


def run_on_gpu(problem: Problem, config: KernelConfig, case: dict) -> np.ndarray:
    """The case through the primitives, on the GPU; float32."""
    x = mx.array(case["x"]).astype(getattr(mx, problem.dtype))
    if problem.kind == "linear":
        y = ops.trellis_linear(x, case["weight"], config=config, stream=mx.gpu)
    else:
        scores = None if case["scores"] is None else mx.array(case["scores"])
        y = ops.trellis_swiglu(
            x,
            mx.array(case["indices"]),
            ExpertBank(*case["weights"]),
            scores=scores,
            activation=problem.activation,
            config=config,
            stream=mx.gpu,
        )
    return np.array(y.astype(mx.float32))


def _error(got: np.ndarray, want: np.ndarray) -> float:
    """Largest error of a row over the row's norm; infinite if anything is not finite."""
    if got.shape != want.shape or not np.isfinite(got).all():
        return float("inf")
    flat = want.reshape(-1, want.shape[-1])
    errors = np.linalg.norm(got.reshape(flat.shape) - flat, axis=-1)
    return float((errors / np.maximum(np.linalg.norm(flat, axis=-1), 1e-30)).max(initial=0.0))


def _key(problem: Problem, config: KernelConfig) -> str:
    """What decides which code runs: all of the config, and of the problem all but its sizes."""
    what = {
        name: getattr(problem, name) for name in ("kind", "bits", "codebooks", "activation", "dtype", "combine", "bias")
    }
    return json.dumps(what | asdict(config), sort_keys=True)


class SelfTest:
    """Verdicts on configs, remembered beside the profiles.

    Args:
        device: ``"gpu"``; another name is for tests.
        execute: Runs a case. Default: :func:`run_on_gpu`.
        path: The file of verdicts. Default: one per chip, OS and shader sources.
    """

    def __init__(self, device: str = "gpu", execute: Executor = run_on_gpu, path: Path | None = None):
        self._execute, self._lock = execute, threading.Lock()
        here = fingerprint(device)
        self._machine = {
            "chip": here.chip,
            "os": here.os,
            "mlx": here.mlx_version,
            "kernels": here.kernel_hash,
        }
        self._path = path or profile_io.default_path(device).with_suffix(".selftest.json")
        self._verdicts = self._load()

    def _load(self) -> dict[str, str]:
        """Verdicts of this machine and these kernels; none if the file is missing, foreign or malformed."""
        try:
            if self._path.stat().st_size > _MAX_FILE_BYTES:
                return {}
            stored = json.loads(self._path.read_bytes())
        except (OSError, ValueError):
            return {}
        if not isinstance(stored, dict) or stored.get("machine") != self._machine:
            return {}
        verdicts = stored.get("verdicts")
        valid = isinstance(verdicts, dict) and all(isinstance(v, str) for v in verdicts.values())
        return verdicts if valid else {}

    def _save(self) -> None:
        """A disk that cannot be written costs a repeat of the tests, no more."""
        text = json.dumps({"machine": self._machine, "verdicts": self._verdicts}, indent=1)
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            handle, beside = tempfile.mkstemp(dir=self._path.parent, prefix=self._path.name)
            with os.fdopen(handle, "w") as file:
                file.write(text)
            os.replace(beside, self._path)
        except OSError as error:
            _log.debug("self-test verdicts are not kept: %s", error)

    def known(self, problem: Problem, config: KernelConfig) -> bool:
        """Whether :meth:`fault` answers without running anything."""
        return _key(problem, config) in self._verdicts

    def fault(self, problem: Problem, config: KernelConfig) -> str | None:
        """What is wrong with a config on this machine, or ``None``. The first time a small case is run."""
        with self._lock:
            key = _key(problem, config)
            if key not in self._verdicts:
                self._verdicts[key] = self._judge(problem, config)
                self._save()
            return self._verdicts[key] or None

    def _judge(self, problem: Problem, config: KernelConfig) -> str:
        """ "" if the config is right, else what is wrong."""
        try:
            small = small_problem(problem, config)
            case = make_case(small)
            error = _error(self._execute(small, config, case), reference(small, case))
        except (
            RuntimeError,
            ValueError,
        ) as failure:  # what MLX raises for kernels that do not compile or run
            return f"it does not run: {str(failure)[:500]}"
        return "" if error <= LIMIT else f"its error against the codec is {error:.3g}, at most {LIMIT} is right"

    def select(self, problem: Problem) -> Choice:
        """The first choice for a problem whose kernels are right. Warns about every one that is refused.

        Raises:
            RuntimeError: If no kernel for the problem is right.
        """
        while True:
            choice = choices.choose(problem)
            fault = self.fault(problem, choice.config)
            if fault is None:
                return choice
            choices.refuse(problem, choice.config, fault)
            following = choices.choose(problem).config
            warnings.warn(
                f"{choice.config} is refused on this GPU: {fault}. {following} is tried instead",
                RuntimeWarning,
                3,
            )


@lru_cache(maxsize=1)
def _gpu() -> SelfTest:
    return SelfTest()


def fault(problem: Problem, config: KernelConfig) -> str | None:
    """What is wrong with a config on this machine, or ``None``. On the CPU nothing is tested."""
    return _gpu().fault(problem, config) if problem.device == "gpu" else None


def select(problem: Problem, traced: bool) -> tuple[Choice, bool]:
    """The choice for a problem, and whether it is final.

    Args:
        problem: On the CPU nothing is tested.
        traced: Whether the call is being traced: nothing runs then. An unknown config is used untested this
        once.
    """
    if problem.device != "gpu":
        return choices.choose(problem), True
    choice = choices.choose(problem)
    if traced and not _gpu().known(problem, choice.config):
        return choice, False
    return _gpu().select(problem), True
