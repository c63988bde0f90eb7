"""What clients send to a server, and nobody vouches for: the limits, and what each field must be. Pure."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Mapping
from typing import Any

from ..storage.untrusted import is_flag_or_null, is_text_or_null, is_whole

ALLOW_OTHERS = "--allow-other-models"
"""Option of the server: clients may name models, draft models and adapters that it was not started with."""

# A million tokens of text are 4 to 8 MB.
MAX_BODY_BYTES = 32 << 20
# For a whole request, and for each write of an answer: longer than a slow line takes, and threads come back.
TIMEOUT_SECONDS = 60.0
_MAX_INT = 2**31 - 1

Known = Mapping[str, tuple[str, Callable[[Any], bool]]]
"""What the fields of a request must be, in words, and whether a value is that."""


class Refused(Exception):
    """A request that is answered with a status of its own."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


def _is_number(value: Any) -> bool:
    # A whole number of any length is JSON, and more than a float holds.
    return (isinstance(value, float) or is_whole(value)) and abs(value) <= sys.float_info.max


def _is_count(value: Any) -> bool:
    return is_whole(value) and 0 <= value <= _MAX_INT


def _is_seed(value: Any) -> bool:
    return value is None or (is_whole(value) and 0 <= value < 2**64)


def _is_stop(value: Any) -> bool:
    return is_text_or_null(value) or _is_texts(value)


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(v, str) and v for v in value)


def _is_content(value: Any) -> bool:
    if isinstance(value, list):
        return all(isinstance(part, dict) and isinstance(part.get("type"), str) for part in value)
    return is_text_or_null(value)


def _is_messages(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) > 0
        and all(isinstance(m, dict) and isinstance(m.get("role"), str) and _is_content(m.get("content")) for m in value)
    )


def _is_prompt(value: Any) -> bool:
    return isinstance(value, str) and len(value) > 0


def _is_objects(value: Any) -> bool:
    return value is None or (isinstance(value, list) and all(isinstance(v, dict) for v in value))


def _is_object(value: Any) -> bool:
    return value is None or isinstance(value, dict)


def _is_biases(value: Any) -> bool:
    return value is None or (
        isinstance(value, dict)
        and all(key.isascii() and key.isdigit() and len(key) < 10 and _is_number(v) for key, v in value.items())
    )


_NUMBER = ("a finite number", _is_number)
_COUNT = (f"a whole number from 0 to {_MAX_INT}", _is_count)
# What mlx-lm's server reads. Its own checks of ranges come afterwards.
READ: Known = {
    **dict.fromkeys(
        (
            "temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
            "xtc_probability", "xtc_threshold",
        ),
        _NUMBER,
    ),
    **dict.fromkeys(
        (
            "top_k", "num_draft_tokens", "repetition_context_size", "presence_context_size", "frequency_context_size",
        ),
        _COUNT,
    ),
    **dict.fromkeys(("max_tokens", "max_completion_tokens"), ("a whole number", lambda v: v is None or _is_count(v))),
    "top_logprobs": ("a whole number", lambda v: v == -1 or _is_count(v)),
    **dict.fromkeys(("model", "draft_model", "adapters"), ("a string", is_text_or_null)),
    **dict.fromkeys(("stream", "logprobs"), ("true or false", is_flag_or_null)),
    **dict.fromkeys(("stream_options", "chat_template_kwargs", "role_mapping"), ("an object", _is_object)),
    "seed": ("a whole number from 0 to 2^64 - 1", _is_seed),
    "stop": ("a string or a list of strings", _is_stop),
    "messages": ("a list of messages, each with a role and a content", _is_messages),
    "prompt": ("a string that is not empty", _is_prompt),
    "tools": ("a list of objects", _is_objects),
    "logit_bias": ("an object of numbers by token", _is_biases),
}  # fmt: skip
# What OpenAI's clients send to these two paths, and this server leaves alone.
IGNORED = frozenset({
    "audio", "best_of", "echo", "function_call", "functions", "metadata", "modalities", "n", "parallel_tool_calls",
    "prediction", "prompt_cache_key", "reasoning_effort", "response_format", "safety_identifier", "service_tier",
    "store", "suffix", "tool_choice", "user", "verbosity", "web_search_options",
})  # fmt: skip


def check_fields(body: dict, vocabulary: int | None, known: Known = READ, ignored: Collection[str] = IGNORED) -> None:
    """See that the fields of a request are known, and what they are taken for.

    Args:
        body: The request.
        vocabulary: Tokens of the model, or ``None`` if that is not known.
        known: The fields that the server reads. Default: those of mlx-lm's.
        ignored: Those that it leaves alone. Default: those of mlx-lm's.

    Raises:
        ValueError: If one is not; the message names it.
    """
    for name, value in body.items():
        if name in ignored:
            continue
        if name not in known:
            raise ValueError(f"{name[:80]!r} is no field of a request")
        wanted, fits = known[name]
        if not fits(value):
            raise ValueError(f"{name} must be {wanted}")
    outside = [key for key in body.get("logit_bias") or {} if vocabulary is not None and int(key) >= vocabulary]
    if outside:
        raise ValueError(f"logit_bias: the model has {vocabulary} tokens, no token {outside[0]}")


def take_option(option: str) -> bool:
    """Whether ``sys.argv`` has an option, which is taken out: the host's own server does not know it."""
    found = option in sys.argv
    sys.argv[:] = [argument for argument in sys.argv if argument != option]
    return found
