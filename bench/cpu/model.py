"""Whole models: loading, prompts and generation, beside MLX's affine format and llama.cpp.

Every model is measured in a process of its own, one after the other: its peak of memory is that process's. Loading is
from a warm page cache: the files are read once before. With --shape the checkpoints are written first, of random words,
EXL3, affine with the same dense tensors and a GGUF of the same sizes, and deleted at the end.

    python -m bench.cpu.model models/docs-moe-exl3-3.0bpw
    python -m bench.cpu.model --shape qwen3-30b-a3b --layers 4 --bits 3 --output model.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from bench.cpu import checkpoint, llama_cpp
from mlx_marlin import device, set_num_threads
from mlx_marlin.loader.directory import Kind, kind_of
from mlx_marlin.storage import atomic

PROMPTS = (128, 512, 2048)
GENERATED = 16
PEERS = ("affine", "llama.cpp")
STEP = 2048  # tokens of a prompt at once, mlx_lm's default
# What ru_maxrss counts in: kilobytes, on macOS bytes.
_RSS_UNIT = 1 if sys.platform == "darwin" else 1024


def timed(run: Callable[[], object]) -> dict[str, float]:
    """Wall and CPU seconds of a call."""
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}


def _peak_bytes() -> int:
    if sys.platform == "linux":  # ru_maxrss begins with that of the process that started this one
        (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:")]
        return int(line.split()[1]) << 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _RSS_UNIT


def _load(directory: Path):
    """The model; one of MLX's affine format with float32 activations: MLX's CPU backend converts halves in software."""
    if kind_of(directory) is Kind.EXL3:
        import mlx_marlin

        return mlx_marlin.load(str(directory))[0]
    import mlx_lm

    model = mlx_lm.load(str(directory))[0]
    if mx.default_device().type == mx.cpu:
        model.set_dtype(mx.float32)
        mx.eval(model.parameters())
    return model


def _run(model, prompt: np.ndarray, following: np.ndarray) -> dict:
    """A prompt, and single tokens behind it: random ones, as a model of random words would repeat its likeliest."""
    from mlx_lm.models.cache import make_prompt_cache

    cache = make_prompt_cache(model)

    def fill() -> None:  # as mlx_lm's generate does: only the last token's logits are computed
        for begin in range(0, prompt.shape[1] - 1, STEP):
            model(mx.array(prompt[:, begin : min(begin + STEP, prompt.shape[1] - 1)]), cache=cache)
            mx.eval([c.state for c in cache])
        mx.eval(model(mx.array(prompt[:, -1:]), cache=cache))

    def generate() -> None:
        for token in following.tolist():
            mx.eval(model(mx.array([[token]]), cache=cache))

    prefill = timed(fill)
    generation = timed(generate)
    prefill["tokens_per_s"] = prompt.size / prefill["wall_s"]
    generation["tokens_per_s"] = following.size / generation["wall_s"]
    return {"prompt": prefill, "generation": generation}


def measure(directory: Path, prompts: list[int], generated: int, threads: int) -> dict:
    """Load one model in this process and run it.

    Args:
        directory: An EXL3 directory, or one that mlx-lm loads.
        prompts: Tokens of the prompts; behind each, generation is measured at that context.
        generated: Tokens of the generation.
        threads: Of the CPU kernels of ours; MLX's own have one.
    """
    # Imports are no part of loading. transformers imports tokenizers where they are first named.
    import mlx_lm  # noqa: F401
    from transformers import AutoTokenizer, PreTrainedTokenizerFast  # noqa: F401

    set_num_threads(threads)
    for file in directory.glob("*.safetensors"):
        with open(file, "rb", buffering=0) as stream:
            while stream.read(16 << 20):
                pass
    before, models = _peak_bytes(), []
    load = timed(lambda: models.append(_load(directory)))
    (model,) = models
    weights = sum(value.nbytes for _, value in tree_flatten(model.parameters()))
    load.update(gb_per_s=weights / 1e9 / load["wall_s"], peak_over_weights=(_peak_bytes() - before) / weights)
    vocabulary, rng = model.args.vocab_size, np.random.default_rng(0)
    mx.eval(model(mx.array([[1, 2]])))  # what happens once: configs, buffers
    runs = []
    for tokens in prompts:
        run = _run(model, rng.integers(0, vocabulary, (1, tokens)), rng.integers(0, vocabulary, generated))
        runs.append({"context": tokens, **run})
    kind = "EXL3" if kind_of(directory) is Kind.EXL3 else "mlx-lm"
    return {"model": directory.name, "kind": kind, "weight_bytes": weights, "load": load, "runs": runs}


def _in_a_process(directory: Path, arguments: argparse.Namespace) -> dict:
    command = [sys.executable, "-m", "bench.cpu.model", str(directory), "--single", "--threads", str(arguments.threads)]
    command += ["--generated", str(arguments.generated), "--prompts", *map(str, arguments.prompts)]
    run = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(run.stdout.splitlines()[-1])


def print_table(results: list[dict]) -> None:
    """One block for each model."""
    for result in results:
        load = result["load"]
        print(
            f"\n{result['model']} ({result['kind']}), {result['weight_bytes'] / 1e9:.2f} GB: loaded in "
            f"{load['wall_s']:.2f} s ({load['cpu_s']:.2f} CPU s), {load['gb_per_s']:.2f} GB/s, "
            + (f"peak {load['peak_over_weights']:.3f} of the weights" if load["peak_over_weights"] else "mapped")
        )
        print(f"{'context':>8} {'prompt tok/s':>13} {'CPU s':>8} {'generation tok/s':>17} {'CPU s':>8}")
        for run in result["runs"]:
            prompt, generation = run["prompt"], run["generation"]
            print(
                f"{run['context']:8} {prompt['tokens_per_s']:13.2f} {prompt['cpu_s']:8.2f} "
                f"{generation['tokens_per_s']:17.2f} {generation['cpu_s']:8.2f}"
            )


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directories", type=Path, nargs="*", help="EXL3, what mlx-lm loads, or GGUF files")
    parser.add_argument("--shape", choices=checkpoint.SHAPES, help="write random checkpoints of this shape")
    parser.add_argument("--layers", type=int, help="of --shape; default: the model's own")
    parser.add_argument("--bits", type=int, choices=(2, 3, 4), default=3, help="of --shape, every format")
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS), help="default: %(default)s")
    parser.add_argument("--prompts", type=int, nargs="*", default=list(PROMPTS), help="default: %(default)s")
    parser.add_argument("--generated", type=int, default=GENERATED, help="tokens at each context; default: %(default)s")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--where", type=Path, help="directory for --shape's checkpoints; default: the system's")
    parser.add_argument("--output", type=Path, help="JSON")
    parser.add_argument("--single", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if not arguments.directories and not arguments.shape:
        parser.error("give directories or --shape")
    return arguments


def write_shape(where: Path, arguments: argparse.Namespace) -> list[Path]:
    """The random checkpoints that are asked for: EXL3 first."""
    config = checkpoint.config_of(arguments.shape, arguments.layers)
    forms = {"exl3": checkpoint.Exl3, **({"affine": checkpoint.Affine} if "affine" in arguments.peers else {})}
    directories = []
    for name, form in forms.items():
        directories.append(where / f"{arguments.shape}-{name}-{arguments.bits}bit")
        rng = np.random.default_rng(0)
        checkpoint.write(directories[-1], config, form(rng, arguments.bits), rng)
    if "llama.cpp" in arguments.peers and not llama_cpp.missing():
        directories.append(where / f"{arguments.shape}-{arguments.bits}bit.gguf")
        llama_cpp.write(directories[-1], config, arguments.bits, np.random.default_rng(0))
    return directories


def main(argv: list[str] | None = None) -> None:
    arguments = _parse(argv)
    if arguments.single:
        (model,) = arguments.directories
        run = llama_cpp.measure if model.suffix == ".gguf" else measure
        print(json.dumps(run(model, arguments.prompts, arguments.generated, arguments.threads)))
        return
    with tempfile.TemporaryDirectory(dir=arguments.where) as where:
        written = write_shape(Path(where), arguments) if arguments.shape else []
        results = [_in_a_process(directory, arguments) for directory in (*arguments.directories, *written)]
    print_table(results)
    if arguments.shape and "llama.cpp" in arguments.peers and llama_cpp.missing():
        missing = " and ".join(llama_cpp.missing())
        print(f"\nllama.cpp's CPU backend is not measured: not installed: {missing} (pip install '.[bench]')")
    if arguments.output:
        chip = device.fingerprint("cpu").chip
        machine = {"chip": chip, "cores": os.cpu_count(), "python": platform.python_version()}
        versions = {name: version(name) for name in ("mlx_marlin", "mlx", "mlx_lm")}
        stored = {"machine": machine, "versions": versions, "threads": arguments.threads, "results": results}
        atomic.write_text(arguments.output, json.dumps(stored, indent=1) + "\n")


if __name__ == "__main__":
    main()
