"""What tensors are for, told by their names: parts of a checkpoint that text models leave out, and unknown ones."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

DRAFT = "multi-token prediction layers"
VISION = "vision tower"
AUDIO = "audio tower"
NGRAM = "n-gram tables"
OTHER = "other tensors"

# The first version of ExLlamaV3 that writes each of them, and what its converter calls it.
_SINCE = {DRAFT: "1.4.1 (-mb)", VISION: "1.4.2 (-vb)", NGRAM: "1.4.5 (-ngb)"}

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
_DRAFT = re.compile(r"(?:^|\.)(?:mtp|nextn)(?:_\w+)?\.")
# What only the first or last of DeepSeek's prediction layers has, which stand behind the model's own.
_DRAFT_JOINTS = re.compile(r"\.(?:eh_proj|enorm|hnorm|shared_head|final_layernorm)\.")
_VISION = re.compile(
    r"(?:^|\.)(?:visual|vision|vision_\w+|embed_vision|vit|multi_modal_projector|mm_projector|patch_merge_mlp|aligner|"
    r"image_\w+)(?:\.|$)"
)
_AUDIO = re.compile(r"(?:^|\.)(?:audio|audio_\w+|embed_audio)(?:\.|$)")
_NGRAM = re.compile(r"(?:^|\.)ngram\w*\.|\.(?:head_offsets|head_vocab_sizes|layer_multipliers)$")


def parts_of(names: Iterable[str], layers: int) -> dict[str, str]:
    """What the tensors or linears with these names belong to; only those that no text model computes with.

    Args:
        names: All names of a checkpoint.
        layers: Layers of the model. Layers behind the last are taken for prediction layers if one of them has what
            joins those to the model.
    """
    names = list(names)
    behind = {name for name in names if _number(name) >= layers}
    joined = any(_DRAFT_JOINTS.search(f"{name}.") for name in behind)
    parts = {}
    for name in names:
        if _VISION.search(name):
            parts[name] = VISION
        elif _AUDIO.search(name):
            parts[name] = AUDIO
        elif _NGRAM.search(name):
            parts[name] = NGRAM
        elif _DRAFT.search(name) or (joined and name in behind):
            parts[name] = DRAFT
    return parts


def _number(name: str) -> int:
    match = _LAYER.search(name)
    return int(match[1]) if match else -1


def seems_to_be(name: str, layers: int, version: str | None) -> str:
    """What a tensor or linear without a place in the model may be, and which ExLlamaV3 writes it; for error messages.

    Args:
        name: Its name.
        layers: Layers of the model.
        version: The version of ExLlamaV3 that config.json names, if it does.
    """
    wrote = f"; this checkpoint says that it was written by {version}" if version else ""
    part = parts_of([name], layers).get(name)
    if part in _SINCE:
        return f"it seems to belong to {part}, which ExLlamaV3 writes since {_SINCE[part]}{wrote}"
    if part is not None:
        return f"it seems to belong to an {part}, which ExLlamaV3 copies{wrote}"
    if ".slice." in name:
        return f"it seems to be a slice of an MLP wider than 55296, which ExLlamaV3 stores in slices{wrote}"
    if _number(name) >= layers:
        return f"it seems to be a layer behind the {layers} of config.json{wrote}"
    return f"it is unknown to ExLlamaV3 1.6.5 and older{wrote}"


@dataclass(frozen=True)
class LeftOut:
    """What a model does not use of its checkpoint.

    Attributes:
        tensors: Part (such as ``"vision tower"``) -> name of a tensor -> its bytes.
    """

    tensors: Mapping[str, Mapping[str, int]]

    @property
    def nbytes(self) -> int:
        """Bytes of all of them in the checkpoint."""
        return sum(sum(sizes.values()) for sizes in self.tensors.values())

    @property
    def expected(self) -> bool:
        """Whether a text model is the same without them."""
        return not self.tensors.keys() - {DRAFT, VISION, AUDIO}

    def __bool__(self) -> bool:
        return bool(self.tensors)

    def __str__(self) -> str:
        parts = []
        for part, sizes in self.tensors.items():
            names = f": {', '.join(sorted(sizes)[:3])}" if part == OTHER else ""
            more = ", ..." if names and len(sizes) > 3 else ""
            parts.append(f"{part} ({len(sizes)} tensors, {sum(sizes.values()) / 1e6:.1f} MB{names}{more})")
        return ", ".join(parts)
