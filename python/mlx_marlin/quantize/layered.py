"""An mlx-lm model run one layer at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map, tree_map_with_path

from .names import Names, parts_of_experts
from .origins import load_weights
from .slices import found_slice, numbers_made
from .source import ExpertTensors, Source
from .spill import SpilledArrays, States
from .taps import replace_module

Call = tuple[tuple, dict]
"""What a layer is called with beside the hidden state."""


class _Recorder:
    """Stands in for a layer: notes what it is called with and passes the hidden state on.

    A layer that returns more than that shows it on its first call, which is not evaluated.
    """

    def __init__(self, layer: nn.Module):
        self.layer = layer
        self.calls: list[Call] = []
        self.rest: tuple = ()
        self.returns_tuple = False

    def __call__(self, x: mx.array, *args: Any, **kwargs: Any) -> Any:
        if not self.calls:
            result = self.layer(x, *args, **kwargs)
            if isinstance(result, tuple):
                self.returns_tuple, self.rest = True, result[1:]
        self.calls.append((args, kwargs))
        return (x, *self.rest) if self.returns_tuple else x

    def __getattr__(self, name: str) -> Any:
        return getattr(self.layer, name)


class _Feed:
    """Stands in for a layer: gives what it is told, or passes the hidden state on."""

    def __init__(self, recorder: _Recorder, values: Iterator[np.ndarray] | None = None):
        self.recorder, self.values = recorder, values

    def __call__(self, x: mx.array, *args: Any, **kwargs: Any) -> Any:
        x = x if self.values is None else mx.array(next(self.values))
        return (x, *self.recorder.rest) if self.recorder.returns_tuple else x

    def __getattr__(self, name: str) -> Any:
        return getattr(self.recorder.layer, name)


class _Reached(Exception):
    """The first layer was reached."""


class _First:
    """Stands in for the first layer: notes the hidden state and goes no further."""

    def __init__(self, recorder: _Recorder, seen: list[np.ndarray] | SpilledArrays):
        self.recorder, self.seen = recorder, seen

    def __call__(self, x: mx.array, *args: Any, **kwargs: Any) -> Any:
        self.seen.append(np.array(x.astype(mx.float32)))
        raise _Reached

    def __getattr__(self, name: str) -> Any:
        return getattr(self.recorder.layer, name)


class _HeadTap:
    """Stands in for a linear outside of the layers."""

    def __init__(self, linear: nn.Module, call: Callable[[mx.array], mx.array]):
        self.linear, self.call = linear, call

    def __call__(self, x: mx.array) -> mx.array:
        return self.call(x)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.linear, name)


class LayeredModel:
    """A model whose layers run, and are in memory, one at a time; float32 throughout.

    Args:
        source: The checkpoint.
        tokens: int32 ``[windows, length]``: calibration text.
        batch: Windows per call.

    Raises:
        ValueError: If mlx-lm cannot make a model of the checkpoint, or it does not run layer by layer.

    Attributes:
        model: mlx-lm's.
        names: What the checkpoint calls its parts.
        paths: Of the layers.
        layers: The layers.
        head: Path of the module that makes the logits: a linear, or the embeddings.
    """

    def __init__(self, source: Source, tokens: np.ndarray, batch: int):
        from ..lm.model import build  # needs mlx-lm

        self.source = source
        self.model = build(source.path, source.model_config)
        paths = {id(module): path for path, module in self.model.named_modules()}
        self.layers = list(self.model.layers)
        self.paths = [paths[id(layer)] for layer in self.layers]
        self._stacks = tuple(
            f"{path}.{part}.weight" for path, module in self.model.named_modules() for part in parts_of_experts(module)
        )
        origins, stacked = load_weights(self.model, source, len(self.layers))
        self._experts = {path: ExpertTensors(source, stacked[path]) for path in self._stacks if path in stacked}
        fused = [path for path in self._stacks if path not in stacked]
        self._numbers = numbers_made(self.model, source.tensors, source.arrays(), fused)
        self.names = Names(source, self.model, origins, self.paths)
        self.batches = [mx.array(tokens[i : i + batch]) for i in range(0, len(tokens), batch)]
        self.recorders = [_Recorder(layer) for layer in self.layers]
        self.head = self._record_calls()

    def _find_slices(self, index: int) -> None:
        """Find where the weights of a layer's experts can be read one by one in tensors of all experts."""
        for path in [path for path in self._numbers if path.startswith(f"{self.paths[index]}.")]:
            found = found_slice(self._numbers.pop(path), self.source.tensors)
            if found is not None:
                self._experts[path] = ExpertTensors(self.source, [found[0]], found[1])

    def _record_calls(self) -> str:
        for path, recorder in zip(self.paths, self.recorders):
            replace_module(self.model, path, recorder)
        with self._watched_heads() as seen:
            logits = self.model(self.batches[0])
        for tokens in self.batches[1:]:
            self.model(tokens)
        self._check_layers_apart()
        modules = dict(self.model.named_modules())
        if not seen or modules[seen[-1]].weight.shape[0] != logits.shape[-1]:
            raise ValueError(
                f"{self.source.path}: the module that makes the logits of {type(self.model).__module__} is not found: "
                "neither a linear nor the embeddings, applied after the last layer"
            )
        return seen[-1]

    @contextmanager
    def _watched_heads(self) -> Iterator[list[str]]:
        """The paths of linears outside of the layers and of embeddings used as such, in the order of their calls."""
        seen: list[str] = []
        originals: list[tuple[str, nn.Module]] = []

        def watched(path: str, call: Callable[[mx.array], mx.array]) -> Callable[[mx.array], mx.array]:
            def note(x: mx.array) -> mx.array:
                seen.append(path)
                return call(x)

            return note

        for path, module in self.model.named_modules():
            if type(module) is nn.Linear or isinstance(module, nn.Embedding):
                originals.append((path, module))
        for path, module in originals:
            self._tap(path, module, watched(path, module.as_linear if isinstance(module, nn.Embedding) else module))
        yield seen
        for path, module in originals:
            self._untap(path, module)

    def _tap(self, path: str, module: nn.Module, call: Callable[[mx.array], mx.array]) -> None:
        if isinstance(module, nn.Embedding):
            module.__dict__["as_linear"] = call  # the instance's, in place of the class's
        else:
            replace_module(self.model, path, _HeadTap(module, call))

    def _untap(self, path: str, module: nn.Module) -> None:
        if isinstance(module, nn.Embedding):
            del module.__dict__["as_linear"]
        else:
            replace_module(self.model, path, module)

    def _check_layers_apart(self) -> None:
        """See that no layer is given what another one returned beside the hidden state."""
        given: dict[int, str] = {}
        for path, recorder in zip(self.paths, self.recorders):
            for args, kwargs in recorder.calls[:1]:
                for value in dict(tree_flatten([list(args), dict(kwargs)])).values():
                    if id(value) in given and isinstance(value, mx.array):
                        raise ValueError(
                            f"{self.source.path}: {path} of {type(self.model).__module__} uses more of "
                            f"{given[id(value)]} than its hidden state; such models are not converted"
                        )
            given.update({id(value): path for value in dict(tree_flatten(list(recorder.rest))).values()})
        for recorder in self.recorders:  # what is not used holds the weights that it would be computed from
            recorder.rest = (None,) * len(recorder.rest)

    def embeddings(self, into: SpilledArrays | None = None) -> States:
        """Hidden states before the first layer, one array per batch.

        Args:
            into: Where they are put. Default: a list.
        """
        first = _First(self.recorders[0], [] if into is None else into)
        replace_module(self.model, self.paths[0], first)
        for tokens in self.batches:
            with suppress(_Reached):
                self.model(tokens)
        replace_module(self.model, self.paths[0], self.recorders[0])
        # The tables are not needed for long; what is lazy is read again when it is.
        tables = [path for path, module in self.model.named_modules() if isinstance(module, nn.Embedding)]
        names = {f"{path}.weight": self.names.origins.get(f"{path}.weight") for path in tables}
        fresh = self.source.arrays()
        self.model.load_weights([(path, fresh[name]) for path, name in names.items() if name], strict=False)
        mx.clear_cache()
        return first.seen

    def load(self, index: int) -> None:
        """Bring a layer into memory, as float32; not its experts where those can be read one by one, else as stored.

        What it is called with is evaluated too: other threads cannot do that.

        Raises:
            ValueError: If a value is not finite; the message names the tensor.
        """
        layer, path = self.layers[index], self.paths[index]
        self._find_slices(index)

        def widened(name: str, value: mx.array) -> mx.array:
            is_stack = f"{path}.{name}" in self._stacks
            return value if is_stack or not mx.issubdtype(value.dtype, mx.floating) else value.astype(mx.float32)

        layer.update(tree_map_with_path(widened, layer.parameters()))
        parameters: dict[str, mx.array] = dict(tree_flatten(layer.parameters(), prefix=f".{path}"))
        parameters = {name: value for name, value in parameters.items() if name not in self._experts}
        given = dict(tree_flatten([[list(args), dict(kwargs)] for args, kwargs in self.recorders[index].calls]))
        mx.eval(parameters, [value for value in given.values() if isinstance(value, mx.array)])
        mx.clear_cache()  # of what the stacks were made of
        for name, value in parameters.items():
            self.check_finite(name, value)

    def experts(self, index: int) -> dict[str, ExpertTensors]:
        """Where the weights of a layer's experts can be read one by one: by path of the stack, inside the layer."""
        prefix = f"{self.paths[index]}."
        return {
            path.removeprefix(prefix).removesuffix(".weight"): tensors
            for path, tensors in self._experts.items()
            if path.startswith(prefix)
        }

    def check_finite(self, path: str, value: mx.array) -> None:
        """Raise ValueError if a value of a parameter is not finite, naming the tensor that it comes from."""
        if mx.issubdtype(value.dtype, mx.floating) and not mx.isfinite(value).all().item():
            name = self.names.origins.get(path) or self._expert(path, value)
            where = f"tensor {name} holds" if name else f"the tensors that make {path} hold"
            raise ValueError(f"{self.source.path}: {where} values that are not finite")

    def _expert(self, path: str, value: mx.array) -> str | None:
        """The checkpoint's tensor of the first expert in a stack that is not finite, if it has one of its own."""
        for layer in self.paths:
            for block, names in self.names.experts(layer).items():
                part, _, leaf = path.removeprefix(f"{layer}.{block}.").rpartition(".")
                if part in names.parts:
                    e = next(e for e in range(len(value)) if not mx.isfinite(value[e]).all().item())
                    single = f"{names.name(e, part)}.{leaf}"
                    return single if single in self.source.tensors else names.sources[0]
        return None

    def unload(self, index: int) -> None:
        """Let go of a layer's weights."""
        layer = self.layers[index]
        layer.update(tree_map(lambda p: mx.zeros((), p.dtype), layer.parameters()))
        mx.clear_cache()

    def output(self, index: int, hidden: np.ndarray, batch: int) -> np.ndarray:
        """A layer's output.

        Args:
            index: The layer.
            hidden: Its input, float32 ``[windows, length, hidden]``.
            batch: Of which one of the batches it is.
        """
        args, kwargs = self.recorders[index].calls[batch]
        y = self.layers[index](mx.array(hidden), *args, **kwargs)
        return np.array(y[0] if self.recorders[index].returns_tuple else y)

    def head_module(self) -> nn.Module:
        """The module that makes the logits."""
        return dict(self.model.named_modules())[self.head]

    def head_inputs(self, hidden: States, note: Callable[[np.ndarray], None]) -> None:
        """Show what the output projection sees, given the hidden states after the last layer.

        Args:
            hidden: The states, one array per batch.
            note: Called with float32 ``[rows, features]`` for each batch.
        """
        module = self.head_module()

        def show(x: mx.array) -> mx.array:
            note(np.array(x.astype(mx.float32)).reshape(-1, x.shape[-1]))
            return x

        self._feed(hidden)
        self._tap(self.head, module, show)
        for tokens in self.batches:
            self.model(tokens)
        self._untap(self.head, module)

    def _feed(self, hidden: States) -> None:
        """Let the layers give these states, one per call of the model."""
        for i, (path, recorder) in enumerate(zip(self.paths, self.recorders)):
            replace_module(self.model, path, _Feed(recorder, None if i else iter(hidden)))

    def logits(self, hidden: States) -> Iterator[np.ndarray]:
        """The model's output, float32, for each of some states after the last layer, ``[windows, length, hidden]``."""
        self._feed(hidden)
        for h in hidden:
            yield np.array(self.model(self.batches[0][: h.shape[0], : h.shape[1]]).astype(mx.float32))
