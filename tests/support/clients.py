"""What OpenAI's client makes of a server, whichever host it is of."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from openai import OpenAI

from tests.support.tool_calls import ARGUMENTS, NAME, TOOL

QUESTION = [{"role": "user", "content": "What is this?"}]
TOKENS = 12
# <|im_end|> is never said.
ENDLESS = {"max_tokens": 10**6, "logit_bias": {"2": -100}}


class Client:
    """A client of one model.

    Args:
        port: Of the server.
        model: As the server calls it.
    """

    def __init__(self, port: int, model: str):
        self.api, self.model = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0), model

    def ask(self, messages: list = QUESTION, **more: Any) -> Any:
        options = {"max_tokens": TOKENS, "temperature": 0.0, **more}
        return self.api.chat.completions.create(model=self.model, messages=messages, **options)

    def text(self, messages: list = QUESTION, **more: Any) -> str:
        return self.ask(messages, **more).choices[0].message.content

    def streamed(self, messages: list = QUESTION, **more: Any) -> tuple[str, int]:
        """The text of a stream, and in how many pieces it came."""
        return joined(self.ask(messages, stream=True, **more))


def joined(stream: Iterable) -> tuple[str, int]:
    pieces = [c.choices[0].delta.content for c in stream if c.choices and c.choices[0].delta.content]
    return "".join(pieces), len(pieces)


def assert_streams_say_the_same(client: Client, wanted: str) -> None:
    """A whole answer, a stream, and two streams at once are what the library says."""
    assert client.text() == wanted
    assert client.streamed()[0] == wanted and client.streamed()[1] > 1
    with ThreadPoolExecutor() as pool:
        both = list(pool.map(lambda _: client.streamed(), range(2)))
    assert [text for text, _ in both] == [wanted, wanted]


def assert_tools_are_called(client: Client, prompt_tokens: int) -> None:
    """The template is given the tools, and what the model says is parsed."""
    answer = client.ask(tools=[TOOL])
    assert answer.usage.prompt_tokens == prompt_tokens
    (choice,) = answer.choices
    assert choice.finish_reason == "tool_calls" and not choice.message.content
    (call,) = choice.message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == (NAME, ARGUMENTS)
    deltas = [c.choices[0].delta.tool_calls or [] for c in client.ask(tools=[TOOL], stream=True) if c.choices]
    parts = [part.function for delta in deltas for part in delta]
    assert "".join(part.name or "" for part in parts) == NAME
    assert json.loads("".join(part.arguments or "" for part in parts)) == ARGUMENTS
    # The answer of a tool is read with the call that it answers.
    called = {"role": "assistant", "content": None, "tool_calls": [call.model_dump()]}
    answered = [*QUESTION, called, {"role": "tool", "tool_call_id": call.id, "content": "rain"}]
    assert client.ask(answered).usage.prompt_tokens > client.ask().usage.prompt_tokens


def assert_cancelled_streams_free_their_slots(client: Client, wanted: str, slots: int) -> None:
    """As many endless streams as a server has slots run at once; when their clients are gone, it answers others."""
    streams = [client.ask(stream=True, **ENDLESS) for _ in range(slots)]
    for stream in streams:
        for _ in range(3):
            next(stream)
    for stream in streams:
        stream.close()
    start = time.monotonic()
    assert client.text() == wanted
    assert time.monotonic() - start < 30, "a million tokens were waited for"
