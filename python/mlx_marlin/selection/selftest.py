"""Before a config first runs on a GPU, one small case runs against the codec: compilers have miscompiled
kernels that were right elsewhere. A config that is wrong is refused, and the next feasible one is tried.

This happens where a config is chosen, in Python: never inside a primitive and never inside a trace.
"""

from __future__ import annotations

import json
import logging
import threading
import warnings
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import lru_cache
from itertools import product
from pathlib import Path

import mlx.core as mx
import numpy as np

from .. import codec, kernels, ops
from ..device.machine import fingerprint
from ..kernels import KernelConfig, Problem
from ..ops import reference
from ..profile import files as profile_files
from ..storage import atomic
from ..weights import synthetic
from ..weights.experts import ExpertBank, ExpertStack
from . import choices
from .choices import Choice

__all__ = ["SelfTest", "fault", "select"]

_log = logging.getLogger("mlx_marlin")

# Largest error of a row over the row's norm: a few roundings of the dtype. The wrong decoder that is nearest to the
# right one (mul1 with offset 510) is off by 1e-2 on the case's rows.
LIMIT = {"float32": 1e-4, "float16": 2e-3, "bfloat16": 8e-3}
# With half operands and half sums inside a tile: rounding alone reaches 1.5e-3.
HALF_LIMIT = 6e-3
# Sizes of the small case. 128 is one Hadamard block; up to 2048 narrow tiles become legal; from 3072 on a product no
# longer makes its own input, with half operands from 10240 on.
_SIZES = (128, 256, 384, 512, 640, 768, 1024, 1280, 2048, 3072, 4096, 5120, 6144, 8192, 10240)
_EXPERTS = 3
_MAX_FILE_BYTES = 1 << 20
# What csrc/metal/encode.cpp says of a kernel that the compiler rejects.
_NOT_BUILT = "could not be built"


class NoSmallCase(Exception):
    """No small problem runs the kernels that a config runs."""


Executor = Callable[[Problem, KernelConfig, dict], np.ndarray]


def _code(problem: Problem, config: KernelConfig) -> list:
    """What a plan compiles: each kernel with its constants, once; rows in several passes run the same again."""
    plan = ops.plan(problem, config)
    return list(dict.fromkeys((d["kernel"], tuple(sorted(d["constants"].items()))) for d in plan["dispatches"]))


def small_problem(problem: Problem, config: KernelConfig) -> Problem:
    """The smallest problem whose plan has the same kernels and constants; one row more than a tile has.

    Raises:
        NoSmallCase: If none of the sizes has such a plan.
    """
    rows = config.tile_size_m + 1
    experts = max(len(problem.bits), _EXPERTS) if problem.kind == "swiglu" or problem.experts > 1 else 1
    same = replace(problem, rows=rows, top_k=min(problem.top_k, experts, 2), experts=experts)
    wanted = _code(replace(problem, rows=rows), config)
    for hidden, intermediate in sorted(product(_SIZES, _SIZES), key=lambda sizes: (sizes[0] * sizes[1], sizes)):
        small = replace(same, hidden=hidden, intermediate=intermediate)
        if kernels.feasible(small, config) is None and _code(small, config) == wanted:
            return small
    raise NoSmallCase(f"no small problem runs the kernels that {config} runs for {problem}")


def make_case(problem: Problem) -> dict:
    """Inputs of a problem: every bit width and every codebook of it occurs. The same for every run."""
    rng = np.random.default_rng(0)
    # The first channel of each Hadamard block is an outlier: it lies evenly over the rotated block, where an error that
    # all weights share then adds up.
    x = rng.standard_normal((problem.rows, problem.hidden)).astype(np.float32)
    first = x[:, :: codec.HADAMARD_SIZE]
    first *= 16
    first += np.copysign(12, first)
    weights = [synthetic.random_projection(rng, problem, part) for part in range(len(problem.shapes))]
    if problem.kind == "linear":
        return {"x": x, "weights": weights[0], "indices": rng.integers(0, problem.experts, problem.rows, np.uint32)}
    indices = np.stack([rng.permutation(problem.experts)[: problem.top_k] for _ in range(problem.rows)])
    scores = rng.random(indices.shape).astype(np.float32) if problem.combine else None
    return {"x": x, "weights": weights, "indices": indices.astype(np.uint32), "scores": scores}


def expected(problem: Problem, case: dict) -> np.ndarray:
    """What the case must give, by the codec, in float64."""
    x = np.array(mx.array(case["x"]).astype(getattr(mx, problem.dtype)).astype(mx.float32)).astype(np.float64)
    if problem.kind == "linear":
        return np.concatenate([reference.linear(row[None], case["weights"][e]) for row, e in zip(x, case["indices"])])
    return reference.swiglu(x, case["indices"], case["weights"], case["scores"], problem.activation, 1.702, 7.0)


def run_on_gpu(problem: Problem, config: KernelConfig, case: dict) -> np.ndarray:
    """The case through the primitives, on the GPU; float32."""
    x = mx.array(case["x"]).astype(getattr(mx, problem.dtype))
    if problem.kind == "linear" and problem.experts == 1:
        y = ops.trellis_linear(x, case["weights"][0], config=config, stream=mx.gpu)
    elif problem.kind == "linear":
        with mx.stream(mx.gpu):
            y = gathered(problem, config, case, x)
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


