"""What a conversion tells while it runs, and how the command shows it."""

import pytest

from mlx_marlin.quantize import cli, progress
from mlx_marlin.quantize.progress import Clock, Progress


@pytest.fixture
def now(monkeypatch):
    """A clock that only the test moves."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])  # one module for all
    return now


def test_work_under_way_is_told_every_two_seconds(now):
    told = []
    clock = Clock(told.append)
    clock.total = 4.0
    clock.tick("reading")
    for i in range(1, 100):
        now[0] += 0.125
        clock.tick(f"measuring {i}", i / 100)
    assert [p.stage for p in told] == ["reading", *(f"measuring {i}" for i in range(16, 100, 16))]
    assert all(p.under_way for p in told) and [p.done for p in told] == [i / 400 for i in range(0, 100, 16)]
    assert all(p.seconds_left is None for p in told)  # nothing is finished that could tell
    clock.advance("measured", 1.0)
    assert told[-1] == Progress("measured", 0.25, pytest.approx(37.125), False)
    now[0] += 2.125
    clock.tick("measuring", 0.2)
    assert told[-1] == Progress("measuring", 0.3, pytest.approx(14.5 * 2.8 / 1.2), True)


def test_a_resumed_run_expects_from_its_own_speed(now):
    told = []
    clock = Clock(told.append)
    clock.total = 4.0
    clock.skip(2.0)
    now[0] += 10
    clock.advance("measured", 1.0)
    assert told[-1].done == 0.75 and told[-1].seconds_left == pytest.approx(10)


REPORTS = [
    Progress("reading", 0.0, None, True),
    Progress("measuring 1", 0.1, None, True),
    Progress("measured", 0.25, 3725.0),
    Progress("measuring 2", 0.3, 61.0, True),
]


def shown(monkeypatch, is_terminal, now, seconds):
    monkeypatch.setattr(cli.sys.stderr, "isatty", lambda: is_terminal, raising=False)
    screen = cli._Screen([])
    for report in REPORTS:
        screen(report)
        now[0] += seconds
    screen.close()


def test_a_terminal_has_one_line_that_moves(now, monkeypatch, capsys):
    shown(monkeypatch, True, now, 2)
    lines = ["  0.0 %  reading", " 10.0 %  measuring 1", " 25.0 %  measured, 1 h 02 min left\n",
             " 30.0 %  measuring 2, 1 min 01 s left\n"]  # fmt: skip
    assert capsys.readouterr().err == "".join(f"\r\x1b[K{line}" for line in lines)


@pytest.mark.parametrize("seconds, lines", [(2, (0, 2)), (61, (0, 1, 2, 3))])
def test_a_file_has_what_is_done_and_a_line_a_minute(now, monkeypatch, capsys, seconds, lines):
    shown(monkeypatch, False, now, seconds)
    stages = [line.split("  ")[-1].split(",")[0] for line in capsys.readouterr().err.splitlines()]
    assert stages == [REPORTS[i].stage for i in lines]
