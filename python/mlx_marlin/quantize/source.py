"""The checkpoint to be converted: its tensors by name, and which of them stay as they are."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np

from ..loader.directory import lazy_arrays, read_tensors
from ..loader.scaling import without_folded_scales
from ..storage.safetensors import Tensor, TensorInfo, widened
from ..storage.untrusted import read_json
from .packed import PackedTensor, unpacked
from .slices import Slice

# Linears that EXL3 leaves alone: routers, gates of shared experts, MLA's kv_b (its two halves are used apart), and
# the narrow projections of state-space layers.
KEPT_LINEARS = frozenset({
    "gate", "router", "shared_expert_gate", "kv_b_proj", "embed_q", "unembed_out",
    "in_proj_ba", "in_proj_a", "in_proj_b", "x_proj", "dt_proj",
})  # fmt: skip
_HALF_SUFFIXES = (".gate.weight", ".router.weight", ".shared_expert_gate.weight", ".kv_b_proj.weight")
# What is added to the scores that choose experts: a choice is discrete, and half precision loses the differences.
_CHOOSING_BIAS = re.compile(r"(?:e_score_correction_bias|expert_bias|router_bias|\.(?:gate|router)\.bias)$")
# Files of weights in any format, and what describes those of the source: all else is copied.
_WEIGHT_SUFFIXES = frozenset({
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".ggml", ".h5", ".msgpack", ".onnx", ".npz", ".tmp",
})  # fmt: skip
_DESCRIBING = frozenset({"config.json", "quantization_config.json", "hf_quant_config.json"})


class Source:
    """An unquantized Hugging Face checkpoint, or one whose weights are fp8 in blocks, mxfp4 or nvfp4.

    Args:
        path: Its directory.

    Raises:
        ValueError: If it or a file that its index names is missing, damaged, or quantized in another way.

    Attributes:
        path: The directory.
        config: config.json.
        quantization: What config.json or hf_quant_config.json says of how the weights are stored, or ``None``.
        tensors: Where each tensor lies; packed ones by the names that they have unpacked.
    """

    def __init__(self, path: Path):
        self.path = path
        if not path.is_dir():
            found = "a file" if path.exists() else "not there"
            raise ValueError(f"{path} is {found}; the directory of a Hugging Face checkpoint is wanted")
        if not (path / "config.json").is_file():
            raise ValueError(f"{path} holds no config.json; a Hugging Face checkpoint directory is wanted")
        self.config = read_json(path / "config.json", finite=False)
        self.quantization = self._quantization()
        model_type = self.config.get("model_type")
        if not isinstance(model_type, str) or "model_file" in self.config:
            raise ValueError(
                f"{path / 'config.json'}: model_type must name an architecture of mlx-lm, and code inside of the "
                f"checkpoint (model_file) is not run; got {model_type!r}"
            )
        try:
            self.stored: dict[str, TensorInfo] = read_tensors(path)
        except FileNotFoundError as error:
            raise ValueError(str(error)) from None
        if not self.stored:
            raise ValueError(f"{path} holds no tensors")
        try:
            self.tensors = unpacked(self.stored, self.quantization)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        if without_folded_scales(self.config) is not self.config:
            raise ValueError(
                f"{path}: {self.config.get('model_type')} models with attention_value_scale are not converted: EXL3 "
                "keeps that scale inside of o_proj"
            )

    def _quantization(self) -> dict | None:
        """``quantization_config``, or what stands in its place; mlx's own key is refused."""
        if self.config.get("quantization"):
            raise ValueError(f"{self.path} is already quantized by MLX; convert the original fp16 or bf16 checkpoint")
        parts = (self.config, self.config.get("text_config"))
        found = next(
            (p["quantization_config"] for p in parts if isinstance(p, dict) and p.get("quantization_config")), None
        )
        if found is not None and not isinstance(found, dict):
            raise ValueError(f"{self.path / 'config.json'}: quantization_config must be an object, got {found!r}")
        beside = self.path / "hf_quant_config.json"
        if found is None and beside.is_file():  # of NVIDIA's Model Optimizer, whose older versions leave config.json
            found = {"quant_method": "modelopt", **read_json(beside)}
        return found

    @property
    def model_config(self) -> dict:
        """The config of the model with its weights unpacked."""
        config = {key: value for key, value in self.config.items() if key != "quantization_config"}
        text = config.get("text_config")
        if isinstance(text, dict):
            config["text_config"] = {key: value for key, value in text.items() if key != "quantization_config"}
        return config

    def arrays(self) -> dict[str, mx.array]:
        """All tensors, lazily: each is read, and unpacked, when it is first evaluated."""
        stored = lazy_arrays(self.stored)
        places = {info: name for name, info in self.stored.items()}
        result = {}
        for name, info in self.tensors.items():
            if isinstance(info, PackedTensor):
                result[name] = info.array(*(stored[places[part]] for part in info.parts))
            else:
                result[name] = stored[name]
        return result

    def same(self, one: str, other: str) -> bool:
        """Whether two tensors are the same matrix."""
        a, b = self.tensors[one], self.tensors[other]
        return a.shape == b.shape and a.dtype == b.dtype and a.read() == b.read()

    def kept(self, name: str) -> Tensor:
        """A tensor that is not quantized, in the dtype that EXL3 stores it in.

        Raises:
            ValueError: If a value is not finite, or beyond half precision where it is stored so.
        """
        stored = self.tensors[name]
        dtype = self.kept_dtype(name)
        if dtype == stored.dtype:
            return Tensor(stored.dtype, stored.shape, stored.read())
        values = stored.floats()
        return Tensor.of(values.astype(np.float32)) if dtype == "F32" else half(name, values)

    def kept_dtype(self, name: str) -> str:
        """The dtype of :meth:`kept`."""
        dtype = self.tensors[name].dtype
        if _CHOOSING_BIAS.search(name):
            return "F32" if dtype == "BF16" else dtype
        if dtype == "F32" or (dtype == "BF16" and name.endswith(_HALF_SUFFIXES)):
            return "F16"
        return dtype

    def side_files(self, output: Path) -> list[Path]:
        """Every file that is no weight, relative to the directory: tokenizers, templates, code, ...

        Args:
            output: A directory that is left out, should it lie inside.

        Raises:
            ValueError: If one is a link that leads nowhere.
        """
        inside = os.path.relpath(os.path.realpath(output), os.path.realpath(self.path))
        names = []
        for file in sorted(self.path.rglob("*")):
            name = file.relative_to(self.path)
            hidden = any(part.startswith(".") for part in name.parts)
            if not hidden and file.is_symlink() and not file.exists():
                raise ValueError(f"{file} is a link to {file.readlink()}, which is not there; download the model again")
            if hidden or not file.is_file() or Path(inside) in name.parents:
                continue
            is_weights = file.suffix in _WEIGHT_SUFFIXES or file.name.endswith(".index.json")
            if not is_weights and str(name) not in _DESCRIBING:
                names.append(name)
        return names


