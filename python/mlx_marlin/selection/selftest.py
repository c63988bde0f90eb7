"""Before a config first runs on a GPU, small cases run against the codec: compilers have miscompiled kernels that were
right elsewhere. A config that is wrong is refused, and the next feasible one is tried.

This happens where a config is chosen, in Python: never inside a primitive and never inside a trace.
"""

from __future__ import annotations

import json
import logging
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path

import mlx.core as mx
import numpy as np

from .. import codec, kernels, ops
from ..device.machine import fingerprint
from ..kernels import KernelConfig, Problem
from ..ops import reference
from ..profile import files as profile_files
from ..storage import atomic
from ..weights.experts import ExpertBank, ExpertStack
from . import choices, small_cases
from .choices import Choice
from .small_cases import NoSmallCase, expected, make_case

__all__ = ["SelfTest", "fault", "select"]

_log = logging.getLogger("mlx_marlin")

# Largest error of a row over the row's norm: a few roundings of the dtype. The wrong decoder that is nearest to the
# right one (mul1 with offset 510) is off by 1e-2 on the case's rows.
LIMIT = {"float32": 1e-4, "float16": 2e-3, "bfloat16": 8e-3}
# With half operands and half sums inside a tile: rounding alone reaches 1.5e-3.
HALF_LIMIT = 6e-3
_MAX_FILE_BYTES = 1 << 20
# What csrc/metal/encode.cpp says of a kernel that the compiler rejects.
_NOT_BUILT = "could not be built"


Executor = Callable[[Problem, KernelConfig, dict], np.ndarray]


def run_on_gpu(problem: Problem, config: KernelConfig, case: dict) -> np.ndarray:
    """The case through the primitives, on the GPU; float32."""
    if case.get("of") == "embedding":
        table = mx.array(case["trellis"]), mx.array(case["signs"])
        bits = int(problem.bits[0][0])  # half rates are of products
        rows = ops.trellis_embedding(lazy_indices(case), *table, problem.intermediate, bits, stream=mx.gpu)
        return np.array(rows.astype(mx.float32))
    x = mx.array(case["x"]).astype(getattr(mx, problem.dtype))
    if case.get("of") == "weight":
        return np.array(ops.trellis_decode(case["weights"][0], stream=mx.gpu).astype(mx.float32))
    if case.get("of") == "gradient":
        with mx.stream(mx.gpu):
            at = mx.zeros((problem.rows, problem.hidden), x.dtype)
            _, (y,) = mx.vjp(lambda x: gathered(problem, config, case, x), [at], [x])
            return np.array(y.astype(mx.float32))
    if problem.kind == "linear" and problem.experts == 1:
        y = ops.trellis_linear(x, case["weights"][0], config=config, stream=mx.gpu)
    elif problem.kind == "linear":
        with mx.stream(mx.gpu):
            y = gathered(problem, config, case, x)
    else:
        scores = None if case["scores"] is None else mx.array(case["scores"])
        bank = ExpertBank(*case["weights"]) if problem.side_by_side == 2 else ExpertBank(None, *case["weights"])
        op = ops.trellis_swiglu if problem.side_by_side == 2 else ops.trellis_mlp
        y = op(
            x,
            lazy_indices(case),
            bank,
            scores=scores,
            activation=problem.activation,
            config=config,
            stream=mx.gpu,
        )
    return np.array(y.astype(mx.float32))


def lazy_indices(case: dict) -> mx.array:
    """The indices of a case, not evaluated: calls refuse those out of range that they know."""
    return mx.array(case["indices"]) + mx.array(0, mx.uint32)


def gathered(problem: Problem, config: KernelConfig, case: dict, x: mx.array) -> mx.array:
    """One projection of experts, each row by its own, on the current stream."""
    stack = ops.prepare(ExpertStack.of("experts", case["weights"]))
    indices = lazy_indices(case)[:, None]
    return ops.run(ops.check_gathered(x, indices, stack), ops.resolve("self-test", problem, config))[:, 0]


def _key(problem: Problem, config: KernelConfig) -> str:
    """What a verdict is about: the kernels with their constants, and the config that lays out the work."""
    plan = ops.plan(replace(problem, rows=config.tile_size_m + 1), config)
    return json.dumps([small_cases.code(plan), asdict(config)], sort_keys=True)


def _tests(problem: Problem, config: KernelConfig) -> Iterator[tuple[str, Problem | None]]:
    """What must be right for a config to run a problem: the subject of each verdict, and the small problem that gives
    it; ``None`` is the config's own, which takes longer to find.
    """
    yield _key(problem, config), None
    for routed in small_cases.routing_problems(problem, config):
        (route,) = (d for d in ops.plan(routed, config)["dispatches"] if d["kernel"] == "trellis_route")
        # Sorting is the same code for all configs; the rows of a tile and the alignment of experts decide what it does.
        about = [route["kernel"], route["constants"], routed.experts, config.tile_size_m]
        yield json.dumps(about, sort_keys=True), routed


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
        for key, _ in _tests(problem, config):
            if key in self._broken or self._verdicts.get(key):
                return True
            if key not in self._verdicts:
                return False
        return True

    def fault(self, problem: Problem, config: KernelConfig) -> str | None:
        """What is wrong with a config on this machine, or ``None``. The first time small cases are run."""
        with self._lock:
            for key, small in _tests(problem, config):
                found = self._verdict(key, small, problem, config)
                if found:
                    return found
        return None

    def _verdict(self, key: str, small: Problem | None, problem: Problem, config: KernelConfig) -> str:
        """ "" if a test is passed, else what is wrong; kept on disk unless the test did not run."""
        if key in self._broken:
            return self._broken[key]
        if key not in self._verdicts:
            try:
                self._verdicts[key] = self._judge(small or small_cases.small_problem(problem, config), config)
            except NoSmallCase as failure:
                self._broken[key] = f"it cannot be tested: {failure}"
                return self._broken[key]
            except RuntimeError as failure:  # what MLX raises for kernels that do not compile or run
                # Not kept on disk: memory may have been short.
                self._broken[key] = f"it does not run: {failure}"
                return self._broken[key]
            self._save()
        return self._verdicts[key]

    def others(self) -> dict[str, str]:
        """What is wrong with the kernels that no config chooses: decoding weights and rows of embeddings, to the bit,
        and gradients.
        """
        cases = {
            f"trellis_decode of {codebook} at {bits} bits": (*small_cases.decoded_case(bits, codebook), 0.0)
            for bits, codebook in codec.FORMATS
        }
        for bits in range(1, codec.MAX_BITS + 1):
            cases[f"trellis_embedding at {bits} bits"] = (*small_cases.embedding_case(bits), 0.0)
        for problem in small_cases.transposed_problems():
            name = f"the gradient of a linear with {problem.experts} weights"
            cases[name] = (problem, small_cases.transposed_case(problem), LIMIT[problem.dtype])
        found = {}
        for name, (problem, case, limit) in cases.items():
            try:
                found[name] = self._compare(problem, kernels.default(problem), case, limit)
            except RuntimeError as failure:
                found[name] = f"it does not run: {failure}"
        return {name: fault for name, fault in found.items() if fault}

    def _judge(self, small: Problem, config: KernelConfig) -> str:
        """ "" if the config is right for a small problem, else what is wrong."""
        return self._compare(small, config, make_case(small), _limit(small, config))

    def _compare(self, problem: Problem, config: KernelConfig, case: dict, limit: float) -> str:
        try:
            error = reference.row_error(self._execute(problem, config, case), expected(problem, case))
        except ValueError as failure:  # another shape
            return str(failure)
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
