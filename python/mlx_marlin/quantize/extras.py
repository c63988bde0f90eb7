"""Prediction layers and vision towers: quantized without calibration, as text models do not compute with them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from ..loader.contents import AUDIO, DRAFT, VISION, parts_of
from ..storage.safetensors import widened
from .job_state import JobState
from .jobs import seed_of
from .packed import PackedTensor
from .settings import KEPT, LEFT_OUT, Settings
from .source import KEPT_LINEARS, Source
from .stored import stored_tensors
from .weight import Codes, prepare, quantize_prepared

# Prediction layers: matrices that are no linears, or that are stored once with the model.
_NO_LINEAR = re.compile(r"(?:^|\.)(?:embed\w*|\w*embedding\w*|shared_head\.head|lm_head|conv1d|\w*norm)$")
_FUSED_EXPERTS = re.compile(r"(.*\.experts)\.(gate_up_proj|down_proj)(?:\.weight)?$")
# The towers that ExLlamaV3 1.6.5 quantizes of itself and whose names are known: Qwen3-VL's and Qwen3.5's.
_TOWER_MODELS = frozenset({"qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe"})
_TOWER_LINEAR = re.compile(
    r"(?:^|\.)visual\.(?:blocks\.\d+\.(?:attn\.(?:qkv|proj)|mlp\.linear_fc[12])|merger\.linear_fc[12])$"
)
# Linears of one file in the work directory, which is as much as an interruption costs.
_FILE_LINEARS = 64


@dataclass(frozen=True)
class Extra:
    """One linear of a prediction layer or tower.

    Attributes:
        name: What it is called.
        bits: Its width.
        tensor: The tensor that it is, or is a part of.
        rows: Which of its outputs, or of a stack of experts, which expert and which of its outputs.
        bias: The tensor of its bias, cut likewise.
    """

    name: str
    bits: float
    tensor: str
    rows: tuple[int | slice, ...]
    bias: str | None


@dataclass(frozen=True)
class Extras:
    """What is done with the parts of a checkpoint that text models leave out.

    Attributes:
        parts: Names of their tensors -> which part.
        linears: What is quantized.
        replaced: Tensors that those stand for.
        dropped: Tensors that are left out.
        notes: What is done with each part, in words.
        bits: Config keys: ``mtp_bits`` where there are prediction layers, ``vision_bits`` where a tower is quantized.
        label: Of its files: the widths that were asked for.
    """

    parts: dict[str, str]
    linears: list[Extra]
    replaced: frozenset[str]
    dropped: frozenset[str]
    notes: list[str]
    bits: dict[str, float]
    label: str

    @property
    def files(self) -> list[str]:
        """Names of the files, each of the next :data:`_FILE_LINEARS` linears."""
        return [f"extra-{self.label}-{start:06}.safetensors" for start in range(0, len(self.linears), _FILE_LINEARS)]

    def others(self, names: Iterable[str]) -> set[str]:
        """Those names of a converted checkpoint that belong to these parts."""
        stems = {extra.name for extra in self.linears}
        return {name for name in names if name in self.parts or name.rpartition(".")[0] in stems}


def find_extras(source: Source, settings: Settings, layers: int) -> Extras:
    """Decide about the parts of a checkpoint that text models leave out.

    Args:
        source: The checkpoint.
        settings: For ``mtp_bits`` and ``vision_bits``.
        layers: The model's layers.
    """
    parts = parts_of(source.tensors, layers)
    linears: list[Extra] = []
    dropped: set[str] = set()
    notes, bits = [], {}
    for part, wanted, find in (
        (DRAFT, settings.mtp_bits, _draft_linears),
        (VISION, settings.vision_bits, _tower_linears),
        (AUDIO, KEPT, lambda *_: []),
    ):
        names = [name for name, kind in parts.items() if kind == part]
        if not names:
            continue
        found = [] if wanted in (KEPT, LEFT_OUT) else find(source, names, wanted)
        size = sum(source.tensors[name].nbytes for name in names) / 1e6
        if wanted == LEFT_OUT:
            dropped.update(names)
            notes.append(f"{part}: left out ({len(names)} tensors, {size:.1f} MB)")
        elif found:
            notes.append(f"{part}: {len(found)} linears at {wanted} bits, all else kept as it is")
        else:
            notes.append(f"{part}: kept as they are ({len(names)} tensors, {size:.1f} MB)")
        if part == DRAFT and found:
            dropped.update(_copies(source, parts, names))
        if part == DRAFT and wanted != LEFT_OUT:
            bits["mtp_bits"] = wanted if found else KEPT
        elif part == VISION and found:
            bits["vision_bits"] = wanted
        linears += found
    # Of a tower's fused qkv ExLlamaV3 keeps the original beside its parts.
    used = [(e.tensor, e.bias) for e in linears if not e.tensor.endswith(".qkv.weight")]
    replaced = {tensor for pair in used for tensor in pair if tensor is not None}
    label = f"{settings.mtp_bits}-{settings.vision_bits}"
    return Extras(parts, linears, frozenset(replaced), frozenset(dropped), notes, bits, label)


def _bias_of(source: Source, stem: str) -> str | None:
    return f"{stem}.bias" if f"{stem}.bias" in source.tensors else None


def _copies(source: Source, parts: dict[str, str], names: list[str]) -> list[str]:
    """Embeddings and heads of prediction layers that are the model's own once more, which EXL3 does not store."""
    ends = ("embed_tokens.weight", "shared_head.head.weight", "lm_head.weight")
    own = [name for name in source.tensors if name not in parts and f".{name}".endswith(tuple(f".{e}" for e in ends))]
    return [name for name in names if name.endswith(ends) and any(source.same(name, other) for other in own)]


