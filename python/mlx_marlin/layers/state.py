"""What layers make of their parameters and of what has been measured: stacks and configs.

Both are made again when a parameter, the profile or the feedback changed, and by every copy of a layer.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import is_

import mlx.core as mx
import mlx.nn as nn

from .. import ops
from ..kernels import KernelConfig, checked_accuracy
from ..selection import choices, selftest
from ..weights.experts import ExpertStack

# A server meets ever new numbers of rows, and a model has hundreds of layers: an entry is 0.4 KB. What was dropped is
# still in the table of the process (selection/choices.py).
_MAX_CONFIGS = 64

Tap = Callable[..., mx.array]
"""Stands in a layer's calls; takes what the layer takes."""

StackArrays = tuple[mx.array, mx.array, mx.array, mx.array | None]
"""Codes, suh, svh and bias as a stack has them."""


class LayerConfigs:
    """The configs of one layer, resolved for the primitives, by what its calls differ in.

    Valid for one state of the world: made anew where the weights, the profile or the feedback changed.

    Attributes:
        top_k, combine, dtype: Of the latest new kind of call: what explain() assumes where it is not told. Before the
            first call top_k is ``None``.
    """

    __slots__ = ("_resolved", "combine", "dtype", "top_k")

    def __init__(self) -> None:
        self.top_k: int | None = None
        self.combine, self.dtype = False, mx.float32
        # The generation of the choices, the weights, and the configs; one tuple, so that threads see all or none.
        self._resolved: tuple[int, tuple[ops.Stack, ...], dict[tuple, ops.NativeConfig]] = (-1, (), {})

    def choose(self, call: ops.Call) -> ops.NativeConfig:
        """The config that runs a call: a dictionary look-up after the first call of a kind."""
        generation, stacks, configs = self._resolved
        now = choices.generation()
        if generation != now or len(stacks) != len(call.stacks) or not all(map(_same_source, stacks, call.stacks)):
            configs = {}
            self._resolved = now, call.stacks, configs
        dtype, combine = call.x.dtype, call.scores is not None
        key = call.rows, call.top_k, dtype, combine, call.accuracy, mx.default_device().type
        config = configs.get(key)
        if config is None:
            self.top_k, self.combine, self.dtype = call.top_k, combine, dtype
            problem = call.problem(ops.device_of(None))
            choice, final = selftest.select(problem, ops.is_traced(call.x))
            config = ops.resolve(call.op, problem, choice.config)
            if final:
                if len(configs) >= _MAX_CONFIGS:
                    configs.clear()
                configs[key] = config
        return config

    def run(self, call: ops.Call, config: KernelConfig | None = None) -> mx.array:
        """A checked call with a given config, or with the one that is chosen for it."""
        if config is None:
            return ops.run(call, self.choose(call))
        return ops.run(call, ops.resolve(call.op, call.problem(ops.device_of(None)), config))


def _same_source(a: ops.Stack, b: ops.Stack) -> bool:
    return a.source is b.source


class Derived:
    """What a layer makes of its parameters and settings. Not copied and not pickled.

    Attributes:
        configs: Its configs.
        adaptation: Stands in the calls while the layer is adapted, or ``None``.
        collected: The parameters, and the stack that was made of them; one tuple, so that threads see both or none.
        checked: The projections that were found to fit together.
    """

    __slots__ = ("adaptation", "checked", "collected", "configs")

    def __init__(self) -> None:
        self.configs = LayerConfigs()
        self.adaptation: Tap | None = None
        self.collected: tuple[tuple, ops.Stack | None] = ((None,) * 5, None)
        self.checked: tuple[ExpertStack | None, ...] = (None, None, None)


class TrellisModule(nn.Module):
    """A module with derived parts that stay behind when it is copied or pickled."""

    def __init__(self) -> None:
        super().__init__()
        self._derived = Derived()
        self._accuracy = "float32"

    @property
    def accuracy(self) -> str:
        """What calls may round: ``"float32"``, nothing but their result; ``"half"``, about as much as float16 does."""
        return self._accuracy

    @accuracy.setter
    def accuracy(self, accuracy: str) -> None:
        self._accuracy = checked_accuracy(accuracy)

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name != "_derived"}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._derived = Derived()

    @property
    def _adaptation(self) -> Tap | None:
        return self._derived.adaptation

    @_adaptation.setter
    def _adaptation(self, tap: Tap | None) -> None:
        self._derived.adaptation = tap


class StackedModule(TrellisModule):
    """A module over one stack, whose parameters are the stack's arrays: never trainable.

    ``unfreeze`` of a module above clears ``_no_grad`` of every module below it, without asking them; here it clears
    a copy.
    """

    @property
    def _no_grad(self) -> set[str]:
        return set(self)

    @_no_grad.setter
    def _no_grad(self, keys: set[str]) -> None:
        pass

    @property
    def weight_count(self) -> int:
        """Weights that the words stand for, in logical sizes, and biases."""
        in_features, out_features = self._sizes
        bias = self.get("bias")
        return self._formats().size * in_features * out_features + (0 if bias is None else bias.size)

    @property
    def stack(self) -> ops.Stack:
        """The parameters as the kernels take them; collected and checked again when one was replaced."""
        get = self.get  # attribute access to a parameter costs a microsecond each
        (trellis, formats, suh, svh, bias), stack = self._derived.collected
        same = get("trellis") is trellis and get("formats") is formats and get("suh") is suh and get("svh") is svh
        return stack if same and get("bias") is bias and stack is not None else self._collect()

    def _collect(self) -> ops.Stack:
        with ops.BUILD_LOCK:
            before, stack = self._derived.collected
            parameters = self._parameters()
            if stack is not None and all(map(is_, parameters, before)):
                return stack  # another thread was first
            if stack is not None and any(p is not None and ops.is_traced(p) for p in parameters):
                codes, suh, svh, bias = self._stack_arrays()
                # Formats that follow from the codes' shape are no parameter: a trace holds shapes fast.
                return ops.with_parameters(stack, codes, self.get("formats"), suh, svh, bias)
            for name in ("suh", "svh"):
                original = None if stack is None else getattr(stack.source, name)
                self[name] = ops.half_scales(name, self[name], original)
            codes, suh, svh, bias = self._stack_arrays()
            stack = ops.prepare(ExpertStack(codes, self._formats(), suh, svh, bias, *self._sizes))
            self._derived.collected = self._parameters(), stack
            return stack

    def _parameters(self) -> tuple[mx.array | None, ...]:
        return tuple(self.get(name) for name in ("trellis", "formats", "suh", "svh", "bias"))

    def _stack_arrays(self) -> StackArrays:
        raise NotImplementedError

    def _formats(self) -> mx.array:
        """The experts' formats as a stack has them."""
        raise NotImplementedError
