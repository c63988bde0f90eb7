"""The tokenizer of a checkpoint: its files checked before weights are read."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlx_lm import utils as mlx_lm_utils
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..storage.untrusted import check_genuine, is_flag_or_null, is_listed, is_text_or_null, is_whole, read_json

# A directory with none of these has no tokenizer: what transformers reads vocabularies from.
_VOCABULARIES = ("tokenizer.json", "*.model", "vocab.*", "*.tiktoken")
# MLX's indices are int32; -1 says that there is none.
_MAX_ID = 2**31 - 1

Check = Callable[[Any], bool]


def _is_id(value: Any) -> bool:
    return is_whole(value) and -1 <= value <= _MAX_ID


def _is_ids(value: Any) -> bool:
    return value is None or _is_id(value) or (isinstance(value, list) and all(map(_is_id, value)))


def _is_number(value: Any) -> bool:
    return value is None or isinstance(value, float) or is_whole(value)


def _is_token(value: Any) -> bool:
    flags = ("lstrip", "rstrip", "normalized", "single_word", "special")
    if isinstance(value, dict):
        return isinstance(value.get("content"), str) and all(is_flag_or_null(value.get(flag)) for flag in flags)
    return is_text_or_null(value)


def _is_tokens(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(_is_token, value.values()))
    return value is None or (isinstance(value, list) and all(v is not None and _is_token(v) for v in value))


def _is_decoder(value: Any) -> bool:
    """Added tokens by id."""
    if value is None:
        return True
    return isinstance(value, dict) and all(
        re.fullmatch(r"\d{1,9}", key) and isinstance(token, dict) and _is_token(token) for key, token in value.items()
    )


def _is_template(value: Any) -> bool:
    if isinstance(value, list):
        return all(isinstance(v, dict) and all(isinstance(v.get(k), str) for k in ("name", "template")) for v in value)
    return is_text_or_null(value) or (isinstance(value, dict) and all(isinstance(v, str) for v in value.values()))


def _is_texts(value: Any) -> bool:
    return value is None or (isinstance(value, list) and all(isinstance(v, str) for v in value))


def _is_module(value: Any) -> bool:
    """What becomes part of the name of a module of mlx-lm."""
    return value is None or (isinstance(value, str) and re.fullmatch(r"\w+", value) is not None)


_TOKEN = ("a token: a string, or an object with its content", _is_token)
_TOKENS = ("a list or an object of tokens", _is_tokens)
_FLAG = ("true or false", is_flag_or_null)
_TEXT = ("a string", is_text_or_null)
_MODULE = ("a name", _is_module)
_IDS = (f"a token's number up to {_MAX_ID}, or a list of them", _is_ids)

# What transformers and mlx-lm take each key for; keys that are not listed are not used, or of any type.
_SPECIAL_TOKENS: dict[str, tuple[str, Check]] = {
    **{f"{kind}_token": _TOKEN for kind in ("bos", "eos", "unk", "pad", "sep", "cls", "mask")},
    "additional_special_tokens": _TOKENS,
    "extra_special_tokens": _TOKENS,
}
_KEYS: dict[str, dict[str, tuple[str, Check]]] = {
    "tokenizer_config.json": {
        **_SPECIAL_TOKENS,
        **dict.fromkeys(
            (
                "add_bos_token", "add_eos_token", "add_prefix_space", "clean_up_tokenization_spaces", "legacy",
                "split_special_tokens", "use_default_system_prompt", "do_lower_case", "use_fast", "from_slow",
            ),
            _FLAG,
        ),
        **dict.fromkeys(("tokenizer_class", "padding_side", "truncation_side"), _TEXT),
        **dict.fromkeys(("chat_template_type", "tool_parser_type"), _MODULE),
        "chat_template": ("a string, or a list or an object of named ones", _is_template),
        "model_max_length": ("a number", _is_number),
        "added_tokens_decoder": ("an object of tokens by their numbers", _is_decoder),
        "model_input_names": ("a list of strings", _is_texts),
    },
    "special_tokens_map.json": _SPECIAL_TOKENS,
    "generation_config.json": {"eos_token_id": _IDS},
    "config.json": {"eos_token_id": _IDS},
    "tokenizer.json": {},
    "added_tokens.json": {},
}  # fmt: skip


def check_keys(file: Path) -> None:
    """See that the keys of a JSON file of a checkpoint are of the types that they are taken for.

    Raises:
        ValueError: If one is not, or the file is not JSON; names file and key.
    """
    content = read_json(file, finite=False)
    for key, (wanted, fits) in _KEYS[file.name].items():
        if not fits(content.get(key)):
            shown = repr(content[key])
            raise ValueError(f"{file}: {key} must be {wanted}, got {shown if len(shown) <= 80 else shown[:77] + '...'}")
    if file.name == "added_tokens.json":
        wrong = [token for token, number in content.items() if not _is_id(number)]
        if wrong:
            raise ValueError(f"{file}: {wrong[0]!r} must be a token's number, got {content[wrong[0]]!r:.80}")


def check_tokenizer(directory: Path) -> None:
    """See that a directory holds a tokenizer, and a config that transformers reads it with, before weights are read.

    Raises:
        FileNotFoundError: If it holds none, or a file of it is a link that leads nowhere.
        ValueError: If a file of it is not what its name says.
    """
    # glob leaves out links that lead nowhere.
    files = [file for file in sorted(directory.iterdir()) if any(map(file.match, _VOCABULARIES))]
    if not files:
        raise FileNotFoundError(
            f"{directory} holds no tokenizer (none of {', '.join(_VOCABULARIES)}); copy its files from the original "
            "model's repository"
        )
    for file in files:
        check_genuine(file)
    for name in _KEYS:
        if name != "config.json" and is_listed(directory / name):
            check_keys(directory / name)
    config = directory / "config.json"
    quantization = read_json(config, finite=False).get("quantization_config") if is_listed(config) else None
    if quantization is not None and not isinstance(quantization, dict):
        raise ValueError(
            f"{config}: quantization_config must be an object or null for transformers to read the tokenizer, got "
            f"{type(quantization).__name__}; remove it, the tensors themselves tell how they are quantized"
        )


def load_tokenizer(directory: Path, *arguments: Any, **keywords: Any) -> TokenizerWrapper:
    """``mlx_lm.utils.load_tokenizer`` of a directory that :func:`check_tokenizer` found good.

    Raises:
        ValueError: If transformers cannot make a tokenizer of its files.
    """
    try:
        return _make(directory, *arguments, **keywords)
    except (ImportError, MemoryError):  # a package that is missing is no fault of the files
        raise
    except Exception as error:  # the tokenizers package raises bare Exceptions
        files = [name for name in ("tokenizer.json", "tokenizer_config.json") if (directory / name).exists()]
        raise ValueError(
            f"{directory}: transformers cannot make a tokenizer of {' and '.join(files) or 'its files'}: "
            f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        ) from error


# mlx-lm's own, also after `commands.install`.
_make = mlx_lm_utils.load_tokenizer
