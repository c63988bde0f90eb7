"""OpenAI's client against mlx-lm's server over an EXL3 model."""

import mlx_lm
import pytest

import mlx_marlin
from tests.support import architectures, clients, tool_calls
from tests.support.servers import LM, Server

SLOTS = 2


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    checkpoint = tool_calls.plant_tool_call(architectures.qwen3_moe(tool_calls.SIZES))
    return tool_calls.write_tool_processor(checkpoint.write(tmp_path_factory.mktemp("lm") / "exl3"))


@pytest.fixture(scope="module")
def client(directory, tmp_path_factory):
    log = tmp_path_factory.mktemp("server") / "log"
    server = Server(LM, log, "--model", directory, "--decode-concurrency", SLOTS)
    yield clients.Client(server.port, str(directory))
    assert "Traceback" not in log.read_text(), log.read_text()
    server.stop()


@pytest.fixture(scope="module")
def loaded(directory):
    return mlx_marlin.load(directory)


def prompt(tokenizer, **keywords) -> list[int]:
    return tokenizer.apply_chat_template(clients.QUESTION, add_generation_prompt=True, **keywords)


@pytest.fixture(scope="module")
def wanted(loaded):
    """What the library says."""
    return mlx_lm.generate(*loaded, prompt(loaded[1]), max_tokens=clients.TOKENS)


def test_streams(client, wanted):
    clients.assert_streams_say_the_same(client, wanted)


def test_tools(client, loaded):
    clients.assert_tools_are_called(client, len(prompt(loaded[1], tools=[tool_calls.TOOL])))


def test_cancelled_streams(client, wanted):
    clients.assert_cancelled_streams_free_their_slots(client, wanted, SLOTS)
