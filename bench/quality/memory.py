"""Peak memory of the converter's stages for one layer of a large model, the search left out.

Usage: python -m bench.quality.memory DIR [--experts 128] [--hidden 2048] [--width 768] [--tokens 65536] [--jobs 8]

A checkpoint of one layer is made in DIR (sparse where experts beyond the first are zeros), or used if it is there. Only
the first linears of each kind are prepared, searched (in name) and refined: the others need the same again.
"""

from __future__ import annotations

import argparse
import json
import struct
import sys
import threading
import time
from pathlib import Path

import numpy as np
from threadpoolctl import threadpool_limits

from mlx_marlin import codec, ops
from mlx_marlin.quantize.jobs import Original, job_bytes, layer_jobs
from mlx_marlin.quantize.layered import LayeredModel
from mlx_marlin.quantize.progress import Clock
from mlx_marlin.quantize.runner import BATCH, Runner
from mlx_marlin.quantize.source import Source
from mlx_marlin.quantize.spill import Spill
from mlx_marlin.quantize.stored import stored_codes, stored_tensors
from mlx_marlin.quantize.weight import expected_loss, prepare, quantize_prepared

VOCABULARY, WINDOW, HEAD = 4096, 256, 128
_PERIOD = 0.02  # seconds between two looks at the memory
_FILLED = 4  # experts whose weights are not zero


def make(directory: Path, experts: int, hidden: int, width: int) -> None:
    """Write a checkpoint of one layer of Qwen3-MoE, in bf16."""
    heads = hidden // HEAD
    config = dict(
        model_type="qwen3_moe", hidden_size=hidden, num_hidden_layers=1, intermediate_size=width,
        num_attention_heads=heads, num_key_value_heads=max(1, heads // 8), head_dim=HEAD, num_experts=experts,
        num_experts_per_tok=8, moe_intermediate_size=width, decoder_sparse_step=1, mlp_only_layers=[],
        norm_topk_prob=True, rms_norm_eps=1e-6, rope_theta=1e6, vocab_size=VOCABULARY, tie_word_embeddings=True,
        max_position_embeddings=2048,
    )  # fmt: skip
    layer, kv = "model.layers.0", max(1, heads // 8) * HEAD
    shapes = {"model.embed_tokens.weight": (VOCABULARY, hidden), "model.norm.weight": (hidden,)}
    for name, rows in (("q", hidden), ("k", kv), ("v", kv), ("o", hidden)):
        shapes[f"{layer}.self_attn.{name}_proj.weight"] = (rows, hidden)
    for name in ("input_layernorm", "post_attention_layernorm"):
        shapes[f"{layer}.{name}.weight"] = (hidden,)
    for name in ("q_norm", "k_norm"):
        shapes[f"{layer}.self_attn.{name}.weight"] = (HEAD,)
    shapes[f"{layer}.mlp.gate.weight"] = (experts, hidden)
    for e in range(experts):
        for name, shape in (("gate", (width, hidden)), ("up", (width, hidden)), ("down", (hidden, width))):
            shapes[f"{layer}.mlp.experts.{e}.{name}_proj.weight"] = shape
    header, end = {}, 0
    for name, shape in shapes.items():
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [end, end + 2 * int(np.prod(shape))]}
        end = header[name]["data_offsets"][1]
    text = json.dumps(header).encode()
    rng = np.random.default_rng(0)
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        start = file.tell()
        file.truncate(start + end)
        for name, shape in shapes.items():
            parts = name.split(".experts.")
            if len(parts) > 1 and int(parts[1].split(".")[0]) >= _FILLED:
                continue
            values = rng.standard_normal(shape, np.float32) * shape[-1] ** -0.5 if len(shape) > 1 else np.ones(shape)
            words = (np.asarray(values, np.float32).view(np.uint32) >> 16).astype(np.uint16)
            file.seek(start + header[name]["data_offsets"][0])
            file.write(words.tobytes())
    (directory / "config.json").write_text(json.dumps(config))


class Watch:
    """The largest resident memory since the last look, in GB: Linux only."""

    def __init__(self) -> None:
        self.peak = 0.0
        threading.Thread(target=self._look, daemon=True).start()

    @staticmethod
    def now() -> float:
        (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
        return int(line.split()[1]) * 1024 / 1e9

    def _look(self) -> None:
        while True:
            self.peak = max(self.peak, self.now())
            time.sleep(_PERIOD)

    def tell(self, stage: str) -> None:
        """Print the peak of a stage."""
        print(f"{stage}: peak {self.peak:.2f} GB, behind it {self.now():.2f} GB", flush=True)
        self.peak = self.now()


def run(directory: Path, tokens: int, count: int) -> None:
    """A layer through measuring and quantizing, all but the search."""
    watch = Watch()
    windows = np.random.default_rng(0).integers(0, VOCABULARY, (tokens // WINDOW, WINDOW)).astype(np.int32)
    source = Source(directory)
    runner = Runner(source, windows, LayeredModel(source, windows, BATCH), Clock(None))
    runner.directory = directory
    runner.reopen()
    spill = Spill(directory)
    with threadpool_limits(1, "blas"):
        hidden = runner.embeddings()
        watch.tell("embeddings")
        runner.load(0)
        watch.tell("layer loaded")
        with runner.taps(0) as taps:
            after = runner.run(0, hidden, taps=taps)
            watch.tell("calibrated")
            jobs = layer_jobs(runner.model, 0, taps, Original(runner.model, 0, hidden[0], after[0], 0))
            watch.tell(f"{len(jobs)} linears found")

            def task(job, threads):
                prepared = prepare(job.weight(), job.hessian(), [0])
                job.effect(), expected_loss(prepared, 3, "mul1")
                codes = quantize_prepared(prepared, 3, "mul1", threads)
                return {name: spill.tensor(t) for name, t in stored_tensors(job.name, codes, None).items()}

            found = runner.parallel(task, jobs[:count], "quantizing", 0.0, job_bytes)
            watch.tell(f"{count} linears quantized")
            for job, stored in zip(jobs, found):
                job.install(codec.dequantize(stored_codes(job.name, stored, "mul1", job.shape)), None)
            watch.tell("installed")
            runner.run(0, hidden)
            watch.tell("run again")


def _any_states(tiles: np.ndarray, bits: float, codebook: str, *, threads: int | None = None) -> np.ndarray:
    """In the place of the search. Of equal states a linear's values would be all the same, its scales undetermined."""
    size = (1, len(tiles), codec.words_per_tile(bits))
    return codec.unpack(np.random.default_rng(0).integers(0, 1 << 16, size, np.uint16).view(np.int16))[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    for name, default in (("experts", 128), ("hidden", 2048), ("width", 768), ("tokens", 65536), ("jobs", 8)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    if not (options.directory / "config.json").exists():
        make(options.directory, options.experts, options.hidden, options.width)
    ops.viterbi_search = _any_states
    run(options.directory, options.tokens, options.jobs)


if __name__ == "__main__":
    sys.exit(main())
