"""What layers make of their parameters and of what has been measured: stacks and configs.

Both are made again when a parameter, the profile or the feedback changed, and by every copy of a layer.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter, is_

import mlx.core as mx
import mlx.nn as nn

from .. import ops
from ..kernels import Problem
from ..selection import choices, selftest
from ..weights.experts import ExpertStack

_SOURCE = attrgetter("source")


class Table:
    """The resolved configs of one layer, by what its calls differ in; valid for one state of the world.

    Args:
        selection: Whose it is.
        generation: Of the choices.
        sources: The weights.
    """

    __slots__ = ("_natives", "_selection", "generation", "sources")

    def __init__(self, selection: Selection, generation: int, sources: tuple[ExpertStack, ...]):
        self._selection, self.generation, self.sources = selection, generation, sources
        self._natives: dict[tuple, object] = {}

    def __call__(self, x: mx.array, rows: int, top_k: int, combine: bool):
        """The resolved config: a dictionary look-up after the first call of a kind."""
        dtype = x.dtype
        key = rows, top_k, dtype, combine, mx.default_device().type
        native = self._natives.get(key)
        if native is None:
            latest = self._selection
            latest.top_k, latest.combine, latest.dtype = top_k, combine, dtype
            problem = latest.problem(self.sources, rows, dtype, ops.device_of(None), combine, top_k)
            choice, final = selftest.select(problem, ops.is_traced(x))
            native = ops.resolve(latest.op, problem, choice.config)
            if final:
                self._natives[key] = native
        return native


class Selection:
    """What runs each kind of call of one layer.

    Args:
        op: For error messages.
        problem: Called with (sources, rows, dtype, device, combine, top_k); sources: the weights.

    Attributes:
        top_k, combine, dtype: Of the latest new kind of call: what explain() assumes where it is not told.
    """

    __slots__ = ("_table", "combine", "dtype", "op", "problem", "top_k")

    def __init__(self, op: str, problem: Callable[..., Problem]):
        self.op, self.problem = op, problem
        self.top_k, self.combine, self.dtype = 1, False, mx.float32
        self._table = Table(self, -1, ())

    def current(self, *stacks: ops.Stack) -> Table:
        """The table, a new one if the weights, the profile or the feedback changed."""
        table, generation, sources = self._table, choices.generation(), tuple(map(_SOURCE, stacks))
        if generation != table.generation or not all(map(is_, sources, table.sources)):
            table = self._table = Table(self, generation, sources)
        return table


class Derived:
    """What a layer makes of its parameters and settings. Not copied and not pickled.

    Attributes:
        selection: Its configs.
        adaptation: Stands in the calls while the layer is adapted, or ``None``.
        collected: The parameters, and the stack that was made of them; one tuple, so that threads see both or none.
        checked: The three projections that were found to fit together.
    """

    __slots__ = ("adaptation", "checked", "collected", "selection")

    def __init__(self, selection: Selection):
        self.selection = selection
        self.adaptation = None
        self.collected: tuple[tuple, ops.Stack | None] = ((None,) * 5, None)
        self.checked: tuple[ExpertStack | None, ...] = (None, None, None)


def _linear_problem(sources, rows, dtype, device, combine, top_k) -> Problem:
    """As :class:`Selection` calls it; combine and top_k mean nothing to one product."""
    return ops.linear_problem(sources[0], rows, dtype, device)


class TrellisModule(nn.Module):
    """A module with derived parts that stay behind when it is copied or pickled."""

    def __init__(self):
        super().__init__()
        self._derive()

    def _derive(self) -> None:
        self._derived = Derived(Selection("trellis_linear", _linear_problem))

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name != "_derived"}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._derive()

    @property
    def _selection(self) -> Selection:
        return self._derived.selection

    @property
    def _adaptation(self):
        return self._derived.adaptation

    @_adaptation.setter
    def _adaptation(self, tap) -> None:
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
                return ops.with_parameters(stack, *self._stack_arrays(traced=True))
            for name in ("suh", "svh"):
                original = None if stack is None else getattr(stack.source, name)
                self[name] = ops.half_scales(name, self[name], original)
            stack = ops.prepare(ExpertStack(*self._stack_arrays(traced=False), *self._sizes))
            self._derived.collected = self._parameters(), stack
            return stack

    def _parameters(self) -> tuple[mx.array | None, ...]:
        return tuple(self.get(name) for name in ("trellis", "formats", "suh", "svh", "bias"))

    def _stack_arrays(self, traced: bool) -> tuple[mx.array | None, ...]:
        """Codes, formats, suh, svh and bias as a stack has them; traced: formats that do not change are ``None``."""
        raise NotImplementedError
