"""An mlx-lm model run one layer at a time, with taps on the inputs of its linears and experts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map

from .hessian import Hessian

Call = tuple[mx.array, tuple, dict]
"""What a layer is called with: the hidden state, and all else."""


class _Recorder:
    """Stands in for a layer: notes what it is called with and passes the hidden state on."""

    def __init__(self, layer: nn.Module):
        self.layer = layer
        self.calls: list[Call] = []

    def __call__(self, x: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        self.calls.append((x, args, kwargs))
        return x

    def __getattr__(self, name: str) -> Any:
        return getattr(self.layer, name)


class _Feed:
    """Stands in for a layer: gives what it is told, or passes the hidden state on."""

    def __init__(self, layer: nn.Module, values: Iterator[np.ndarray] | None = None):
        self.layer, self.values = layer, values

    def __call__(self, x: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        return x if self.values is None else mx.array(next(self.values))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.layer, name)


class LinearTap:
    """Stands in for an ``nn.Linear``: accumulates the Hessian of its input, optionally disturbs its output.

    It multiplies in NumPy, where its rows are needed anyway: MLX's matmul on the CPU is a reference BLAS.
    """

    def __init__(self, linear: nn.Linear, name: str):
        self.linear, self.name = linear, name
        self.hessian: Hessian | None = None
        self.noise: Callable[[mx.array], mx.array] | None = None
        self.recording = False
        self.weight = np.ascontiguousarray(np.array(linear.weight).T)
        self.bias = np.array(linear.bias) if "bias" in linear else None

    def __call__(self, x: mx.array) -> mx.array:
        rows = np.array(x.astype(mx.float32)).reshape(-1, x.shape[-1])
        if self.recording:
            if self.hessian is None:
                self.hessian = Hessian(x.shape[-1])
            self.hessian.add(rows)
        y = rows @ self.weight
        if self.bias is not None:
            y += self.bias
        y = mx.array(y.reshape(*x.shape[:-1], -1)).astype(x.dtype)
        return y if self.noise is None else y + self.noise(y)


@dataclass
class ExpertRows:
    """What the experts of one block saw: float32 ``x [tokens, hidden]``, ``indices [tokens, k]``, ``scores``."""

    x: list[np.ndarray] = field(default_factory=list)
    indices: list[np.ndarray] = field(default_factory=list)
    scores: list[np.ndarray] = field(default_factory=list)

    def joined(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return np.concatenate(self.x), np.concatenate(self.indices), np.concatenate(self.scores)


class ExpertsTap:
    """Stands in for a ``SwitchGLU``: notes its rows, and computes it in NumPy, expert by expert."""

    def __init__(self, experts: nn.Module, name: str):
        self.experts, self.name, self.rows = experts, name, ExpertRows()
        self.recording = False
        self.probe: np.ndarray | None = None
        self.weights: dict[str, tuple[np.ndarray, np.ndarray | None]] = {}

    def load(self) -> None:
        """Bring the weights to NumPy, ``[experts, in, out]``."""
        for part in ("gate_proj", "up_proj", "down_proj"):
            module = getattr(self.experts, part)
            bias = np.array(module.bias.astype(mx.float32)) if "bias" in module else None
            weight = np.array(module.weight.astype(mx.float32)).transpose(0, 2, 1)
            self.weights[part] = (np.ascontiguousarray(weight), bias)

    def project(self, part: str, expert: int, x: np.ndarray) -> np.ndarray:
        weight, bias = self.weights[part]
        y = x @ weight[expert]
        return y if bias is None else y + bias[expert]

    def activate(self, up: np.ndarray, gate: np.ndarray) -> np.ndarray:
        return np.array(self.experts.activation(mx.array(up), mx.array(gate)))

    def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
        if self.probe is not None:
            shape = (*indices.shape, x.shape[-1])
            return mx.broadcast_to(mx.array(self.probe[: indices.shape[-1], : x.shape[-1]]), shape)
        rows = np.array(x.astype(mx.float32)).reshape(-1, x.shape[-1])
        chosen = np.array(indices).reshape(len(rows), -1)
        if self.recording:
            self.rows.x.append(rows)
            self.rows.indices.append(chosen)
        out = np.empty((*chosen.shape, rows.shape[1]), np.float32)
        for expert in np.unique(chosen):
            token, slot = np.nonzero(chosen == expert)
            mine = rows[token]
            h = self.activate(self.project("up_proj", expert, mine), self.project("gate_proj", expert, mine))
            out[token, slot] = self.project("down_proj", expert, h)
        return mx.array(out.reshape(*indices.shape, -1)).astype(x.dtype)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.experts, name)


class BlockTap:
    """Stands in for the block around the experts: finds the routing scores.

    The block's output is linear in what the experts return, so experts that return unit vectors, minus experts that
    return zeros, show each slot's score in the first k channels.
    """

    def __init__(self, block: nn.Module, experts: ExpertsTap):
        self.block, self.experts = block, experts

    def __call__(self, x: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        out = self.block(x, *args, **kwargs)
        if self.experts.recording:
            width = x.shape[-1]
            self.experts.probe = np.zeros((width, width), np.float32)
            without = self.block(x, *args, **kwargs)
            self.experts.probe = np.eye(width, dtype=np.float32)
            shown = np.array((self.block(x, *args, **kwargs) - without).astype(mx.float32))
            self.experts.probe = None
            k = self.experts.rows.indices[-1].shape[1]
            self.experts.rows.scores.append(np.abs(shown.reshape(-1, width)[:, :k]))
        return out

    def __getattr__(self, name: str) -> Any:
        return getattr(self.block, name)


def _child(module: Any, key: str) -> Any:
    return module[int(key)] if isinstance(module, (list, tuple)) else getattr(module, key)


def _replace(root: nn.Module, path: str, value: object) -> None:
    """Put ``value`` at a dotted path below ``root``."""
    *parents, last = path.split(".")
    parent = root
    for key in parents:
        parent = _child(parent, key)
    if isinstance(parent, list):
        parent[int(last)] = value
    else:
        setattr(parent, last, value)


def is_experts(module: nn.Module) -> bool:
    """Whether a module is a SwitchGLU in shape: gate, up and down stacks over experts."""
    parts = (getattr(module, part, None) for part in ("gate_proj", "up_proj", "down_proj"))
    return all(part is not None and getattr(part, "num_experts", None) and part.weight.ndim == 3 for part in parts)


class LayeredModel:
    """A model whose layers run, and are in memory, one at a time; float32 throughout.

    Args:
        path: Directory of an unquantized mlx-lm / Hugging Face checkpoint.
        tokens: int32 ``[windows, length]``: calibration text.
        batch: Windows per call.
    """

    def __init__(self, path: Path, tokens: np.ndarray, batch: int):
        from mlx_lm.utils import load_model

        self.model, self.config = load_model(path, lazy=True)
        names = {id(module): name for name, module in self.model.named_modules()}
        self.names = [names[id(layer)] for layer in self.model.layers]
        self.layers = list(self.model.layers)
        self.batches = [mx.array(tokens[i : i + batch]) for i in range(0, len(tokens), batch)]
        self.calls = self._record_calls()

    def _record_calls(self) -> list[list[Call]]:
        recorders = [_Recorder(layer) for layer in self.layers]
        for name, recorder in zip(self.names, recorders):
            _replace(self.model, name, recorder)
        for tokens in self.batches:
            self.model(tokens)
        return [recorder.calls for recorder in recorders]

    def embeddings(self) -> list[np.ndarray]:
        """Hidden states before the first layer, one array per batch."""
        return [np.array(x.astype(mx.float32)) for x, _, _ in self.calls[0]]

    def load(self, index: int) -> None:
        """Bring a layer into memory, as float32."""
        layer = self.layers[index]
        layer.update(
            tree_map(lambda p: p.astype(mx.float32) if mx.issubdtype(p.dtype, mx.floating) else p, layer.parameters())
        )
        mx.eval(layer.parameters())

    def unload(self, index: int) -> None:
        """Let go of a layer's weights."""
        layer = self.layers[index]
        layer.update(tree_map(lambda p: mx.zeros((), p.dtype), layer.parameters()))
        mx.clear_cache()

    def run(self, index: int, hidden: list[np.ndarray]) -> list[np.ndarray]:
        """A layer's output for each batch."""
        result = []
        for x, (_, args, kwargs) in zip(hidden, self.calls[index]):
            result.append(np.array(self.layers[index](mx.array(x), *args, **kwargs)))
        return result

    def head_inputs(self, hidden: list[np.ndarray]) -> list[np.ndarray]:
        """What the output projection sees, float32, given the hidden states after the last layer."""
        seen = []

        def note(x: mx.array) -> mx.array:
            seen.append(np.array(x.astype(mx.float32)))
            return x

        untie = self._tap_head(note)
        self._feed(hidden)
        for tokens in self.batches:
            self.model(tokens)
        untie()
        return seen

    def _feed(self, hidden: list[np.ndarray]) -> None:
        """Let the layers give these states, one per call of the model."""
        for i, (name, layer) in enumerate(zip(self.names, self.layers)):
            _replace(self.model, name, _Feed(layer, None if i else iter(hidden)))

    def logits(self, hidden: list[np.ndarray]) -> Iterator[np.ndarray]:
        """The model's output, float32, for each of some states after the last layer, ``[windows, length, hidden]``."""
        self._feed(hidden)
        for h in hidden:
            yield np.array(self.model(self.batches[0][: h.shape[0], : h.shape[1]]).astype(mx.float32))

    def _tap_head(self, note: Callable[[mx.array], mx.array]) -> Callable[[], None]:
        if getattr(self.model, "lm_head", None) is not None:
            self.model.lm_head = note
            return lambda: None
        for module in self.model.modules():
            if isinstance(module, nn.Embedding):
                method = "as_linear"  # the instance's, in place of the class's
                setattr(module, method, note)
                return lambda: delattr(module, method)
        raise ValueError(f"{type(self.model).__name__} has neither lm_head nor an embedding to tie it to")


