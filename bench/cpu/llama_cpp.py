"""Whole models of llama.cpp's CPU backend: random GGUF files of a given shape, and their rates, by xllamacpp's server.

Needs the extra ``bench``: gguf writes the file, xllamacpp runs it.
"""

from __future__ import annotations

import importlib.util
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

# K-quants by bits: bytes of a block of 256 weights, where its half-precision scale lies, and the scale that makes of
# random words weights of about 0.02.
_TYPES = {
    2: ("Q2_K", 84, 80, 2e-3),
    3: ("Q3_K", 110, 108, 5e-4),
    4: ("Q4_K", 144, 0, 2e-4),
    6: ("Q6_K", 210, 208, 1.5e-5),
}
_BLOCK = 256
HEAD_BITS = 6
MODULES = ("gguf", "xllamacpp")


def missing() -> list[str]:
    """Modules that are not installed."""
    return [name for name in MODULES if importlib.util.find_spec(name) is None]


def _tensors(config: dict, bits: int) -> Iterator[tuple[str, tuple[int, ...], int | None]]:
    """Name, shape (rows last but one, inputs last) and bits of every tensor; None: float32."""
    hidden, head, width = config["hidden_size"], config["head_dim"], config["moe_intermediate_size"]
    heads, kv_heads, experts = config["num_attention_heads"], config["num_key_value_heads"], config["num_experts"]
    yield "token_embd.weight", (config["vocab_size"], hidden), 16
    yield "output_norm.weight", (hidden,), None
    yield "output.weight", (config["vocab_size"], hidden), HEAD_BITS
    for number in range(config["num_hidden_layers"]):
        block = f"blk.{number}"
        for name, size in (("attn_norm", hidden), ("ffn_norm", hidden), ("attn_q_norm", head), ("attn_k_norm", head)):
            yield f"{block}.{name}.weight", (size,), None
        yield f"{block}.attn_q.weight", (heads * head, hidden), bits
        yield f"{block}.attn_k.weight", (kv_heads * head, hidden), bits
        yield f"{block}.attn_v.weight", (kv_heads * head, hidden), bits
        yield f"{block}.attn_output.weight", (hidden, heads * head), bits
        yield f"{block}.ffn_gate_inp.weight", (experts, hidden), None
        yield f"{block}.ffn_gate_exps.weight", (experts, width, hidden), bits
        yield f"{block}.ffn_up_exps.weight", (experts, width, hidden), bits
        yield f"{block}.ffn_down_exps.weight", (experts, hidden, width), bits


