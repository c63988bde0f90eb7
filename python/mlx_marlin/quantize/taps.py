"""Taps on the inputs of a layer's linears and experts. What they stand in for is computed in NumPy.

Several threads may run the layer at once, each for a batch of its own: what taps see is noted by batch, and added up in
the order of the batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from threading import local
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..storage.safetensors import widened
from .hessian import Hessian
from .names import parts_of_experts
from .source import ExpertTensors
from .spill import Spill, SpilledRows


def _child(module: Any, key: str) -> Any:
    return module[int(key)] if isinstance(module, (list, tuple)) else getattr(module, key)


def replace_module(root: nn.Module, path: str, value: object) -> None:
    """Put ``value`` at a dotted path below ``root``."""
    *parents, last = path.split(".")
    parent = root
    for key in parents:
        parent = _child(parent, key)
    if isinstance(parent, list):
        parent[int(last)] = value
    else:
        setattr(parent, last, value)


@dataclass
class Notes:
    """What the taps saw of one batch.

    Attributes:
        rows: Inputs of linears, float32 ``[rows, features]``.
        experts: Inputs of experts, float32 ``[tokens, hidden]``, and the experts chosen, ``[tokens, k]``.
        scores: The routing's, ``[tokens, k]``.
    """

    rows: list[tuple[LinearTap, np.ndarray]] = field(default_factory=list)
    experts: list[tuple[ExpertsTap, np.ndarray, np.ndarray]] = field(default_factory=list)
    scores: list[tuple[ExpertsTap, np.ndarray]] = field(default_factory=list)

    def parts(self) -> list[Callable[[], None]]:
        """What adds these to what the taps saw before, one of each tap."""
        adds = [tap.add for tap in dict.fromkeys(entry[0] for entry in self.rows)]
        adds += [tap.add for tap in dict.fromkeys(entry[0] for entry in self.experts)]
        return [partial(add, self) for add in adds]


class _Thread(local):
    """What a thread does with the taps of a layer.

    Attributes:
        notes: Where they note what they see, if they do.
        probe: What experts return in place of their output, ``[k, width]``.
        noise: What disturbs the output of a linear.
    """

    notes: Notes | None = None
    probe: np.ndarray | None = None
    noise: tuple[LinearTap, Callable[[mx.array], mx.array]] | None = None


class LinearTap:
    """Stands in for an ``nn.Linear``: accumulates the Hessian of its input.

    It multiplies in NumPy, where its rows are needed anyway.
    """

    def __init__(self, linear: nn.Linear, name: str, thread: _Thread):
        self.linear, self.name, self._thread = linear, name, thread
        self.hessian: Hessian | None = None
        self.weight = np.ascontiguousarray(np.array(linear.weight).T)
        self.bias = np.array(linear.bias) if "bias" in linear else None

    def __call__(self, x: mx.array) -> mx.array:
        rows = np.array(x.astype(mx.float32)).reshape(-1, x.shape[-1])
        thread = self._thread
        if thread.notes is not None and thread.probe is None:
            thread.notes.rows.append((self, rows))
        y = rows @ self.weight
        if self.bias is not None:
            y += self.bias
        out = mx.array(y.reshape(*x.shape[:-1], -1)).astype(x.dtype)
        return out + thread.noise[1](out) if thread.noise is not None and thread.noise[0] is self else out

    def add(self, notes: Notes) -> None:
        """Add what it saw of the next batch."""
        for tap, rows in notes.rows:
            if tap is self:
                if self.hessian is None:
                    self.hessian = Hessian(rows.shape[1])
                self.hessian.add(rows)


class ExpertRows:
    """What the experts of one block saw: ``x [tokens, hidden]`` on disk, ``indices [tokens, k]``, ``scores``."""

    def __init__(self, directory: Path | None):
        self.x = SpilledRows(directory)
        self.indices: list[np.ndarray] = []
        self.scores: list[np.ndarray] = []


class ExpertWeights:
    """The weights of one projection of all experts; each is float32, and read or unpacked, only while it is used.

    Args:
        module: The stack, ``weight [experts, out, in]`` and maybe ``bias [experts, out]``.
        tensors: Where its weights can be read one by one; else they are held as stored.
        spill: Where those that are replaced are kept.
    """

    def __init__(self, module: nn.Module, tensors: ExpertTensors | None, spill: Spill):
        self._read = self._held(module) if tensors is None else tensors.read
        self._count, *sizes = module.weight.shape
        self.shape: tuple[int, int] = (sizes[1], sizes[0])
        """``(in, out)`` of each."""
        self._spill = spill
        self._installed: dict[int, tuple[int, np.dtype]] = {}
        self._unpacked: dict[int, int] | None = {} if tensors is not None and tensors.is_packed else None
        self.bias = np.array(module.bias.astype(mx.float32)) if "bias" in module else None

    @staticmethod
    def _held(module: nn.Module) -> Callable[[int], np.ndarray]:
        mx.eval(module.weight)
        is_bfloat = module.weight.dtype == mx.bfloat16
        stored = np.array(module.weight.view(mx.uint16) if is_bfloat else module.weight, copy=False)
        return lambda expert: widened(stored[expert], "BF16" if is_bfloat else "").astype(np.float32, copy=False)

    def __len__(self) -> int:
        return self._count

    def weight(self, expert: int) -> np.ndarray:
        """float32 ``[in, out]``."""
        if expert not in self._installed:
            return (self._read(expert) if self._unpacked is None else self._read_once(expert)).T
        start, dtype = self._installed[expert]
        values = np.empty(self.shape, dtype)
        self._spill.read_into(values, start)
        return values.astype(np.float32, copy=False)

    def _read_once(self, expert: int) -> np.ndarray:
        """Of packed tensors, which stand for bfloat16 values: unpacked once, and kept so on the disk."""
        assert self._unpacked is not None  # this is why it is called
        if expert not in self._unpacked:
            values = self._read(expert)
            words = (np.ascontiguousarray(values).view(np.uint32) >> 16).astype(np.uint16)
            self._unpacked[expert] = self._spill.add(words.data)
            return values
        words = np.empty(self.shape[::-1], np.uint16)
        self._spill.read_into(words, self._unpacked[expert])
        return widened(words, "BF16")

    def install(self, expert: int, weight: np.ndarray, bias: np.ndarray | None) -> None:
        """Replace one. It is kept in half precision, as ExLlamaV3 decodes weights, where that is enough."""
        half = weight.astype(np.float16)
        kept = np.ascontiguousarray(half if np.isfinite(half).all() else weight)
        self._installed[expert] = self._spill.add(kept.data), kept.dtype
        if bias is not None and self.bias is not None:
            self.bias[expert] = bias


class ExpertsTap:
    """Stands in for a ``SwitchGLU`` or ``SwitchMLP``: notes its rows, and computes it in NumPy, expert by expert.

    Attributes:
        reading: Names of the projections that read x.
        last: Name of the one that reads what they make of it.
    """

    def __init__(
        self,
        experts: nn.Module,
        name: str,
        thread: _Thread,
        tensors: Mapping[str, ExpertTensors] | None = None,
        directory: Path | None = None,
    ):
        self.experts, self.name, self.rows, self.thread = experts, name, ExpertRows(directory), thread
        found, spill = tensors or {}, Spill(directory)
        parts = parts_of_experts(experts)
        *self.reading, self.last = parts
        self.weights = {
            part: ExpertWeights(getattr(experts, part), found.get(f"{name}.{part}"), spill) for part in parts
        }

    def project(self, part: str, expert: int, x: np.ndarray) -> np.ndarray:
        weights = self.weights[part]
        y = x @ weights.weight(expert)
        return y if weights.bias is None else y + weights.bias[expert]

    def outputs(self, expert: int, x: np.ndarray) -> dict[str, np.ndarray]:
        """Of the projections that read x."""
        return {part: self.project(part, expert, x) for part in self.reading}

    def activate(self, outputs: Mapping[str, np.ndarray]) -> np.ndarray:
        """What goes into the last projection. mlx-lm's activations of gated experts take up, then gate."""
        return np.array(self.experts.activation(*(mx.array(outputs[part]) for part in reversed(self.reading))))

    def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
        probe, notes = self.thread.probe, self.thread.notes
        if probe is not None:
            return mx.broadcast_to(mx.array(probe), (*indices.shape, probe.shape[-1]))
        rows = np.array(x.astype(mx.float32)).reshape(-1, x.shape[-1])
        chosen = np.array(indices).reshape(len(rows), -1)
        if notes is not None:
            notes.experts.append((self, rows, chosen))
        out = np.empty((*chosen.shape, rows.shape[1]), np.float32)
        for expert in np.unique(chosen):
            token, slot = np.nonzero(chosen == expert)
            hidden = self.activate(self.outputs(expert, rows[token]))
            out[token, slot] = self.project(self.last, expert, hidden)
        return mx.array(out.reshape(*indices.shape, -1)).astype(x.dtype)

    def add(self, notes: Notes) -> None:
        """Add what it saw of the next batch."""
        for tap, rows, chosen in notes.experts:
            if tap is self:
                self.rows.x.append(rows)
                self.rows.indices.append(chosen)
        self.rows.scores += [scores for tap, scores in notes.scores if tap is self]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.experts, name)


