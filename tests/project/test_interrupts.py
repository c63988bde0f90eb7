"""Ctrl-C is one line and status 130, also while a command is being imported."""

import signal
import subprocess
import sys
from importlib import metadata

import pytest

import mlx_marlin_commands
from mlx_marlin import cli

COMMANDS = {"mlx_marlin": "run", "mlx_marlin-convert": "convert", "mlx_marlin-tune": "tune"}


def test_the_commands_start_outside_the_package():
    scripts = metadata.entry_points(group="console_scripts")
    for command, function in COMMANDS.items():
        (script,) = scripts.select(name=command)
        assert script.value == f"{mlx_marlin_commands.__name__}:{function}"


@pytest.mark.parametrize("command, function", COMMANDS.items())
def test_an_import_is_interrupted_in_one_line(command, function):
    """An import inside mlx_marlin's own gets the signal, and makes another exception of it."""
    code = """
import importlib.abc, os, signal, sys
class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "mlx_marlin":
            try:
                os.kill(os.getpid(), signal.SIGINT)
                for _ in range(100): pass
            except KeyboardInterrupt:
                raise ImportError("interrupted") from None
sys.meta_path.insert(0, Finder())
import mlx_marlin_commands
"""
    result = subprocess.run(
        [sys.executable, "-c", f"{code}\nmlx_marlin_commands.{function}()"], capture_output=True, text=True, timeout=60
    )
    assert (result.returncode, result.stderr) == (130, f"\n{command}: interrupted\n")


def test_what_an_interrupt_became_is_not_shown(monkeypatch, capsys):
    def interrupted():
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise ImportError("numpy failed to import") from None

    before, statuses = signal.getsignal(signal.SIGINT), []
    monkeypatch.setattr(cli, "_main", interrupted)
    monkeypatch.setattr(cli.os, "_exit", statuses.append)
    try:
        cli.main()
    finally:
        signal.signal(signal.SIGINT, before)
    assert statuses == [mlx_marlin_commands.INTERRUPTED] == [130]
    assert capsys.readouterr().err == "\nmlx_marlin: interrupted\n"


def test_handlers_are_given_back():
    before = signal.getsignal(signal.SIGINT)
    with mlx_marlin_commands.imports("any"):
        assert signal.getsignal(signal.SIGINT) is not before
    assert signal.getsignal(signal.SIGINT) is before
