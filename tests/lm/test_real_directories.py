"""Directories as downloads and caches leave them: they load with the same logits, or the error says why."""

import json
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

import mlx_marlin
from mlx_marlin import TrellisModelLoader, codec
from mlx_marlin.layers import PartlyQuantizedSwitchGLU
from mlx_marlin.lm.mlx_lm_host import MLX_LM
from mlx_marlin.lm.model import load_exl3_model
from mlx_marlin.lm.problems import model_problems
from mlx_marlin.lm.sharding import open_sharded
from mlx_marlin.lm.tokenizer import check_tokenizer
from mlx_marlin.loader import Kind, kind_of
from tests.support import architectures, generic_checkpoints
from tests.support.checkpoints import SIZES
from tests.support.commands import refused, run
from tests.support.generic_checkpoints import logits
from tests.support.paths import MODELS

EXL3 = MODELS / "docs-moe-exl3-mixed"
SHARDS = 3
LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 5368709120\n"
HTML_PAGE = b'\n<!DOCTYPE html>\n<html lang="en"><head><title>Entry not found</title></head></html>\n'


@pytest.fixture(scope="module")
def intact(tmp_path_factory):
    """A directory of three shards, one of a single file, and their logits."""
    folder = tmp_path_factory.mktemp("intact")
    checkpoint = architectures.qwen3_moe()
    whole = checkpoint.write(folder / "whole")
    return checkpoint.write(folder / "shards", shards=SHARDS), whole, logits(load_exl3_model(whole)[0])


@pytest.fixture
def sharded(intact, tmp_path):
    return Path(shutil.copytree(intact[0], tmp_path / "model"))


@pytest.fixture
def whole(intact, tmp_path):
    return Path(shutil.copytree(intact[1], tmp_path / "model"))


def same(directory: Path, intact) -> bool:
    return np.array_equal(logits(load_exl3_model(directory)[0]), intact[2])


