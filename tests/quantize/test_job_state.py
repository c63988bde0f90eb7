"""Interrupted conversions: what is damaged or foreign is told and made again, and the files are the same in the end."""

import fcntl
import json
import logging
import random
import shutil
import struct
from dataclasses import replace
from pathlib import Path

import pytest

from mlx_marlin.quantize import convert, job_state, resume
from mlx_marlin.storage.safetensors import TensorInfo, read_header
from tests.quantize.test_convert import MOE, digest, make_source, moe_shapes
from tests.support.conversions import Interrupted, interrupt, no_search
from tests.support.paths import MODELS

STAGES = ("measured layer 1", "quantized layer 1", "assembling")


@pytest.fixture(scope="module")
def quick():
    with no_search():
        yield


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("state")


@pytest.fixture(scope="module")
def arguments(root):
    text = root / "text"
    text.write_text((MODELS / "docs-moe/heldout.txt").read_text()[:500])
    return dict(bits=2.75, head_bits=4, embed_bits=2, calibration=text)


@pytest.fixture(scope="module")
def source(root):
    return make_source(root / "source", MOE, moe_shapes(), "BF16")


@pytest.fixture(scope="module")
def finished(quick, source, arguments, root):
    """Digests of the files that an undisturbed conversion gives."""
    convert(source, root / "finished", **arguments)
    return digest(root / "finished")


@pytest.fixture(scope="module")
def stopped(quick, source, arguments, root):
    """Conversions that were stopped, by stage; and another one, with another seed."""
    outputs = {stage: root / stage for stage in (*STAGES, "foreign")}
    for stage, output in outputs.items():
        with pytest.raises(Interrupted):
            convert(
                source, output, progress=interrupt("assembling" if stage == "foreign" else stage),
                seed=int(stage == "foreign"), **arguments,
            )  # fmt: skip
    return outputs


@pytest.fixture
def work(stopped, tmp_path):
    """The work directory of a copy that was stopped before its last files."""
    return Path(shutil.copytree(stopped["assembling"], tmp_path / "exl3")) / ".convert"


@pytest.fixture
def told(monkeypatch):
    """What was logged."""
    lines = []
    monkeypatch.setattr(logging.getLogger("mlx_marlin.quantize"), "warning", lines.append)
    return lines


PARTS = (
    "measurement/measured-0000.json", "measurement/measured-0001.json", "measurement/sensitivity.json",
    "measurement/embedding-2.safetensors", "layer-0000.safetensors", "layer-0001.safetensors", "head.safetensors",
    "layer-state-0001.safetensors",
)  # fmt: skip
JOBS = ("job.json", "measurement/job.json")
SEARCHED = "measurement/searched-0000.safetensors"


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 16
    path.write_bytes(content)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def empty(path):
    path.write_bytes(b"")


def test_the_parts_are_these(work):
    made = {str(p.relative_to(work)) for p in work.rglob("*") if p.is_file()} - {"layer-state-0000.safetensors"}
    jobs = {f"{place}{name}" for place in ("", "measurement/") for name in ("job.json", "lock")}
    assert made == {*PARTS, SEARCHED, *jobs, "plan.txt"}


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("damage, message", [(flip, "was changed"), (truncate, "is truncated"), (empty, "truncated")])
def test_a_damaged_part_is_told_and_made_again(source, arguments, finished, work, told, name, damage, message):
    damage(work / name)
    reports = []
    convert(source, work.parent, resume=True, progress=reports.append, **arguments)
    (line,) = told
    assert line.startswith(str(work / name)) and message in line and "made again" in line
    assert line in [r.stage for r in reports]
    assert digest(work.parent) == finished


@pytest.mark.parametrize("name", PARTS)
def test_a_part_of_another_conversion(source, arguments, finished, stopped, work, told, name):
    shutil.copy(stopped["foreign"] / ".convert" / name, work / name)
    convert(source, work.parent, resume=True, **arguments)
    assert f"{work / name} belongs to another conversion; that part is made again" in told
    assert digest(work.parent) == finished


