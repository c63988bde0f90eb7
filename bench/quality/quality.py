"""Perplexity and KL divergence of quantized versions of models/docs-moe on held-out text.

Usage: python -m bench.quality.quality [--work DIR] [--bits 2 2.5 3 4] [--modes per-expert per-layer uniform]
    [--rates half whole] [--output FILE]

Trellis models are converted into DIR (finished ones are used again, interrupted ones resumed). Beside them stand the
data-free EXL3 directories of models/, the same search without calibration, and MLX's own formats. All are evaluated
in float32 with their effective weights, at their effective bits: everything stored for the quantized layers, scales
included, without the head. The routers stay as they are. EXL3 models have their 6-bit head, the others the original.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx_lm.tokenizer_utils import load as load_tokenizer

from mlx_marlin import TrellisModelLoader, codec
from mlx_marlin.quantize import convert, quantize_weight
from mlx_marlin.quantize.budget import stored_bits
from mlx_marlin.quantize.layered import LayeredModel
from mlx_marlin.quantize.resume import WORK
from mlx_marlin.quantize.source import Source
from mlx_marlin.quantize.taps import Taps
from mlx_marlin.storage import atomic

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "models/docs-moe"
WINDOWS, LENGTH = 16, 256
_TEXT_START = 20_000  # characters of heldout.txt that are skipped: the section that models/README.md measured
# (label, mode, bits, group size)
MLX_FORMATS = [
    *((f"affine {bits} bit, group {group}", "affine", bits, group) for bits in (2, 3, 4) for group in (64, 32)),
    ("mxfp4", "mxfp4", 4, 32),
    ("nvfp4", "nvfp4", 4, 16),
]


class Evaluation:
    """The model with replaceable weights, run over the held-out windows."""

    def __init__(self):
        text = (MODEL / "heldout.txt").read_text(encoding="utf-8")[_TEXT_START:]
        tokens = np.array(load_tokenizer(MODEL).encode(text)[: WINDOWS * LENGTH + 1], np.int32)
        self.targets = tokens[1:]
        self.model = LayeredModel(Source(MODEL), tokens[:-1].reshape(WINDOWS, LENGTH), 4)
        self.embeddings = self.model.embeddings()
        self.taps, self.slots = [], {}
        for index in range(len(self.model.layers)):
            self.model.load(index)
            path, names = self.model.paths[index], self.model.names
            taps = Taps(self.model.layers[index], names.linears(path), names.experts(path))
            taps.__enter__()
            self.taps.append(taps)
            self._find(index, taps)
        self.original = {name: get().copy() for name, (get, _) in self.slots.items()}
        self.head = np.array(self.model.model.model.embed_tokens.weight.astype(mx.float32)).T
        self.norm = self.model.model.model.norm
        self.reference = self.log_probabilities({})

    def _find(self, index: int, taps: Taps) -> None:
        layer, names = self.model.paths[index], self.model.names
        for path, tap in taps.linears.items():
            self.slots[names.linears(layer)[path]] = (lambda t=tap: t.weight, lambda w, t=tap: setattr(t, "weight", w))
        for path, tap in taps.experts.items():
            block = names.experts(layer)[path]
            for part, stored in block.parts.items():
                stack = tap.weights[part]
                for e in range(len(stack)):
                    put = lambda w, s=stack, i=e: s.install(i, w, None)  # noqa: E731
                    self.slots[f"{block.prefix}.{e}.{stored}"] = (lambda s=stack, i=e: s.weight(i), put)

    def log_probabilities(self, weights: dict[str, np.ndarray]) -> np.ndarray:
        """float64 [tokens, vocabulary] with some weights replaced, ``lm_head`` among them."""
        for name, (_, put) in self.slots.items():
            put(np.ascontiguousarray(weights.get(name, self.original[name])))
        hidden = self.embeddings
        for index in range(len(self.model.layers)):
            hidden = [self.model.output(index, h, batch) for batch, h in enumerate(hidden)]
        rows = np.concatenate([np.array(self.norm(mx.array(h))).reshape(-1, h.shape[-1]) for h in hidden])
        logits = (rows @ weights.get("lm_head", self.head)).astype(np.float64)
        logits -= logits.max(axis=1, keepdims=True)
        return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))

    def perplexity(self, log_p: np.ndarray) -> float:
        return float(np.exp(-np.mean(log_p[np.arange(len(log_p)), self.targets])))

    def row(self, label: str, kind: str, bits: float, weights: dict[str, np.ndarray]) -> dict:
        log_p = self.log_probabilities(weights)
        kl = float(np.mean(np.sum(np.exp(self.reference) * (self.reference - log_p), axis=1)))
        return {"label": label, "kind": kind, "bits": bits, "perplexity": self.perplexity(log_p), "kl": kl}


def trellis_row(evaluation: Evaluation, label: str, kind: str, directory: Path) -> dict:
    loader = TrellisModelLoader(directory)
    weights, bits, count = {}, 0, 0
    for name in loader.names:
        w = loader.load_weight(name)
        shape = evaluation.original[name].shape if name in evaluation.original else w.padded_shape
        weights[name] = codec.dequantize(w)[: shape[0], : shape[1]]
        if name != "lm_head":
            bits += stored_bits(shape, w.bits, w.codebook, w.bias is not None)
            count += shape[0] * shape[1]
    return evaluation.row(label, kind, bits / count, weights)


def data_free_row(evaluation: Evaluation, bits: float) -> dict:
    weights = {n: codec.dequantize(quantize_weight(w, bits)) for n, w in evaluation.original.items()}
    stored = sum(stored_bits(w.shape, bits, "mul1", False) for w in evaluation.original.values())
    count = sum(w.size for w in evaluation.original.values())
    return evaluation.row(f"trellis K={bits}, no calibration", "trellis, data-free", stored / count, weights)


def mlx_row(evaluation: Evaluation, label: str, mode: str, bits: int, group: int) -> dict:
    weights = {}
    for name, w in evaluation.original.items():
        packed = mx.quantize(mx.array(w.T), group_size=group, bits=bits, mode=mode)
        restored = mx.dequantize(*packed, group_size=group, bits=bits, mode=mode, dtype=mx.float32)
        weights[name] = np.array(restored).T
    overhead = {"affine": 32, "mxfp4": 8, "nvfp4": 8}[mode]  # bits per group: half scale and bias, or one byte
    return evaluation.row(label, f"MLX {mode}", bits + overhead / group, weights)


def table(rows: list[dict]) -> str:
    lines = ["| model | bits | perplexity | KL |", "|---|---|---|---|"]
    for row in sorted(rows, key=lambda r: r["bits"]):
        lines.append(f"| {row['label']} | {row['bits']:.3f} | {row['perplexity']:.3f} | {row['kl']:.4f} |")
    return "\n".join(lines)


def plot(rows: list[dict], path: Path) -> None:
    """KL against bits as an SVG: logarithmic KL from 0.001 to 1, bits from 1.5 to 5."""
    kinds = sorted({row["kind"] for row in rows})
    whole = ", whole rates"  # dashed, in the colour of the same kind with half rates
    hues = ("#1b6ca8", "#c0392b", "#2e8b57", "#b8860b", "#7d3c98", "#555555", "#d2691e", "#008080")
    colours = dict(zip(dict.fromkeys(kind.removesuffix(whole) for kind in kinds), hues, strict=False))
    x = lambda bits: 60 + (bits - 1.5) / 3.5 * 520  # noqa: E731
    y = lambda kl: 380 - (np.log10(max(kl, 1e-3)) + 3) / 3 * 340  # noqa: E731
    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" width="860" height="430" font-family="sans-serif" font-size="12">'
    ]
    for bits in (2, 2.5, 3, 3.5, 4, 4.5):
        parts.append(f'<text x="{x(bits):.0f}" y="400" text-anchor="middle">{bits}</text>')
    for kl in (0.001, 0.01, 0.1, 1):
        parts.append(f'<line x1="60" x2="580" y1="{y(kl):.0f}" y2="{y(kl):.0f}" stroke="#ddd"/>')
        parts.append(f'<text x="54" y="{y(kl) + 4:.0f}" text-anchor="end">{kl}</text>')
    parts.append('<text x="320" y="422" text-anchor="middle">bits per weight, scales included</text>')
    parts.append('<text x="60" y="20">KL divergence from the original</text>')
    for i, kind in enumerate(kinds):
        points = sorted((row["bits"], row["kl"]) for row in rows if row["kind"] == kind)
        line = " ".join(f"{x(b):.1f},{y(k):.1f}" for b, k in points)
        colour, dashes = colours[kind.removesuffix(whole)], ' stroke-dasharray="5 3"' if kind.endswith(whole) else ""
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}"{dashes}/>')
        parts += [f'<circle cx="{x(b):.1f}" cy="{y(k):.1f}" r="3.5" fill="{colour}"/>' for b, k in points]
        parts.append(f'<line x1="596" x2="624" y1="{56 + 20 * i}" y2="{56 + 20 * i}" stroke="{colour}"{dashes}/>')
        parts.append(f'<text x="630" y="{60 + 20 * i}" fill="{colour}">{kind}</text>')
    atomic.write_text(path, "\n".join([*parts, "</svg>\n"]))


def convert_to(directory: Path, bits: float, mode: str, half_rates: bool) -> None:
    """Convert the model, or what an interrupted conversion left; a finished one stays."""
    if (directory / "config.json").exists() and not (directory / WORK).exists():
        return
    show = lambda p: print(f"{directory.name}: {100 * p.done:.0f} % {p.stage}", file=sys.stderr)  # noqa: E731
    convert(MODEL, directory, bits=bits, mixed=mode, half_rates=half_rates, resume=directory.exists(), progress=show)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=ROOT / "build/quality")
    parser.add_argument("--bits", type=float, nargs="*", default=[2, 2.5, 3, 4])
    parser.add_argument("--modes", nargs="*", default=["per-expert", "per-layer", "uniform"])
    parser.add_argument(
        "--rates", nargs="*", choices=["half", "whole"], default=["half"], help="with half rates, or without them"
    )
    parser.add_argument("--data-free", type=int, nargs="*", default=[2, 3, 4], help="K of the runs without calibration")
    parser.add_argument("--output", type=Path, default=ROOT / f"bench/results/{platform.node()}/quality.json")
    options = parser.parse_args()
    evaluation = Evaluation()
    rows = [
        {
            "label": "original",
            "kind": "original",
            "bits": 16.0,
            "perplexity": evaluation.perplexity(evaluation.reference),
            "kl": 0.0,
        }
    ]
    for mode, rates, bits in itertools.product(options.modes, options.rates, options.bits):
        directory = options.work / f"{mode}-{rates}-{bits:g}"
        convert_to(directory, bits, mode, rates == "half")
        kind = mode if rates == "half" else f"{mode}, whole rates"
        rows.append(trellis_row(evaluation, f"trellis {bits:g}, {kind}", f"trellis, {kind}", directory))
    for name in ("docs-moe-exl3-3.0bpw", "docs-moe-exl3-mixed"):
        rows.append(trellis_row(evaluation, f"{name} (models/)", "trellis, data-free", ROOT / "models" / name))
    rows += [data_free_row(evaluation, k) for k in options.data_free]
    rows += [mlx_row(evaluation, *entry) for entry in MLX_FORMATS]
    atomic.write_text(
        options.output, json.dumps({"tokens": WINDOWS * LENGTH, "window": LENGTH, "rows": rows}, indent=1) + "\n"
    )
    plot([row for row in rows if row["kind"] != "original"], options.output.with_suffix(".svg"))
    print(table(rows))


if __name__ == "__main__":
    main()
