"""Which tensors of a checkpoint the linears, experts and head of an mlx-lm model are.

A model's ``sanitize`` renames, stacks and changes tensors. What it passes on as it is, the very array, tells which
tensor a parameter is; only for stacks that it makes of several tensors their names are looked for.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import mlx.nn as nn

from .source import KEPT_LINEARS, Source

PARTS = ("gate_proj", "up_proj", "down_proj")
_W_NAMES = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
# Whose experts EXL3 names w1, w2, w3; for checkpoints in mlx-lm's names, which do not tell.
_W_MODELS = frozenset({"mixtral", "minimax", "phimoe", "lfm2_moe"})
_ROUTERS = frozenset({"gate", "router"})
_EXPERT = re.compile(r"\.experts\.(\d+)\.")


@dataclass(frozen=True)
class ExpertNames:
    """The names of the experts of a block.

    Attributes:
        prefix: Of all of them; a number and a part follow.
        parts: What ``gate_proj``, ``up_proj`` and ``down_proj`` are called.
        sources: The checkpoint's tensors that they are made from.
    """

    prefix: str
    parts: dict[str, str]
    sources: tuple[str, ...]

    def name(self, expert: int, part: str) -> str:
        """The name of one linear; ``part`` is one of :data:`PARTS`."""
        return f"{self.prefix}.{expert}.{self.parts[part]}"

    def group(self, part: str) -> str:
        """What all experts' linears of a part are called together."""
        return f"{self.prefix}.{self.parts[part]}"


def is_experts(module: nn.Module) -> bool:
    """Whether a module is a SwitchGLU in shape: gate, up and down stacks over experts."""
    parts = (getattr(module, part, None) for part in PARTS)
    return all(part is not None and getattr(part, "num_experts", None) and part.weight.ndim == 3 for part in parts)


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
            blocks = [path for path, module in inside.items() if is_experts(module)]
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
        prefix = self._prefixes[layer]
        stacks = [self.origins.get(f"{layer}.{path}.{part}.weight") for part in PARTS]
        full = ".".join(filter(None, (prefix or layer, block)))
        full = full if full.endswith(".experts") else f"{full}.experts"
        count = module.gate_proj.weight.shape[0]
        aliases = {part: part for part in PARTS}
        if all(name is not None for name in stacks):
            is_w = self.source.config.get("model_type") in _W_MODELS
            biases = [self.origins.get(f"{layer}.{path}.{part}.bias") for part in PARTS]
            return ExpertNames(full, dict(_W_NAMES) if is_w else aliases, tuple(filter(None, (*stacks, *biases))))
        for parts in (aliases, _W_NAMES):
            single = [f"{full}.{e}.{part}.weight" for e in range(count) for part in parts.values()]
            if single[0] in tensors:
                self._check_all(single)
                biases = [f"{name.removesuffix('weight')}bias" for name in single]
                return ExpertNames(full, dict(parts), (*single, *(b for b in biases if b in tensors)))
        fused = [f"{full}.{part}" for part in ("gate_up_proj", *PARTS)]
        fused = [name for stem in fused for name in (stem, f"{stem}.weight", f"{stem}_bias", f"{stem}.bias")]
        found = tuple(name for name in fused if name in tensors)
        if found:
            return ExpertNames(full, aliases, found)
        raise ValueError(
            f"{self.source.path} holds no tensors {full}.*, which the experts at {layer}.{path} should come from; "
            f"experts that {self.source.config.get('model_type')} names otherwise are not converted"
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
