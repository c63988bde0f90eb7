"""The checkpoint to be converted: its tensors by name, and which of them stay as they are."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..storage.safetensors import Tensor, TensorInfo, read_header
from ..storage.untrusted import read_json

# Linears that EXL3 leaves alone: routers, gates of shared experts, MLA's kv_b (its two halves are used apart), and
# the narrow projections of state-space layers.
KEPT_LINEARS = frozenset({
    "gate", "router", "shared_expert_gate", "kv_b_proj", "embed_q", "unembed_out",
    "in_proj_ba", "in_proj_a", "in_proj_b", "x_proj", "dt_proj",
})  # fmt: skip
_HALF_SUFFIXES = (
    ".gate.weight", ".router.weight", ".shared_expert_gate.weight", ".e_score_correction_bias", ".kv_b_proj.weight",
)  # fmt: skip
# The extra files that a converted model needs to run.
SIDE_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "generation_config.json", "chat_template.jinja", "chat_template.json",
)  # fmt: skip


class Source:
    """An unquantized Hugging Face checkpoint.

    Args:
        path: Its directory.

    Raises:
        ValueError: If it is missing, damaged, or already quantized.
    """

    def __init__(self, path: Path):
        self.path = path
        if not (path / "config.json").is_file():
            raise ValueError(f"{path} holds no config.json; a Hugging Face checkpoint directory is wanted")
        self.config = read_json(path / "config.json", finite=False)
        if self.config.get("quantization") or self.config.get("quantization_config"):
            raise ValueError(f"{path} is already quantized; convert the original fp16, bf16 or fp32 checkpoint")
        files = sorted(path.glob("model*.safetensors"))
        if not files:
            raise ValueError(f"{path} holds no model*.safetensors")
        self.tensors: dict[str, TensorInfo] = {}
        for file in files:
            self.tensors.update(read_header(file))

    def base(self, path: str) -> str | None:
        """The checkpoint's name of the linear at an mlx-lm module path, without ``.weight``."""
        for spelling in _spellings(path):
            if f"{spelling}.weight" in self.tensors:
                return spelling
        ends = [n for n in self.tensors if n.endswith(f".{path}.weight")]
        return ends[0][: -len(".weight")] if len(ends) == 1 else None

    def expert_names(self, block: str) -> tuple[str, dict[str, str]]:
        """Prefix of a block's experts, and the names of its gate, up and down projections.

        Raises:
            ValueError: If the checkpoint has no experts there.
        """
        for spelling in _spellings(block):
            for prefix in {n[: n.index(f"{spelling}.experts.")] for n in self.tensors if f"{spelling}.experts." in n}:
                full = f"{prefix}{spelling}.experts"
                if f"{full}.0.w1.weight" in self.tensors:
                    return full, {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
                return full, {part: part for part in ("gate_proj", "up_proj", "down_proj")}
        raise ValueError(f"{self.path} holds no tensors {block}.experts.*, which the model's experts should come from")

    def kept(self, name: str) -> Tensor:
        """A tensor that is not quantized, in the dtype that EXL3 stores it in."""
        stored = self.tensors[name]
        if self.kept_dtype(name) == stored.dtype:
            return Tensor(stored.dtype, stored.shape, stored.read())
        return half(name, stored.floats())

    def kept_dtype(self, name: str) -> str:
        """The dtype of :meth:`kept`."""
        dtype = self.tensors[name].dtype
        if dtype == "F32" or (dtype == "BF16" and name.endswith(_HALF_SUFFIXES)):
            return "F16"
        return dtype


def _spellings(path: str) -> list[str]:
    """A module path, and as checkpoints have it that say ``model.language_model`` for ``language_model.model``."""
    head, layers, tail = path.partition(".layers.")
    return [path, ".".join(reversed(head.split("."))) + layers + tail]


def half(name: str, values: np.ndarray) -> Tensor:
    """A tensor as float16.

    Raises:
        ValueError: If a value is beyond half precision.
    """
    with np.errstate(over="ignore"):
        rounded = values.astype(np.float16)
    if not np.isfinite(rounded).all():
        raise ValueError(f"{name} holds values that EXL3's half precision cannot: up to {np.abs(values).max():g}")
    return Tensor.of(rounded)
