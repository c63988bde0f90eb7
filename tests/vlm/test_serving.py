"""mlx-vlm's server over an EXL3 model: OpenAI's client, and requests that nobody vouches for."""

import base64
import io
import json
import socket

import mlx_vlm
import pytest

from mlx_marlin import vlm
from mlx_marlin.lm.requests import ALLOW_OTHERS
from mlx_marlin.vlm.serving import ALLOW_MEDIA
from tests.support import clients, tool_calls
from tests.support.paths import MODELS
from tests.support.servers import SECONDS, VLM, Server, head
from tests.support.vlm_checkpoints import qwen3_vl_moe
from tests.vlm.test_load import picture

SLOTS = 2
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    checkpoint = tool_calls.plant_tool_call(qwen3_vl_moe(tool_calls.SIZES).checkpoint)
    return tool_calls.write_tool_processor(checkpoint.write(tmp_path_factory.mktemp("vlm") / "exl3"))


@pytest.fixture(scope="module")
def server(directory, tmp_path_factory):
    log = tmp_path_factory.mktemp("server") / "log"
    server = Server(VLM, log, "--model", directory, "--max-num-seqs", SLOTS)
    yield server
    assert works(server, directory)
    assert "Traceback" not in log.read_text(), log.read_text()
    server.stop()


@pytest.fixture(scope="module")
def client(server, directory):
    return clients.Client(server.port, str(directory))


@pytest.fixture(scope="module")
def good(directory):
    return request(directory)


def request(directory) -> dict:
    return {"model": str(directory), "messages": clients.QUESTION, "max_tokens": 2, "temperature": 0.0}


def works(server, directory) -> bool:
    status, answer = server.send(request(directory), CHAT)
    return status == 200 and answer["usage"]["completion_tokens"] == 2


@pytest.fixture(scope="module")
def loaded(directory):
    return vlm.load(directory)


def prompt(loaded, **keywords) -> str:
    model, processor = loaded
    return mlx_vlm.apply_chat_template(processor, model.config, clients.QUESTION, **keywords)


def answer(loaded, image=None) -> str:
    """What the library says."""
    text = prompt(loaded, num_images=0 if image is None else 1)
    images = None if image is None else [image]
    return mlx_vlm.generate(*loaded, text, images, max_tokens=clients.TOKENS, temperature=0.0).text


def test_streams(client, loaded):
    clients.assert_streams_say_the_same(client, answer(loaded))


def shown(url: str) -> list[dict]:
    """A question about a picture."""
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": clients.QUESTION[0]["content"]}]
    return [{"role": "user", "content": parts}]


def test_a_picture(client, loaded):
    said = []
    for seed in (1, 5):
        data = io.BytesIO()
        picture(seed).save(data, "PNG")
        messages = shown(f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}")
        wanted = answer(loaded, picture(seed))
        assert client.text(messages) == wanted and client.streamed(messages)[0] == wanted
        said.append(wanted)
    assert len({answer(loaded), *said}) == 3


def test_tools(client, loaded):
    text = prompt(loaded, tools=[tool_calls.TOOL])
    clients.assert_tools_are_called(client, len(loaded[1].tokenizer.encode(text)))


def test_cancelled_streams(client, loaded):
    clients.assert_cancelled_streams_free_their_slots(client, answer(loaded), SLOTS)


def test_responses(client, loaded):
    """OpenAI's other interface."""
    options = {"max_output_tokens": clients.TOKENS, "temperature": 0.0}
    response = client.api.responses.create(model=client.model, input=clients.QUESTION[0]["content"], **options)
    assert response.output_text == answer(loaded)


# Requests that nobody vouches for.


def test_it_listens_on_loopback_only(server):
    assert server.listens_on() == ["0100007F"]


@pytest.mark.parametrize(
    "body, message",
    [
        (b"{", "the request cannot be read as JSON"),
        (b"[1]", "the request must be a JSON object, got list"),
        (b'{"model": NaN}', "NaN is not JSON"),
        (b'{"model": "a", "model": "b"}', "'model' appears twice"),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "nests too deeply"),
        ({"max_token": 3}, "'max_token' is no field of a request"),
        ({"x" * 100_000: 3}, f"'{'x' * 80}' is no field"),
        ({"messages": []}, "messages must be a list of messages"),
        ({"messages": [{"role": "user", "content": [1]}]}, "messages must be a list of messages"),
        ({"temperature": "hot"}, "temperature must be a finite number"),
        ({"max_tokens": 2**40}, "max_tokens must be a whole number"),
        ({"seed": -1}, "seed must be a whole number from 0 to"),
        ({"logit_bias": {"99999999": 1}}, "logit_bias: the model has 520 tokens, no token 99999999"),
        ({"resize_shape": [10**6, 10]}, "resize_shape must be one or two sides of a picture"),
        ({"min_pixels": 10**9}, "min_pixels must be a whole number from 1 to"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}], "model": 7}, "model must be"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_bodies(server, good, body, message):
    status, answer = server.send(body if isinstance(body, bytes) else {**good, **body}, CHAT)
    assert status == 400 and message in answer["error"]


