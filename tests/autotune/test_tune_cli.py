"""The mlx_marlin-tune command: arguments, profile, failures, several processes."""

import json
import subprocess
import sys
from dataclasses import asdict

import pytest
from msgspec import structs

from mlx_marlin import kernels, profile
from mlx_marlin.autotune import cli as tune_cli
from mlx_marlin.autotune import run as tuning_run
from mlx_marlin.autotune.workload import Workload
from mlx_marlin.kernels import Problem
from mlx_marlin.profile import json as profile_json
from tests.support.paths import MODELS
from tests.support.tuning import SMALL, tune

pytestmark = pytest.mark.usefixtures("tuning_sandbox")


def test_writes_the_profile_that_layers_find(capsys):
    assert tune("--batch-sizes", "1,4") == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[0].split()[:2] == ["problem", "rows"] and out.splitlines()[3] == ""
    assert out.count("swiglu 256x128 4/2 2,3 ") == 2
    said = err.splitlines()
    assert said[0] == "mlx_marlin-tune: times 2 problems (1, 4 rows) on the cpu: a layer of experts"
    assert said[1].startswith("[1/2] swiglu 256x128 4/2 2,3, 1 row: ") and said[1].endswith(" s left")
    assert said[2] == "[2/2] swiglu 256x128 4/2 2,3, 4 rows: 0 s left" and "continues" not in err
    stored = profile.load(profile.default_path("cpu"))
    problem = Problem.swiglu(256, 128, rows=4, experts=4, top_k=2, bits=((2, 2, 2), (3, 3, 3)))
    assert profile.find(problem).config == stored.problems[problem].config
    assert not list(profile.default_path("cpu").parent.glob("*.session*"))


def test_json_and_output(tmp_path, capsys, monkeypatch):
    """Every figure as a number, every config and problem as an object, every rejection with its reason."""
    call = Workload._call

    def crash(self, config, *rest):
        if config.simdgroups == 1:
            raise RuntimeError("no thread left")
        return call(self, config, *rest)

    monkeypatch.setattr(kernels.cpu, "cpu_threads", lambda: 2)
    monkeypatch.setattr(Workload, "_call", crash)
    path = tmp_path / "out" / "p.json"
    assert tune("--batch-sizes", "4", "--json", "--output", str(path)) == 0
    (row,) = json.loads(capsys.readouterr().out)
    ((problem, entry),) = profile.load(path).problems.items()
    assert row["rows"] == 4 and row["label"] == "swiglu 256x128 4/2 2,3"
    assert row["problem"] == json.loads(json.dumps(asdict(problem)))
    assert row["config"] == asdict(entry.config) and row["default"] == asdict(entry.default)
    saved = [100 * (1 - ratio) for ratio in (entry.ratio[0], entry.ratio[2], entry.ratio[1])]
    assert [row["saved_percent"], *row["saved_percent_interval"]] == saved and row["decision"] == entry.decision
    assert (row["best_ms"], row["default_ms"]) == (entry.samples.median_ms, entry.baseline.median_ms)
    assert row["objective"] == {"latency": 1.0, "throughput": 0.0, "memory": 0.0} and row["verdict"] == "correct"
    assert row["measured"] == len(entry.timings)
    assert [r["reason"] for r in row["rejected"]] == ["RuntimeError: no thread left"]
    assert row["rejected"][0]["config"]["simdgroups"] == 1
    assert not profile.default_path("cpu").exists()


def test_model(capsys):
    assert tune_cli.main(["--model", str(MODELS / "docs-moe-exl3-mixed"), *SMALL[4:], "--batch-sizes", "1"]) == 0
    out, err = capsys.readouterr()
    assert out.count("linear") == 3  # lm_head, k and v, q and o
    assert "times 4 problems (1 row) on the cpu: the layers of" in err
    lines = [line.partition("]")[2].partition(":")[0] for line in err.splitlines() if line.startswith("[")]
    assert sorted(lines) == [
        " linear 256x128 4, 1 row",
        " linear 256x2048 6, 1 row",
        " linear 256x256 4, 1 row",
        " swiglu 256x128 16/4 2..4, 1 row",
    ]
    problems = profile.load(profile.default_path("cpu")).problems
    assert {p.bits for p in problems if p.kind == "swiglu"} == {((2, 2, 2), (2, 3, 3), (3, 3, 4))}
    assert {p.top_k for p in problems if p.kind == "swiglu"} == {4}


def test_without_arguments_it_says_what_it_is_about_to_tune(monkeypatch, capsys):
    """Before it starts."""

    def start(self, problems, *rest):
        assert len(problems) == 18 and {p.rows for p in problems} == {1, 4, 8, 16, 32, 64}
        raise KeyboardInterrupt

    monkeypatch.setattr(tuning_run.Run, "tune", start)
    assert tune_cli.main(["--device", "cpu"]) == 130
    said = capsys.readouterr().err.splitlines()[0]
    assert said.startswith("mlx_marlin-tune: times 18 problems (1, 4, 8, 16, 32, 64 rows) on the cpu: the experts of ")
    assert "Qwen3-30B-A3B" in said and said.endswith("add --model DIR")


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
        (["--shape", "256,128,4,2", "--bits", "9"], "widths such as"),
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
        ([*SMALL, "--memory-limit", "1e-9"], "could not tune swiglu 256x128 4/2 2,3, 1 row: MemoryError: the weights"),
    ],
)
def test_errors_exit_with_2(arguments, message, capsys):
    assert tune_cli.main([*arguments, *([] if "--device" in arguments else ["--device", "cpu"])]) == 2
    assert message in capsys.readouterr().err


