"""Several sizes from one measurement: the files of each alone, what is used again, resuming, and tables of widths."""

import shutil

import pytest

from mlx_marlin.quantize import allocate, cli, convert, layers, measure
from tests.quantize.test_convert import MOE, digest, make_source, moe_shapes
from tests.support.conversions import Interrupted, interrupt, no_search
from tests.support.paths import MODELS

SIZES = [2.75, 3.5]
FOLDERS = ["2.75bpw", "3.5bpw"]
FIRST = "model.layers.0.self_attn.q_proj"
EXPERT = "model.layers.0.mlp.experts.{}.gate_proj"


@pytest.fixture(scope="module", autouse=True)
def quick():
    with no_search():
        yield


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("sizes")


@pytest.fixture(scope="module")
def source(root):
    return make_source(root / "source", MOE, moe_shapes(), "BF16")


@pytest.fixture(scope="module")
def text(root):
    path = root / "text"
    path.write_text((MODELS / "docs-moe/heldout.txt").read_text()[:500])
    return path


@pytest.fixture(scope="module")
def arguments(text):
    return dict(head_bits=4, embed_bits=2, calibration=text)


@pytest.fixture(scope="module")
def alone(source, arguments, root):
    """Digests of the files that conversions to one size give."""
    for size, folder in zip(SIZES, FOLDERS):
        convert(source, root / "alone" / folder, bits=size, **arguments)
    return {folder: digest(root / "alone" / folder) for folder in FOLDERS}


@pytest.fixture(scope="module")
def several(source, arguments, root):
    """The output, the plans and the stages of a conversion to both."""
    stages = []
    plans = convert(
        source, root / "several", bits=SIZES, progress=lambda report: stages.append(report.stage), **arguments
    )
    return root / "several", plans, stages


@pytest.fixture(scope="module")
def job(several):
    return several[0] / "measurement"


@pytest.fixture
def searches(monkeypatch):
    """One entry for each linear that is searched."""
    done, search = [], layers.quantize_prepared
    monkeypatch.setattr(layers, "quantize_prepared", lambda *a: done.append(a[1]) or search(*a))
    return done


def measured_again(monkeypatch):
    """A measurement that is not to be."""
    monkeypatch.setattr("mlx_marlin.quantize.measurement.prepare", lambda *_: pytest.fail("measured again"))


def digests(output):
    return {folder: digest(output / folder) for folder in FOLDERS}


def test_the_files_of_each_size_are_those_of_it_alone(several, alone):
    output, plans, stages = several
    assert digests(output) == alone
    assert sorted(p.name for p in output.iterdir()) == [*FOLDERS, "measurement"]
    assert [plan.bits for plan in plans] == sorted(plan.bits for plan in plans)
    assert all(size - 0.1 < plan.bits <= size for size, plan in zip(SIZES, plans))
    assert sum(stage.startswith("measured layer") for stage in stages) == 2


def test_stopped_after_the_first_size_and_resumed(source, arguments, alone, several, tmp_path, searches):
    output = tmp_path / "out"
    with pytest.raises(Interrupted):
        convert(source, output, bits=SIZES, progress=interrupt("quantized layer 2 of 2 for 3.5bpw"), **arguments)
    done = len(searches)
    convert(source, output, bits=SIZES, resume=True, **arguments)
    assert digests(output) == alone and len(searches) == done  # both layers were there


@pytest.mark.parametrize("stage", ["measured layer 1", "quantized layer 1 of 2 for 2.75bpw", "assembling for 2.75bpw"])
def test_stopped_in_the_middle_of_a_size(source, arguments, alone, tmp_path, stage):
    with pytest.raises(Interrupted):
        convert(source, tmp_path / "out", bits=SIZES, progress=interrupt(stage), **arguments)
    with pytest.raises(FileExistsError, match="resume what was begun"):
        convert(source, tmp_path / "out", bits=SIZES, **arguments)
    convert(source, tmp_path / "out", bits=SIZES, resume=True, **arguments)
    assert digests(tmp_path / "out") == alone


