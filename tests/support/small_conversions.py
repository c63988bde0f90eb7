"""Quick conversions of tiny models: a tokenizer of single characters, little text, and a search that only steps."""

from __future__ import annotations

import json
import string
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mlx_marlin import codec, ops
from mlx_marlin.quantize import calibration
from mlx_marlin.quantize.calibration import BUNDLED
from mlx_marlin.storage.safetensors import TensorInfo, read_header
from tests.support import architectures
from tests.support.checkpoints import SIZES, Checkpoint

# Without padding, so that a budget buys wide codes.
SMALL = replace(SIZES, hidden=128, experts=2, heads=2, kv_heads=1, width=128, dense_width=128)
LETTERS = sorted(string.printable)
WINDOWS, LENGTH = 4, 32
_ARCS = 2


def small(name: str) -> Checkpoint:
    """A checkpoint of one of :data:`architectures.ARCHITECTURES`."""
    thirds = name in ("mixtral", "qwen2_moe")  # their heads divide the hidden size by 3
    return architectures.ARCHITECTURES[name](replace(SMALL, hidden=384) if thirds else SMALL)


def add_tokenizer(directory: Path, **config: object) -> Path:
    """One token per printable character, the same that ``tokenizers`` would write."""
    model = {"type": "BPE", "vocab": {c: i for i, c in enumerate(LETTERS)}, "merges": [], "unk_token": " "}
    (directory / "tokenizer.json").write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": model}))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **config}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory


def write_text(path: Path) -> Path:
    """Calibration text for :data:`WINDOWS`."""
    text = "".join(c for c in BUNDLED.read_text()[20000:22000] if c in LETTERS)
    path.write_text(text[: WINDOWS * LENGTH])
    return path


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Of logits, each row's mean taken off: 1 for the same model, near 0 for another head."""
    a, b = (x - x.mean(axis=-1, keepdims=True) for x in (a, b))
    return float(np.sum(a * b) / np.sqrt(np.sum(a * a) * np.sum(b * b)))


def stepping_search(tiles: np.ndarray, bits: float, codebook: str, *, threads: int | None = None) -> np.ndarray:
    """Tail-biting states, each the nearest that the one before it allows: far quicker than the real search.

    The ring is searched in two arcs at once. Each begins where the one before it ends, as a first pass over its last
    positions found it, and must end where that found its own end: there a few positions are far off.
    """
    length = codec.TILE_SIZE // _ARCS
    widths = [codec.half_bits(bits) // 2 + (codec.is_half_rate(bits) and t % 2) for t in range(length)]
    table = codec.codebook_values(codebook).astype(np.float32)
    targets = tiles.reshape(-1, length)
    states = np.empty(targets.shape, np.uint16)
    rows = np.arange(len(targets))
    end, state = None, np.zeros(len(targets), np.int64)
    for begin in (length // 2, 0):
        left = sum(widths[begin:])
        for t in range(begin, length):
            width = widths[t]
            left -= width
            # Of an end that is known, what is fresh here may be a part.
            known = 0 if end is None else min(width, max(0, 16 - left))
            if known:
                following = (state << width)[:, None] & 0xFFFF | np.arange(1 << (width - known)) << known
                following |= (end >> left & (1 << known) - 1)[:, None]
                state = following[rows, np.abs(table[following] - targets[:, t, None]).argmin(axis=1)]
            else:  # the states that follow lie side by side
                first = state & 0xFFFF >> width
                values = table.reshape(-1, 1 << width)[first]
                state = first << width | np.abs(values - targets[:, t, None]).argmin(axis=1)
            states[:, t] = state
        end = state
        state = np.roll(end.reshape(-1, _ARCS), 1, axis=1).ravel()
    return states.reshape(tiles.shape)


@pytest.fixture
def quick_conversions(monkeypatch):
    """Conversions with :func:`stepping_search`, windows of :data:`LENGTH` tokens."""
    monkeypatch.setattr(ops, "viterbi_search", stepping_search)
    monkeypatch.setattr(calibration, "LENGTH", LENGTH)


def source_of(
    tmp_path: Path, name: str = "llama", change: Callable[[Checkpoint], None] = lambda checkpoint: None
) -> tuple[Path, Checkpoint]:
    """A directory to convert, ``tmp_path / "source"``, and what it was made of, changed before."""
    checkpoint = small(name)
    change(checkpoint)
    return add_tokenizer(checkpoint.write_dense(tmp_path / "source")), checkpoint


def values(info: TensorInfo) -> np.ndarray:
    """A tensor as float32."""
    raw = np.array(info.array())
    return (raw.astype(np.uint32) << 16).view(np.float32) if info.dtype == "BF16" else raw.astype(np.float32)


def header(directory: Path) -> dict[str, TensorInfo]:
    """Of a checkpoint in one file."""
    return read_header(directory / "model.safetensors")


def mark_fp8(file: Path, which: Callable[[str], bool] = lambda name: True) -> None:
    """Make fp8 of a file's tensors of U8, as which MLX saves it."""
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    infos = json.loads(data[8 : 8 + length])
    for name, info in infos.items():
        if name != "__metadata__" and info["dtype"] == "U8" and which(name):
            info["dtype"] = "F8_E4M3"
    text = json.dumps({name: info for name, info in infos.items() if info})  # no empty __metadata__
    text += " " * (-len(text) % 8)
    file.write_bytes(len(text).to_bytes(8, "little") + text.encode() + data[8 + length :])
