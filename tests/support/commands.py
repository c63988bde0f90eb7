"""Commands of the package, each in a copy of a process that has imported what mlx-lm's commands import: the imports
take three quarters of such a command's time.

The package itself is imported in each copy anew, as a user's process does.
"""

from __future__ import annotations

import atexit
import functools
import gc
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.support.paths import ROOT

# Only so that a command that waits for ever is noticed at all; every one of them ends within seconds.
HANGS = 900
_FILES = ("stdin", "stdout", "stderr")


@functools.cache
def _original() -> subprocess.Popen:
    """The process that is copied. It ends where its input does."""
    command = [sys.executable, "-m", "tests.support.commands"]
    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    atexit.register(process.communicate)
    return process


def run(*arguments: str, module: str = "mlx_marlin", typed: str = "") -> subprocess.CompletedProcess:
    """As ``python -m module arguments`` with files in the place of a terminal; typed: what its input has."""
    with tempfile.TemporaryDirectory() as folder:
        stdin, stdout, stderr = (Path(folder) / name for name in _FILES)
        stdin.write_text(typed)
        original = _original()
        print(json.dumps([folder, module, *arguments]), file=original.stdin, flush=True)
        status = int(original.stdout.readline())
        return subprocess.CompletedProcess(arguments, status, stdout.read_text(), stderr.read_text())


def refused(result: subprocess.CompletedProcess) -> str:
    """The one line that a command gives as its reason."""
    assert result.returncode == 2, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    *_, line = result.stderr.strip().splitlines()
    return line


def _serve() -> None:
    """Copies this process once per line of its input, and prints the status with which each copy ended."""
    import mlx_lm.server  # noqa: F401  with whom most of mlx-lm comes
    from transformers import AutoTokenizer, PreTrainedTokenizerFast  # noqa: F401  imported where they are first named

    gc.freeze()  # the copies' collections leave out what was imported
    for line in sys.stdin:
        folder, module, *arguments = json.loads(line)
        copy = os.fork()
        if not copy:
            _become(Path(folder), module, arguments)
            return
        _, status = os.waitpid(copy, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def _become(folder: Path, module: str, arguments: list[str]) -> None:
    for number, name in enumerate(_FILES):
        file = os.open(folder / name, os.O_RDWR | os.O_CREAT)
        os.dup2(file, number)
        os.close(file)
    sys.stdin = open(0)
    signal.alarm(HANGS)
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    _serve()