class ExpertTensors:
    """The weights of one projection of all experts, as the checkpoint has them; each is read when it is wanted.

    Args:
        source: The checkpoint.
        names: The matrices of single experts, or one tensor of all of them.
        part: What the projection has of that one tensor's values of an expert. Default: all.

    Attributes:
        is_packed: Whether reading one takes arithmetic.
    """

    def __init__(self, source: Source, names: Sequence[str], part: Slice | None = None):
        self._source, self._names, self._part = source, names, part
        self._are_single = len(source.tensors[names[0]].shape) == 2
        self._checked: set[int] = set()
        self.is_packed = isinstance(source.tensors[names[0]], PackedTensor)

    def read(self, expert: int) -> np.ndarray:
        """float32 ``[out, in]``.

        Raises:
            ValueError: If a value is not finite; the message names the tensor.
        """
        name = self._names[expert if self._are_single else 0]
        info = self._source.tensors[name]
        if self._are_single:
            values, dtype = info.floats(), ""
        elif isinstance(info, PackedTensor):
            values, dtype = info.row(expert), ""
        else:
            values, dtype = info.rows(expert, expert + 1)[0], info.dtype
        values = values if self._part is None else self._part.of(values)
        values = widened(values, dtype).astype(np.float32, copy=False)
        if expert not in self._checked:
            if not np.isfinite(values).all():
                raise ValueError(f"{self._source.path}: tensor {name} holds values that are not finite")
            self._checked.add(expert)
        return values


def half(name: str, values: np.ndarray) -> Tensor:
    """A tensor as float16.

    Raises:
        ValueError: If a value is beyond half precision, or not finite.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        rounded = values.astype(np.float16)
    if not np.isfinite(rounded).all():
        raise beyond_half(name, float(np.abs(values).max()))
    return Tensor.of(rounded)


def beyond_half(name: str, largest: float) -> ValueError:
    """The error for a tensor that half precision cannot hold."""
    return ValueError(f"{name} holds values that EXL3's half precision cannot: up to {largest:g}")
