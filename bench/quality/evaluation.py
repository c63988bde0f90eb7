"""A model with replaceable weights, run over windows of text: perplexity, and KL divergence from the original."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx_lm.tokenizer_utils import load as load_tokenizer

from mlx_marlin.lm import dense_ops
from mlx_marlin.quantize.layered import LayeredModel
from mlx_marlin.quantize.source import Source
from mlx_marlin.quantize.taps import Taps

WINDOWS, LENGTH = 16, 256
# Rows whose logits are in memory at a time: 0.1 GB for 49152 tokens.
_ROWS = 512


def log_probabilities(logits: np.ndarray) -> np.ndarray:
    """float32 ``[rows, vocabulary]``, with sums in float64."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True, dtype=np.float64)).astype(np.float32)


class Evaluation:
    """A model over the first :data:`WINDOWS` windows of each of some texts.

    Args:
        model: Directory of the checkpoint.
        texts: By name; the first one is that whose figures stand alone in a row.
        layers: How many of the first layers have weights that are replaced. Default: ``None``, all.

    Raises:
        ValueError: If a text is too short.

    Attributes:
        original: The weights that can be replaced, float32 ``[in, out]``, by name.
    """

    def __init__(self, model: Path, texts: dict[str, str], layers: int | None = None):
        dense_ops.install()  # attention
        tokenizer, windows, targets = load_tokenizer(model), [], {}
        for name, text in texts.items():
            tokens = np.array(tokenizer.encode(text)[: WINDOWS * LENGTH + 1], np.int32)
            if len(tokens) <= WINDOWS * LENGTH:
                raise ValueError(f"the text {name} has {len(tokens)} tokens; {WINDOWS * LENGTH + 1} are wanted")
            windows.append(tokens[:-1].reshape(WINDOWS, LENGTH))
            targets[name] = tokens[1:]
        self.targets = targets
        self.model = LayeredModel(Source(model), np.concatenate(windows), 4)
        self.embeddings = self.model.embeddings()
        self.taps, self.slots = [], {}
        for index in range(len(self.model.layers)):
            self.model.load(index)
            path, names = self.model.paths[index], self.model.names
            taps = Taps(self.model.layers[index], names.linears(path), names.experts(path))
            taps.__enter__()
            self.taps.append(taps)
            if layers is None or index < layers:
                self._find(index, taps)
        self.original = {name: get().copy() for name, (get, _) in self.slots.items()}
        self.head = np.array(self.model.head_module().weight.astype(mx.float32)).T
        self.norm = self.model.model.model.norm
        rows = self._final_rows({})
        self.reference = np.concatenate([log_probabilities(logits) for _, logits in self._logits(rows, self.head)])

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

    def _final_rows(self, weights: dict[str, np.ndarray]) -> np.ndarray:
        """What the head sees of all texts, float32 ``[tokens, hidden]``."""
        for name, (_, put) in self.slots.items():
            put(np.ascontiguousarray(weights.get(name, self.original[name])))
        hidden = self.embeddings
        for index in range(len(self.model.layers)):
            hidden = [self.model.output(index, h, batch) for batch, h in enumerate(hidden)]
        return np.concatenate([np.array(self.norm(mx.array(h))).reshape(-1, h.shape[-1]) for h in hidden])

    @staticmethod
    def _logits(rows: np.ndarray, head: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
        for start in range(0, len(rows), _ROWS):
            part = slice(start, start + _ROWS)
            yield part, rows[part] @ head

    def figures(self, weights: dict[str, np.ndarray]) -> dict[str, dict[str, float]]:
        """Perplexity and KL divergence for each text with some weights replaced, ``lm_head`` among them."""
        targets = np.concatenate(list(self.targets.values()))
        chosen, divergence = np.empty(len(targets)), np.empty(len(targets))
        for part, logits in self._logits(self._final_rows(weights), weights.get("lm_head", self.head)):
            log_p, reference = log_probabilities(logits), self.reference[part]
            chosen[part] = log_p[np.arange(len(log_p)), targets[part]]
            divergence[part] = np.sum(np.exp(reference) * (reference - log_p), axis=1, dtype=np.float64)
        found = {}
        for i, name in enumerate(self.targets):
            part = slice(i * WINDOWS * LENGTH, (i + 1) * WINDOWS * LENGTH)
            kl = max(0.0, float(divergence[part].mean()))  # rounding leaves the original's a little below
            found[name] = {"perplexity": float(np.exp(-chosen[part].mean())), "kl": kl}
        return found

    def row(self, label: str, kind: str, bits: float, weights: dict[str, np.ndarray], seconds: float | None) -> dict:
        """A line of the table; of texts after the first one the figures are below ``texts``.

        Args:
            label: Its name.
            kind: What is one line in the plot.
            bits: Everything stored for the quantized layers, in bits per weight.
            weights: The effective weights that are not the original's.
            seconds: The processor's time for making them; ``None`` if it was not measured.
        """
        (first, *rest), figures = self.targets, self.figures(weights)
        row = {"label": label, "kind": kind, "bits": bits, **figures[first]}
        row |= {} if seconds is None else {"cpu_s": seconds}
        return row | ({"texts": {name: figures[name] for name in rest}} if rest else {})