def test_a_further_size_costs_only_its_search(source, arguments, several, tmp_path, searches, monkeypatch):
    output = shutil.copytree(several[0], tmp_path / "out")
    measured_again(monkeypatch)
    (plan,) = convert(source, output, bits=[3.25], resume=True, **arguments)
    linears = len([name for name in moe_shapes() if "_proj" in name])
    first = [name for name in plan.widths if ".layers.0." in name]
    known = [name for name in first if plan.widths[name] in {p.widths[name] for p in several[1]}]
    assert known and len(searches) == linears - len(known)
    convert(source, tmp_path / "alone", bits=3.25, **arguments, job=output / "measurement")
    assert digest(tmp_path / "alone") == digest(output / "3.25bpw")
    assert digests(output) == digests(several[0])


def test_a_size_that_is_complete_must_be_this_conversions(source, arguments, several, tmp_path):
    output = shutil.copytree(several[0], tmp_path / "out")
    with pytest.raises(FileExistsError, match="2.75bpw holds a model that is not known to be this conversion's"):
        convert(source, output, bits=SIZES, resume=True, **{**arguments, "head_bits": 5})
    (output / "2.75bpw/plan.txt").write_text("")
    with pytest.raises(FileExistsError, match="not known to be"):
        convert(source, output, bits=SIZES, resume=True, **arguments)


def test_a_complete_size_may_have_got_other_files(source, arguments, several, alone, tmp_path):
    """A model card; and what is left where a process was killed as it removed the work directory."""
    output = shutil.copytree(several[0], tmp_path / "out")
    (output / "2.75bpw/README.md").write_text("A model.")
    (output / "2.75bpw/.finished").mkdir()
    convert(source, output, bits=SIZES, resume=True, **arguments)
    assert (output / "2.75bpw/README.md").exists() and not (output / "2.75bpw/.finished").exists()
    (output / "2.75bpw/README.md").unlink()
    assert digests(output) == alone


@pytest.mark.parametrize("place", ["", ".convert"])
def test_a_measurement_among_the_files_of_a_model_is_refused(source, arguments, tmp_path, place):
    with pytest.raises(ValueError, match="the measurement would lie among the files of the model in .*out; choose"):
        convert(source, tmp_path / "out", bits=2.5, job=tmp_path / "out" / place, **arguments)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("bits", [float("nan"), float("inf"), 0, 9])
def test_a_size_that_is_none(job, bits):
    with pytest.raises(ValueError, match=r"bits must lie in 1\.\.8, got"):
        allocate(job, bits)


