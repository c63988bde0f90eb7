"""Servers of their own process, on sockets."""

from __future__ import annotations

import http.client
import json
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

# A request that comes slowly is waited for this long.
SECONDS = 4.0
# The module of a host's server, the command.
LM = ("mlx_marlin.lm.serving", ("server",))
VLM = ("mlx_marlin.vlm.serving", ("vlm", "server"))
_START = """
import importlib, sys
from mlx_marlin import __main__ as cli
serving = importlib.import_module("{module}")
serving.TIMEOUT_SECONDS = {seconds}
if hasattr(serving, "Handler"):
    serving.Handler.timeout = {seconds}
sys.exit(cli.main())
"""


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def head(path: str, length: object) -> bytes:
    """The head of a request that announces this length."""
    lines = f"POST {path} HTTP/1.1", "Host: x", "Content-Type: application/json", f"Content-Length: {length}", "", ""
    return "\r\n".join(lines).encode()


class Server:
    """A server, which listens when this returns.

    Args:
        host: :data:`LM` or :data:`VLM`.
        log: Where its output goes.
        arguments: Of its command.
    """

    def __init__(self, host: tuple[str, tuple[str, ...]], log: Path, *arguments: object):
        (module, command), self.port, self.log = host, free_port(), log
        start = _START.format(module=module, seconds=SECONDS)
        self.process = subprocess.Popen(
            [sys.executable, "-c", start, *command, "--port", str(self.port), *map(str, arguments)],
            stdout=open(log, "w"),
            stderr=subprocess.STDOUT,
        )
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port)).close()
                return
            except OSError:
                assert self.process.poll() is None, log.read_text()
                time.sleep(0.1)

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()

    def send(self, body: Any, path: str, method: str = "POST", **headers: str) -> tuple[int, Any]:
        """Status and answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port)
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        connection.request(method, path, data, {"Content-Type": "application/json", **headers})
        response = connection.getresponse()
        answer = json.loads(response.read())
        connection.close()
        return response.status, answer

    def raw(self, text: bytes) -> bytes:
        """What comes back for bytes that no client would send."""
        with socket.create_connection(("127.0.0.1", self.port)) as connection:
            connection.sendall(text)
            answer = b""
            while piece := connection.recv(4096):
                answer += piece
            return answer

    def listens_on(self) -> list[str]:
        """The addresses that it listens on, as Linux writes them."""
        return [
            line.split()[1].partition(":")[0]
            for line in open("/proc/net/tcp")
            if line.split()[3] == "0A" and line.split()[1].endswith(f":{self.port:04X}")
        ]

    def answers_a_drip(self, path: str) -> bytes:
        """What comes back for a request of which every byte comes in time, all of them do not."""
        with socket.create_connection(("127.0.0.1", self.port)) as connection:
            connection.sendall(head(path, 1000))
            start, answer = time.monotonic(), b""
            connection.settimeout(SECONDS / 4)
            while not answer and time.monotonic() < start + 20 * SECONDS:
                connection.sendall(b"{")
                try:
                    answer = connection.recv(4096)
                except TimeoutError:
                    pass
            return answer
