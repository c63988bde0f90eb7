"""mlx_marlin-tune --check: what is found, what is not, and with which exit code."""

import json
import math
import random
import shutil
from dataclasses import replace

import pytest
from msgspec import structs

from mlx_marlin import kernels, profile
from mlx_marlin.autotune import check as regression
from mlx_marlin.autotune import cli as tune_cli
from mlx_marlin.autotune import workload
from mlx_marlin.autotune.run import one_step
from mlx_marlin.autotune.workload import Workload
from mlx_marlin.profile import json as profile_json

SMALL = ["--shape", "256,256,4,2", "--bits", "2,3", "--device", "cpu", "--iterations", "8", "--warmup", "1", "--quick"]


class World:
    """A machine whose speed and whose noise only the test sets."""

    def __init__(self):
        self.speed, self.noise, self.rng = 1.0, 0.01, random.Random(0)
        self.times, self.control, self.calls = {}, 1.0, 0

    def sample(self, mean):
        self.calls += 1
        return 1e-3 * mean * self.speed * math.exp(self.rng.gauss(0, self.noise))


@pytest.fixture
def world(tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_MARLIN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(workload, "last_level_cache", lambda: 1 << 16)
    monkeypatch.setattr(kernels.cpu, "cpu_threads", lambda: 2)
    world = World()
    monkeypatch.setattr(workload.ConfigClock, "__call__", lambda self: world.sample(world.times.get(self.config, 1.0)))
    monkeypatch.setattr(workload.ConfigClock, "warm_up", lambda self, n: self._check and self._check())
    for module in ("trial", "check"):
        monkeypatch.setattr(f"mlx_marlin.autotune.{module}.measure.control", lambda *_: Control(world))
        monkeypatch.setattr(f"mlx_marlin.autotune.{module}.measure.launch_floor", lambda: 1e-4)
    profile.refresh()
    yield world
    profile.refresh()


class Control:
    def __init__(self, world):
        self.world = world

    def warm_up(self, calls):
        pass

    def __call__(self):
        return self.world.sample(self.world.control)


def tune(*more):
    assert tune_cli.main([*SMALL, *more]) == 0


def check(capsys, *more):
    """Exit code, rows of the table by batch size, and what was said beside."""
    capsys.readouterr()
    code = tune_cli.main(["--check", "--device", "cpu", "--iterations", "8", "--json", *more])
    out, err = capsys.readouterr()
    return code, {row["rows"]: row for row in json.loads(out or "[]")}, err


def edited(change):
    """Change the entries of the stored profile."""
    path = profile.default_path("cpu")
    stored = profile.load(path)
    stored.problems = {problem: change(entry) for problem, entry in stored.problems.items()}
    path.write_bytes(profile_json.encode(stored))


def other_of(problem):
    """A candidate of a quick run that is not the default."""
    return next(config for config in one_step(problem) if config != kernels.default(problem))


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """What is stored of the first test's tuning: all find the same."""
    return tmp_path_factory.mktemp("stored") / "cache"


@pytest.fixture
def tuned(world, stored, tmp_path):
    """One entry at 16 rows that is the default, one at 64 rows that is not."""
    if stored.exists():
        shutil.copytree(stored, tmp_path / "cache")
    else:
        tune("--batch-sizes", "16")
        (problem,) = profile.load(profile.default_path("cpu")).problems
        better = other_of(replace(problem, rows=64))
        world.times = {better: 0.8}
        tune("--batch-sizes", "64")
        shutil.copytree(tmp_path / "cache", stored)
    profile.refresh()
    problems = profile.load(profile.default_path("cpu")).problems
    entries = {problem.rows: entry for problem, entry in problems.items()}
    better = other_of(next(problem for problem in problems if problem.rows == 64))
    assert entries[16].config == entries[16].default and entries[64].config == better
    world.times = {better: 0.8}
    return world


def test_nothing_has_changed(tuned, capsys):
    code, rows, _ = check(capsys)
    assert code == 0 and set(rows) == {16, 64} and not any(r["regression"] or r["note"] for r in rows.values())
    assert rows[64]["now_ms"] == pytest.approx(0.8, rel=0.05) and rows[64]["default_ms"] == pytest.approx(1.0, rel=0.05)
    assert rows[64]["stored_saved_percent"] == pytest.approx(20, abs=4)


@pytest.mark.parametrize("speed", [0.3, 3.0])
def test_a_machine_of_another_speed_is_no_regression(tuned, capsys, speed):
    """Neighbours, heat, batteries: the default and the control have slowed down alike."""
    tuned.speed = speed
    assert check(capsys)[0] == 0


def test_a_slower_config_is_found_beside_the_default(tuned, capsys):
    """Even where the machine has become faster, so that no stored time shows it."""
    (better,) = tuned.times
    tuned.times, tuned.speed = {better: 1.3}, 0.5
    code, rows, _ = check(capsys)
    assert code == 1 and not rows[16]["regression"]
    assert rows[64]["regression"] == "slower than it was and slower than the default"
    tuned.times = {better: 0.95}  # less than a quarter slower than it was
    assert check(capsys)[0] == 0
    assert check(capsys, "--tolerance", "0.1")[0] == 1


def test_a_slower_default_is_found_beside_the_control(tuned, capsys):
    tuned.times |= {kernels.default(p): 1.5 for p in profile.load(profile.default_path("cpu")).problems if p.rows == 16}
    code, rows, _ = check(capsys, "--batch-sizes", "16")
    assert code == 1 and rows[16]["regression"] == "slower than it was"


def test_a_regression_must_show_again(tuned, capsys, monkeypatch):
    """What only the first samples show was a neighbour."""
    looks, look = [], regression.Check._look

    def disturbed(self, problem, entry):
        looks.append(problem.rows)
        sampled = look(self, problem, entry)
        return replace(sampled, config=[3 * t for t in sampled.config]) if len(looks) <= 2 else sampled

    monkeypatch.setattr(regression.Check, "_look", disturbed)
    assert check(capsys)[0] == 0 and looks == [16, 64, 16, 64]


@pytest.mark.parametrize("runs", [5, pytest.param(40, marks=pytest.mark.slow)])
def test_noise_alone_is_no_regression(tuned, capsys, runs):
    tuned.noise = 0.2
    assert sum(check(capsys)[0] for _ in range(runs)) <= 1


def test_an_entry_without_anything_to_compare_with(tuned, capsys):
    edited(lambda e: structs.replace(e, over_control=None))
    tuned.times |= {kernels.default(p): 5.0 for p in profile.load(profile.default_path("cpu")).problems if p.rows == 16}
    code, rows, _ = check(capsys, "--batch-sizes", "16")
    assert code == 0 and rows[16]["note"] == "nothing was stored that it could be compared with"


def test_a_config_chosen_for_its_memory_may_be_slower_than_the_default(tuned, capsys):
    (better,) = tuned.times
    tuned.times = {better: 1.2}
    edited(lambda e: structs.replace(e, ratio=(1.2, 1.19, 1.21), objective=(1.0, 0.0, 1.0)))
    assert check(capsys, "--batch-sizes", "64")[0] == 0
    edited(lambda e: structs.replace(e, objective=(1.0, 0.0, 0.0)))
    assert check(capsys, "--batch-sizes", "64")[1][64]["regression"] == "slower than the default"


# What cannot run any more


def test_a_wrong_result_is_a_finding(tuned, capsys, monkeypatch):
    (better,) = tuned.times
    call = Workload._call
    monkeypatch.setattr(Workload, "_call", lambda self, c, *r: call(self, c, *r) + (c == better))
    code, rows, _ = check(capsys)
    assert code == 1 and not rows[16]["regression"] and rows[16]["now_ms"]
    assert rows[64]["regression"].startswith("ValueError: wrong result: of 65 rows") and rows[64]["now_ms"] is None


def test_an_infeasible_config_is_a_finding(tuned, capsys):
    edited(lambda e: structs.replace(e, config=replace(e.config, tile_size_n=48)))
    code, rows, _ = check(capsys)
    assert code == 1 and all(r["regression"].startswith("infeasible: a task on the CPU has") for r in rows.values())


def test_a_crashing_default_is_a_finding(tuned, capsys, monkeypatch):
    call = Workload._call

    def crash(self, config, *rest):
        if config == kernels.default(self.problem):
            raise RuntimeError("gone")
        return call(self, config, *rest)

    monkeypatch.setattr(Workload, "_call", crash)
    _, rows, _ = check(capsys)
    assert (
        rows[16]["regression"] == "RuntimeError: gone" and rows[64]["regression"] == "its default: RuntimeError: gone"
    )


def test_what_does_not_fit_the_memory_is_not_judged(tuned, capsys):
    code, rows, err = check(capsys, "--memory-limit", "1e-6")
    assert code == 2 and "nothing was measured: of the 2 entries" in err
    assert all("not measured: the weights take" in r["note"] and not r["regression"] for r in rows.values())


def test_memory_that_the_machine_does_not_have_is_no_regression(tuned, capsys, monkeypatch):
    synthetic = Workload.synthetic

    def scarce(problem, **more):
        if problem.rows == 16:
            raise RuntimeError("[malloc] out of memory")
        return synthetic(problem, **more)

    monkeypatch.setattr(Workload, "synthetic", scarce)
    code, rows, _ = check(capsys)
    assert code == 0 and rows[64]["now_ms"] and rows[16]["note"] == "not measured: [malloc] out of memory"


# Which profile, which entries


def test_another_build_of_the_kernels_is_checked(tuned, capsys):
    """That is what a check in CI is for; each build has a profile of its own."""
    path = profile.default_path("cpu")
    stored = profile.load(path)
    stored.fingerprint = structs.replace(stored.fingerprint, kernel_hash="0" * 16, os="Linux 1", mlx_version="0.1")
    old = path.with_name(f"{path.stem[:-8]}{'0' * 8}.json")
    old.write_bytes(profile_json.encode(stored))
    path.unlink()
    code, rows, err = check(capsys)
    assert code == 0 and set(rows) == {16, 64} and str(old) in err
    assert check(capsys, "--output", str(old))[0] == 0


def test_another_machine_is_refused(tuned, capsys):
    path = profile.default_path("cpu")
    stored = profile.load(path)
    stored.fingerprint = structs.replace(stored.fingerprint, chip="Another chip")
    path.write_bytes(profile_json.encode(stored))
    code, _, err = check(capsys)
    assert code == 2 and "foreign profile: it was measured on Another chip" in err


@pytest.mark.parametrize(
    "arguments, found",
    [
        ([], {16, 64}),
        (["--batch-sizes", "16,17"], {16}),
        (["--shape", "256,256,4,2", "--bits", "2,3"], {16, 64}),
        (["--shape", "256,256,4,2", "--bits", "2,3", "--batch-sizes", "64"], {64}),
        (["--shape", "256,256,4,2", "--bits", "2,3", "--quick"], {16, 64}),
    ],
)
def test_arguments_choose_the_entries(tuned, capsys, arguments, found):
    code, rows, _ = check(capsys, *arguments)
    assert code == 0 and set(rows) == found


@pytest.mark.parametrize(
    "arguments",
    [
        ["--batch-sizes", "17"],
        ["--shape", "256,256,4,2", "--bits", "4"],
        ["--shape", "256,256,4,2", "--bits", "2,3", "--dtype", "float16"],
        ["--budget", "1e-9"],
    ],
)
def test_measuring_nothing_is_not_success(tuned, capsys, arguments):
    code, rows, err = check(capsys, *arguments)
    assert code == 2 and rows == {} and "nothing was measured: of the 2 entries of " in err


def test_the_table_names_the_regression(tuned, capsys):
    edited(lambda e: structs.replace(e, config=replace(e.config, tile_size_n=48)))
    capsys.readouterr()
    assert tune_cli.main(["--check", "--device", "cpu", "--iterations", "2"]) == 1
    assert capsys.readouterr().out.count("infeasible: ") == 2


def test_a_real_check_says_no_or_yes(tmp_path, monkeypatch, capsys):
    """Without a planted clock, on whatever machine this is: both answers are right, an error is not."""
    monkeypatch.setenv("MLX_MARLIN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(workload, "last_level_cache", lambda: 1 << 16)
    tune("--batch-sizes", "1")
    code, rows, _ = check(capsys)
    assert code in (0, 1) and rows[1]["now_ms"] > 0 and bool(rows[1]["regression"]) == (code == 1)
    (entry,) = profile.load(profile.default_path("cpu")).problems.values()
    assert entry.over_control is not None
