"""What a checkpoint is, from its headers and its config alone."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import msgspec

from ..codec import TILE_SIZE
from ..device.machine import default_device, memory_bytes
from ..loader.contents import parts_of
from ..loader.directory import Kind, TrellisModelLoader
from ..loader.embedding import QuantizedEmbedding
from ..loader.exl3 import QuantizedLinear
from ..storage.safetensors import ITEM_BYTES, TensorInfo
from ..storage.untrusted import read_json
from .mapping import WeightMap
from .memory import UnknownCache, cache_bytes, weight_bytes
from .model import open_checkpoint, running_dtype
from .placeholders import EXPERT

CONTEXT = 8192
"""Tokens that memory is computed for unless asked otherwise: a long chat."""

# How the original models call their token embeddings.
_EMBEDDING = re.compile(r"(?:^|\.)(?:embed_tokens|embed_in|wte|tok_embeddings|word_embeddings|embedding)\.weight$")


class Memory(msgspec.Struct, frozen=True):
    """What a model takes to run, in bytes, for one sequence. What a prompt's products need meanwhile is not counted.

    Attributes:
        device: ``"cpu"`` or ``"gpu"``.
        context: Tokens.
        weights: Parameters once loaded, in the dtype that they run in.
        cache: mlx-lm's caches at this context; ``None`` where their sizes are not known beforehand.
        cache_unknown: Why they are not; empty where they are.
        available: What calls on the device can use.
        fits: Whether weights and caches do not exceed that.
    """

    device: str
    context: int
    weights: int
    cache: int | None
    cache_unknown: str
    available: int
    fits: bool


class Info(msgspec.Struct, frozen=True):
    """What a checkpoint is. Widths are keys such as ``"2.5"``.

    Attributes:
        directory: The directory.
        format: The format's name.
        version: Of the converter, as config.json says; ``None`` if it does not.
        architecture: The class of the original model, as config.json says.
        model_type: mlx-lm's name of it.
        bytes: Size of the tensors by kind: trellis, scales (with biases and markers), embedding, unquantized, left out.
        weights: Weights that the model uses, padded ones included.
        bits_per_weight: Everything that the model uses, over all its weights.
        linear_bits_per_weight: Trellis, scales and biases of the quantized linears but the head, over their weights.
        head_bits: K of the head; ``None`` where it is not quantized.
        embedding_bits: K of the token embedding; ``None`` where it is not quantized.
        widths: Weights of the quantized linears by K, the head not counted.
        projections: Linears outside of experts by the last part of their names, then K.
        experts: Experts by projection, then K.
        codebooks: Quantized linears by codebook.
        left_out: What the model does not use, and its bytes.
        memory: What it takes to run; ``None`` where mlx-lm cannot build the model.
        not_loadable: Why it cannot; empty where it can.
    """

    directory: str
    format: str
    version: str | None
    architecture: str
    model_type: str
    bytes: dict[str, int]
    weights: int
    bits_per_weight: float
    linear_bits_per_weight: float
    head_bits: float | None
    embedding_bits: int | None
    widths: dict[str, int]
    projections: dict[str, dict[str, int]]
    experts: dict[str, dict[str, int]]
    codebooks: dict[str, int]
    left_out: dict[str, int]
    memory: Memory | None
    not_loadable: str


def _open(directory: Path) -> TrellisModelLoader:
    if directory.is_file():
        raise ValueError(f"{directory} is a file; give the directory that it is in")
    if not directory.is_dir():
        raise FileNotFoundError(
            f"{directory} is no directory here; give that of an EXL3 model. One of the Hugging Face Hub comes with: "
            "hf download REPO --revision BRANCH --local-dir DIR"
        )
    loader = TrellisModelLoader(directory)
    if loader.kind is Kind.METAL_MARLIN:
        raise ValueError(
            f"{directory} is of the metal-marlin format, not EXL3; TrellisModelLoader loads single weights of it"
        )
    if not loader.quantized and not loader.embeddings:
        raise ValueError(
            f"{directory} holds no EXL3 tensors; mlx_marlin-convert --model {directory} --output DIR --bits 3 makes "
            "an EXL3 model of an fp16, bf16 or fp32 one"
        )
    return loader


def _layers(config: dict) -> int:
    for part in (config, config.get("text_config")):
        if isinstance(part, dict) and isinstance(part.get("num_hidden_layers"), int):
            return part["num_hidden_layers"]
    return 1 << 30  # no layer is behind the last one then


def _left_out(loader: TrellisModelLoader, mapping: WeightMap | None, config: dict) -> dict[str, dict[str, int]]:
    """Part -> tensor -> bytes of what the model does not use: as mapped, or else by the names alone."""
    if mapping is not None:
        return {part: dict(sizes) for part, sizes in mapping.left_out.tensors.items()}
    modules = {**loader.quantized, **loader.embeddings}
    sizes = {f"{m.name}.{suffix}": info.nbytes for m in modules.values() for suffix, info in m.parts.items()}
    sizes.update({name: info.nbytes for name, info in (*loader.unquantized.items(), *loader.tables.items())})
    found: dict[str, dict[str, int]] = {}
    for name, part in parts_of(sizes, _layers(config)).items():
        found.setdefault(part, {})[name] = sizes[name]
    return found


def _text(bits: float) -> str:
    return f"{bits:g}"


def _counted(widths: Iterable[float]) -> dict[str, int]:
    return {_text(bits): count for bits, count in sorted(Counter(widths).items())}


def _by_projection(linears: list[QuantizedLinear], of_experts: bool) -> dict[str, dict[str, int]]:
    groups: dict[str, list[float]] = {}
    for linear in linears:
        if (EXPERT.fullmatch(linear.name) is not None) == of_experts:
            groups.setdefault(linear.name.rpartition(".")[2], []).append(linear.bits)
    return {name: _counted(widths) for name, widths in groups.items()}


def _size(linear: QuantizedLinear) -> int:
    return linear.padded_shape[0] * linear.padded_shape[1]


def _stored(linear: QuantizedLinear) -> int:
    return sum(info.nbytes for info in linear.parts.values())


def _is_head(linear: QuantizedLinear) -> bool:
    return f".{linear.name}".endswith(".lm_head")


def _memory(model: nn.Module, mapping: WeightMap, context: int) -> Memory:
    device = default_device()
    weights = weight_bytes(model, mapping)
    cache, unknown = None, ""
    try:
        cache = cache_bytes(model, context, running_dtype(mapping.dense, None) or mx.float16)
    except UnknownCache as error:
        unknown = str(error)
    available = memory_bytes(device)
    return Memory(device, context, weights, cache, unknown, available, weights + (cache or 0) <= available)


class _Used(NamedTuple):
    """What of a checkpoint the model uses."""

    linears: list[QuantizedLinear]
    embeddings: list[QuantizedEmbedding]
    plain: dict[str, TensorInfo]

    @classmethod
    def of(cls, loader: TrellisModelLoader, unused: set[str]) -> _Used:
        return cls(
            [m for m in loader.linears.values() if f"{m.name}.trellis" not in unused],
            [e for e in loader.embeddings.values() if f"{e.name}.signs" not in unused],
            {name: info for name, info in loader.unquantized.items() if name not in unused},
        )

    def bytes_by_kind(self) -> dict[str, int]:
        trellis = sum(m.parts["trellis"].nbytes for m in self.linears)
        rows = sum(info.nbytes for name, info in self.plain.items() if _EMBEDDING.search(name))
        return {
            "trellis": trellis,
            "scales": sum(map(_stored, self.linears)) - trellis,
            "embedding": sum(e.nbytes for e in self.embeddings) + rows,
            "unquantized": sum(info.nbytes for info in self.plain.values()) - rows,
        }

    def weights(self) -> int:
        plain = sum(info.nbytes // ITEM_BYTES[info.dtype] for info in self.plain.values())
        return sum(map(_size, self.linears)) + sum(e.rows * e.groups * TILE_SIZE for e in self.embeddings) + plain


def describe(directory: str | Path, context: int = CONTEXT) -> Info:
    """What an EXL3 directory is. Reads the headers of its files and its config, no weight.

    Args:
        directory: The directory.
        context: Tokens that the memory is computed for. Default: :data:`CONTEXT`.

    Raises:
        FileNotFoundError: If there is no such directory, or a file of it is missing.
        ValueError: If it is no EXL3 directory, or a damaged one, or the context is not positive.
    """
    if context < 1:
        raise ValueError(f"the context must be at least one token, got {context}")
    directory = Path(directory)
    loader = _open(directory)
    config = read_json(directory / "config.json", finite=False)
    memory, mapping, not_loadable = None, None, ""
    try:
        model, _, mapping = open_checkpoint(directory)
        memory = _memory(model, mapping, context)
    except ValueError as error:
        not_loadable = str(error)
    left_out = _left_out(loader, mapping, config)
    used = _Used.of(loader, {name for sizes in left_out.values() for name in sizes})
    body = [m for m in used.linears if not _is_head(m)]
    heads = [m.bits for m in used.linears if _is_head(m)]
    widths: Counter[float] = Counter()
    for linear in body:
        widths[linear.bits] += _size(linear)
    names, by_kind, weights = config.get("architectures"), used.bytes_by_kind(), used.weights()
    return Info(
        directory=str(directory),
        format="EXL3 (ExLlamaV3)",
        version=loader.version,
        architecture=str(names[0]) if isinstance(names, list) and names else "not named",
        model_type=str(config.get("model_type")),
        bytes={**by_kind, "left out": sum(sum(sizes.values()) for sizes in left_out.values())},
        weights=weights,
        bits_per_weight=8 * sum(by_kind.values()) / max(1, weights),
        linear_bits_per_weight=8 * sum(map(_stored, body)) / max(1, sum(map(_size, body))),
        head_bits=heads[0] if heads else None,
        embedding_bits=used.embeddings[0].bits if used.embeddings else None,
        widths={_text(bits): count for bits, count in sorted(widths.items())},
        projections=_by_projection(body, of_experts=False),
        experts=_by_projection(body, of_experts=True),
        codebooks=dict(Counter(m.codebook for m in used.linears)),
        left_out={part: sum(sizes.values()) for part, sizes in left_out.items()},
        memory=memory,
        not_loadable=not_loadable,
    )
