"""The ops, with their argument errors. The only door to the C++ extension.

- ``stacks``: weights as the primitives take them.
- ``problems``: what a call asks for, and the config that answers it.
- ``products``: the ops themselves.
- ``planning``: what a GPU would run.
- ``search``: the encoder's search.
"""

from pathlib import Path

import mlx.core as mx

from .. import _ext, shaders
from .planning import plan
from .problems import DTYPES, Activation, _native, device_of, linear_problem, resolve, swiglu_problem
from .products import (
    cpu_digest,
    gather_linear,
    instruction_set,
    is_traced,
    linear,
    plan_digest,
    set_num_threads,
    swiglu,
    trellis_decode,
    trellis_linear,
    trellis_swiglu,
)
from .search import set_viterbi_instruction_set, viterbi_instruction_sets, viterbi_search
from .stacks import BUILD_LOCK, Stack, _prepare_weight, half_scales, prepare, with_parameters

__all__ = [
    "BUILD_LOCK",
    "DTYPES",
    "SHADERS",
    "Activation",
    "Stack",
    "_ext",
    "_native",
    "_prepare_weight",
    "cpu_digest",
    "device_of",
    "gather_linear",
    "half_scales",
    "instruction_set",
    "is_traced",
    "linear",
    "linear_problem",
    "plan",
    "plan_digest",
    "prepare",
    "resolve",
    "set_num_threads",
    "set_viterbi_instruction_set",
    "swiglu",
    "swiglu_problem",
    "trellis_decode",
    "trellis_linear",
    "trellis_swiglu",
    "viterbi_instruction_sets",
    "viterbi_search",
    "with_parameters",
]

SHADERS = Path(_ext.__file__).parent / "shaders"
"""Where the Metal sources are installed."""

if mx.metal.is_available():
    _ext.set_shaders(shaders.sources(SHADERS))
