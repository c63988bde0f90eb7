"""mlx-lm's server for clients that nobody vouches for: what they send is checked before it is acted on."""

from __future__ import annotations

import argparse
import io
import json
import time
from collections.abc import Callable
from functools import partial

from mlx_lm import server

from ..storage.untrusted import parse_json
from .requests import ALLOW_OTHERS, MAX_BODY_BYTES, TIMEOUT_SECONDS, Refused, check_fields

_GENERATE = ("/v1/completions", "/v1/chat/completions", "/chat/completions")
_CHUNK_BYTES = 1 << 16


class Handler(server.APIHandler):
    """mlx-lm's handler, behind checks of what is sent."""

    timeout = TIMEOUT_SECONDS  # of the socket: a client that does not read its answer is left alone

    def do_POST(self) -> None:
        try:
            self._post()
        except (ConnectionError, TimeoutError):  # mlx-lm has stopped what it generated for it
            self.close_connection = True
            self.log_message("the client went away, or did not read its answer")

    def _post(self) -> None:
        if self.path in _GENERATE:
            try:
                body = self._body()
                self._check(body)
            except Refused as refusal:
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
            raise Refused(411, "Content-Length header is required")
        if not (length.isascii() and length.isdigit() and len(length) < 20):
            raise Refused(400, "Content-Length must be a whole number")
        if int(length) > MAX_BODY_BYTES:
            raise Refused(413, f"a request may have {MAX_BODY_BYTES} bytes, this one announces {int(length)}")
        try:
            return parse_json(self._read(int(length)), "the request")
        except TimeoutError:
            raise Refused(408, f"the request did not come within {TIMEOUT_SECONDS:g} seconds") from None
        except ValueError as error:
            raise Refused(400, str(error)) from None

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
            raise Refused(400, str(error)) from None
        needed = "prompt" if self.path == _GENERATE[0] else "messages"
        if body.get(needed) is None:
            raise Refused(400, f"{needed} is missing")
        started: argparse.Namespace = provider.cli_args
        if getattr(started, "allow_other_models", False):
            return
        if started.model is None and body.get("model") in (None, "default_model"):
            raise Refused(404, f"the server was started without a model; start it with --model or {ALLOW_OTHERS}")
        for field, name in (
            ("model", started.model),
            ("draft_model", started.draft_model),
            ("adapters", started.adapter_path),
        ):
            asked = body.get(field)
            if asked is not None and asked != name and (field == "adapters" or asked != "default_model"):
                raise Refused(404, f"{field}: the server was not started with {asked[:200]!r}; see {ALLOW_OTHERS}")


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