def _words(rng: np.random.Generator, shape: tuple[int, ...], bits: int) -> np.ndarray:
    """Blocks of a K-quant, random but for their scales."""
    _, size, at, scale = _TYPES[bits]
    blocks = np.frombuffer(rng.bytes(int(np.prod(shape)) // _BLOCK * size), np.uint8).reshape(-1, size).copy()
    scales = [scale, 0.0] if bits in (2, 4) else [scale]  # those of 2 and 4 bits have an offset too
    halves = np.array(scales, np.float16).view(np.uint8)
    blocks[:, at : at + len(halves)] = halves
    return blocks.reshape(*shape[:-1], shape[-1] // _BLOCK * size)


def _metadata(writer: Any, config: dict) -> None:
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_expert_count(config["num_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    # Prompts are given as ids: any vocabulary of that size does.
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([f"<{i}>" for i in range(config["vocab_size"])])
    writer.add_token_types([1] * config["vocab_size"])
    writer.add_token_merges(["a b"])


def write(path: Path, config: dict, bits: int, rng: np.random.Generator) -> None:
    """Write a GGUF.

    Args:
        path: The file.
        config: See :func:`bench.cpu.checkpoint.config_of`; of qwen3_moe.
        bits: 2, 3 or 4, of everything but embeddings (float16) and head (6).
        rng: Source of everything random.
    """
    import gguf

    if bits not in _TYPES:
        raise ValueError(f"bits of a GGUF must be one of {sorted(_TYPES)}, got {bits}")
    tensors = list(_tensors(config, bits))
    for name, shape, width in tensors:
        if width in _TYPES and shape[-1] % _BLOCK:
            raise ValueError(f"{name} {shape}: a K-quant wants a multiple of {_BLOCK} inputs")
    writer = gguf.GGUFWriter(path, "qwen3moe", use_temp_file=False)
    _metadata(writer, config)
    for name, shape, width in tensors:
        if width in _TYPES:
            kind = getattr(gguf.GGMLQuantizationType, _TYPES[width][0])
            size = (*shape[:-1], shape[-1] // _BLOCK * _TYPES[width][1])
            writer.add_tensor_info(name, size, np.dtype(np.uint8), int(np.prod(size)), raw_dtype=kind)
        else:
            dtype = np.dtype(np.float16 if width == 16 else np.float32)
            writer.add_tensor_info(name, shape, dtype, int(np.prod(shape)) * dtype.itemsize)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, shape, width in tensors:
        if width in _TYPES:
            data = _words(rng, shape, width)
        elif len(shape) == 1:
            data = np.ones(shape, np.float32)
        else:
            spread = 12**0.5 * (1.0 if width == 16 else shape[-1] ** -0.5)
            data = ((rng.random(shape, np.float32) - 0.5) * spread).astype(np.float16 if width == 16 else np.float32)
        writer.write_tensor_data(data)
    writer.close()


def measure(path: Path, prompts: list[int], generated: int, threads: int) -> dict:
    """Load a GGUF in this process and run it; the same figures as :func:`bench.cpu.model.measure`.

    The rates are the server's own, without its queue and its tokenizer; memory is mapped and not counted.
    """
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(path)
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = threads
    parameters.n_ctx, parameters.n_parallel = max(prompts) + generated + 1, 1
    parameters.n_batch = parameters.n_ubatch = 512
    parameters.warmup, parameters.fit_params, parameters.verbosity, parameters.n_gpu_layers = False, False, -1, 0
    with open(path, "rb", buffering=0) as stream:
        while stream.read(16 << 20):
            pass
    wall, cpu = time.perf_counter(), time.process_time()
    server = xllamacpp.Server(parameters)
    load = {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}
    load.update(gb_per_s=path.stat().st_size / 1e9 / load["wall_s"], peak_over_weights=None)
    rng = np.random.default_rng(0)

    def complete(ids: np.ndarray, tokens: int) -> tuple[dict, float]:
        request = {"prompt": ids.tolist(), "n_predict": tokens, "cache_prompt": False, "ignore_eos": True}
        before = time.process_time()
        answer = server.handle_completions(request)
        answer = json.loads(answer) if isinstance(answer, (str, bytes)) else answer
        return answer["timings"], time.process_time() - before

    vocabulary = 1000  # below every shape's
    complete(rng.integers(0, vocabulary, 16), 1)  # pages of the mapped file
    runs = []
    for tokens in prompts:
        ids = rng.integers(0, vocabulary, tokens)
        timings, prompt_cpu = complete(ids, 1)
        following, both_cpu = complete(ids, generated + 1)
        seconds = following["predicted_ms"] / 1e3
        runs.append(
            {
                "context": tokens,
                "prompt": {
                    "wall_s": timings["prompt_ms"] / 1e3,
                    "cpu_s": prompt_cpu,
                    "tokens_per_s": tokens / timings["prompt_ms"] * 1e3,
                },
                "generation": {
                    "wall_s": seconds,
                    "cpu_s": max(both_cpu - prompt_cpu, 0.0),
                    "tokens_per_s": following["predicted_n"] / seconds,
                },
            }
        )
    return {"model": path.name, "kind": "llama.cpp", "weight_bytes": path.stat().st_size, "load": load, "runs": runs}
