"""The ops, with their argument errors. The only door to the C++ extension.

- ``stacks``: weights as the primitives take them.
- ``problems``: what a call asks for, and the config that answers it.
- ``calls``: a call in three steps: checked, its problem, the primitive.
- ``products``: the ops that users call.
- ``embedding``: rows of a quantized token embedding.
- ``attention``: attention on the CPU.
- ``planning``: what a GPU would run.
- ``gathering``: requests of several threads, run together.
- ``search``: the encoder's search.
- ``shaders``: the Metal sources, made self-contained.
- ``reference``: what a call must give, by the codec, for checks at run time.
- ``runtime``: threads, memory, instruction set, digests.
"""

from pathlib import Path

import mlx.core as mx

from .. import _ext
from . import shaders
from .attention import attention, attention_runs, run_attention
from .calls import Call, check_experts, check_gathered, check_linear, run
from .embedding import trellis_embedding
from .planning import plan, scratch_bytes
from .problems import (
    DTYPE_NAMES,
    Activation,
    Indices,
    NativeConfig,
    StreamOrDevice,
    device_of,
    experts_problem,
    linear_problem,
    resolve,
)
from .products import is_traced, trellis_decode, trellis_linear, trellis_mlp, trellis_swiglu
from .runtime import (
    cpu_digest,
    has_accelerators,
    instruction_set,
    plan_digest,
    replace_sgemm,
    set_num_threads,
    uninitialized,
    widen,
)
from .search import CODEBOOK_MULTIPLIERS, mlx_turn, search_fault, searches_on_gpu, viterbi_search
from .stacks import BUILD_LOCK, Stack, half_scales, prepare, prepare_weight, with_parameters

__all__ = [
    "BUILD_LOCK",
    "CODEBOOK_MULTIPLIERS",
    "DTYPE_NAMES",
    "SHADERS",
    "Activation",
    "Call",
    "Indices",
    "NativeConfig",
    "Stack",
    "StreamOrDevice",
    "attention",
    "attention_runs",
    "check_experts",
    "check_gathered",
    "check_linear",
    "cpu_digest",
    "device_of",
    "experts_problem",
    "half_scales",
    "has_accelerators",
    "instruction_set",
    "is_traced",
    "linear_problem",
    "mlx_turn",
    "plan",
    "plan_digest",
    "prepare",
    "prepare_weight",
    "replace_sgemm",
    "resolve",
    "run",
    "run_attention",
    "scratch_bytes",
    "search_fault",
    "searches_on_gpu",
    "set_num_threads",
    "trellis_decode",
    "trellis_embedding",
    "trellis_linear",
    "trellis_mlp",
    "trellis_swiglu",
    "uninitialized",
    "viterbi_search",
    "widen",
    "with_parameters",
]

SHADERS = Path(_ext.__file__).parent / "shaders"
"""Where the Metal sources are installed."""

if mx.metal.is_available():
    _ext.set_shaders(shaders.sources(SHADERS))
