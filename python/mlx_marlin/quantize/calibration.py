"""Calibration tokens: the bundled text, or a file."""

from __future__ import annotations

from pathlib import Path

import numpy as np

# Documentation and docstrings of Python's standard library; see calibration.LICENSE.txt beside it.
BUNDLED = Path(__file__).with_name("calibration.txt")
# 65536 tokens: of 128 experts, 8 per token, each sees 4096 on average, twice as many as it has inputs of 2048.
WINDOWS, LENGTH = 256, 256


def calibration_tokens(model: Path, file: str | Path | None, trust_remote_code: bool = False) -> np.ndarray:
    """:data:`WINDOWS` of :data:`LENGTH` tokens, spread evenly over the text; a shorter text gives fewer.

    Args:
        model: Directory with the tokenizer.
        file: UTF-8 text, or ``None`` for the bundled one.
        trust_remote_code: Whether the tokenizer may run code from the checkpoint. Default: ``False``.

    Returns:
        int32 ``[windows, length]``.

    Raises:
        ValueError: If there is no text or tokenizer, the text is too short for one window, or is not UTF-8.
    """
    from mlx_lm.tokenizer_utils import load as load_tokenizer

    path = BUNDLED if file is None else Path(file)
    if not path.is_file():
        found = "a directory" if path.is_dir() else "not there"
        raise ValueError(f"the calibration text {path} is {found}; a UTF-8 text file is wanted")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from None
    try:
        tokenizer = load_tokenizer(model, {"trust_remote_code": trust_remote_code})
    except Exception as error:  # anything at all, of libraries and of code in the checkpoint
        advice = "" if trust_remote_code else "; if it needs code from the checkpoint, allow that (trust_remote_code)"
        raise ValueError(f"{model} has no tokenizer that loads: {type(error).__name__}: {error}{advice}") from error
    tokens = np.array(tokenizer.encode(text), np.int32)
    if len(tokens) < LENGTH:
        raise ValueError(f"{path} has {len(tokens)} tokens; calibration needs at least {LENGTH}")
    count = min(WINDOWS, len(tokens) // LENGTH)
    starts = np.linspace(0, len(tokens) - LENGTH, count).astype(np.int64)
    return np.stack([tokens[s : s + LENGTH] for s in starts])