class Taps:
    """The taps of one layer, in place for the length of a ``with`` block.

    Attributes:
        linears: By dotted path inside the layer.
        experts: By dotted path inside the layer.
    """

    def __init__(self, layer: nn.Module, wanted: Callable[[str], bool]):
        self.layer = layer
        self.linears: dict[str, LinearTap] = {}
        self.experts: dict[str, ExpertsTap] = {}
        self._originals: list[tuple[str, nn.Module, LinearTap | ExpertsTap | BlockTap]] = []
        modules = dict(layer.named_modules())
        for path, module in modules.items():
            if is_experts(module):
                tap = self.experts[path] = ExpertsTap(module, path)
                tap.load()
        inside = tuple(f"{path}." for path in self.experts)
        for path, module in modules.items():
            if type(module) is nn.Linear and wanted(path) and not path.startswith(inside):
                self.linears[path] = LinearTap(module, path)
        for path in (*self.experts, *self.linears):
            self._originals.append((path, modules[path], self.experts.get(path) or self.linears[path]))
        for path, experts in self.experts.items():
            block = path.rpartition(".")[0]
            if block:
                self._originals.append((block, modules[block], BlockTap(modules[block], experts)))

    def __enter__(self) -> Taps:
        for path, _, tap in self._originals:
            _replace(self.layer, path, tap)
        return self

    def __exit__(self, *exc_info: object) -> None:
        for path, original, _ in reversed(self._originals):
            _replace(self.layer, path, original)

    def record(self, on: bool) -> None:
        """Whether the taps note what they see."""
        taps: list[LinearTap | ExpertsTap] = [*self.linears.values(), *self.experts.values()]
        for tap in taps:
            tap.recording = on