class BlockTap:
    """Stands in for the block around the experts: finds the routing scores.

    The block's output is linear in what the experts return, so experts that return unit vectors, minus experts that
    return zeros, show each slot's score in the first k channels. Where the experts' width is another than the block's,
    a projection follows, and a slot's score is how long its part of the output is, for each unit that the expert
    returns.
    """

    def __init__(self, block: nn.Module, experts: ExpertsTap):
        self.block, self.experts = block, experts

    def __call__(self, x: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        out, thread = self.block(x, *args, **kwargs), self.experts.thread
        if thread.notes is not None:
            _, width = self.experts.weights[self.experts.last].shape
            own = [chosen for tap, _, chosen in thread.notes.experts if tap is self.experts]
            if not own:
                raise ValueError(f"{self.experts.name}: the block around these experts does not call them as such")
            chosen = own[-1]
            k = chosen.shape[1]

            def shown(probe: np.ndarray) -> np.ndarray:
                thread.probe = probe
                try:
                    y = np.array(self.block(x, *args, **kwargs).astype(mx.float32))
                finally:
                    thread.probe = None
                return y.reshape(-1, y.shape[-1])

            without = shown(np.zeros((k, width), np.float32))
            if width == x.shape[-1]:
                scores = np.abs(shown(np.eye(k, width, dtype=np.float32)) - without)[:, :k]
            else:
                unit = np.random.default_rng(0).choice([-1.0, 1.0], width).astype(np.float32) / width**0.5
                probes = np.einsum("st,w->stw", np.eye(k, dtype=np.float32), unit)
                scores = np.stack([np.linalg.norm(shown(probe) - without, axis=1) for probe in probes], axis=1)
            thread.notes.scores.append((self.experts, scores))
        return out

    def __getattr__(self, name: str) -> Any:
        return getattr(self.block, name)


class Taps:
    """The taps of one layer, in place for the length of a ``with`` block.

    Args:
        layer: The layer, loaded.
        linears: Paths of its linears to be tapped.
        experts: Paths of its experts.
        tensors: Where the experts' weights can be read one by one, by path of the stack. Default: nowhere.
        directory: On which disk things are kept that need not be in memory. Default: that of temporary files.

    Attributes:
        linears: By dotted path inside the layer.
        experts: By dotted path inside the layer.
    """

    def __init__(
        self,
        layer: nn.Module,
        linears: Iterable[str],
        experts: Iterable[str],
        tensors: Mapping[str, ExpertTensors] | None = None,
        directory: Path | None = None,
    ):
        self.layer, self._thread = layer, _Thread()
        modules = dict(layer.named_modules())
        self.experts = {path: ExpertsTap(modules[path], path, self._thread, tensors, directory) for path in experts}
        self.linears = {path: LinearTap(modules[path], path, self._thread) for path in linears}
        self._originals: list[tuple[str, nn.Module, LinearTap | ExpertsTap | BlockTap]] = []
        for path in (*self.experts, *self.linears):
            self._originals.append((path, modules[path], self.experts.get(path) or self.linears[path]))
        for path, tap in self.experts.items():
            block = path.rpartition(".")[0]
            if block:
                self._originals.append((block, modules[block], BlockTap(modules[block], tap)))

    def __enter__(self) -> Taps:
        for path, _, tap in self._originals:
            replace_module(self.layer, path, tap)
        return self

    def __exit__(self, *exc_info: object) -> None:
        for path, original, _ in reversed(self._originals):
            replace_module(self.layer, path, original)

    @contextmanager
    def noting(self) -> Iterator[Notes]:
        """What this thread shows to the taps inside of a ``with`` block; see :meth:`Notes.parts`."""
        self._thread.notes = notes = Notes()
        try:
            yield notes
        finally:
            self._thread.notes = None

    @contextmanager
    def disturbing(self, tap: LinearTap, noise: Callable[[mx.array], mx.array]) -> Iterator[None]:
        """Add to a linear's output what noise gives for it, for this thread inside of a ``with`` block."""
        self._thread.noise = tap, noise
        try:
            yield
        finally:
            self._thread.noise = None
