"""mlx-vlm's server for clients that nobody vouches for: what they send is checked before it is acted on.

The server is an ASGI application, and :class:`Guard` stands in front of it: what passes is a body that is whole, in
JSON, of known fields, for the model that the server was started with.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from typing import Any, NamedTuple

from fastapi import HTTPException
from mlx_vlm.server import cli
from mlx_vlm.server.app import app
from mlx_vlm.server.decisions import DecisionRequest
from mlx_vlm.server.embeddings import EmbeddingsRequest
from mlx_vlm.server.openai import _decode_input_audio_data
from mlx_vlm.server.reranking import RerankRequest
from mlx_vlm.server.runtime import runtime
from mlx_vlm.server.schemas import AnthropicRequest, ChatRequest, CompactRequest, OpenAIRequest
from PIL import Image
from pydantic import BaseModel

from ..lm.command_line import CheckpointError, value_of
from ..lm.requests import (
    ALLOW_OTHERS,
    IGNORED,
    MAX_BODY_BYTES,
    READ,
    TIMEOUT_SECONDS,
    Known,
    Refused,
    check_fields,
    take_option,
)
from ..storage.untrusted import is_whole, parse_json

ALLOW_MEDIA = "--allow-media-anywhere"
"""Option of the server: clients may name pictures, sounds and videos by path or address, which the server reads."""

# mlx-vlm's own default is every address of the machine.
_LOOPBACK = "127.0.0.1"
# Pillow warns of larger pictures, and refuses those of twice the size.
_MAX_PIXELS = Image.MAX_IMAGE_PIXELS or 1 << 26

_TIMEOUTS = (TimeoutError, asyncio.TimeoutError)  # one class since Python 3.11
_log = logging.getLogger("mlx_marlin.vlm")

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class _Path(NamedTuple):
    """A path that takes JSON.

    Attributes:
        schema: What mlx-vlm reads of a request.
        option: The option that the server gets its model by.
        ignored: What clients send beside that, and mlx-vlm leaves alone.
    """

    schema: type[BaseModel]
    option: str = "--model"
    ignored: frozenset[str] = IGNORED


_CHAT = frozenset({"max_completion_tokens", "stop"})
_RESPONSES = frozenset({
    "background", "conversation", "include", "max_tool_calls", "prompt", "stream_options", "top_logprobs", "truncation",
})  # fmt: skip
_MESSAGES = frozenset({"betas", "container", "context_management", "mcp_servers"})
# Without the /v1 in front.
_PATHS = {
    "/chat/completions": _Path(ChatRequest, ignored=IGNORED | _CHAT),
    "/responses": _Path(OpenAIRequest, ignored=IGNORED | _RESPONSES),
    "/responses/input_tokens": _Path(OpenAIRequest, ignored=IGNORED | _RESPONSES),
    "/responses/compact": _Path(CompactRequest, ignored=IGNORED | _RESPONSES),
    "/messages": _Path(AnthropicRequest, ignored=IGNORED | _MESSAGES),
    "/messages/count_tokens": _Path(AnthropicRequest, ignored=IGNORED | _MESSAGES),
    "/embeddings": _Path(EmbeddingsRequest, "--embedding-model"),
    "/rerank": _Path(RerankRequest, "--reranker-model"),
    "/decisions": _Path(DecisionRequest, "--decision-model"),
}
# What the server says of itself, and nothing of files that a client names.
_TOLD = frozenset({
    "/health", "/metrics", "/models", "/cache/stats", "/moe-offload/stats", "/settings", "/docs", "/openapi.json",
})  # fmt: skip

_ANYTHING = ("anything", lambda value: True)


def _is_pixels(value: Any) -> bool:
    return value is None or (is_whole(value) and 0 < value <= _MAX_PIXELS)


def _is_shape(value: Any) -> bool:
    sides = value if isinstance(value, list) else [value]
    return value is None or (0 < len(sides) <= 2 and all(_is_pixels(n * n if is_whole(n) else n) for n in sides))


_PIXELS = (f"a whole number from 1 to {_MAX_PIXELS}", _is_pixels)
_READ = {
    **READ,
    "max_output_tokens": READ["max_tokens"],
    "min_pixels": _PIXELS,
    "max_pixels": _PIXELS,
    "resize_shape": (f"one or two sides of a picture of at most {_MAX_PIXELS} pixels", _is_shape),
}


def _known(schema: type[BaseModel]) -> Known:
    return {name: _READ.get(name, _ANYTHING) for name in schema.model_fields}


# Where a request holds a picture, a sound or a video, or says where one is.
_PICTURES, _VIDEOS = ("image", "image_url", "images"), ("video", "video_url")
# Fields with descriptions of types, where such names mean something else.
_SCHEMAS = ("tools", "text", "response_format", "output_config", "metadata")


def _references(value: Any) -> Iterator[tuple[str, Any]]:
    """What a part of a request has of pictures, sounds and videos: each with the kind of data that it must be."""
    if isinstance(value, list):
        for part in value:
            yield from _references(part)
    elif isinstance(value, dict):
        for name, part in value.items():
            kind = "image" if name in _PICTURES else "video" if name in _VIDEOS else "audio" if name == "audio" else ""
            if name == "input_audio":
                yield "input_audio", part
            elif name == "source":  # of a picture in Anthropic's form
                yield from (("image", part.get("url")),) if isinstance(part, dict) and "url" in part else ()
            elif kind:
                for item in part if isinstance(part, list) else [part]:
                    yield kind, item.get("url") if isinstance(item, dict) else item
            else:
                yield from _references(part)


def _check_media(body: dict) -> None:
    """See that pictures, sounds and videos are in the request itself: mlx-vlm opens whatever else it is told to."""
    for kind, value in _references({name: part for name, part in body.items() if name not in _SCHEMAS}):
        if kind == "input_audio":
            try:
                inline = not isinstance(_decode_input_audio_data(value), str)
            except (AttributeError, HTTPException, LookupError, TypeError):
                inline = False
        else:
            inline = value is None or (isinstance(value, str) and value.startswith(f"data:{kind}/"))
        if not inline:
            what = "sounds" if "audio" in kind else f"{kind}s"
            raise Refused(400, f"{what} must be in the request, as base64 or a data URL; see {ALLOW_MEDIA}")


def _vocabulary() -> int | None:
    config = getattr(getattr(runtime.response_generator, "model", None), "config", None)
    size = getattr(getattr(config, "text_config", config), "vocab_size", None)
    return size if isinstance(size, int) else None


class _NotRead(Exception):
    """A client takes too long to read its answer."""


class Guard:
    """An ASGI application in front of mlx-vlm's.

    Args:
        application: mlx-vlm's.
        started: What the server was started with, by option: its models and its adapter.
        allow_others: Whether clients may name other models and adapters, and use every path.
        allow_media: Whether clients may name pictures, sounds and videos by path or address.
    """

    def __init__(
        self,
        application: Callable[..., Awaitable[None]],
        started: dict[str, str | None],
        allow_others: bool,
        allow_media: bool,
    ):
        self.application, self.started = application, started
        self.allow_others, self.allow_media = allow_others, allow_media

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.application(scope, receive, send)
            return
        try:
            path = self._path(scope)
            if scope["type"] == "http" and scope["method"] not in ("GET", "HEAD", "OPTIONS"):
                receive = _replayed(await self._body(scope, receive, path), receive)
        except Refused as refusal:
            await _answer(scope, send, refusal)
            return

        async def send_in_time(message: Message) -> None:
            try:
                await asyncio.wait_for(send(message), TIMEOUT_SECONDS)
            except _TIMEOUTS:
                raise _NotRead from None

        try:
            await self.application(scope, receive, send_in_time)
        except _NotRead:
            _log.warning("a client did not read its answer for %g seconds, and is left alone", TIMEOUT_SECONDS)

    def _path(self, scope: Message) -> _Path | None:
        """What the path of a request takes, if that is JSON.

        Raises:
            Refused: If it is for those only who may name other models.
        """
        name = scope["path"].removeprefix("/v1")
        method = scope.get("method")
        if method == "POST" and name in _PATHS:
            return _PATHS[name]
        told = method in ("GET", "HEAD") and name in _TOLD and not scope["query_string"]
        # Of answers that the server keeps; their names are drawn at random.
        kept = name.startswith("/responses/")
        if not (told or kept or method == "OPTIONS" or self.allow_others):
            raise Refused(404, f"{scope['path'][:80]} is for servers with {ALLOW_OTHERS} only")
        return None

    async def _body(self, scope: Message, receive: Receive, path: _Path | None) -> bytes:
        try:
            data = await asyncio.wait_for(_read(scope, receive), TIMEOUT_SECONDS)
        except _TIMEOUTS:
            raise Refused(408, f"the request did not come within {TIMEOUT_SECONDS:g} seconds") from None
        if path is None:
            return data
        try:
            # Names that are null are names that were not given.
            body = {k: v for k, v in parse_json(data, "the request").items() if v is not None}
            check_fields(body, _vocabulary(), _known(path.schema), path.ignored)
        except ValueError as error:
            raise Refused(400, str(error)) from None
        if path.schema is ChatRequest and "max_completion_tokens" in body:  # OpenAI's name for it today
            body.setdefault("max_tokens", body.pop("max_completion_tokens"))
        if not self.allow_media:
            _check_media(body)
        if not self.allow_others:
            self._check_names(path.option, body)
        return json.dumps(body).encode()

    def _check_names(self, option: str, body: dict) -> None:
        if self.started[option] is None:
            raise Refused(404, f"the server was started without a model; start it with {option} or {ALLOW_OTHERS}")
        for field, name in (("model", self.started[option]), ("adapter_path", self.started["--adapter-path"])):
            asked = body.get(field)
            if asked is not None and asked != name:
                raise Refused(404, f"{field}: the server was not started with {str(asked)[:200]!r}; see {ALLOW_OTHERS}")


async def _read(scope: Message, receive: Receive) -> bytes:
    """The body of a request."""
    announced = dict(scope["headers"]).get(b"content-length", b"0")
    data, size, more = bytearray(), int(announced), True  # uvicorn refuses what is no number
    while more and size <= MAX_BODY_BYTES:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Refused(400, f"the request ends after {len(data)} of {size} bytes")
        data += message.get("body", b"")
        size, more = max(size, len(data)), message.get("more_body", False)
    if size > MAX_BODY_BYTES:
        raise Refused(413, f"a request may have {MAX_BODY_BYTES} bytes, this one has {size} or more")
    return bytes(data)


def _replayed(body: bytes, receive: Receive) -> Receive:
    """Hands a body on, then whatever comes behind it: that the client went away."""
    bodies = [body]

    async def replay() -> Message:
        return {"type": "http.request", "body": bodies.pop()} if bodies else await receive()

    return replay


async def _answer(scope: Message, send: Send, refusal: Refused) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close"})  # before it is accepted: 403
        return
    text = json.dumps({"error": str(refusal)}).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(text)).encode()),
        (b"connection", b"close"),  # what is left of the request is not read
    ]
    await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
    await send({"type": "http.response.body", "body": text})


def guard() -> None:
    """Put the guard in front of mlx-vlm's server, as ``sys.argv`` asks for it; it listens on loopback by default.

    Raises:
        CheckpointError: If the server is to start itself anew, which would leave the guard out.
    """
    if "--reload" in sys.argv:
        raise CheckpointError("--reload would start mlx-vlm's own server, which reads no EXL3 models; leave it out")
    allow_others, allow_media = take_option(ALLOW_OTHERS), take_option(ALLOW_MEDIA)
    options = {"--adapter-path", *(path.option for path in _PATHS.values())}
    started = {option: value_of(option) for option in options}
    app.add_middleware(Guard, started=started, allow_others=allow_others, allow_media=allow_media)
    vars(cli)["DEFAULT_SERVER_HOST"] = _LOOPBACK