def _draft_linears(source: Source, names: list[str], bits: float) -> list[Extra]:
    linears = []
    for name in names:
        shape, fused = source.tensors[name].shape, _FUSED_EXPERTS.fullmatch(name)
        stem = name.removesuffix(".weight")
        if fused and len(shape) == 3:
            half = shape[1] // 2
            cuts = {"down_proj": slice(None)}
            if fused[2] == "gate_up_proj":
                cuts = {"gate_proj": slice(half), "up_proj": slice(half, None)}
            for e in range(shape[0]):
                linears += [Extra(f"{fused[1]}.{e}.{part}", bits, name, (e, cut), None) for part, cut in cuts.items()]
        elif name.endswith(".weight") and len(shape) == 2 and not _NO_LINEAR.search(stem):
            if stem.rpartition(".")[2] not in KEPT_LINEARS:
                linears.append(Extra(stem, bits, name, (), _bias_of(source, stem)))
    return linears


def _tower_linears(source: Source, names: list[str], bits: float) -> list[Extra]:
    if source.config.get("model_type") not in _TOWER_MODELS:
        return []
    linears = []
    for name in names:
        stem = name.removesuffix(".weight")
        if not (name.endswith(".weight") and _TOWER_LINEAR.search(stem) and len(source.tensors[name].shape) == 2):
            continue
        bias = _bias_of(source, stem)
        if not stem.endswith(".qkv"):
            linears.append(Extra(stem, bits, name, (), bias))
            continue
        third = source.tensors[name].shape[0] // 3
        for i, part in enumerate("qkv"):
            rows = slice(i * third, (i + 1) * third)
            linears.append(Extra(f"{stem.removesuffix('qkv')}{part}_proj", bits, name, (rows,), bias))
    return linears


def _read(source: Source, tensor: str, rows: tuple[int | slice, ...]) -> np.ndarray:
    """float32. Of a stack only the expert that is wanted is read, and unpacked."""
    info = source.tensors[tensor]
    if not rows or not isinstance(rows[0], int):
        return info.floats()[rows].astype(np.float32)
    if isinstance(info, PackedTensor):
        return info.row(rows[0])[rows[1:]]
    (expert,) = info.rows(rows[0], rows[0] + 1)
    return widened(expert, info.dtype).astype(np.float32)[rows[1:]]


def _quantize(extra: Extra, source: Source, settings: Settings, threads: int) -> tuple[Codes, np.ndarray | None]:
    weight = _read(source, extra.tensor, extra.rows)
    bias = None if extra.bias is None else _read(source, extra.bias, extra.rows)
    for name, values in ((extra.tensor, weight), (extra.bias, bias)):
        if values is not None and not np.isfinite(values).all():
            raise ValueError(f"{source.path}: tensor {name} holds values that are not finite")
    prepared = prepare(weight.T, None, seed_of(settings.seed, extra.name))
    return quantize_prepared(prepared, extra.bits, settings.codebook, threads), bias


def write_extras(
    state: JobState,
    extras: Extras,
    source: Source,
    settings: Settings,
    parallel: Callable[[Callable[[Extra, int], tuple[Codes, np.ndarray | None]], list[Extra], str], list],
) -> None:
    """Quantize them, unless an earlier run did.

    Args:
        state: Where they are kept for other sizes: beside the measurement.
        extras: What is to be done.
        source: The checkpoint.
        settings: Of the conversion.
        parallel: Runs a task, given its number of threads, for each of a list, and tells what that is.
    """
    for i, part in enumerate(extras.files):
        if state.seal(part) is None:
            some = extras.linears[i * _FILE_LINEARS : (i + 1) * _FILE_LINEARS]
            results = parallel(
                lambda extra, threads: _quantize(extra, source, settings, threads),
                some,
                f"quantizing prediction layers and towers, part {i + 1} of {len(extras.files)}",
            )
            tensors = {}
            for extra, (codes, bias) in zip(some, results):
                tensors.update(stored_tensors(extra.name, codes, bias))
            state.write_tensors(part, tensors)