def test_the_links_of_a_cache(intact, sharded, tmp_path):
    """As the Hub's client lays them out: relative links into a folder of files named by their digests."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "0123abcd"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for i, file in enumerate(sorted(sharded.iterdir())):
        file.rename(blobs / f"{i:064x}")
        (snapshot / file.name).symlink_to(Path("../../blobs") / f"{i:064x}")
    assert kind_of(snapshot) is Kind.EXL3 and same(snapshot, intact)


def index_of_others(directory: Path) -> None:
    (directory / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}})
    )


def index_of_the_original(directory: Path) -> None:
    """It names the right file, and the tensors from before the quantization."""
    (directory / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"lm_head.weight": "model.safetensors"}})
    )


def damaged_index(directory: Path) -> None:
    (directory / "model.safetensors.index.json").write_bytes(HTML_PAGE)


@pytest.mark.parametrize("make", [index_of_others, index_of_the_original, damaged_index])
def test_a_stale_index_beside_a_whole_file(intact, whole, make):
    make(whole)
    assert same(whole, intact)


def test_shards_without_their_index(intact, sharded):
    (sharded / "model.safetensors.index.json").unlink()
    assert same(sharded, intact)


def change_config(directory: Path, **changes) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, **changes}))


@pytest.mark.parametrize("value", [None, [], ["exl3"], "exl3", 4], ids=repr)
def test_a_quantization_config_of_another_form(intact, whole, value):
    change_config(whole, quantization_config=value)
    assert kind_of(whole) is Kind.EXL3 and same(whole, intact)


def add_tokenizer(directory: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(EXL3 / name, directory)


@pytest.mark.parametrize("value", [[], ["exl3"], "exl3", 4], ids=repr)
def test_transformers_wants_an_object_for_a_quantization_config(whole, value):
    """It reads the tokenizer, and config.json for it."""
    add_tokenizer(whole)
    change_config(whole, quantization_config=value)
    with pytest.raises(ValueError, match=rf"config.json: quantization_config .* got {type(value).__name__}; remove it"):
        mlx_marlin.load(whole)
    change_config(whole, quantization_config=None)
    mlx_marlin.load(whole)


def shard(directory: Path) -> Path:
    return directory / f"model-00002-of-{SHARDS:05}.safetensors"


@pytest.mark.parametrize("name", ["model-00002-of-00003.safetensors", "model.safetensors.index.json", "config.json"])
@pytest.mark.parametrize(
    "content, message",
    [
        (LFS_POINTER, "is a git-lfs pointer, not the file itself; run 'git lfs pull'"),
        (HTML_PAGE, "is an HTML page, .*; download it again"),
        (b"\xef\xbb\xbf" + HTML_PAGE, "is an HTML page"),
    ],
    ids=("pointer", "page", "marked page"),
)
def test_what_stands_in_the_place_of_a_file(sharded, name, content, message):
    (sharded / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name} {message}"):
        load_exl3_model(sharded)


def test_a_byte_order_mark(whole):
    """Neither mlx-lm nor ExLlamaV3 reads such a config."""
    text = (whole / "config.json").read_text()
    for encoding, name in (("utf-8-sig", "UTF-8"), ("utf-16", "UTF-16")):
        (whole / "config.json").write_text(text, encoding=encoding)
        with pytest.raises(ValueError, match=rf"config.json begins with a byte order mark \({name}\).*without one"):
            load_exl3_model(whole)


@pytest.mark.parametrize("name", ["model-00002-of-00003.safetensors", "model.safetensors.index.json", "config.json"])
@pytest.mark.parametrize("indexed", [True, False], ids=("index", "no index"))
def test_a_link_that_leads_nowhere(sharded, name, indexed):
    if not indexed:
        (sharded / "model.safetensors.index.json").unlink()
    (sharded / name).unlink(missing_ok=True)
    (sharded / name).symlink_to("../blobs/gone")
    with pytest.raises(FileNotFoundError, match=rf"{name} is a link to .*gone, which is not there.*download"):
        load_exl3_model(sharded)


@pytest.mark.parametrize("indexed", [True, False], ids=("index", "no index"))
def test_a_missing_shard(sharded, indexed):
    shard(sharded).unlink()
    if not indexed:
        (sharded / "model.safetensors.index.json").unlink()
    with pytest.raises(FileNotFoundError, match="model-00002-of-00003.safetensors is missing"):
        load_exl3_model(sharded)


@pytest.mark.parametrize("name", ["generation_config.json", "ngram_embedding.safetensors", "tokenizer.json"])
def test_a_link_that_leads_nowhere_in_the_place_of_a_file_that_may_be_missing(whole, name):
    add_tokenizer(whole)
    (whole / name).unlink(missing_ok=True)
    (whole / name).symlink_to("../blobs/gone")
    with pytest.raises(FileNotFoundError, match=rf"{name} is a link to .*gone, which is not there.*download"):
        mlx_marlin.load(whole)


@pytest.mark.parametrize("content, message", [(LFS_POINTER, "git-lfs pointer"), (HTML_PAGE, "HTML page")])
@pytest.mark.parametrize("name", ["model.safetensors", "ngram_embedding.safetensors", "generation_config.json"])
def test_what_stands_in_the_place_of_further_files(whole, name, content, message):
    change_config(whole, quantization_config=None)  # nothing but the files' names tells that it is EXL3
    (whole / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name} is an? {message}"):
        load_exl3_model(whole)


def test_a_folder_in_the_place_of_a_file(sharded):
    shard(sharded).unlink()
    shard(sharded).mkdir()
    with pytest.raises(ValueError, match="model-00002-of-00003.safetensors is not a file"):
        load_exl3_model(sharded)


# Experts that a recipe left unquantized. ExLlamaV3 takes such layers.

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def leave_unquantized(directory: Path, names: list[str], dtype=mx.float32, shape: tuple | None = None) -> None:
    """Put the dense form in the place of quantized linears, of shape ``[out, in]``; by default experts of ``SIZES``."""
    loader, file = TrellisModelLoader(directory), directory / "model.safetensors"
    tensors = dict(mx.load(str(file)))
    mx.eval(tensors)
    for name in names:
        down = name.endswith(("down_proj", "w2"))
        sizes = {"in_features": SIZES.width} if down else {"in_features": SIZES.hidden}
        sizes["out_features"] = SIZES.hidden if down else SIZES.width
        if shape is not None:
            sizes = {"in_features": shape[1], "out_features": shape[0]}
        w = loader.load_weight(name, **sizes)
        for suffix in loader.quantized[name].parts:
            del tensors[f"{name}.{suffix}"]
        tensors[f"{name}.weight"] = mx.array(codec.dequantize(w).T).astype(dtype)
        if w.bias is not None:
            tensors[f"{name}.bias"] = w.bias[: w.out_features]
    mx.save_safetensors(str(file), tensors)


def close(got: np.ndarray, wanted: np.ndarray) -> bool:
    return np.abs(got - wanted).max() <= 1e-4 * np.abs(wanted).max() and (got.argmax(-1) == wanted.argmax(-1)).all()


EXPERTS = "model.layers.1.mlp.experts"


@pytest.mark.parametrize(
    "names",
    [
        [f"{EXPERTS}.2.up_proj"],
        [f"{EXPERTS}.0.{p}" for p in PROJECTIONS],
        [f"{EXPERTS}.{e}.down_proj" for e in range(SIZES.experts)],
        [f"{EXPERTS}.0.gate_proj", f"{EXPERTS}.3.down_proj"],
        [f"{EXPERTS}.{e}.{p}" for e in range(SIZES.experts) for p in PROJECTIONS],
    ],
    ids=("a projection", "an expert", "a projection of all", "two", "all"),
)
def test_experts_that_were_left_unquantized(intact, whole, names):
    leave_unquantized(whole, names)
    model, _ = load_exl3_model(whole)
    assert close(logits(model), intact[2])
    tokens = mx.array([[5]])
    assert close(np.array(model(tokens)), np.array(load_exl3_model(intact[1])[0](tokens)))  # also one row alone
    assert not model.left_out


@pytest.mark.parametrize(
    "name, linear",
    [
        ("mixtral", "model.layers.1.block_sparse_moe.experts.1.w2"),
        ("gpt_oss", "model.layers.1.mlp.experts.1.up_proj"),  # fused in the original, with biases
        ("gemma4", "model.language_model.layers.1.experts.1.gate_proj"),
        ("nemotron_h", "backbone.layers.1.mixer.experts.1.up_proj"),
        ("nemotron_h_latent", "backbone.layers.1.mixer.experts.3.down_proj"),
        ("phixtral", "transformer.h.1.moe.mlp.1.fc2"),  # with biases
    ],
)
def test_unquantized_experts_of_other_architectures(tmp_path, name, linear):
    checkpoint = architectures.ARCHITECTURES[name]()
    directory = checkpoint.write(tmp_path / "model")
    wanted = logits(load_exl3_model(directory)[0])
    dense = checkpoint.dense.get(f"{linear}.weight")  # of a fused original there is none
    leave_unquantized(directory, [linear], shape=None if dense is None else dense.shape)
    assert close(logits(load_exl3_model(directory)[0]), wanted)


def test_unquantized_experts_without_a_fused_kernel(tmp_path, monkeypatch):
    monkeypatch.delitem(MLX_LM.activations, "mlx_lm.models.step3p5.ClampedSwiGLU")
    checkpoint, _ = generic_checkpoints.make("step3p5")
    directory = checkpoint.write(tmp_path / "model")
    wanted = logits(load_exl3_model(directory)[0])
    name = next(n for n in checkpoint.bits if n.endswith(".experts.1.up_proj"))
    leave_unquantized(directory, [name])
    assert close(logits(load_exl3_model(directory)[0]), wanted)


def test_unquantized_experts_run_in_the_dtype_of_the_rest(whole):
    leave_unquantized(whole, [f"{EXPERTS}.2.up_proj"], mx.float16)
    model, _ = load_exl3_model(whole)
    glu = model.layers[1].mlp.switch_mlp
    assert isinstance(glu, PartlyQuantizedSwitchGLU) and glu.dense.up_proj.weight.shape[0] == 1
    assert {glu.dense[p].weight.dtype for p in PROJECTIONS} == {mx.float32}
    assert set(glu.children()) == {"quantized", "dense"}


def test_an_unquantized_expert_of_another_size(whole):
    leave_unquantized(whole, [f"{EXPERTS}.2.up_proj"])
    tensors = dict(mx.load(str(whole / "model.safetensors")))
    mx.eval(tensors)
    for shape, message in (
        ((96, 300), r"\[384, 128\] matrix, but"),
        ((90, 192), r"shape \[90, 192\], but .* \[96, 192\]"),
    ):
        tensors[f"{EXPERTS}.2.up_proj.weight"] = mx.zeros(shape)
        mx.save_safetensors(str(whole / "model.safetensors"), tensors)
        with pytest.raises(ValueError, match=rf"{EXPERTS}\.2\.up_proj.*{message}"):
            load_exl3_model(whole)


@architectures.needs_new_mlx_lm("has no tensor parallelism for qwen3_moe")
def test_unquantized_experts_are_not_split_over_ranks(whole):
    class Pair:
        rank, size = staticmethod(lambda: 0), staticmethod(lambda: 2)

    leave_unquantized(whole, [f"{EXPERTS}.2.up_proj"])
    with pytest.raises(ValueError, match="some of its experts are not quantized, .*; use expert or pipeline"):
        open_sharded(whole, None, Pair())


def test_the_tuner_takes_the_quantized_experts(whole):
    leave_unquantized(whole, [f"{EXPERTS}.2.up_proj"])
    (problem,) = [p for p in model_problems(whole, "float32", "cpu") if p.kind == "swiglu" and p.experts == 3]
    assert problem.top_k == 2


# What is no model at all.


def test_a_file_in_the_place_of_a_directory(whole):
    file = whole / "model.safetensors"
    with pytest.raises(FileNotFoundError, match="model.safetensors is a file; give the directory of the model"):
        mlx_marlin.load(file)
    assert kind_of(file) is Kind.PLAIN
    said = refused(run("generate", "--prompt", "x", "--model", str(file)))
    assert said == f"mlx_marlin: {file} is a file; give the directory of the model, with config.json"


def test_a_directory_without_a_tokenizer(whole):
    shutil.copy(EXL3 / "tokenizer_config.json", whole)  # which is no vocabulary
    with pytest.raises(FileNotFoundError, match="holds no tokenizer .*copy its files from the original model's"):
        mlx_marlin.load(whole)
    assert "holds no tokenizer" in refused(run("generate", "--prompt", "x", "--model", str(whole)))


@pytest.mark.parametrize("content, message", [(LFS_POINTER, "git-lfs pointer"), (HTML_PAGE, "HTML page")])
def test_what_stands_in_the_place_of_a_tokenizer(whole, content, message):
    shutil.copy(EXL3 / "tokenizer.json", whole)
    check_tokenizer(whole)
    (whole / "tokenizer.json").write_bytes(content)
    with pytest.raises(ValueError, match=f"tokenizer.json is an? {message}"):
        mlx_marlin.load(whole)
