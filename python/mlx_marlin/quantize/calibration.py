"""Calibration tokens: the bundled text, or a file."""

from __future__ import annotations

from pathlib import Path

import numpy as np

# Documentation and docstrings of Python's standard library; see calibration.LICENSE.txt beside it.
BUNDLED = Path(__file__).with_name("calibration.txt")


def calibration_tokens(model: Path, file: str | Path | None, windows: int, length: int) -> np.ndarray:
    """Windows of tokens, spread evenly over the text.

    Args:
        model: Directory with the tokenizer.
        file: UTF-8 text, or ``None`` for the bundled one.
        windows: At most this many; a shorter text gives fewer.
        length: Tokens per window.

    Returns:
        int32 ``[windows, length]``.

    Raises:
        ValueError: If the text is too short for one window, or is not UTF-8.
    """
    from mlx_lm.tokenizer_utils import load as load_tokenizer

    path = BUNDLED if file is None else Path(file)
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from None
    tokens = np.array(load_tokenizer(model).encode(text), np.int32)
    if len(tokens) < length:
        raise ValueError(f"{path} has {len(tokens)} tokens; calibration needs at least {length}")
    count = min(windows, len(tokens) // length)
    starts = np.linspace(0, len(tokens) - length, count).astype(np.int64)
    return np.stack([tokens[s : s + length] for s in starts])
