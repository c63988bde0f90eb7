"""What ``make demo`` runs: text from the trained model that the repository ships, and what its quantization
costs.

Perplexity is measured on 4096 held-out tokens, in 16 windows of 256. Bits per weight count every byte of the
linears and experts, scales included; the output head, which affine quantization leaves tied to the float16
embeddings, stands apart.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
from mlx_lm.models.switch_layers import SwitchLinear
from mlx_lm.sample_utils import make_sampler

from mlx_marlin import TrellisModelLoader, _ext, load

MODELS = Path(__file__).resolve().parent.parent / "models"
ORIGINAL = MODELS / "docs-moe"
EXL3 = tuple(MODELS / f"docs-moe-exl3-{size}" for size in ("2.5bpw", "3.0bpw", "mixed"))
PROMPT, SEED = "Return a list of", 3
TOKENS, WINDOW = 4096, 256
# The first part of the held-out text is left for calibration.
HELDOUT_START = 20_000
AFFINE_BITS, AFFINE_GROUPS = (2, 3, 4, 5, 6, 8), (32, 64, 128)


@dataclass
class Row:
    """One line of the table."""

    name: str
    bits: float
    head_bits: float
    perplexity: float
    seconds: float


def heldout_tokens(tokenizer) -> np.ndarray:
    """The held-out tokens, one more than are predicted."""
    text = (ORIGINAL / "heldout.txt").read_text()[HELDOUT_START:]
    return np.array(tokenizer.encode(text)[: TOKENS + 1])


def perplexity(model, tokens: np.ndarray) -> float:
    """exp of the mean negative log-likelihood of each token given those before it in its window."""
    inputs = mx.array(tokens[:-1].reshape(-1, WINDOW))
    targets = mx.array(tokens[1:].reshape(-1, WINDOW))
    total = 0.0
    for x, y in zip(inputs, targets):
        losses = nn.losses.cross_entropy(model(x[None]).astype(mx.float32), y[None], reduction="sum")
        total += losses.item()
    return float(np.exp(total / targets.size))


def exl3_bits(directory: Path) -> tuple[float, float]:
    """Bits per weight of the linears and experts, and of the head."""
    sizes = {True: [0, 0], False: [0, 0]}
    for name, linear in TrellisModelLoader(directory).quantized.items():
        size = sizes[name == "lm_head"]
        size[0] += 8 * sum(part.nbytes for part in linear.parts.values())
        size[1] += linear.padded_shape[0] * linear.padded_shape[1]
    return tuple(size[0] / size[1] for size in (sizes[False], sizes[True]))


def affine_sizes() -> list[tuple[float, int, int]]:
    """(bits per weight, bits, group size) of affine quantization: a float16 scale and bias per group."""
    return sorted((bits + 32 / group, bits, group) for bits in AFFINE_BITS for group in AFFINE_GROUPS)


def load_original() -> nn.Module:
    return mlx_lm.load(str(ORIGINAL))[0]


def load_affine(bits: int, group: int) -> nn.Module:
    """The original with linears and experts, but not the router, in affine quantization; run in float32."""
    model = load_original()
    nn.quantize(
        model,
        group,
        bits,
        class_predicate=lambda path, m: isinstance(m, (nn.Linear, SwitchLinear)) and not path.endswith(".gate"),
    )
    model.set_dtype(mx.float32)  # the float16 scales keep their values
    return model


def measure(name: str, model: nn.Module, tokens: np.ndarray, bits: float, head_bits: float) -> Row:
    print(f"measuring {name}", file=sys.stderr, flush=True)
    start = time.perf_counter()
    value = perplexity(model, tokens)
    return Row(name, bits, head_bits, value, time.perf_counter() - start)


def device() -> str:
    """Where the models run, for the reader."""
    if mx.default_device() == mx.gpu:
        return f"the GPU of {mx.device_info()['device_name']}, through the Metal kernels"
    return f"the CPU ({_ext.instruction_set()} kernels, {_ext.num_threads()} threads)"


def generate(directory: Path) -> None:
    """Text after a prompt, and the speeds with a prompt of one window; the same text in every run on one machine."""
    model, tokenizer = load(str(directory))
    sampler = make_sampler(temp=0.7, top_p=0.9)

    def run(prompt: list[int], tokens: int) -> list:
        mx.random.seed(SEED)
        return list(mlx_lm.stream_generate(model, tokenizer, prompt, max_tokens=tokens, sampler=sampler))

    prompt, window = tokenizer.encode(PROMPT), heldout_tokens(tokenizer)[:WINDOW].tolist()
    run(window, 2)  # MLX compiles its graphs on first use: about a second of g++ on a CPU
    text = [response.token for response in run(prompt, 120)]
    last = run(window, 120)[-1]
    print(f"{directory.name} on {device()} continues {PROMPT!r}:\n")
    print(tokenizer.decode(prompt + text))
    print(f"\nmeasured: {last.generation_tps:.0f} tokens/s; a prompt of {WINDOW} at {last.prompt_tps:.0f} tokens/s\n")


def table() -> list[Row]:
    """Measure everything, smallest loss of quality first."""
    loaded = {directory: load(str(directory)) for directory in EXL3}
    tokens = heldout_tokens(loaded[EXL3[0]][1])
    model = load_original()
    model.set_dtype(mx.float32)
    rows = [measure("original, run in float32", model, tokens, 16.0, 16.0)]
    affine = set()
    for directory, (model, _) in loaded.items():
        bits, head_bits = exl3_bits(directory)
        rows.append(measure(f"EXL3 {directory.name.rpartition('-')[2]}", model, tokens, bits, head_bits))
        affine.update([size for size in affine_sizes() if size[0] >= bits][:2])  # the two nearest, not smaller
    for effective, bits, group in sorted(affine):
        name = f"MLX affine {bits}-bit, group {group}"
        rows.append(measure(name, load_affine(bits, group), tokens, effective, 16.0))
    return sorted(rows, key=lambda row: row.perplexity)


def main() -> None:
    generate(EXL3[0])
    rows = table()
    print(f"Perplexity on {TOKENS} held-out tokens in windows of {WINDOW}, on {device()} (measured):\n")
    print(f"{'model':32} {'bits/weight':>12} {'head bits':>10} {'perplexity':>11} {'seconds':>8}")
    for row in rows:
        print(f"{row.name:32} {row.bits:12.2f} {row.head_bits:10.2f} {row.perplexity:11.3f} {row.seconds:8.1f}")


if __name__ == "__main__":
    main()