def test_parts_that_changed_places(source, arguments, finished, work, told):
    (work / "layer-0000.safetensors").rename(work / "x")
    (work / "layer-0001.safetensors").rename(work / "layer-0000.safetensors")
    (work / "x").rename(work / "layer-0001.safetensors")
    convert(source, work.parent, resume=True, **arguments)
    assert [line.partition(" ")[2] for line in told] == [
        f"is a copy of layer-{i:04}.safetensors; that part is made again" for i in (1, 0)
    ]
    assert digest(work.parent) == finished


def test_a_seal_over_other_content(source, arguments, finished, work, told):
    """JSON with another type in it, and its old seal; then a new digest, which only the whole chain tells."""
    path = work / "measurement/measured-0000.json"
    content = path.read_bytes()
    path.write_bytes(content.replace(b'"energy": "', b'"energy": [', 1))
    convert(source, work.parent, resume=True, **arguments)
    assert "was changed" in told[0] and digest(work.parent) == finished


@pytest.mark.parametrize("lost", ["*-state-*", "*-state-0001*", "layer-0000*", "measured-*", "*.json", "l*"])
def test_parts_that_are_gone(source, arguments, finished, work, lost):
    for path in work.rglob(lost):
        path.unlink()
    convert(source, work.parent, resume=True, **arguments)
    assert digest(work.parent) == finished


def test_layers_that_are_there_are_not_searched_again(source, arguments, finished, work, monkeypatch):
    """Their codes are installed again where the states behind them are lost."""
    from mlx_marlin.quantize import layers

    for path in (*work.glob("layer-state-*"), work / "layer-0001.safetensors"):
        path.unlink()
    searched, search = [], layers.quantize_prepared
    monkeypatch.setattr(layers, "quantize_prepared", lambda *a: searched.append(1) or search(*a))
    convert(source, work.parent, resume=True, **arguments)
    assert len(searched) == len([n for n in moe_shapes() if ".layers.1." in n and "_proj" in n])
    assert digest(work.parent) == finished


def test_states_that_a_layer_does_not_give(source, arguments, finished, work, told, monkeypatch):
    """Where a layer's stored codes do not lead on to the same states, it is made again."""
    from mlx_marlin.quantize import layers

    for path in work.glob("layer-state-*"):
        path.unlink()
    read = layers.stored_codes

    def negated(name, stored, *rest):
        codes = read(name, stored, *rest)
        return replace(codes, svh=-codes.svh) if isinstance(stored[f"{name}.svh"], TensorInfo) else codes

    monkeypatch.setattr(layers, "stored_codes", negated)
    convert(source, work.parent, resume=True, **arguments)
    assert [line for line in told if "does not give the states that it says" in line] and digest(
        work.parent
    ) == finished


def reseal(path: Path, **changes) -> None:
    """A file as another program could make it that knows how seals are made."""
    content = path.read_bytes()[: -job_state._TAIL.size]
    (length,) = struct.unpack("<Q", content[-8:])
    said = json.loads(content[-8 - length : -8])
    said["made_from"].update(changes)
    seal = json.dumps(said).encode()
    body = content[: -8 - length] + seal + struct.pack("<Q", len(seal))
    path.write_bytes(body + job_state._TAIL.pack(job_state.hashlib.sha256(body).digest(), job_state._MAGIC))


@pytest.mark.parametrize(
    "name, key, shown",
    [
        ("layer-0000.safetensors", "widths", "widths"),
        ("layer-0001.safetensors", "before", "hidden states"),
        ("measurement/sensitivity.json", "before", "before"),
        ("head.safetensors", "before", "before"),
    ],
)
def test_what_was_made_from_something_else(source, arguments, finished, work, told, name, key, shown):
    reseal(work / name, **{key: "0" * 64})
    convert(source, work.parent, resume=True, **arguments)
    assert told == [f"{work / name} was made from something else ({shown}); that part is made again"]
    assert digest(work.parent) == finished


# What a conversion was begun with.


def copy(source: Path, path: Path, **config) -> Path:
    """A copy of a checkpoint, with other file times."""
    shutil.copytree(source, path, copy_function=shutil.copyfile)
    content = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**content, **config}))
    return path


