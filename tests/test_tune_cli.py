"""The mlx_marlin-tune command: arguments, profile, interruption, checks, several processes."""

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from mlx_marlin import kernels, profile, profile_io, tune_cli, tuning_run, workload
from mlx_marlin.kernels import Problem
from mlx_marlin.profile_data import Timing

MODELS = Path(__file__).parents[1] / "models"
SMALL = ["--shape", "256,128,4,2", "--bits", "2,3", "--device", "cpu", "--iterations", "2", "--warmup", "1", "--quick"]


@pytest.fixture(autouse=True)
def sandbox(tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_MARLIN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(workload, "last_level_cache", lambda: 1 << 16)
    handler = signal.getsignal(signal.SIGTERM)
    profile.refresh()
    yield
    signal.signal(signal.SIGTERM, handler)
    profile.refresh()


def tune(*more):
    return tune_cli.main([*SMALL, *more])


def test_writes_the_profile_that_layers_find(capsys):
    assert tune("--batch-sizes", "1,4") == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[0].split()[:2] == ["problem", "rows"] and len(out.splitlines()) == 3
    assert "swiglu 256x128 4/2 2,3" in out and "[2/2]" in err and "s left" in err
    stored = profile.load(profile.default_path("cpu"))
    problem = Problem("swiglu", 4, 2, 256, 128, 4, ((2, 2, 2), (3, 3, 3)), ("mul1",), "silu", "float32", "cpu")
    assert profile.lookup(problem) == stored.problems[problem].config
    assert not list(profile.default_path("cpu").parent.glob("*.session*"))


def test_json_and_output(tmp_path, capsys):
    path = tmp_path / "out" / "p.json"
    assert tune("--batch-sizes", "1", "--json", "--output", str(path)) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["rows"] == 1 and row["best_ms"] > 0 and row["decision"] in ("faster", "default", "undecided")
    assert profile.load(path).problems and not profile.default_path("cpu").exists()


def test_model(capsys):
    assert tune_cli.main(["--model", str(MODELS / "docs-moe-exl3-mixed"), *SMALL[4:], "--batch-sizes", "1"]) == 0
    assert capsys.readouterr().out.count("linear") == 3  # lm_head, k and v, q and o
    problems = profile.load(profile.default_path("cpu")).problems
    assert {p.bits for p in problems if p.kind == "swiglu"} == {((2, 2, 2), (2, 3, 3), (3, 3, 4))}
    assert {p.top_k for p in problems if p.kind == "swiglu"} == {4}


def test_model_problems_are_those_of_the_loaded_model():
    import mlx.core as mx

    import mlx_marlin
    from mlx_marlin.lm.problems import model_problems

    path = MODELS / "docs-moe-exl3-mixed"
    model, _ = mlx_marlin.load(str(path))
    posed = set()
    for _, module in model.named_modules():
        if isinstance(module, mlx_marlin.TrellisSwitchGLU):
            posed.add(module.problem(1, mx.float32, "cpu", top_k=4))
        elif isinstance(module, mlx_marlin.TrellisLinear):
            posed.add(module.problem(1, mx.float32, "cpu"))
    assert set(model_problems(path, "float32", "cpu")) == posed


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--shape", "256,128,4"], "hidden,inter,experts,top_k"),
        (["--shape", "256,128,4,5"], "top_k <= experts"),
        (["--shape", "256,128,4,2", "--bits", "9"], "widths from 1 to 8"),
        (["--bits", "2"], "--bits goes with --shape"),
        (["--batch-sizes", "0"], "at least 1"),
        (["--batch-sizes", "a"], "must be integers"),
        (["--iterations", "0"], "must be above 0"),
        (["--warmup", "-1"], "at least 0"),
        (["--budget", "nan"], "must be above 0"),
        (["--model", "x", "--shape", "1,1,1,1"], "not allowed with"),
    ],
)
def test_wrong_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit) as error:
        tune_cli.main(arguments)
    assert error.value.code == 2 and message in capsys.readouterr().err


def test_triple():
    assert tune_cli.parser().parse_args(["--shape", "256,128,4,2", "--bits", "6_2_3,4"]).bits == ((4, 4, 4), (6, 2, 3))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--model", "no/such/dir"], "no/such/dir"),
        (["--check"], "there is no profile"),
        ([*SMALL, "--memory-limit", "1e-9"], "memory limit"),
    ],
)
def test_errors_exit_with_2(arguments, message, capsys):
    assert tune_cli.main([*arguments, *([] if "--device" in arguments else ["--device", "cpu"])]) == 2
    assert message in capsys.readouterr().err


def test_foreign_profile_is_left_alone(tmp_path, capsys):
    path = tmp_path / "p.json"
    tune("--batch-sizes", "1", "--output", str(path))
    stored = profile.load(path)
    stored.fingerprint = replace(stored.fingerprint, chip="Another chip")
    path.write_bytes(profile_io.encode(stored))
    before = path.read_bytes()
    assert tune("--batch-sizes", "1", "--output", str(path)) == 2
    assert "foreign profile" in capsys.readouterr().err and path.read_bytes() == before


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


