"""Checkpoints with a quantized token embedding: against the same model with the decoded table."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm import utils as mlx_lm_utils

import mlx_marlin
from mlx_marlin import EmbeddingWeight, TrellisEmbedding, TrellisLinear, TrellisModelLoader
from mlx_marlin.lm import embedding as lm_embedding
from mlx_marlin.lm import model as lm_model
from mlx_marlin.lm.embedding import EmbeddingWithHead
from mlx_marlin.lm.model import build, load_exl3_model, open_checkpoint
from mlx_marlin.lm.sharding import split
from mlx_marlin.loader.embedding import QuantizedEmbedding
from tests.lm.test_architectures import assert_same, load_dense
from tests.lm.test_distributed import NO_TENSOR_PARALLELISM, Rank
from tests.support import architectures, architectures_gemma
from tests.support.checkpoints import SPLITTABLE, Sizes
from tests.support.generic_checkpoints import logits
from tests.support.paths import MODELS

NAME = "model.embed_tokens"
TINY = Sizes(layers=1)


def embeddings_of(model: nn.Module) -> list[str]:
    return [path for path, module in model.named_modules() if isinstance(module, TrellisEmbedding)]


@pytest.mark.parametrize("name", ("llama", "qwen3", "gemma3"))
def test_a_tied_model_without_a_head_uses_the_table(name, tmp_path):
    checkpoint = architectures.ARCHITECTURES[name]()
    checkpoint.quantize_embedding(5)
    prefix = "language_model." if name == "gemma3" else ""
    checkpoint.drop_head(f"{prefix}lm_head")
    model, _ = load_exl3_model(checkpoint.write(tmp_path / "exl3"))
    assert_same(logits(model), logits(load_dense(checkpoint, tmp_path / "dense")))
    assert len(embeddings_of(model)) == 1


def test_the_head_of_a_model_that_mlx_lm_always_ties(tmp_path):
    checkpoint = architectures_gemma.gemma2()
    checkpoint.quantize_embedding(4)
    model, _ = load_exl3_model(checkpoint.write(tmp_path / "exl3"))
    head = checkpoint.dense.pop("lm_head.weight")
    dense = load_dense(checkpoint, tmp_path / "dense")
    dense.model.embed_tokens.as_linear = lambda x: x @ head.T
    assert_same(logits(model), logits(dense))
    embedding = model.model.embed_tokens
    assert isinstance(embedding, EmbeddingWithHead) and isinstance(embedding.head, TrellisLinear)
    table = np.array(checkpoint.dense[f"{NAME}.weight"])
    np.testing.assert_array_equal(np.array(embedding.weight), table.astype(np.float32))


@pytest.mark.parametrize("dtype", (None, mx.float32, mx.bfloat16, mx.float16))
def test_dtype(dtype, tmp_path):
    checkpoint = architectures.llama(TINY)
    checkpoint.quantize_embedding()
    model, _ = load_exl3_model(checkpoint.write(tmp_path / "exl3"), dtype=dtype)
    wanted = dtype or mx.float32
    assert model.model.embed_tokens(mx.array([1, 2])).dtype == wanted
    assert model(mx.array([[1, 2]])).dtype == wanted


def test_a_gpu_takes_the_dtype_of_the_norms(monkeypatch):
    monkeypatch.setattr(mx, "default_device", lambda: mx.gpu)
    dense = {"gate.weight": mx.zeros(2, mx.float16), "model.norm.weight": mx.zeros(2, mx.bfloat16)}
    assert lm_model.running_dtype(dense, None) == mx.bfloat16
    assert {v.dtype for v in lm_model.cast_dense(nn.Module(), dense, None).values()} == {mx.bfloat16}
    assert lm_model.running_dtype({"model.norm.weight": mx.zeros(2)}, None) is None
    module, source = nn.Embedding(4, 256), QuantizedEmbedding("e", {})
    weight = EmbeddingWeight(np.zeros((4, 65), np.int16), np.ones((1, 256), np.float16))
    monkeypatch.setattr(QuantizedEmbedding, "load", lambda self, features: weight)
    assert lm_embedding.make_embedding(module, source, None)(mx.array([1])).dtype == mx.float16


def test_parameters_are_saved_and_loaded(tmp_path):
    checkpoint = architectures.llama(TINY)
    checkpoint.quantize_embedding()
    directory = checkpoint.write(tmp_path / "exl3")
    model, _ = load_exl3_model(directory)
    model.save_weights(str(tmp_path / "weights.safetensors"))
    names = {key for key, _ in tree_flatten(model.parameters())}
    assert {f"{NAME}.trellis", f"{NAME}.signs"} <= names and f"{NAME}.weight" not in names
    other, _ = load_exl3_model(directory)
    other.model.embed_tokens.trellis = mx.zeros_like(other.model.embed_tokens.trellis)
    other.load_weights(str(tmp_path / "weights.safetensors"))
    np.testing.assert_array_equal(logits(other), logits(model))


def test_tokens_are_generated(tmp_path):
    checkpoint = architectures.qwen3_moe(Sizes(vocab=512), dense=False)
    checkpoint.quantize_embedding()
    directory = checkpoint.write(tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):  # of 512 tokens
        (directory / name).write_bytes((MODELS / "random-qwen3_moe" / name).read_bytes())
    from mlx_lm import generate

    model, tokenizer = mlx_marlin.load(directory)
    assert isinstance(generate(model, tokenizer, "hello", max_tokens=4), str)


@NO_TENSOR_PARALLELISM
def test_every_rank_of_a_split_has_the_whole_table(tmp_path):
    checkpoint = architectures.qwen3_moe(SPLITTABLE, dense=False)
    checkpoint.quantize_embedding()
    directory = checkpoint.write(tmp_path / "model")
    model, config, mapping = open_checkpoint(directory)
    split(model, build(directory, config), mapping, Rank(1, 2))
    assert list(mapping.embeddings) == [NAME] and mapping.embeddings[NAME].rows == SPLITTABLE.vocab
    assert model.model.embed_tokens.weight.shape == (SPLITTABLE.vocab, SPLITTABLE.hidden)


def test_single_weights(tmp_path):
    checkpoint = architectures.llama(TINY)
    checkpoint.quantize_embedding(7, parts=3)
    loader = TrellisModelLoader(checkpoint.write(tmp_path / "exl3", shards=3))
    assert NAME not in loader.names and list(loader.embeddings) == [NAME]
    source = loader.embeddings[NAME]
    assert (source.rows, source.groups, source.bits) == (160, 1, 7)
    assert source.nbytes == 160 * 2 * (1 + 16 * 7) + 512
    w = loader.load_weight("embed_tokens", out_features=192)
    assert isinstance(w, EmbeddingWeight) and (w.bits, w.rows, w.features) == (7, 160, 192)
    table = np.array(checkpoint.dense[f"{NAME}.weight"])
    np.testing.assert_array_equal(np.array(TrellisEmbedding(w)(mx.arange(160))), table)
    assert loader.load_weight(NAME, in_features=160).features == 256
    for wrong, message in ((dict(in_features=161), "is 160, not 161"), (dict(out_features=257), r"\(0, 256\]")):
        with pytest.raises(ValueError, match=rf"embed_tokens: .*{message}"):
            loader.load_weight(NAME, **wrong)


def put(**changes):
    """Replace tensors of the embedding by suffix, in keywords with __ for the dot; None removes."""

    def edit(tensors):
        for suffix, value in changes.items():
            key = f"{NAME}.{suffix.replace('__', '.')}"
            tensors.pop(key, None)
            if value is not None:
                tensors[key] = value(tensors) if callable(value) else value

    return edit


@pytest.mark.parametrize(
    "edit, message",
    [
        (
            put(signs=None),
            r"embed_tokens\.trellis has two dimensions, as .* 1\.6\.0 .*, but model\.embed_tokens\.signs is",
        ),
        (put(trellis=None), r"embed_tokens\.signs is there, but model\.embed_tokens\.trellis is missing"),
        (put(weight=mx.zeros((160, 192))), r"embed_tokens has both \.weight and \.trellis"),
        (put(signs=mx.ones((1, 256))), r"embed_tokens\.signs must be F16 \[groups, 256\], got F32 \[1, 256\]"),
        (put(signs=mx.ones((2, 128), mx.float16)), r"signs must be F16 \[groups, 256\], got F16 \[2, 128\]"),
        (put(signs=mx.full((1, 256), 0.5, mx.float16)), r"embed_tokens: the signs of an embedding are \+1 and -1"),
        (put(trellis=mx.zeros((160, 65), mx.float16)), r"embed_tokens\.trellis must be I16, got F16"),
        (put(trellis=mx.zeros((160, 64), mx.int16)), r"embed_tokens\.trellis: .* K from 1 to 8.* got \[160, 64\]"),
        (put(trellis=mx.zeros((0, 65), mx.int16)), r"embed_tokens\.trellis has 0 rows"),
        (put(shard_0__trellis=mx.zeros((8, 65), mx.int16)), r"has both \.trellis and \.shard_\{i\}\.trellis"),
        (
            put(trellis=None, shard_1__trellis=mx.zeros((160, 65), mx.int16)),
            r"embed_tokens\.shard_0\.trellis is missing, but other parts",
        ),
        (
            put(
                trellis=None,
                shard_0__trellis=mx.zeros((80, 65), mx.int16),
                shard_1__trellis=mx.zeros((80, 49), mx.int16),
            ),
            r"embed_tokens\.shard_1\.trellis has 80 rows of 3 bits; .* the first has 4 bits",
        ),
        (put(trellis=mx.zeros((161, 65), mx.int16)), r"161 rows in 1 groups of 256 elements.* wants 160 rows of 192"),
        (
            put(trellis=mx.zeros((160, 130), mx.int16), signs=mx.ones((2, 256), mx.float16)),
            r"160 rows in 2 groups of 256 elements.* wants 160 rows of 192",
        ),
    ],
)
def test_damaged_embeddings_name_the_tensor(edit, message, tmp_path):
    checkpoint = architectures.llama(TINY)
    checkpoint.quantize_embedding()
    edit(checkpoint.exl3)
    directory = checkpoint.write(tmp_path / "model")
    with pytest.raises(ValueError, match=message) as error:
        load_exl3_model(directory)
    assert str(directory) in str(error.value)


def test_an_embedding_in_the_place_of_a_linear(tmp_path):
    checkpoint = architectures.llama(TINY)
    checkpoint.quantize_embedding()
    name = "model.layers.0.self_attn.q_proj"
    for key in [key for key in checkpoint.exl3 if key.startswith(name)]:
        del checkpoint.exl3[key]
    for suffix in ("trellis", "signs"):
        checkpoint.exl3[f"{name}.{suffix}"] = checkpoint.exl3[f"{NAME}.{suffix}"]
    with pytest.raises(ValueError, match=rf"{name} is quantized, .* a Linear that needs a dense weight"):
        load_exl3_model(checkpoint.write(tmp_path / "model"))


def test_a_model_may_multiply_with_the_table(tmp_path):
    """seed_oss has no as_linear in its forward call."""
    from tests.support import generic_checkpoints

    checkpoint, _ = generic_checkpoints.make("seed_oss")
    checkpoint.config["tie_word_embeddings"] = True
    checkpoint.drop_head()
    checkpoint.quantize_embedding()
    model, _ = load_exl3_model(checkpoint.write(tmp_path / "exl3"))
    dense, _ = mlx_lm_utils.load_model(checkpoint.write_dense(tmp_path / "dense"))
    dense.set_dtype(mx.float32)
    assert_same(logits(model), logits(dense))


def test_an_embedding_that_the_model_does_not_use(tmp_path):
    checkpoint = architectures.qwen3_next()
    checkpoint.quantize_embedding()
    for suffix in ("trellis", "signs"):
        checkpoint.exl3[f"mtp.embed_tokens.{suffix}"] = checkpoint.exl3[f"{NAME}.{suffix}"]
    mapping = open_checkpoint(checkpoint.write(tmp_path / "model"))[2]
    left = mapping.left_out.tensors["multi-token prediction layers"]
    assert left["mtp.embed_tokens.trellis"] == 160 * 2 * 65 and left["mtp.embed_tokens.signs"] == 512
    assert list(mapping.embeddings) == [NAME]