def gathered(problem: Problem, config: KernelConfig, case: dict, x: mx.array) -> mx.array:
    """One projection of experts, each row by its own, on the current stream."""
    stack = ops.prepare(ExpertStack.of("experts", case["weights"]))
    indices = mx.array(case["indices"])[:, None]
    return ops.run(ops.check_gathered(x, indices, stack), ops.resolve("self-test", problem, config))[:, 0]


def _key(problem: Problem, config: KernelConfig) -> str:
    """What a verdict is about: the kernels with their constants, and the config that lays out the work."""
    code = _code(replace(problem, rows=config.tile_size_m + 1), config)
    return json.dumps([code, asdict(config)], sort_keys=True)


def _limit(problem: Problem, config: KernelConfig) -> float:
    limit = LIMIT[problem.dtype]
    return limit if config.use_fp32_acc else max(limit, HALF_LIMIT)


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
        self._path = path or profile_files.default_path(device).with_suffix(".selftest.json")
        self._verdicts = self._load()
        self._broken: dict[str, str] = {}  # this process's configs that did not run

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
        if not isinstance(verdicts, dict) or not all(isinstance(v, str) for v in verdicts.values()):
            return {}
        return verdicts

    def _save(self) -> None:
        """A disk that cannot be written costs a repeat of the tests, no more."""
        text = json.dumps({"machine": self._machine, "verdicts": self._verdicts}, indent=1)
        try:
            atomic.write_text(self._path, text)
        except OSError as error:
            _log.debug("self-test verdicts are not kept: %s", error)

    def known(self, problem: Problem, config: KernelConfig) -> bool:
        """Whether :meth:`fault` answers without running anything."""
        key = _key(problem, config)
        return key in self._verdicts or key in self._broken

    def fault(self, problem: Problem, config: KernelConfig) -> str | None:
        """What is wrong with a config on this machine, or ``None``. The first time a small case is run."""
        with self._lock:
            key = _key(problem, config)
            if key in self._broken:
                return self._broken[key]
            if key not in self._verdicts:
                try:
                    self._verdicts[key] = self._judge(problem, config)
                except NoSmallCase as failure:
                    self._broken[key] = f"it cannot be tested: {failure}"
                    return self._broken[key]
                except RuntimeError as failure:  # what MLX raises for kernels that do not compile or run
                    # Not kept on disk: memory may have been short.
                    self._broken[key] = f"it does not run: {failure}"
                    return self._broken[key]
                self._save()
            return self._verdicts[key] or None

    def _judge(self, problem: Problem, config: KernelConfig) -> str:
        """ "" if the config is right, else what is wrong."""
        small = small_problem(problem, config)
        case = make_case(small)
        try:
            error = reference.row_error(self._execute(small, config, case), expected(small, case))
        except ValueError as failure:  # another shape
            return str(failure)
        limit = _limit(problem, config)
        return "" if error <= limit else f"its error against the codec is {error:.3g}, at most {limit:g} is right"

    def select(self, problem: Problem, traced: bool = False) -> tuple[Choice, bool]:
        """The first choice for a problem whose kernels are right, and whether that is known. Those that are refused get
        one warning.

        Args:
            problem: What is asked.
            traced: Nothing may run: a config without a verdict is the choice, and that is not known to be right.

        Raises:
            RuntimeError: If no kernel for the problem is right, or ``choices.MOST_UNBUILT`` could not be built.
        """
        refused: dict[KernelConfig, str] = {}
        choice = choices.choose(problem)
        while not traced or self.known(problem, choice.config):
            fault = self.fault(problem, choice.config)
            if fault is None:
                break
            refused[choice.config] = fault
            choices.refuse(problem, choice.config, fault, built=_NOT_BUILT not in fault)
            try:
                choice = choices.choose(problem)
            except RuntimeError:
                _warn(refused, "None is tried instead")
                raise
        if refused:
            _warn(refused, f"{choice.config} is tried instead")
        return choice, self.known(problem, choice.config)


def _warn(refused: dict[KernelConfig, str], what_follows: str) -> None:
    """One warning, about the first configs that were refused."""
    told = [f"{config} is refused on this GPU: {fault}" for config, fault in refused.items()][: choices.MOST_UNBUILT]
    if len(refused) > len(told):
        told.append(f"{len(refused) - len(told)} more are refused")
    warnings.warn("\n".join([*told, what_follows]), RuntimeWarning, 4)


@lru_cache(maxsize=1)
def _gpu() -> SelfTest:
    return SelfTest()


def fault(problem: Problem, config: KernelConfig) -> str | None:
    """What is wrong with a config on this machine, or ``None``. Kernels that came compiled are not tested."""
    return _gpu().fault(problem, config) if kernels.rules_of(problem).COMPILED_AT_RUN_TIME else None


def select(problem: Problem, traced: bool) -> tuple[Choice, bool]:
    """The choice for a problem, and whether it is final.

    Args:
        problem: Kernels that came compiled are not tested, nor is anything where there are no rows.
        traced: Whether the call is being traced. Nothing runs then: a config that is not known yet is used untested,
            and a compiled function keeps it; if it cannot be built, its evaluation says so.
    """
    choice = choices.choose(problem)
    if not kernels.rules_of(problem).COMPILED_AT_RUN_TIME or problem.rows == 0:
        return choice, True
    return _gpu().select(problem, traced)
