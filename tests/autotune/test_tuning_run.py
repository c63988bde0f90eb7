"""Runs that are interrupted, killed, short of time or taken up again."""

import os
import signal
import subprocess
import sys
import time

import pytest

from mlx_marlin import profile
from mlx_marlin.autotune import run as tuning_run
from mlx_marlin.autotune import workload
from mlx_marlin.autotune.session import Session
from mlx_marlin.autotune.workload import Workload
from mlx_marlin.kernels import Problem
from tests.support.tuning import SMALL, tune

pytestmark = pytest.mark.usefixtures("tuning_sandbox")


def sessions():
    return list(profile.default_path("cpu").parent.glob("*.session*"))


def counted(monkeypatch, stop_at=None):
    """Count the problems that are tuned; interrupt before one of them."""
    tuned = []
    one = tuning_run.Run._tune_one

    def tune_one(self, problem, *rest):
        if len(tuned) == stop_at:
            raise KeyboardInterrupt
        tuned.append(problem.rows)
        one(self, problem, *rest)

    monkeypatch.setattr(tuning_run.Run, "_tune_one", tune_one)
    return tuned


# Taken up again


def test_interrupted_and_continued(monkeypatch, capsys):
    with monkeypatch.context() as patch:
        first = counted(patch, stop_at=2)
        assert tune("--batch-sizes", "1,2,4") == 130
    assert first == [1, 2] and "the same command continues" in capsys.readouterr().err
    second = counted(monkeypatch)
    assert tune("--batch-sizes", "1,2,4") == 0
    assert second == [4]
    out, err = capsys.readouterr()
    assert out.count("swiglu") == 3 and "[3/3]" in err  # the table has all three
    assert "continues an earlier run: 2 of 3 problems were done\n" in err
    assert tune("--batch-sizes", "1,2,4") == 0
    assert second == [4, 1, 2, 4]  # a finished run is not continued
    assert "continues" not in capsys.readouterr().err


def test_another_plan_is_not_continued(monkeypatch):
    with monkeypatch.context() as patch:
        counted(patch, stop_at=1)
        assert tune("--batch-sizes", "1,2") == 130
    tuned = counted(monkeypatch)
    assert tune("--batch-sizes", "1,4") == 0
    assert tuned == [1, 4]


def test_a_damaged_session_file_starts_afresh(monkeypatch):
    with monkeypatch.context() as patch:
        counted(patch, stop_at=1)
        assert tune("--batch-sizes", "1,2") == 130
    (session,) = sessions()
    for text in ("{", "[]", "\udc80", '{"plan": 3}'):
        session.write_bytes(text.encode("utf-8", "surrogateescape"))
        with monkeypatch.context() as patch:
            tuned = counted(patch, stop_at=0)
            assert tune("--batch-sizes", "1,2") == 130 and tuned == []
    tuned = counted(monkeypatch)
    assert tune("--batch-sizes", "1,2") == 0 and tuned == [1, 2] and not sessions()


def test_a_clock_that_was_ahead_does_not_skip_anything(monkeypatch):
    """Entries stamped in the future looked done to every later run."""
    with monkeypatch.context() as patch:
        now = time.time
        patch.setattr("mlx_marlin.autotune.trial.time.time", lambda: now() + 1e6)
        assert tune("--batch-sizes", "1,2") == 0
    path = profile.default_path("cpu")
    assert {e.timestamp for e in profile.load(path).problems.values()} == {0.0}
    tuned = counted(monkeypatch)
    assert tune("--batch-sizes", "1,2") == 0 and tuned == [1, 2]
    assert all(e.timestamp > 0 for e in profile.load(path).problems.values())


def test_a_problem_whose_entry_is_gone_is_tuned_again(monkeypatch):
    with monkeypatch.context() as patch:
        counted(patch, stop_at=1)
        assert tune("--batch-sizes", "1,2") == 130
    profile.default_path("cpu").unlink()
    tuned = counted(monkeypatch)
    assert tune("--batch-sizes", "1,2") == 0 and tuned == [1, 2]


def test_a_problem_that_failed_is_tried_again_when_all_else_is_done(monkeypatch, capsys):
    with monkeypatch.context() as patch:
        counted(patch, stop_at=2)
        patch.setattr(Workload, "synthetic", lambda problem, **more: (_ for _ in ()).throw(MemoryError("too large")))
        assert tune("--batch-sizes", "1,2,4") == 130
    again = counted(monkeypatch)
    assert tune("--batch-sizes", "1,2,4") == 0 and again == [4, 1, 2]
    assert "could not tune" not in capsys.readouterr().err.partition("continues")[2]


def test_sessions_that_nobody_continues_are_removed(monkeypatch):
    with monkeypatch.context() as patch:
        counted(patch, stop_at=1)
        assert tune("--batch-sizes", "1,2") == 130
    (forgotten,) = sessions()
    other = forgotten.with_name("p.json.session-mine")  # no name of ours
    other.write_text("")
    for days, left in ((29, {forgotten, other}), (31, {other})):
        for path in sessions():
            os.utime(path, times=(time.time() - days * 86400,) * 2)
        assert tune("--batch-sizes", "4") == 0
        assert set(sessions()) == left


# Two processes of one plan


def test_whoever_finishes_the_plan_takes_nothing_from_the_other(tmp_path):
    """Both read what the other did; the first removes the file while the second is still at it."""
    problems = [Problem.linear(256, 128, rows=rows, bits=3) for rows in (1, 2)]
    first, second = (Session(tmp_path / "p.json", "plan") for _ in range(2))
    second.add(done=[problems[1]], failed={problems[0]: "no memory"})
    told = second.encode()
    first.add(done=[problems[0]])
    second.absorb(first.encode())
    second.close()
    first.absorb(told)
    assert first.done == second.done == set(problems) and not first.failed and not second.failed


