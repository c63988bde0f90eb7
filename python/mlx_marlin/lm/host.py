"""What this package needs to know of a library that brings models: mlx-lm, or mlx-vlm.

Where the tensors of a checkpoint go, and what stands for its linears and experts, is the same for all of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..layers.experts import TrellisSwitchGLU, TrellisSwitchMLP
from ..layers.linear import TrellisLinear
from ..layers.partial import PartlyQuantizedSwitchGLU
from ..layers.sharded import AllToShardedTrellisLinear, LocalExperts, ShardedToAllTrellisLinear

# What model code raises on a config or a set of tensors that it was not written for.
MODEL_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)


class UnknownArchitecture(ValueError):
    """A model that this host has no class for; the message says which one it has it in, if any."""


GATED = TrellisSwitchGLU.PROJECTIONS
"""Children of gated experts, in every host."""

UNGATED = TrellisSwitchMLP.PROJECTIONS
"""Children of experts of two matrices, in every host."""

UNGATED_ACTIVATIONS = {
    "mlx.nn.layers.activations.ReLU2": "relu_squared",
    "mlx.nn.layers.activations.SiLU": "silu",
    # As GELU's argument says.
    "mlx.nn.layers.activations.GELU:precise": "gelu_tanh",
    "mlx.nn.layers.activations.GELU:tanh": "gelu_tanh",
}
"""Activations of experts of two matrices, by their full names: what the fused kernels call them."""


@dataclass(frozen=True)
class ExpertsKind:
    """A class of a host's experts.

    Attributes:
        module: The class.
        projections: Names of its children: those that read x, then the one that reads what they make of it.
        fused: What stands for them where their activation has a kernel; takes a stack for each projection, and what
            :class:`~mlx_marlin.ops.Activation` has, of experts without a gate the name alone.
        partly: What stands for those of which some were left unquantized.
        local: What stands for those of which each rank has some.
    """

    module: type[nn.Module]
    projections: tuple[str, ...]
    fused: Callable[..., nn.Module]
    partly: type[PartlyQuantizedSwitchGLU] = PartlyQuantizedSwitchGLU
    local: type[LocalExperts] = LocalExperts


class Host(ABC):
    """A library of models.

    Attributes:
        name: As it is called in messages.
        whole: Whether its models go from tokens to logits; drafters are parts of those.
        loader: Its function that loads models which are not EXL3.
        model_code: The package whose modules are model code, with a dot behind.
        experts: Its classes of experts.
        projection: Its class of one projection of all experts.
        grouped: Its class of a linear for each group of inputs, if it has one.
        activations: Its classes of activations of experts, by their full names: what the fused kernels call them.
        linear: What stands for quantized linears.
        all_to_sharded: What stands for quantized linears of whose outputs each rank has some.
        sharded_to_all: What stands for quantized linears of whose inputs each rank has some.
    """

    name: str
    whole: bool = True
    loader: str
    model_code: str
    experts: tuple[ExpertsKind, ...]
    projection: type[nn.Module]
    grouped: type[nn.Module] | None
    activations: Mapping[str, str]
    linear: type[TrellisLinear]
    all_to_sharded: type[AllToShardedTrellisLinear] = AllToShardedTrellisLinear
    sharded_to_all: type[ShardedToAllTrellisLinear] = ShardedToAllTrellisLinear

    def kind_of(self, module: nn.Module) -> ExpertsKind | None:
        """Which experts a module is, itself or its class derived from theirs; ``None`` if none."""
        return next((kind for kind in self.experts if isinstance(module, kind.module)), None)

    @abstractmethod
    def load_config(self, directory: Path) -> dict:
        """config.json with what the host adds to it."""

    @abstractmethod
    def new_model(self, config: dict) -> nn.Module:
        """The model of a config, its parameters lazy and random. May write into the config.

        Raises:
            UnknownArchitecture: If the host has no class for it.
        """

    @abstractmethod
    def sanitize(self, model: nn.Module, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """A checkpoint's tensors as the host's own loader would hand them to the model.

        Parts that the model works without, and of which the checkpoint has nothing, are taken from the model.
        """

    @abstractmethod
    def uses(self, part: str) -> bool:
        """Whether models compute with a part of a checkpoint, a name of :mod:`~mlx_marlin.loader.contents`."""

    @abstractmethod
    def make_cache(self, model: nn.Module) -> list[Any]:
        """Empty caches of one sequence."""

    @abstractmethod
    def logits(self, model: nn.Module, tokens: mx.array, cache: list[Any]) -> mx.array:
        """The logits of text alone, ``[batch, tokens, vocabulary]``."""

    @abstractmethod
    def layers(self, model: nn.Module) -> int:
        """Layers of its text model."""

    @abstractmethod
    def splits(self, model: nn.Module) -> nn.Module | None:
        """The part of a model whose ``shard`` splits each layer over ranks, if it can be split so."""

    @abstractmethod
    def pipelines(self, model: nn.Module) -> nn.Module | None:
        """The part of a model whose ``pipeline`` gives each rank some of the layers, if it can be split so."""

    @abstractmethod
    def finish(self, model: nn.Module, dtype: mx.Dtype) -> None:
        """What is left to do when a model has its weights.

        Args:
            model: The model.
            dtype: What its activations are computed in.
        """
