"""The finished directory: shards, index, configuration, exactly as ExLlamaV3 1.6.5 lays them out."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Collection, Iterable
from pathlib import Path

from .. import codec
from ..loader.exl3 import MARKERS
from ..storage import atomic, safetensors
from ..storage.safetensors import ITEM_BYTES, TensorInfo, read_header
from .extras import Extras
from .settings import Settings
from .source import Source

# The layout that is written is that of this version.
_FORMAT_VERSION = "1.6.5"
FINISHED = ".finished"  # name of the work directory while it is removed
_SHARD_BYTES = 8 << 30
_TORCH_NAMES = {
    "F16": "torch.float16", "BF16": "torch.bfloat16", "F32": "torch.float32", "I16": "torch.int16",
    "I32": "torch.int32", "I64": "torch.int64", "U8": "torch.uint8", "I8": "torch.int8", "BOOL": "torch.bool",
}  # fmt: skip


def assemble(
    source: Source,
    output: Path,
    plan: str,
    files: Iterable[Path],
    *,
    head: str,
    replaced: Collection[str],
    extras: Extras,
    settings: Settings,
    calibration: tuple[int, int],
) -> None:
    """Put the finished parts together.

    Args:
        source: The checkpoint, for everything that is not quantized.
        output: Where the model goes.
        plan: What plan.txt says.
        files: The finished parts.
        head: Name of the output projection.
        replaced: Tensors of the checkpoint that quantized ones stand for, beside weights and biases of their names.
        extras: What is done with prediction layers and towers.
        settings: Of the conversion.
        calibration: Shape of the calibration tokens, ``(windows, length)``.
    """
    parts: dict[str, TensorInfo] = {}
    for file in files:
        parts.update(read_header(file))
    quantized = {name.rpartition(".")[0] for name in parts if name.endswith(".trellis")}
    gone = {*parts, *replaced, *extras.replaced, *extras.dropped}
    kept = [name for name in source.tensors if not _replaced(name, quantized) and name not in gone]
    dtypes = {**{n: t.dtype for n, t in parts.items()}, **{n: source.kept_dtype(n) for n in kept}}
    shapes = {**{n: t.shape for n, t in parts.items()}, **{n: source.tensors[n].shape for n in kept}}
    sizes = {n: math.prod(shapes[n]) * ITEM_BYTES[dtypes[n]] for n in dtypes}
    shards = _shards(sizes)
    for shard, names in shards.items():
        data = (parts[n].read() if n in parts else source.kept(n).data for n in names)
        safetensors.write(output / shard, [(n, dtypes[n], shapes[n]) for n in names], data)
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(sizes.values())},
            "weight_map": {n: f for f, ns in shards.items() for n in ns},
        }
        atomic.write_text(output / "model.safetensors.index.json", json.dumps(index, indent=2, sort_keys=True))
    for name in source.side_files(output):
        atomic.write_bytes(output / name, (source.path / name).read_bytes())
    others = extras.others(dtypes)
    text = {n: t for n, t in parts.items() if n not in others}
    summary = {
        "quant_method": "exl3",
        "version": _FORMAT_VERSION,
        "bits": _average_bits({n: t.shape for n, t in text.items() if n != f"{head}.trellis"}),
        "head_bits": settings.head_bits,
        **extras.bits,
        "calibration": {"rows": calibration[0], "cols": calibration[1]},
        "out_scales": "always",
        "codebook": settings.codebook,
    }
    if source.quantization is not None:
        summary["original_quantization_config"] = source.quantization
    stored = {n: dtype for n, dtype in dtypes.items() if n not in others}
    storage = _tensor_storage(stored, shapes, sizes, settings.codebook)
    atomic.write_text(output / "quantization_config.json", json.dumps({**summary, "tensor_storage": storage}, indent=2))
    atomic.write_text(output / "plan.txt", plan)
    # The head is written even where it is tied, and may differ from the embeddings; ExLlamaV3 says so since 1.6.1.
    untied = {"tie_word_embeddings": False} if "tie_word_embeddings" in source.config else {}
    config = {**source.model_config, **untied, "quantization_config": summary}
    atomic.write_text(output / "config.json", json.dumps(config, indent=2))


def finish(work: Path) -> None:
    """Remove the work directory of a complete model."""
    # Renamed first: a kill from here on leaves a complete model and no half-removed state to resume from.
    shutil.rmtree(work.rename(work.with_name(FINISHED)))


def _average_bits(shapes: dict[str, tuple[int, ...]]) -> float:
    """K of the linears, weighted with their padded sizes, as ExLlamaV3 rounds it."""
    trellises = [shape for name, shape in shapes.items() if name.endswith(".trellis") and len(shape) == 3]
    weights = sum(rows * columns for rows, columns, _ in trellises) * codec.TILE_SIZE
    return round(sum(math.prod(shape) for shape in trellises) * codec.TILE / weights, 2) if weights else 0.0


def _replaced(name: str, quantized: set[str]) -> bool:
    """Whether a source tensor is the weight or bias of a quantized linear."""
    return name.rpartition(".")[0] in quantized and name.endswith((".weight", ".bias"))


def _shards(sizes: dict[str, int]) -> dict[str, list[str]]:
    """Tensor names by file: ascending, a new file where the next tensor would exceed the limit."""
    groups: list[list[str]] = [[]]
    filled = 0
    for name in sorted(sizes):
        if groups[-1] and filled + sizes[name] > _SHARD_BYTES:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += sizes[name]
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{i + 1:05}-of-{len(groups):05}.safetensors": names for i, names in enumerate(groups)}


def _tensor_storage(
    dtypes: dict[str, str], shapes: dict[str, tuple[int, ...]], sizes: dict[str, int], codebook: str
) -> dict[str, dict]:
    """What each module stores, of those without modules inside."""
    storage: dict[str, dict] = {}
    names = {name.rpartition(".")[0] for name in dtypes}
    parents = {name[:i] for name in names for i, c in enumerate(name) if c == "."}
    for name in sorted(dtypes):
        if name.rpartition(".")[0] in parents:
            continue
        module = storage.setdefault(name.rpartition(".")[0], {"stored_tensors": {}})
        dtype = _TORCH_NAMES.get(dtypes[name], dtypes[name])
        module["stored_tensors"][name] = {"shape": list(shapes[name]), "n_bytes": sizes[name], "dtype": dtype}
        if name.endswith(".trellis") and len(shapes[name]) == 3:  # an embedding has stored_tensors only
            module.update(quant_format="exl3", bits_per_weight=codec.trellis_bits(shapes[name]))
            if codebook in MARKERS:
                module[f"{codebook}_multiplier"] = MARKERS[codebook]
    return storage