def test_damaged_codes_of_other_sizes_are_searched_again(source, arguments, several, alone, tmp_path, caplog):
    job = shutil.copytree(several[0] / "measurement", tmp_path / "job")
    content = bytearray((job / "searched-0000.safetensors").read_bytes())
    content[len(content) // 2] ^= 1
    (job / "searched-0000.safetensors").write_bytes(content)
    convert(source, tmp_path / "out", bits=SIZES[0], job=job, **arguments)
    assert "searched-0000.safetensors was changed; that part is made again" in caplog.text
    assert digest(tmp_path / "out") == alone[FOLDERS[0]]


def test_a_damaged_measurement_is_measured_again(source, text, several, arguments, alone, tmp_path, caplog):
    job = shutil.copytree(several[0] / "measurement", tmp_path / "job")
    (job / "measured-0001.json").write_text("{}")
    with pytest.raises(ValueError, match="the measurement in .*job is not complete; mlx_marlin-convert measure goes"):
        allocate(job, 3.0)
    measure(source, job, calibration=text)
    assert "measured-0001.json is truncated" in caplog.text
    assert (job / "measured-0001.json").read_bytes() == (several[0] / "measurement/measured-0001.json").read_bytes()


def test_measurements_of_something_else(source, text, several, job, arguments, tmp_path):
    with pytest.raises(ValueError, match=r"measurement in .* was begun with something else \(settings: seed was 0, is"):
        measure(source, job, calibration=text, seed=1)
    with pytest.raises(ValueError, match="settings: codebook was"):
        convert(source, tmp_path / "out", bits=3, codebook="mcg", job=job, **arguments)
    (tmp_path / "files").mkdir()
    (tmp_path / "files/a").write_text("")
    with pytest.raises(FileExistsError, match="files holds other files, not a measurement"):
        measure(source, tmp_path / "files", calibration=text)
    with pytest.raises(ValueError, match="files holds no measurement"):
        allocate(tmp_path / "files", 3.0)


@pytest.mark.parametrize(
    "bits, message",
    [([], "got none"), ([3, 3.0], "got 3.0 twice"), ([3, 9], "1..8, got 9.0"), ([3, 1.01], "1.01 bits .* cannot be")],
)
def test_bad_sizes(source, arguments, tmp_path, bits, message):
    with pytest.raises(ValueError, match=message):
        convert(source, tmp_path / "out", bits=bits, **arguments)
    assert not (tmp_path / "out").exists()


# Tables.


@pytest.fixture(scope="module")
def table(job, root):
    allocate(job, SIZES[0], allocation=root / "table")
    return (root / "table").read_text()


def test_the_plan_of_a_size(job, several, table, root):
    plan = allocate(job, SIZES[0])
    assert (plan.widths, plan.bits, plan.loss) == tuple(getattr(several[1][0], n) for n in ("widths", "bits", "loss"))
    assert allocate(job, SIZES[0], half_rates=False, mixed="uniform").widths[FIRST] in (2, 3)
    assert (several[0] / "2.75bpw/plan.txt").read_text().startswith("# bits per weight")
    with pytest.raises(FileExistsError, match="choose another name"):
        allocate(job, 3.0, allocation=root / "table")
    with pytest.raises(ValueError, match="cannot be met"):
        allocate(job, 1.0)
    with pytest.raises(ValueError, match="mixed must be one of"):
        allocate(job, 3.0, mixed="some")


def test_a_table_gives_the_files_of_its_plan(source, arguments, several, job, root, table, alone, tmp_path):
    for name, given in (("written", root / "table"), ("plan", several[0] / "2.75bpw/plan.txt")):
        convert(source, tmp_path / name, allocation=given, job=job, **arguments)
        found, wanted = digest(tmp_path / name), dict(alone[FOLDERS[0]])
        # Its bound is that of all widths.
        assert {**found, "plan.txt": ""} == {**wanted, "plan.txt": ""}


def edited(table, name, k):
    return "\n".join(
        " ".join([name, str(k), *line.split()[2:]]) if line.startswith(f"{name} ") else line
        for line in table.splitlines()
    )


def test_an_edited_table(source, arguments, job, table, several, tmp_path):
    (tmp_path / "table").write_text("# mine\n\n" + edited(table, FIRST, 8) + "\n")
    stopped = tmp_path / "out"
    with pytest.raises(Interrupted):
        convert(
            source, stopped, allocation=tmp_path / "table", job=job, progress=interrupt("quantized layer 1"),
            **arguments,
        )  # fmt: skip
    (tmp_path / "table").write_text(edited(table, FIRST, 7))
    with pytest.raises(ValueError, match=r"begun with something else \(allocation: widths differs\)"):
        convert(source, stopped, allocation=tmp_path / "table", job=job, resume=True, **arguments)
    (tmp_path / "table").write_text(edited(table, FIRST, 8.0))
    plan = convert(source, stopped, allocation=tmp_path / "table", job=job, resume=True, **arguments)
    assert plan.widths == {**several[1][0].widths, FIRST: 8} and plan.bits > several[1][0].bits
    assert plan.bound <= plan.loss < several[1][0].loss


@pytest.mark.parametrize(
    "change, mixed, message",
    [
        (lambda t: edited(t, FIRST, 9), "per-expert", rf"line \d+: K of {FIRST} is 9; one of 1, 1.5, .*, 8 is wanted"),
        (lambda t: t.replace(FIRST, f"{FIRST}x"), "per-expert", f"has no linear {FIRST}x; the nearest is model"),
        (lambda t: edited(t, FIRST, "x"), "per-expert", rf"line \d+: K of {FIRST} is x; one of"),
        (lambda t: t.replace(f"{FIRST} ", "x.q_proj "), "per-expert", r"line \d+: the model has no linear x.q_proj; a"),
        (lambda t: t + f"{FIRST} 3\n", "per-expert", rf"line 36: {FIRST} has a K already, on line \d+; one line for"),
        (lambda t: t + f"{FIRST}\n", "per-expert", f"line 36: {FIRST} is given no K; one of"),
        (lambda t: t.replace(f"{FIRST} ", "# "), "per-expert", f"has 31 of the model's 32 linears; .* for {FIRST}$"),
        (lambda t: "", "per-expert", "has 0 of the model's 32 linears; lines are wanted for .* and 29 more"),
        (
            lambda t: edited(edited(t, EXPERT.format(0), 2), EXPERT.format(1), 3), "per-layer",
            rf"{EXPERT.format(1)} is given 3, but {EXPERT.format(0)} on line \d+ 2; with per-layer all of model.* want",
        ),
        (lambda t: b"\xff", "per-expert", "is not UTF-8"),
    ],
)  # fmt: skip
def test_bad_tables_are_refused_at_once(source, arguments, table, tmp_path, change, mixed, message):
    lines = table.splitlines()
    header = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    content = change("\n".join(["#"] * (3 - header) + lines) + "\n")
    (tmp_path / "table").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        convert(source, tmp_path / "out", allocation=tmp_path / "table", mixed=mixed, **arguments)
    assert not (tmp_path / "out").exists()


def test_either_a_size_or_a_table(source, tmp_path):
    for given in ({}, {"bits": 3, "allocation": tmp_path / "table"}):
        with pytest.raises(ValueError, match="either bits or an allocation is wanted"):
            convert(source, tmp_path / "out", **given)
    with pytest.raises(FileNotFoundError):
        convert(source, tmp_path / "out", allocation=tmp_path / "table")


def test_half_rates_in_a_table_of_whole_widths(source, arguments, table, tmp_path):
    (tmp_path / "table").write_text(edited(table, FIRST, 2.5))
    with pytest.raises(ValueError, match=r"one of 1, 2, 3, 4, 5, 6, 7, 8 is wanted"):
        convert(source, tmp_path / "out", allocation=tmp_path / "table", half_rates=False, **arguments)


# The command.


def run(*words):
    return cli.main([str(word) for word in words])


def test_the_command(source, text, alone, tmp_path, capsys):
    job, table, own = tmp_path / "job", tmp_path / "table", ["--mixed", "per-expert"]
    assert run("measure", "--model", source, "--job", job, "--calibration", text) == 0
    assert f"allocate --job {job}" in capsys.readouterr().out
    assert run("allocate", "--job", job, "--bits", 2.75, "--allocation", table, *own) == 0
    assert "bits per weight, allocation within" in capsys.readouterr().out
    options = ["--job", job, "--head-bits", 4, "--embed-bits", 2, "--calibration", text, *own]
    assert run("--model", source, "--output", tmp_path / "one", "--allocation", table, *options) == 0
    assert {**digest(tmp_path / "one"), "plan.txt": ""} == {**alone[FOLDERS[0]], "plan.txt": ""}
    assert run("--model", source, "--output", tmp_path / "out", "--bits", *SIZES, *options) == 0
    assert capsys.readouterr().out.count("see plan.txt") == 3
    assert digests(tmp_path / "out") == alone
    assert run("allocate", "--job", tmp_path, "--bits", 3) == 2
    assert "holds no measurement" in capsys.readouterr().err


def test_the_command_wants_either(capsys):
    for words in (["--bits", "3", "--allocation", "x"], []):
        with pytest.raises(SystemExit):
            run("--model", "a", "--output", "b", *words)
    assert "--bits" in capsys.readouterr().err
