"""Every source that the Metal kernels are specialised to."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from itertools import product

from mlx_marlin import _ext, codec, kernels, ops
from mlx_marlin.kernels import KernelConfig, Problem, make_name, metal
from mlx_marlin.ops.stacks import stack_info
from tests.support.metal_executor import stem, viterbi_plan

ONE_FORMAT = [(3, "mcg")]
ALL_FORMATS = [(bits, "mul1") for bits in codec.WIDTHS] + [(3, codebook) for codebook in codec.CODEBOOKS]


def sources(formats: list[tuple[float, str]]) -> dict[tuple[str, tuple], list[str]]:
    """Kernels by shader file and source constants, of every legal config and of the calls that no config decides.

    Args:
        formats: (bits, codebook) pairs, all of which a source decodes.

    Returns:
        Kernels that share file and constants are one unit for a compiler. The number of threads is left out: it is an
        attribute, which changes no code.
    """
    named = set(_ext.SOURCE_CONSTANTS) - {"max_threads"}
    found = defaultdict(set)
    for dispatch in _dispatches(sorted({b for b, _ in formats}), sorted({c for _, c in formats})):
        constants = {k: v for k, v in dispatch["constants"].items() if k in named}
        found[stem(dispatch["kernel"]), tuple(sorted(constants.items()))].add(dispatch["kernel"])
    return {source: sorted(names) for source, names in found.items()}


def _dispatches(bits: list[float], codebooks: list[str]) -> Iterator[dict]:
    sizes = {"rows": 3, "experts": 2, "codebooks": codebooks, "device": "gpu", "accuracy": "half", "accelerators": True}
    layer = Problem.swiglu(512, 256, top_k=2, bits=[(b,) * 3 for b in bits], combine=True, **sizes)
    for problem in (layer, Problem.linear(256, 256, bits=bits, **sizes)):
        for config in kernels.candidates(problem):
            yield from ops.plan(problem, config)["dispatches"]
    held = {"bias": False, "bits": bits, "codebooks": codebooks}
    weights = [stack_info(experts, 256, 256, **held) for experts in (2, 2 * metal.MAX_EXPERTS)]
    for simdgroups in metal.SIMDGROUPS:
        config = KernelConfig(make_name("decode"), 1, 128, simdgroups, True, "decode")
        native = ops.resolve("test", problem, config)
        for weight in weights:  # as many experts as can be sorted, and more
            yield from _ext.plan_linear(3, 0, weight, 256, 256, 1, True, True, native)["dispatches"]
    yield from _ext.plan_decode(weights[0], 0)["dispatches"]
    yield from _ext.plan_embedding(3, 0, 9, 600, 3)["dispatches"]
    for width, codebook in product(bits, codebooks):
        if (width, codebook) in codec.FORMATS:
            yield from viterbi_plan(1, width, codebook)["dispatches"]