def test_foreign_profile_is_left_alone(tmp_path, capsys):
    path = tmp_path / "p.json"
    tune("--batch-sizes", "1", "--output", str(path))
    stored = profile.load(path)
    stored.fingerprint = structs.replace(stored.fingerprint, chip="Another chip")
    path.write_bytes(profile_json.encode(stored))
    before = path.read_bytes()
    assert tune("--batch-sizes", "1", "--output", str(path)) == 2
    assert "foreign profile" in capsys.readouterr().err and path.read_bytes() == before


def test_one_problem_that_fails_does_not_stop_the_others(monkeypatch, capsys):
    """Out of memory, or a default that is wrong: recorded, reported, and the rest is tuned."""
    synthetic = Workload.synthetic

    def scarce(problem, **more):
        if problem.rows == 2:
            raise MemoryError("the weights take 9 MB, the memory limit is 1 MB")
        if problem.rows == 4:
            raise RuntimeError("[malloc] out of memory")
        return synthetic(problem, **more)

    monkeypatch.setattr(Workload, "synthetic", scarce)
    assert tune("--batch-sizes", "1,2,4,8", "--json") == 0
    out, err = capsys.readouterr()
    rows = {row["rows"]: row for row in json.loads(out)}
    assert "failed" not in rows[1] and "failed" not in rows[8]
    assert rows[2]["failed"] == "MemoryError: the weights take 9 MB, the memory limit is 1 MB"
    assert rows[4]["failed"] == "RuntimeError: [malloc] out of memory"
    assert "could not tune swiglu 256x128 4/2 2,3, 2 rows: MemoryError" in err and "[4/4]" in err
    assert {p.rows for p in profile.load(profile.default_path("cpu")).problems} == {1, 8}
    assert not list(profile.default_path("cpu").parent.glob("*.session*"))


def test_a_wrong_default_is_a_failure_of_its_problem(monkeypatch, capsys):
    call = Workload._call
    monkeypatch.setattr(Workload, "_call", lambda self, *a: call(self, *a) + 1)
    assert tune("--batch-sizes", "1") == 2
    assert "could not tune" in (err := capsys.readouterr().err) and "the default config fails" in err


# A cache that cannot be written


@pytest.fixture
def no_cache(tmp_path, monkeypatch):
    """A file where the cache's folder should be: not even root can make the folder."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MLX_MARLIN_CACHE_DIR", str(tmp_path / "file" / "cache"))


def test_output_elsewhere_needs_no_cache(no_cache, tmp_path):
    path = tmp_path / "p.json"
    assert tune("--batch-sizes", "1", "--output", str(path)) == 0 and profile.load(path).problems
    assert tune_cli.main(["--check", "--device", "cpu", "--iterations", "2", "--output", str(path)]) in (0, 1)


def test_the_default_place_needs_it(no_cache, capsys, monkeypatch):
    monkeypatch.setattr(Workload, "synthetic", lambda *_, **__: pytest.fail("measured for nothing"))
    assert tune("--batch-sizes", "1") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert str(profile.default_path("cpu")) in line and "Not a directory" in line and "with --output" in line


def test_one_lock_for_all_profiles(tmp_path):
    first, second = tuning_run.clock_lock(), tuning_run.clock_lock()
    assert first.lock_file == second.lock_file == str(tmp_path / "cache" / "clock.lock")
    with first:
        assert tuning_run.clock_lock().lock_file == first.lock_file  # held, not broken


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
    done = launch(*SMALL, "--batch-sizes", "1,2", "--output", str(path))
    assert done.returncode == 0, done.stderr
    assert {p.rows for p in profile.load(path).problems} == {1, 2}
    assert "[1/1]" in done.stderr + done.stdout and "[2/2]" not in done.stderr + done.stdout
    assert not list(tmp_path.glob("*.session*"))


def test_what_one_of_several_processes_had_done_is_known_to_all_and_then_forgotten(tmp_path, capsys):
    """One file for all processes of a plan: whoever finishes it removes it, and the next run measures all again."""
    path = tmp_path / "p.json"
    arguments = [*SMALL, "--batch-sizes", "1,2,4", "--output", str(path)]
    assert tune_cli.main(arguments) == 0

    def stamps():
        return {p: e.timestamp for p, e in profile.load(path).problems.items()}

    first = stamps()
    args = tune_cli.parser().parse_args(arguments)
    run = tuning_run.Run(path, "cpu", None, None, tune_cli.RaceSettings(rounds=2, warmup=1), True)
    plan = run._plan(tuning_run.at_rows(tune_cli.layers(args, "cpu"), args.batch_sizes))
    (second,) = (p for p in first if p.rows == 2)
    tuning_run.Session(path, plan).add(done=[second])
    assert tune_cli.main(arguments) == 0 and "[3/3]" in capsys.readouterr().err
    then = stamps()
    assert {p.rows for p in first if then[p] == first[p]} == {2} and not list(tmp_path.glob("*.session*"))
    assert launch(*arguments).returncode == 0
    assert all(stamp > then[p] for p, stamp in stamps().items()) and not list(tmp_path.glob("*.session*"))


def test_one_step_differs_from_the_default_in_one_thing(monkeypatch):
    monkeypatch.setattr(kernels.cpu, "cpu_threads", lambda: 2)
    tuning_run.hardware.cache_clear()
    problem = Problem.linear(256, 512, rows=4, bits=3)
    found = tuning_run.one_step(problem)
    default = kernels.default(problem)
    assert found[0] == default and len(found) == 5 < len(kernels.candidates(problem))  # 2 panels, columns, threads
    for c in found[1:]:
        same = (c.tile_size_m == 4, c.tile_size_n == 256, c.simdgroups == 2)
        assert sum(same) == 2