@pytest.mark.parametrize("stage", STAGES)
def test_a_source_that_was_moved(source, arguments, finished, stopped, tmp_path, told, stage):
    output = shutil.copytree(stopped[stage], tmp_path / "exl3")
    moved = copy(source, tmp_path / "moved", some_note="x", transformers_version="9")
    convert(moved, output, resume=True, **arguments)
    assert not told
    assert {**digest(output), "config.json": ""} == {**finished, "config.json": ""}
    assert json.loads((output / "config.json").read_text())["some_note"] == "x"


def test_a_source_with_another_value(source, arguments, work, tmp_path):
    other = copy(source, tmp_path / "other")
    name = "model.layers.1.self_attn.q_proj.weight"
    info = read_header(other / "model.safetensors")[name]
    content = bytearray((other / "model.safetensors").read_bytes())
    content[info.start + 100] ^= 1
    (other / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=rf"begun with something else \(tensors: {name} differs\)"):
        convert(other, work.parent, resume=True, **arguments)


def test_other_settings(source, arguments, work, tmp_path):
    def message(model=source, **changes):
        with pytest.raises(ValueError, match="begun with something else") as error:
            convert(model, work.parent, resume=True, **{**arguments, **changes})
        return str(error.value)

    assert "(settings: seed was 0, is 5)" in message(seed=5)
    assert "settings: head_bits was 4, is 6; settings: mixed was" in message(head_bits=6, mixed="uniform")
    other = copy(source, tmp_path / "other", rope_theta=20000.0)
    assert "(config.json: rope_theta was 10000.0, is 20000.0)" in message(other)
    (tmp_path / "text").write_text("Other words. " * 100)
    assert "(calibration: tokens differs)" in message(calibration=tmp_path / "text")


def test_differences_are_few_words():
    begun = {"config.json": {"a": 1, "b": [1] * 100, "c": None}, "tensors": {str(i): "x" for i in range(9)}}
    now = {"config.json": {"a": 1, "b": 2, "d": 0}, "tensors": {str(i): "y" for i in range(9)}}
    assert resume.differences(begun, now) == [
        f"config.json: b was {str([1] * 100)[:40]}..., is 2", "config.json: c is gone", "config.json: d is new",
        "tensors: 0 differs", "tensors: 1 differs", "tensors: 2 differs", "tensors: 6 more",
    ]  # fmt: skip


def test_keys_that_model_code_may_read():
    """A class of arguments that is given the whole config: nothing but provenance is left out."""
    config = {"model_type": "qwen3_5", "text_config": {"x": 1, "dtype": "bfloat16"}, "note": 1, "torch_dtype": "x"}
    assert resume.related_config(config) == {"model_type": "qwen3_5", "text_config": {"x": 1}, "note": 1}
    assert resume.related_config({**config, "model_type": "none"}) == {
        "model_type": "none", "text_config": {"x": 1}, "note": 1,
    }  # fmt: skip


@pytest.mark.parametrize("damage", [flip, truncate, empty, Path.unlink])
def test_without_its_job(source, arguments, finished, work, told, damage):
    damage(work / "job.json")
    convert(source, work.parent, resume=True, **arguments)
    assert told == [f"{work / 'job.json'} is missing or damaged; parts that were made from the same are taken up"]
    assert digest(work.parent) == finished


def test_without_its_job_and_with_other_settings(source, arguments, work, told, stopped, tmp_path):
    for place in (work, work / "measurement"):
        (place / "job.json").unlink()
    convert(source, work.parent, resume=True, **{**arguments, "seed": 1})
    assert {line.partition(" ")[0] for line in told} <= {str(work / name) for name in (*JOBS, *PARTS, SEARCHED)}
    convert(source, stopped["foreign"].parent / "second", **{**arguments, "seed": 1})
    assert digest(work.parent) == digest(stopped["foreign"].parent / "second")


