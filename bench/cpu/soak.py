"""The server under many requests: whether its memory stays flat and its answers the same.

Several clients at once send prompts of random lengths; some streams are cancelled. Every answer is compared with what
the same prompt got alone, at temperature 0.

    python -m bench.cpu.soak models/docs-moe-exl3-3.0bpw --requests 10000 --clients 8
"""

from __future__ import annotations

import argparse
import http.client
import json
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

from mlx_marlin.storage import atomic

TEXT = Path(__file__).parents[2] / "README.md"
PROMPTS = 64
LONGEST = 300  # characters of a prompt
MOST_TOKENS = 16
CANCELLED = 0.1  # of the requests
SAMPLES = 100


class Server:
    """A server of a model in a process of its own, ended with the context."""

    def __init__(self, model: Path, log: Path):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self._log = log
        command = [sys.executable, "-m", "mlx_marlin", "server", "--model", str(model), "--port", str(self.port)]
        with open(log, "w") as stream:
            self._process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT)

    def __enter__(self) -> Server:
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port)).close()
                return self
            except OSError:
                if self._process.poll() is not None:
                    raise RuntimeError(f"the server ended:\n{self._log.read_text()}") from None
                time.sleep(0.1)

    def __exit__(self, *exception: object) -> None:
        self._process.kill()
        self._process.wait()

    def resident_mb(self) -> float:
        """Memory that the process holds now."""
        for line in Path(f"/proc/{self._process.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) / 1024
        raise RuntimeError("the server has ended")

    def _post(self, request: dict) -> http.client.HTTPConnection:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)
        connection.request("POST", "/v1/completions", json.dumps(request), {"Content-Type": "application/json"})
        return connection

    def complete(self, prompt: str, tokens: int) -> str:
        """The answer at temperature 0."""
        connection = self._post({"prompt": prompt, "max_tokens": tokens, "temperature": 0.0})
        response = connection.getresponse()
        answer = json.loads(response.read())
        connection.close()
        if response.status != 200:
            raise RuntimeError(f"status {response.status}: {answer}")
        return answer["choices"][0]["text"]

    def cancel(self, prompt: str, tokens: int) -> None:
        """Ask for a stream, and go after its first bytes."""
        connection = self._post({"prompt": prompt, "max_tokens": tokens, "temperature": 0.0, "stream": True})
        connection.getresponse().read(16)
        connection.close()


class Soak:
    """Clients that take their requests from one list.

    Args:
        server: Where to.
        rng: Source of the prompts and of which are cancelled.
        requests: Their number.
    """

    def __init__(self, server: Server, rng: np.random.Generator, requests: int):
        text = TEXT.read_text()
        lengths = rng.integers(1, LONGEST, PROMPTS)
        starts = rng.integers(0, len(text) - LONGEST, PROMPTS)
        self._prompts = [text[start : start + length] for start, length in zip(starts, lengths)]
        self._tokens = rng.integers(1, MOST_TOKENS + 1, PROMPTS)
        self._chosen = rng.integers(0, PROMPTS, requests)
        self._cancelled = rng.random(requests) < CANCELLED
        self._server, self._next, self._lock = server, 0, threading.Lock()
        self.different: list[tuple[int, str]] = []
        self.errors: list[str] = []
        self.memory: list[tuple[int, float]] = []
        self.alone = [self._ask(i) for i in range(PROMPTS)]

    def _ask(self, prompt: int) -> str:
        return self._server.complete(self._prompts[prompt], int(self._tokens[prompt]))

    def _take(self) -> int | None:
        with self._lock:
            taken, self._next = self._next, self._next + 1
            if taken % max(len(self._chosen) // SAMPLES, 1) == 0:
                self.memory.append((taken, self._server.resident_mb()))
        return taken if taken < len(self._chosen) else None

    def _client(self) -> None:
        while (request := self._take()) is not None:
            prompt = int(self._chosen[request])
            try:
                if self._cancelled[request]:
                    self._server.cancel(self._prompts[prompt], int(self._tokens[prompt]))
                elif (answer := self._ask(prompt)) != self.alone[prompt]:
                    self.different.append((prompt, answer))
            except (OSError, RuntimeError, http.client.HTTPException) as error:
                self.errors.append(f"request {request}: {type(error).__name__}: {error}")

    def run(self, clients: int) -> None:
        """Send them all."""
        threads = [threading.Thread(target=self._client) for _ in range(clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="EXL3 directory")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--output", type=Path, help="JSON")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory, Server(arguments.model, Path(directory, "log")) as server:
        soak = Soak(server, np.random.default_rng(0), arguments.requests)
        start = time.perf_counter()
        soak.run(arguments.clients)
        seconds = time.perf_counter() - start
    tenth = next(mb for request, mb in soak.memory if 10 * request >= arguments.requests)
    result = {
        "requests": arguments.requests,
        "clients": arguments.clients,
        "seconds": seconds,
        "errors": soak.errors,
        "different_answers": len(soak.different),
        "resident_mb_after_a_tenth": tenth,
        "resident_mb_at_the_end": soak.memory[-1][1],
        "resident_mb_at_most": max(mb for _, mb in soak.memory),
    }
    for prompt, answer in soak.different[:3]:
        print(f"alone: {soak.alone[prompt]!r}\nthen:  {answer!r}", file=sys.stderr)
    print(json.dumps(result, indent=1))
    if arguments.output:
        atomic.write_text(arguments.output, json.dumps({**result, "memory": soak.memory}, indent=1) + "\n")


if __name__ == "__main__":
    main()
