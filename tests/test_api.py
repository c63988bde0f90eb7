"""The public names: where they import from, what they are called with, and that tools see them."""

import ast
import importlib
import inspect
import pydoc
import subprocess
import sys
from pathlib import Path

import pytest

import mlx_marlin

# Module -> public names. Each is to be had from mlx_marlin too.
PUBLIC = {
    "codec": "CODEBOOKS unpack pack decode inner hadamard unpack_signs dequantize",
    "weights": "TrellisWeight ExpertBank GridWeight",
    "ops": "trellis_linear trellis_swiglu trellis_decode plan set_num_threads",
    "layers": "TrellisLinear TrellisSwitchGLU",
    "kernels": "Problem KernelConfig feasible candidates default",
    "lm": "load",
    "loader": "TrellisModelLoader",
    "autotune": "MixedBPWAutoTuner AutotuneConfig BenchmarkResult",
    "profile": "default_path use_profile",
    "selection": "MixedKernelSelector get_mixed_kernel record_kernel_latency get_statistics reset_history "
    "set_exploration_rate",
    "dispatch": "MixedBpwMoEDispatcher MixedBpwMoEDispatcherExample get_expert_bits estimate_gpu_memory_pressure "
    "get_available_kernels analyze_expert_activation_pattern",
    "quantize": "convert quantize_weight",
    # What public calls return or raise.
    "choices": "Choice",
    "online": "adapt Adaptation",
    "profile_data": "ProfileError",
    "trial": "Objective",
}
NAMES = [(module, name) for module, names in PUBLIC.items() for name in names.split()]

SIGNATURES = {
    "TrellisWeight": "trellis suh svh codebook bias in_features out_features",
    "ExpertBank": "gate up down",
    "trellis_linear": "x w config stream",
    "trellis_swiglu": "x indices bank scores activation alpha limit config stream",
    "trellis_decode": "w stream",
    "set_num_threads": "n",
    "TrellisSwitchGLU": "gate up down activation alpha limit bank",
    "feasible": "problem config",
    "candidates": "problem",
    "default": "problem",
    "use_profile": "path allow_foreign",
    "hadamard": "x axis",
    "pack": "states bits",
    "decode": "states codebook",
}


@pytest.mark.parametrize("module, name", NAMES)
def test_public_names(module, name):
    assert name in mlx_marlin.__all__ and name in dir(mlx_marlin)
    assert getattr(mlx_marlin, name) is getattr(importlib.import_module(f"mlx_marlin.{module}"), name)


def test_nothing_else_is_public():
    assert set(mlx_marlin.__all__) == {name for _, name in NAMES}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures(name):
    assert " ".join(inspect.signature(getattr(mlx_marlin, name)).parameters) == SIGNATURES[name]


def test_public_names_have_documentation():
    for _, name in NAMES:
        value = getattr(mlx_marlin, name)
        assert not callable(value) or inspect.getdoc(value), name


def test_tools_see_the_names_that_are_imported_late():
    tree = ast.parse(Path(mlx_marlin.__file__).read_text())
    (block,) = [n for n in tree.body if isinstance(n, ast.If) and getattr(n.test, "id", "") == "TYPE_CHECKING"]
    declared = {alias.name: node.module for node in block.body for alias in node.names}
    assert declared == mlx_marlin._LAZY
    text = pydoc.plain(pydoc.render_doc(mlx_marlin))
    assert all(name in text for name in mlx_marlin.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        mlx_marlin.nothing  # noqa: B018


def test_everything_but_loading_works_without_mlx_lm():
    code = (
        "import sys; sys.modules['mlx_lm'] = None\n"
        "from mlx_marlin import *\n"
        "import mlx_marlin, pydoc; pydoc.render_doc(mlx_marlin)\n"
        "load('x')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.strip().splitlines()[-1] == (
        "ModuleNotFoundError: loading models needs mlx-lm; in a clone of mlx_marlin run: pip install '.[lm]'"
    )