def test_interrupted_and_continued(monkeypatch, capsys):
    with monkeypatch.context() as patch:
        first = counted(patch, stop_at=2)
        assert tune("--batch-sizes", "1,2,4") == 130
    assert first == [1, 2] and "the same command continues" in capsys.readouterr().err
    second = counted(monkeypatch)
    assert tune("--batch-sizes", "1,2,4") == 0
    assert second == [4]
    assert len(capsys.readouterr().out.splitlines()) == 4  # the table has all three
    assert tune("--batch-sizes", "1,2,4") == 0
    assert second == [4, 1, 2, 4]  # a finished run is not continued


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
    (session,) = profile.default_path("cpu").parent.glob("*.session*")
    session.write_text("{")
    tuned = counted(monkeypatch)
    assert tune("--batch-sizes", "1,2") == 0 and tuned == [1, 2]


def test_terminated_process_keeps_what_it_measured(tmp_path):
    path = tmp_path / "p.json"
    code = "from mlx_marlin.tune_cli import main; raise SystemExit(main())"
    run = subprocess.Popen(
        [sys.executable, "-c", code, *SMALL, "--batch-sizes", ",".join(map(str, range(1, 60))), "--output", str(path)],
        stderr=subprocess.PIPE,
        text=True,
    )
    while not path.exists():
        assert run.poll() is None, run.stderr.read()
        time.sleep(0.05)
    run.send_signal(signal.SIGTERM)
    assert run.wait() == 130 and "interrupted" in run.stderr.read()
    assert 1 <= len(profile.load(path).problems) < 59


def test_budget_leaves_the_rest_for_later(capsys):
    assert tune("--batch-sizes", "1,2", "--budget", "1e-9") == 0
    assert "ended 2 problems early" in capsys.readouterr().err


# --check


def edited(change):
    """Change the only entry of the stored profile."""
    path = profile.default_path("cpu")
    stored = profile.load(path)
    ((problem, entry),) = stored.problems.items()
    stored.problems[problem] = change(entry)
    path.write_bytes(profile_io.encode(stored))


def test_check_passes_and_finds_a_regression(capsys):
    tune("--batch-sizes", "16", "--iterations", "6")
    edited(lambda e: replace(e, samples=Timing(20, 1e3 * e.samples.median_ms, 0.05)))
    capsys.readouterr()
    assert tune_cli.main(["--check", "--device", "cpu", "--iterations", "6"]) == 0
    assert "slower" not in capsys.readouterr().out
    edited(lambda e: replace(e, samples=Timing(20, e.samples.median_ms / 1e5, 0.05)))
    assert tune_cli.main(["--check", "--device", "cpu", "--iterations", "6"]) == 1
    assert "slower than it was" in capsys.readouterr().out


def test_check_compares_with_the_default(monkeypatch, capsys):
    tune("--batch-sizes", "1")
    worse = kernels.candidates(next(iter(profile.load(profile.default_path("cpu")).problems)))[1]
    edited(lambda e: replace(e, config=worse, samples=Timing(20, 1e6, 0.05)))
    capsys.readouterr()
    monkeypatch.setattr(tuning_run.ConfigClock, "__call__", lambda self: 1.2e-3 if self.config == worse else 1e-3)
    assert tune_cli.main(["--check", "--device", "cpu", "--json"]) == 1
    (row,) = json.loads(capsys.readouterr().out)
    assert row["regression"] == "slower than the default" and row["now_ms"] == pytest.approx(1.2)


@pytest.mark.parametrize("ratio, regressed", [(1.0, False), (1.2, False), (1.5, True)])
def test_p_slower(ratio, regressed):
    times = [1e-3 * ratio * f for f in (0.97, 0.99, 1.0, 1.01, 1.03)]
    assert (tuning_run._p_slower(times, Timing(20, 1.0, 0.03), 0.25) < 0.05) == regressed


# Several processes


def launch(*arguments):
    """``mlx.launch -n 2 --backend ring -- mlx_marlin-tune ...``"""
    command = [
        sys.executable,
        "-c",
        "from mlx._distributed_utils.launch import main; main()",
        "-n",
        "2",
        "--backend",
        "ring",
        "--",
        sys.executable,
        "-m",
        "mlx_marlin.autotune",
        *arguments,
    ]
    return subprocess.run(command, capture_output=True, text=True)


def test_two_processes_split_the_work(tmp_path):
    path = tmp_path / "p.json"
    done = launch(*SMALL, "--batch-sizes", "1,2,4,8", "--output", str(path))
    assert done.returncode == 0, done.stderr
    assert {p.rows for p in profile.load(path).problems} == {1, 2, 4, 8}
    assert "[2/2]" in done.stderr + done.stdout and "[4/4]" not in done.stderr + done.stdout
    assert not list(tmp_path.glob("*.session*"))


def test_one_step_differs_from_the_default_in_one_thing():
    problem = Problem("linear", 4, 1, 256, 256, 1, ((3,),), ("mul1",), "none", "float32", "cpu")
    steps = tuning_run.one_step(problem)
    default = kernels.default(problem)
    assert default in steps and 5 < len(steps) < len(kernels.candidates(problem))
    assert all(c.tile_size_n == default.tile_size_n or c.tile_size_m == default.tile_size_m for c in steps)
