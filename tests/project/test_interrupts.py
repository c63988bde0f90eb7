"""Ctrl-C is one line and status 130, also while a command is being imported."""

import signal
import subprocess
import sys
from functools import partial
from importlib import metadata

import pytest

import mlx_marlin_commands
from mlx_marlin import __main__ as cli
from mlx_marlin.autotune.progress import ProgressBar
from mlx_marlin.quantize import Progress
from mlx_marlin.quantize import cli as quantize_cli


@pytest.fixture
def heeded():
    """Ctrl-C raises, as it does at a prompt; in a shell's background it would be ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


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
signal.signal(signal.SIGINT, signal.default_int_handler)
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


def test_what_an_interrupt_became_is_not_shown(monkeypatch, capsys, heeded):
    def interrupted():
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise ImportError("numpy failed to import") from None

    statuses = []
    monkeypatch.setattr(cli, "_main", interrupted)
    monkeypatch.setattr(cli.os, "_exit", statuses.append)
    cli.main()
    assert statuses == [mlx_marlin_commands.INTERRUPTED] == [130]
    assert capsys.readouterr().err == "\nmlx_marlin: interrupted\n"


@pytest.mark.parametrize(
    "opened", [partial(mlx_marlin_commands.imports, "any"), partial(mlx_marlin_commands.interrupts, signal.SIGINT)]
)
def test_handlers_are_given_back(opened, heeded):
    before = signal.getsignal(signal.SIGINT)
    with opened():
        assert signal.getsignal(signal.SIGINT) is not before
    assert signal.getsignal(signal.SIGINT) is before


def test_what_is_to_be_ignored_stays_so(heeded):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with mlx_marlin_commands.interrupts(signal.SIGINT) as seen:
        signal.raise_signal(signal.SIGINT)
    assert not seen
    with mlx_marlin_commands.imports("any"):
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


class Careless:
    """Where an interrupt gets lost."""

    def __del__(self):
        signal.raise_signal(signal.SIGINT)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_lost_interrupt_ends_the_work_all_the_same(heeded):
    with mlx_marlin_commands.interrupts(signal.SIGINT) as seen:
        bar, screen = ProgressBar(1, enabled=False, interrupted=seen), quantize_cli._Screen(seen)
        bar.begin("a problem")
        Careless()
        assert seen == [signal.SIGINT]
        with pytest.raises(KeyboardInterrupt):
            bar.begin("the next")
        with pytest.raises(KeyboardInterrupt):
            screen(Progress("a layer", 0.5, None, False))
