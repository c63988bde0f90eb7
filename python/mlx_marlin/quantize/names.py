"""Which tensors of a checkpoint the linears, experts and head of an mlx-lm model are.

A model's ``sanitize`` renames, stacks and changes tensors. What it passes on as it is, the very array, tells which
tensor a parameter is; only for stacks that it makes of several tensors their names are looked for.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import mlx.nn as nn

from ..layers.experts import TrellisSwitchGLU, TrellisSwitchMLP
from .source import KEPT_LINEARS, Source

KINDS = (TrellisSwitchGLU.PROJECTIONS, TrellisSwitchMLP.PROJECTIONS)
"""Children of each kind of experts: those that read x, then the one that reads what they make of it."""


class _Spelling(NamedTuple):
    """What a checkpoint calls experts.

    Attributes:
        parts: Of one of :data:`KINDS`, in its order.
        folder: What all of them are in.
        models: Who calls them so, of checkpoints in mlx-lm's names, which do not tell; ``None``: everyone else.
    """

    parts: tuple[str, ...]
    folder: str = "experts"
    models: frozenset[str] | None = None


_SPELLINGS = {
    KINDS[0]: (
        _Spelling(KINDS[0]),
        _Spelling(("w1", "w3", "w2"), models=frozenset({"mixtral", "minimax", "phimoe", "lfm2_moe"})),
    ),
    KINDS[1]: (_Spelling(("up_proj", "down_proj")), _Spelling(KINDS[1], "mlp", frozenset({"phixtral"}))),
}
_ROUTERS = frozenset({"gate", "router"})
_EXPERT = re.compile(r"\.(?:experts|mlp)\.(\d+)\.")


@dataclass(frozen=True)
class ExpertNames:
    """The names of the experts of a block.

    Attributes:
        prefix: Of all of them; a number and a part follow.
        parts: What each of a kind's parts is called, in its order.
        sources: The checkpoint's tensors that they are made from.
    """

    prefix: str
    parts: dict[str, str]
    sources: tuple[str, ...]

    def name(self, expert: int, part: str) -> str:
        """The name of one linear; ``part`` is one of ``parts``."""
        return f"{self.prefix}.{expert}.{self.parts[part]}"

    def group(self, part: str) -> str:
        """What all experts' linears of a part are called together."""
        return f"{self.prefix}.{self.parts[part]}"


def parts_of_experts(module: nn.Module) -> tuple[str, ...]:
    """Which of :data:`KINDS` a module is in shape: stacks over experts of these names; none of anything else."""

    def is_stack(part: nn.Module | None) -> bool:
        return part is not None and bool(getattr(part, "num_experts", None)) and part.weight.ndim == 3

    return next((parts for parts in KINDS if all(is_stack(getattr(module, part, None)) for part in parts)), ())


def _inside(above: str, spelling: _Spelling) -> str:
    """What a spelling's experts below a path have in common."""
    return above if above.endswith(f".{spelling.folder}") else f"{above}.{spelling.folder}"