def test_names_of_other_models(server, good):
    for name in ("../other", "/etc", "org/repository", str(MODELS / "docs-moe")):
        for field in ("model", "adapter_path"):
            status, answer = server.send({**good, field: name}, CHAT)
            assert status == 404 and answer["error"].startswith(f"{field}: the server was not started with {name!r}")
    assert server.send({"input": "x"}, "/v1/embeddings")[1]["error"].endswith(
        f"start it with --embedding-model or {ALLOW_OTHERS}"
    )


@pytest.mark.parametrize(
    "method, path",
    [
        ("POST", "/v1/images/generations"),
        ("POST", "/v1/audio/speech"),
        ("POST", "/unload"),
        ("PATCH", "/v1/settings"),
        ("GET", "/v1/models?model_dir=/"),
        ("GET", "/v1/images/defaults?model=/etc"),
    ],
)
def test_paths_to_other_models_and_files(server, method, path):
    status, answer = server.send({}, path, method)
    assert status == 404 and f"is for servers with {ALLOW_OTHERS} only" in answer["error"]


def test_what_it_says_of_itself(server, directory):
    assert server.send(b"", "/v1/models", "GET")[1]["data"][0]["id"] == str(directory)
    assert server.send(b"", "/health", "GET")[0] == 200


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": "/etc/passwd"}},
        {"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/a.png"}},
        {"type": "input_image", "image_url": "file:///etc/passwd"},
        {"type": "video_url", "video_url": {"url": "/dev/video0"}},
        {"type": "video", "video": "http://127.0.0.1:1/a.mp4"},
        {"type": "input_audio", "input_audio": {"data": "/etc/passwd", "format": "wav"}},
        {"type": "input_audio", "input_audio": {"data": "passwd", "format": "wav"}},
        {"type": "image", "source": {"type": "url", "url": "http://127.0.0.1:1/a.png"}},
    ],
    ids=str,
)
def test_pictures_that_are_elsewhere(server, good, part):
    path = "/v1/messages" if "source" in part else CHAT
    status, answer = server.send({**good, "messages": [{"role": "user", "content": [part]}]}, path)
    assert status == 400 and answer["error"].endswith(
        f"must be in the request, as base64 or a data URL; see {ALLOW_MEDIA}"
    )


@pytest.mark.parametrize(
    "request_bytes, status, message",
    [
        (head(CHAT, 2**40), 413, b"a request may have 33554432 bytes"),
        (head(CHAT, -1), 400, b"Invalid HTTP request"),
        (head(CHAT, 1000) + b'{"prompt": ', 408, b"the request did not come within %g seconds" % SECONDS),
        (b"GET /v1/realtime HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: "
         b"13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n", 403, b""),
    ],
    ids=lambda value: str(value)[:40],
)  # fmt: skip
def test_heads(server, request_bytes, status, message):
    answer = server.raw(request_bytes)
    assert answer.split()[1] == str(status).encode() and message in answer


def test_a_request_that_drips(server):
    assert server.answers_a_drip(CHAT).split()[1] == b"408"


def test_clients_that_do_not_read(server, directory, good):
    """Their connections stay open; others are answered meanwhile."""
    body = json.dumps({**good, "stream": True, "max_tokens": 50}).encode()
    others = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(24)]
    for other in others[:4]:
        other.sendall(head(CHAT, len(body)) + body)
    assert works(server, directory)
    for other in others:
        other.close()
    assert works(server, directory)


@pytest.mark.slow
def test_slots_of_clients_that_never_read_are_freed(server, directory, good):
    """What the sockets hold fills up first."""
    body = json.dumps({**good, "stream": True, **clients.ENDLESS}).encode()
    others = []
    for _ in range(SLOTS):
        other = socket.socket()
        other.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        other.connect(("127.0.0.1", server.port))
        other.sendall(head(CHAT, len(body)) + body)
        assert other.recv(1)  # it has a slot
        others.append(other)
    assert works(server, directory)
    assert "did not read its answer" in server.log.read_text()