def test_two_conversions_into_one_directory(source, arguments, finished, work):
    with open(work / "lock", "wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match=f"another conversion is writing to {work.parent}; wait"):
            convert(source, work.parent, resume=True, **arguments)
    convert(source, work.parent, resume=True, **arguments)
    assert digest(work.parent) == finished


def test_an_output_that_is_something_else(source, arguments, finished, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError, match="file is not a directory; choose another name"):
        convert(source, tmp_path / "file", **arguments)
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="dangling is a link to .*nowhere, which is not there"):
        convert(source, tmp_path / "dangling", **arguments)
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    with pytest.raises(FileNotFoundError, match="circle is a link to .*circle, which is not there"):
        convert(source, tmp_path / "circle", **arguments)
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    convert(source, tmp_path / "link", **arguments)
    assert digest(tmp_path / "folder") == finished
    (tmp_path / "kept").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other/.convert").symlink_to(tmp_path / "kept")
    with pytest.raises(ValueError, match=r"\.convert is a link, where a conversion keeps what is not finished"):
        convert(source, tmp_path / "other", resume=True, **arguments)


# Random damage.


def mutate(rng: random.Random, work: Path, foreign: Path) -> str:
    """Damage a work directory; returns how."""
    names = sorted(str(p.relative_to(work)) for p in work.rglob("*") if p.name != "lock" and not p.is_dir())
    name, other_name = rng.choice(names), rng.choice(names)
    path, other = work / name, work / other_name
    if path.is_symlink():  # of an earlier damage: nothing is to be written through it
        path.unlink()
        return f"gone {name}"
    content = path.read_bytes() if path.is_file() else b""
    kind = rng.choice(("cut", "bits", "bytes", "append", "gone", "swap", "copy", "foreign", "json", "link", "nothing"))
    if kind == "cut":
        path.write_bytes(content[: rng.randrange(len(content) + 1)])
    elif kind in ("bits", "bytes"):
        changed = bytearray(content)
        for _ in range(rng.randint(1, 4) if changed else 0):
            i = rng.randrange(len(changed))
            changed[i] = changed[i] ^ 1 << rng.randrange(8) if kind == "bits" else rng.randrange(256)
        path.write_bytes(changed)
    elif kind == "append":
        path.write_bytes(content + rng.randbytes(rng.randint(1, 100)))
    elif kind == "gone":
        path.unlink(missing_ok=True)
    elif kind == "swap" and other.is_file() and path.is_file():
        path.rename(work / "between")
        if other != path:
            other.rename(path)
        (work / "between").rename(other)
    elif kind == "copy" and other.is_file():
        path.write_bytes(other.read_bytes())
    elif kind == "foreign" and (foreign / name).is_file():
        path.write_bytes((foreign / name).read_bytes())
    elif kind == "json":
        old, new = rng.choice(((b'"', b"1"), (b"[", b"{"), (b"0x1", b"nul"), (b"1", b"2"), (b"{", b"["), (b":", b",")))
        path.write_bytes(content.replace(old, new, rng.randint(1, 9)))
    elif kind == "link":
        path.unlink(missing_ok=True)
        path.symlink_to(rng.choice((path, other, foreign / name, Path("/nowhere"))))
    return f"{kind} {name} {other_name}"


def try_damage(seed, source, arguments, finished, stopped, tmp_path):
    rng = random.Random(seed)
    output = Path(shutil.copytree(stopped[rng.choice(STAGES)], tmp_path / f"{seed}"))
    done = [mutate(rng, output / ".convert", stopped["foreign"] / ".convert") for _ in range(rng.randint(1, 3))]
    try:
        convert(source, output, resume=True, **arguments)
        assert digest(output) == finished, (seed, done)
    except ValueError as error:  # the job of another conversion, or of the measurement, is complete in itself
        assert "was begun with something else" in str(error) and "job.json" in str(done), (seed, done)
    except Exception as error:
        raise AssertionError(f"{seed} {done}") from error
    shutil.rmtree(output)


def test_random_damage(source, arguments, finished, stopped, tmp_path):
    for seed in (*FAILED, *range(10)):
        try_damage(seed, source, arguments, finished, stopped, tmp_path)


@pytest.mark.slow
def test_random_damage_of_many(source, arguments, finished, stopped, tmp_path, fuzz_times):
    for seed in range(100, 100 + 1000 * fuzz_times):
        try_damage(seed, source, arguments, finished, stopped, tmp_path)


FAILED = ()
"""Seeds of damage that once gave other files or a traceback."""