# Real signals


MANY = ",".join(map(str, range(1, 11)))


def told(path):
    return path.with_name("stderr")


def started(path, rows=MANY):
    """A run of its own process that has stored something, but not yet all; its stderr is in a file beside."""
    # Whoever runs the tests in a shell's background gave us SIGINT ignored, which a child inherits.
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    code += "from mlx_marlin.autotune.cli import main; raise SystemExit(main())"
    with open(told(path), "w") as stderr:
        run = subprocess.Popen(
            [sys.executable, "-c", code, *SMALL, "--batch-sizes", rows, "--output", str(path)], stderr=stderr
        )
    while not path.exists():
        assert run.poll() is None, told(path).read_text()
        time.sleep(0.02)
    return run


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_an_interrupted_process_keeps_what_it_measured(tmp_path, number):
    path = tmp_path / "p.json"
    run = started(path, ",".join(map(str, range(1, 101))))  # far more than are done before a signal comes
    run.send_signal(number)
    assert run.wait() == 130, told(path).read_text()
    error = told(path).read_text()
    assert "interrupted" in error and "Traceback" not in error
    assert 1 <= len(profile.load(path).problems) < 100 and not list(tmp_path.glob("*.tmp"))


def test_a_killed_process_is_continued_where_it_was(tmp_path):
    path = tmp_path / "p.json"
    run = started(path)
    run.kill()
    run.wait()
    before = {p: e.timestamp for p, e in profile.load(path).problems.items()}
    assert before
    assert tune("--batch-sizes", MANY, "--output", str(path)) == 0
    after = {p: e.timestamp for p, e in profile.load(path).problems.items()}
    assert {p.rows for p in after} == set(range(1, 11))
    again = [p for p in before if after[p] != before[p]]
    assert len(again) <= 1  # the last one may have been stored and not yet noted
    assert not list(tmp_path.glob("*.session*"))


# Time


@pytest.fixture
def now(monkeypatch):
    """A clock that only the test moves; a check takes a second of it, a sample none."""
    now, checked = [0.0], []
    for module in ("autotune.run", "measure.race", "autotune.cli"):
        monkeypatch.setattr(f"mlx_marlin.{module}.time.perf_counter", lambda: now[0])

    def check(self, config):
        now[0] += 1.0
        checked.append((self.problem.rows, config))
        return 0.0

    monkeypatch.setattr(Workload, "check", check)
    monkeypatch.setattr(workload.ConfigClock, "warm_up", lambda self, calls: self._check())
    monkeypatch.setattr(workload.ConfigClock, "__call__", lambda self: 1.0)
    monkeypatch.setattr("mlx_marlin.autotune.trial.measure.launch_floor", lambda: 1e-4)
    monkeypatch.setattr("mlx_marlin.autotune.trial.measure.control", lambda stream, floor: lambda: 1.0)
    return now, checked


def test_no_time_leaves_all_for_later(capsys):
    assert tune("--batch-sizes", "1,2", "--budget", "1e-9") == 0
    assert "ended 2 problems early" in capsys.readouterr().err


def test_slow_checks_stay_within_the_budget_and_runs_make_progress(now, capsys):
    """Each run gets some checks done; none is done twice; in the end all is tuned."""
    now, checked = now
    stored, runs = [], 0
    while True:
        start, before = now[0], len(checked)
        assert tune("--batch-sizes", "16,64", "--budget", "3.5") == 0
        runs += 1
        assert now[0] - start <= 3.5 + 1.0  # one check may be under way when the time is over
        err = capsys.readouterr().err
        if "early" not in err:
            break
        assert len(checked) > before
        stored = profile.load(path).problems if (path := profile.default_path("cpu")).exists() else {}
    assert len(checked) == len(set(checked)) and runs > 2
    assert {p.rows for p in profile.load(profile.default_path("cpu")).problems} == {16, 64} and len(stored) <= 1
    assert not sessions()


def test_the_share_of_a_problem_begins_when_the_clock_is_free(now, monkeypatch):
    """Waiting for another process's measurement takes nothing of a problem's own time."""
    now, _ = now
    given = []
    benchmark = tuning_run.MixedBPWAutoTuner.benchmark_layer

    def spy(self, *a, limits, **more):
        given.append((now[0], limits))
        return benchmark(self, *a, limits=limits, **more)

    monkeypatch.setattr(tuning_run.MixedBPWAutoTuner, "benchmark_layer", spy)

    class Busy:
        """Another process holds the clock for ten seconds at a time."""

        def acquire(self, timeout):
            assert timeout > 10.0
            now[0] += 10.0
            return self

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(tuning_run, "clock_lock", Busy)
    assert tune("--batch-sizes", "1,2", "--budget", "1000") == 0
    (first, limits), (second, later) = given
    assert first == 10.0 and limits.share == pytest.approx(10.0 + 990.0 / 2) and limits.deadline == 1000.0
    assert later.share == pytest.approx(1000.0) and second > 20.0


def test_a_clock_that_never_gets_free_leaves_the_rest(capsys):
    held = tuning_run.clock_lock()
    with held:
        assert tune("--batch-sizes", "1,2", "--budget", "0.2") == 0
    assert "ended 2 problems early" in capsys.readouterr().err
