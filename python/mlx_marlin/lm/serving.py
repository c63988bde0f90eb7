"""mlx-lm's server for clients that nobody vouches for: what they send is checked before it is acted on."""

from __future__ import annotations

import argparse
import io
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from mlx_lm import server

from ..storage.untrusted import is_flag_or_null, is_text_or_null, is_whole, parse_json

ALLOW_OTHERS = "--allow-other-models"
"""Option of the server: clients may name models, draft models and adapters that it was not started with."""

# A million tokens of text are 4 to 8 MB.
MAX_BODY_BYTES = 32 << 20
# For a whole request, and for each write of an answer: longer than a slow line takes, and threads come back.
TIMEOUT_SECONDS = 60.0
_CHUNK_BYTES = 1 << 16
_MAX_INT = 2**31 - 1

_GENERATE = ("/v1/completions", "/v1/chat/completions", "/chat/completions")

Check = Callable[[Any], bool]


class _Refused(Exception):
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
_ANY = ("anything", lambda value: True)
# What mlx-lm's server reads. Its own checks of ranges come afterwards.
_READ: dict[str, tuple[str, Check]] = {
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
_IGNORED = frozenset({
    "audio", "best_of", "echo", "function_call", "functions", "metadata", "modalities", "n", "parallel_tool_calls",
    "prediction", "prompt_cache_key", "reasoning_effort", "response_format", "safety_identifier", "service_tier",
    "store", "suffix", "tool_choice", "user", "verbosity", "web_search_options",
})  # fmt: skip


def check_fields(body: dict, vocabulary: int | None) -> None:
    """See that the fields of a request are known, and what they are taken for.

    Args:
        body: The request.
        vocabulary: Tokens of the model, or ``None`` if that is not known.

    Raises:
        ValueError: If one is not; the message names it.
    """
    for name, value in body.items():
        if name in _IGNORED:
            continue
        if name not in _READ:
            raise ValueError(f"{name[:80]!r} is no field of a request")
        wanted, fits = _READ[name]
        if not fits(value):
            raise ValueError(f"{name} must be {wanted}")
    outside = [key for key in body.get("logit_bias") or {} if vocabulary is not None and int(key) >= vocabulary]
    if outside:
        raise ValueError(f"logit_bias: the model has {vocabulary} tokens, no token {outside[0]}")


class Handler(server.APIHandler):
    """mlx-lm's handler, behind checks of what is sent."""

    timeout = TIMEOUT_SECONDS  # of the socket: a client that does not read its answer is left alone

    def do_POST(self) -> None:
        if self.path in _GENERATE:
            try:
                body = self._body()
                self._check(body)
            except _Refused as refusal:
                self._answer(refusal.status, str(refusal))
                return
            # mlx-lm's handler reads it once more; names that are null are names that were not given.
            text = json.dumps({k: v for k, v in body.items() if v is not None}).encode()
            self.headers.replace_header("Content-Length", str(len(text)))
            connection, self.rfile = self.rfile, io.BytesIO(text)
            try:
                super().do_POST()
            finally:
                self.rfile = connection
            return
        super().do_POST()

    def _answer(self, status: int, message: str) -> None:
        self.close_connection = True  # what is left of the request is not read
        self._set_completion_headers(status)
        self.end_headers()
        self.wfile.write(json.dumps({"error": message}).encode())

    def _body(self) -> dict:
        length = self.headers.get("Content-Length")
        if length is None:
            raise _Refused(411, "Content-Length header is required")
        if not (length.isascii() and length.isdigit() and len(length) < 20):
            raise _Refused(400, "Content-Length must be a whole number")
        if int(length) > MAX_BODY_BYTES:
            raise _Refused(413, f"a request may have {MAX_BODY_BYTES} bytes, this one announces {int(length)}")
        try:
            return parse_json(self._read(int(length)), "the request")
        except TimeoutError:
            raise _Refused(408, f"the request did not come within {TIMEOUT_SECONDS:g} seconds") from None
        except ValueError as error:
            raise _Refused(400, str(error)) from None

    def _read(self, length: int) -> bytes:
        """As many bytes, within the time that a request has: each piece of a slow one comes in time."""
        end, data = time.monotonic() + TIMEOUT_SECONDS, bytearray()
        try:
            while len(data) < length:
                self.connection.settimeout(max(0.001, end - time.monotonic()))
                piece = self.rfile.read1(min(_CHUNK_BYTES, length - len(data)))
                if not piece:
                    raise ValueError(f"the request ends after {len(data)} of {length} bytes")
                data += piece
                if time.monotonic() > end:
                    raise TimeoutError
        finally:
            self.connection.settimeout(self.timeout)
        return bytes(data)

    def _check(self, body: dict) -> None:
        provider = self.response_generator.model_provider
        arguments = getattr(provider.model, "args", None)
        vocabulary = getattr(arguments, "vocab_size", None)
        try:
            check_fields(body, vocabulary if isinstance(vocabulary, int) else None)
        except ValueError as error:
            raise _Refused(400, str(error)) from None
        needed = "prompt" if self.path == _GENERATE[0] else "messages"
        if body.get(needed) is None:
            raise _Refused(400, f"{needed} is missing")
        started: argparse.Namespace = provider.cli_args
        if getattr(started, "allow_other_models", False):
            return
        if started.model is None and body.get("model") in (None, "default_model"):
            raise _Refused(404, f"the server was started without a model; start it with --model or {ALLOW_OTHERS}")
        for field, name in (
            ("model", started.model),
            ("draft_model", started.draft_model),
            ("adapters", started.adapter_path),
        ):
            asked = body.get(field)
            if asked is not None and asked != name and (field == "adapters" or asked != "default_model"):
                raise _Refused(404, f"{field}: the server was not started with {asked[:200]!r}; see {ALLOW_OTHERS}")


def take_option() -> bool:
    """Whether ``sys.argv`` has :data:`ALLOW_OTHERS`, which is taken out: mlx-lm does not know it."""
    found = ALLOW_OTHERS in sys.argv
    sys.argv[:] = [argument for argument in sys.argv if argument != ALLOW_OTHERS]
    return found


def guard(check: Callable[[argparse.Namespace], None], allow_others: bool) -> None:
    """Let mlx-lm's server check its models while it starts, and its clients' requests.

    Args:
        check: Called with the server's arguments: it loads in a thread, and would listen without a model.
        allow_others: Whether clients may name models that it was not started with.
    """

    class CheckedProvider(server.ModelProvider):
        def __init__(self, cli_args: argparse.Namespace):
            check(cli_args)
            cli_args.allow_other_models = allow_others
            super().__init__(cli_args)

    vars(server).update(
        ModelProvider=CheckedProvider, _run_http_server=partial(server._run_http_server, handler_class=Handler)
    )