class Names:
    """What the checkpoint calls the parts of a model.

    Args:
        source: The checkpoint.
        model: The model.
        origins: Of the parameters that are tensors of the checkpoint as they are: path -> name.
        layers: Paths of the layers.
    """

    def __init__(self, source: Source, model: nn.Module, origins: dict[str, str], layers: list[str]):
        self.source, self.origins = source, origins
        self._prefixes = {layer: self._prefix(layer) for layer in layers}
        self._linears: dict[str, list[str]] = {}
        self._experts: dict[str, dict[str, ExpertNames]] = {}
        modules = dict(model.named_modules())
        for layer in layers:
            inside = {p[len(layer) + 1 :]: m for p, m in modules.items() if p.startswith(f"{layer}.")}
            blocks = [path for path, module in inside.items() if parts_of_experts(module)]
            self._experts[layer] = {path: self._experts_of(layer, path, inside[path]) for path in blocks}
            self._linears[layer] = [
                path
                for path, module in inside.items()
                if type(module) is nn.Linear and not path.startswith(tuple(f"{block}." for block in blocks))
            ]

    def _prefix(self, layer: str) -> str | None:
        """What the checkpoint's names of a layer begin with."""
        for path, name in self.origins.items():
            tail = path.removeprefix(layer)
            if path.startswith(f"{layer}.") and name.endswith(tail):
                return name.removesuffix(tail)
        return None

    def linears(self, layer: str) -> dict[str, str]:
        """The linears of a layer that EXL3 quantizes: path inside the layer -> name."""
        return {path: name for path, name in self._named(layer) if name is not None}

    def made(self, layer: str) -> list[str]:
        """Paths of those that it would, but that are made of other tensors, which are copied."""
        return [path for path, name in self._named(layer) if name is None]

    def _named(self, layer: str) -> list[tuple[str, str | None]]:
        found = []
        for path in self._linears[layer]:
            name = self.origins.get(f"{layer}.{path}.weight")
            name = name.removesuffix(".weight") if name is not None and name.endswith(".weight") else None
            *parents, leaf = path.split(".")
            kept = leaf in KEPT_LINEARS or bool(_ROUTERS.intersection(parents[-1:]))
            if not kept and (name is None or name.rpartition(".")[2] not in KEPT_LINEARS):
                found.append((path, name))
        return found

    def experts(self, layer: str) -> dict[str, ExpertNames]:
        """The experts of a layer, by path inside the layer."""
        return self._experts[layer]

    @property
    def stacked(self) -> frozenset[str]:
        """The checkpoint's tensors that all experts are made from."""
        return frozenset(name for blocks in self._experts.values() for e in blocks.values() for name in e.sources)

    def _experts_of(self, layer: str, path: str, module: nn.Module) -> ExpertNames:
        tensors, block = self.source.tensors, path.rpartition(".")[0]
        parts, kind = parts_of_experts(module), self.source.config.get("model_type")
        usual, other = _SPELLINGS[parts]
        stacks = [self.origins.get(f"{layer}.{path}.{part}.weight") for part in parts]
        above = ".".join(filter(None, (self._prefixes[layer] or layer, block)))
        count = module[parts[0]].weight.shape[0]

        def found(spelling: _Spelling, sources: Iterable[str | None]) -> ExpertNames:
            return ExpertNames(_inside(above, spelling), dict(zip(parts, spelling.parts)), tuple(filter(None, sources)))

        if all(name is not None for name in stacks):
            biases = [self.origins.get(f"{layer}.{path}.{part}.bias") for part in parts]
            return found(other if kind in (other.models or ()) else usual, (*stacks, *biases))
        for spelling in (usual, other):
            single = [f"{_inside(above, spelling)}.{e}.{p}.weight" for e in range(count) for p in spelling.parts]
            if single[0] in tensors:
                self._check_all(single)
                biases = [f"{name.removesuffix('weight')}bias" for name in single]
                return found(spelling, (*single, *(b for b in biases if b in tensors)))
        full = _inside(above, usual)
        stems = [f"{full}.{part}" for part in ("gate_up_proj", *parts)]
        fused = [name for stem in stems for name in (stem, f"{stem}.weight", f"{stem}_bias", f"{stem}.bias")]
        fused = [name for name in fused if name in tensors]
        if fused:
            return found(usual, fused)
        raise ValueError(
            f"{self.source.path} holds no tensors {full}.*, which the experts at {layer}.{path} should come from; "
            f"experts that {kind} names otherwise are not converted"
        )

    def _check_all(self, names: list[str]) -> None:
        shapes: dict[str, tuple[int, ...]] = {}
        for name in names:
            if name not in self.source.tensors:
                raise ValueError(f"{self.source.path} holds no tensor {name}, but other experts of the layer are there")
            shape = self.source.tensors[name].shape
            part = _EXPERT.split(name)[-1]
            if shapes.setdefault(part, shape) != shape:
                raise ValueError(
                    f"{self.source.path}: {name} has shape {list(shape)}, but other experts {list(shapes[part])}"
                )
