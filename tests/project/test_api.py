"""The public names: where they import from, what they are called with, and that tools see them."""

import ast
import importlib
import inspect
import pydoc
import subprocess
import sys
from operator import attrgetter
from pathlib import Path

import pytest

import mlx_marlin

# Module -> public names. Each is to be had from mlx_marlin too.
PUBLIC = {
    "codec": "CODEBOOKS unpack pack decode inner hadamard unpack_signs dequantize decode_embedding",
    "weights": "TrellisWeight ExpertBank GridWeight EmbeddingWeight",
    "ops": "trellis_linear trellis_swiglu trellis_mlp trellis_decode plan set_num_threads",
    "layers": "TrellisLinear TrellisSwitchGLU TrellisSwitchMLP TrellisEmbedding GridLinear",
    "kernels": "Problem KernelConfig feasible candidates default",
    "lm": "load",
    "loader": "TrellisModelLoader",
    "autotune": "MixedBPWAutoTuner AutotuneConfig BenchmarkResult Objective",
    "profile": "default_path use_profile ProfileError",
    "selection": "MixedKernelSelector get_mixed_kernel record_kernel_latency get_statistics reset_history "
    "set_exploration_rate Choice",
    "dispatch": "MixedBpwMoEDispatcher MixedBpwMoEDispatcherExample get_expert_bits estimate_gpu_memory_pressure "
    "get_available_kernels analyze_expert_activation_pattern adapt Adaptation",
    "quantize": "convert quantize_weight",
}
NAMES = [(module, name) for module, names in PUBLIC.items() for name in names.split()]

# As inspect.signature prints the parameters, without self; in a table so that a changed default fails too.
SIGNATURES = {
    "TrellisWeight": "trellis, suh, svh, codebook='3inst', bias=None, in_features=None, out_features=None",
    "ExpertBank": "gate, up, down",
    "KernelConfig": "kernel_name, tile_size_m, tile_size_n, simdgroups, use_fp32_acc=False, kernel_variant='base'",
    "trellis_linear": "x, w, *, config=None, stream=None",
    "trellis_swiglu": "x, indices, bank, *, scores=None, activation='silu', alpha=1.702, limit=7.0, config=None, "
    "stream=None",
    "trellis_mlp": "x, indices, bank, *, scores=None, activation='relu_squared', config=None, stream=None",
    "trellis_decode": "w, *, stream=None",
    "plan": "problem, config=None, *, alpha=1.702, limit=7.0",
    "set_num_threads": "n",
    "TrellisSwitchGLU": "gate=None, up=None, down=None, activation='silu', alpha=1.702, limit=7.0, *, bank=None",
    "TrellisSwitchMLP": "fc1=None, fc2=None, activation='gelu_tanh', *, bank=None",
    "TrellisSwitchMLP.__call__": "x, indices, scores=None",
    "TrellisSwitchGLU.__call__": "x, indices, scores=None",
    "TrellisSwitchGLU.explain": "rows, dtype=None, *, top_k=None, combine=None",
    "TrellisLinear.__call__": "x",
    "TrellisLinear.explain": "rows, dtype=None",
    "feasible": "problem, config",
    "candidates": "problem",
    "default": "problem",
    "default_path": "device",
    "use_profile": "path, allow_foreign=False",
    "unpack": "trellis",
    "hadamard": "x, axis=-1",
    "pack": "states, bits",
    "decode": "states, codebook",
    "TrellisModelLoader": "model_dir",
    "TrellisModelLoader.load_weight": "name, *, in_features=None, out_features=None",
    "MixedBPWAutoTuner": "device_name=None, config_path=None, *, device=None, objective=None, memory_limit=None, "
    "dtype=None, race=None",
    "MixedBPWAutoTuner.benchmark_all": "layers, batch_sizes, num_warmup=5, num_iter=20, verbose=True, *, top_k=8",
    "MixedBPWAutoTuner.select_kernel": "batch_size, hidden_dim, bit_widths, use_decode=False, fallback_to_default=True",
    "MixedBPWAutoTuner.record_latency": "kernel_name, batch_size, latency_ms, hidden_dim=None, bit_widths=None, "
    "problem=None, config=None",
    "MixedBPWAutoTuner.adapt_selection": "batch_size, hidden_dim, bit_widths, top_k=3",
    "MixedBPWAutoTuner.export_config": "path=None",
    "MixedKernelSelector": "history_len=100, memory_pressure_threshold=0.9, exploration_rate=0.05, seed=None",
    "get_mixed_kernel": "batch_size, active_expert_bits, gpu_memory_pressure=0.0, gate_bits=None, up_bits=None, "
    "down_bits=None, use_fp32_acc=False, available_kernels=None, pattern=None, problem=None",
    "record_kernel_latency": "kernel_name, batch_size, latency_ms, problem=None",
    "set_exploration_rate": "rate",
    "MixedBpwMoEDispatcher": "layer_or_bank, expert_bit_metadata=None, use_fp32_acc=False, enable_ab_testing=True, "
    "exploration_rate=0.05",
    "MixedBpwMoEDispatcher.dispatch": "activations, expert_ids, expert_probs",
    "get_expert_bits": "expert_ids, expert_bit_metadata",
    "analyze_expert_activation_pattern": "expert_ids, num_experts",
    "adapt": "model, exploration=0.05, *, max_overhead=0.02, seed=None",
    "load": "path_or_hf_repo, dtype=None, accuracy=None, *, tokenizer_config=None, model_config=None, "
    "adapter_path=None, lazy=False, return_config=False, revision=None, trust_remote_code=False, progress=None",
    "convert": "model, output, *, bits=None, head_bits=6, embed_bits=None, mtp_bits=4, vision_bits=6, codebook='mul1', "
    "half_rates=True, calibration=None, mixed='per-expert', resume=False, seed=0, trust_remote_code=False, job=None, "
    "allocation=None, progress=None",
    "quantize.measure": "model, job, *, codebook='mul1', calibration=None, seed=0, trust_remote_code=False, "
    "progress=None",
    "quantize.allocate": "job, bits, *, mixed='per-expert', half_rates=True, allocation=None",
    "quantize_weight": "weight, K, codebook='mul1', hessian=None, seed=0, *, bias=None, threads=None",
}


@pytest.mark.parametrize("module, name", NAMES)
def test_public_names(module, name):
    assert name in mlx_marlin.__all__ and name in dir(mlx_marlin)
    assert getattr(mlx_marlin, name) is getattr(importlib.import_module(f"mlx_marlin.{module}"), name)


def test_nothing_else_is_public():
    assert set(mlx_marlin.__all__) == {name for _, name in NAMES}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures(name):
    signature = inspect.signature(attrgetter(name)(mlx_marlin))
    parameters = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    shown = signature.replace(parameters=parameters, return_annotation=inspect.Signature.empty)
    assert str(shown).strip("()").removeprefix("self, ") == SIGNATURES[name]


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
