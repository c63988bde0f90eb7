"""The server behind requests that nobody vouches for: a status of its own for each, and it goes on."""

import json
import socket

import pytest

from mlx_marlin.lm.requests import ALLOW_OTHERS
from tests.support.paths import MODELS
from tests.support.servers import LM, SECONDS, Server, head

EXL3 = str(MODELS / "docs-moe-exl3-mixed")
TEXT, CHAT = "/v1/completions", "/v1/chat/completions"
GOOD = {"prompt": "The list of", "max_tokens": 2, "temperature": 0.0}


def works(server):
    status, answer = server.send(GOOD, TEXT)
    return status == 200 and answer["usage"]["completion_tokens"] == 2


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(LM, tmp_path_factory.mktemp("server") / "log", "--model", EXL3)
    assert works(server)
    yield server
    assert works(server)
    assert "Traceback" not in server.log.read_text(), server.log.read_text()
    server.stop()


def test_it_listens_on_loopback_only(server):
    assert server.listens_on() == ["0100007F"]


@pytest.mark.parametrize(
    "body, message",
    [
        (b"{", "the request cannot be read as JSON"),
        (b"\xff\xfe{\x00}\x00", "the request cannot be read as JSON: 'utf-8' codec"),
        (b"[1]", "the request must be a JSON object, got list"),
        (b'{"prompt": NaN}', "NaN is not JSON"),
        (b'{"prompt": "a", "prompt": "b"}', "'prompt' appears twice"),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "nests too deeply"),
        ({**GOOD, "max_token": 3}, "'max_token' is no field of a request"),
        ({**GOOD, "x" * 100_000: 3}, f"'{'x' * 80}' is no field"),
        ({}, "prompt is missing"),
        ({"prompt": ""}, "prompt must be a string that is not empty"),
        ({"prompt": ["a"]}, "prompt must be a string"),
        ({**GOOD, "stop": [1]}, "stop must be a string or a list of strings"),
        ({**GOOD, "stop": {"a": 1}}, "stop must be"),
        ({**GOOD, "seed": -1}, "seed must be a whole number from 0 to"),
        ({**GOOD, "seed": 2**64}, "seed must be"),
        ({**GOOD, "temperature": "hot"}, "temperature must be a finite number"),
        (b'{"prompt": "a", "temperature": 1e999}', "temperature must be a finite number"),
        (b'{"prompt": "a", "temperature": 1' + b"0" * 400 + b"}", "temperature must be a finite number"),
        ({**GOOD, "logit_bias": {"5": 10**400}}, "logit_bias must be"),
        ({**GOOD, "temperature": -1}, "temperature must be at least 0"),
        ({**GOOD, "max_tokens": 2**40}, "max_tokens must be a whole number"),
        ({**GOOD, "top_logprobs": 50}, "top_logprobs must be at most"),
        ({**GOOD, "logit_bias": {"-1": 1}}, "logit_bias must be an object of numbers by token"),
        ({**GOOD, "logit_bias": {"99999999": 1}}, "logit_bias: the model has 2048 tokens, no token 99999999"),
        ({**GOOD, "logit_bias": {"5": "x"}}, "logit_bias must be"),
        ({**GOOD, "model": 7}, "model must be a string"),
        ({**GOOD, "draft_model": {"a": 1}}, "draft_model must be a string"),
        ({**GOOD, "chat_template_kwargs": [1]}, "chat_template_kwargs must be an object"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_bodies(server, body, message):
    status, answer = server.send(body, TEXT)
    assert status == 400 and message in answer["error"]


@pytest.mark.parametrize(
    "messages", ["x", [], [1], [{}], [{"role": 1}], [{"role": "user", "content": 5}], [{"role": "u", "content": [1]}]]
)
def test_messages(server, messages):
    status, answer = server.send({"messages": messages, "max_tokens": 1}, CHAT)
    assert status == 400 and "messages must be a list of messages" in answer["error"]
    assert server.send({**GOOD}, CHAT) == (400, {"error": "messages is missing"})


@pytest.mark.parametrize("field", ["model", "draft_model", "adapters"])
@pytest.mark.parametrize("name", ["../other", "/etc", "org/repository", str(MODELS / "docs-moe"), ""])
def test_names_of_other_models(server, field, name):
    status, answer = server.send({**GOOD, field: name}, TEXT)
    assert status == 404 and answer["error"].startswith(f"{field}: the server was not started with {name!r}")


def test_names_of_its_model(server):
    for name in (EXL3, "default_model", None):
        assert server.send({**GOOD, "model": name}, TEXT)[0] == 200


def test_fields_that_other_servers_know(server):
    assert (
        server.send({**GOOD, "user": "me", "n": 1, "seed": None, "stop": None, "logit_bias": {"5": 1}}, TEXT)[0] == 200
    )


@pytest.mark.parametrize(
    "request_bytes, status, message",
    [
        (head(TEXT, 2**40), 413, b"a request may have 33554432 bytes"),
        (head(TEXT, -1), 400, b"Content-Length must be a whole number"),
        (head(TEXT, "9" * 30), 400, b"Content-Length must be a whole number"),
        (head(TEXT, "0x10"), 400, b"Content-Length must be a whole number"),
        (f"POST {TEXT} HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n".encode(), 411, b"Content-Length"),
        (head(TEXT, 1000) + b'{"prompt": ', 408, b"the request did not come within %g seconds" % SECONDS),
        (b"POST /elsewhere HTTP/1.1\r\nContent-Length: 0\r\n\r\n", 404, b"Not Found"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_heads(server, request_bytes, status, message):
    answer = server.raw(request_bytes)
    assert answer.split()[1] == str(status).encode() and message in answer


def test_a_request_that_drips(server):
    """Every byte comes in time, all of them do not."""
    assert server.answers_a_drip(TEXT).split()[1] == b"408"


def test_a_request_that_ends_early(server):
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(head(TEXT, 1000) + b"{")
        connection.shutdown(socket.SHUT_WR)
        assert b"the request ends after 1 of 1000 bytes" in connection.recv(4096) + connection.recv(4096)


def test_clients_that_do_not_read(server):
    """Their connections stay open; others are answered meanwhile."""
    body = json.dumps({**GOOD, "stream": True, "max_tokens": 50}).encode()
    clients = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(4)]
    for client in clients:
        client.sendall(head(TEXT, len(body)) + body)
    silent = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(20)]
    assert works(server)
    for client in (*clients, *silent):
        client.close()
    assert works(server)


def test_an_option_lets_clients_name_models(tmp_path):
    server = Server(LM, tmp_path / "log", ALLOW_OTHERS)
    try:
        assert server.send({**GOOD, "model": EXL3}, TEXT)[0] == 200
    finally:
        server.stop()


def test_a_server_without_a_model(tmp_path):
    server = Server(LM, tmp_path / "log")
    try:
        status, answer = server.send(GOOD, TEXT)
        assert status == 404 and "was started without a model" in answer["error"]
        assert server.send({**GOOD, "model": EXL3}, TEXT)[0] == 404
    finally:
        server.stop()
