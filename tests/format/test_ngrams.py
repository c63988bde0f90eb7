"""N-gram tables: decoded bit by bit, gathered over parts, and what is refused."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_marlin import codec
from mlx_marlin.loader.ngrams import find_ngram_tables
from mlx_marlin.storage.safetensors import read_header

NAME = "model.layers.0.ple.ple_embedding.ngram_embedding"


def rings(rows: int, bits: int) -> np.ndarray:
    rng = np.random.default_rng(bits)
    words = rng.integers(0, 1 << 16, (rows, 1 + 10 * bits), np.uint16)
    words[:, 0] = rng.uniform(0.5, 1.5, rows).astype(np.float16).view(np.uint16)
    return words.view(np.int16)


@pytest.mark.parametrize("bits", range(1, codec.MAX_BITS + 1))
def test_rows_bit_by_bit(bits):
    """The stream's bits in order: of each element K, and before those the 16 - K that came before it in the ring."""
    words = rings(3, bits)
    bias = np.random.default_rng(1).normal(0, 0.3, (3, codec.NGRAM_SIZE)).astype(np.float16)
    got = codec.decode_ngrams(words, bias)
    for row in range(3):
        stream = [int(word) >> bit & 1 for word in words[row, 1:].view(np.uint16) for bit in range(16)]
        fresh = [sum(stream[i * bits + b] << b for b in range(bits)) for i in range(codec.NGRAM_SIZE)]
        for i in range(codec.NGRAM_SIZE):
            state = sum(fresh[(i - age) % codec.NGRAM_SIZE] << age * bits for age in range(16)) & 0xFFFF
            value = codec.decode(np.array([state], np.uint16), "mul1").astype(np.float32)[0]
            scale = words[row, :1].view(np.float16).astype(np.float32)[0]
            assert got[row, i] == np.float16(value * scale + np.float32(bias[row, i]))


def tensors(rows: int = 30) -> dict[str, mx.array]:
    words = rings(rows, 2)
    heads = {"head_offsets": [0, 20], "head_vocab_sizes": [20, 10], "layer_multipliers": [3, 5, 7]}
    return {
        f"{NAME}.shard_0.trellis": mx.array(words[:12]),
        f"{NAME}.shard_1.trellis": mx.array(words[12:]),
        f"{NAME}.head_bias": mx.array(np.arange(320, dtype=np.float16).reshape(2, 160) / 64),
        **{f"{NAME}.{name}": mx.array(np.array(values, np.int64)) for name, values in heads.items()},
    }


def written(tmp_path, changed: dict):
    file = tmp_path / "ngram_embedding.safetensors"
    mx.save_safetensors(str(file), {k: v for k, v in (tensors() | changed).items() if v is not None})
    return read_header(file)


def test_rows_come_from_their_part_and_their_head(tmp_path):
    table = find_ngram_tables(written(tmp_path, {}))[NAME]
    ids = np.array([0, 11, 12, 19, 20, 29])
    bias = np.arange(320, dtype=np.float16).reshape(2, 160) / np.float16(64)
    wanted = codec.decode_ngrams(rings(30, 2)[ids], bias[(ids >= 20).astype(int)])
    assert table.rows == 30 and np.array_equal(table.gather(ids), wanted.astype(np.float32))
    with pytest.raises(ValueError, match="has 30 rows, and row 30 was asked for"):
        table.gather(np.array([30]))
    with pytest.raises(ValueError, match="has 30 rows, and row -1 was asked for"):
        table.gather(np.array([-1, 3]))


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_rows_that_are_not_quantized(dtype, tmp_path):
    values = mx.random.normal((9, 160), key=mx.random.key(0)).astype(dtype)
    file = tmp_path / "ngram_embedding.safetensors"
    mx.save_safetensors(str(file), {f"{NAME}.weight": values})
    table = find_ngram_tables(read_header(file))[NAME]
    assert np.array_equal(table.gather(np.array([1, 8])), np.array(values.astype(mx.float32))[[1, 8]])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({f"{NAME}.shard_0.trellis": None}, r"shard_0\.trellis is missing"),
        ({f"{NAME}.shard_999999999.trellis": mx.zeros((1, 21), mx.int16)}, r"shard_2\.trellis is missing"),
        ({f"{NAME}.weight": mx.zeros((30, 160), mx.float16)}, r"has both \.weight and \.trellis"),
        ({f"{NAME}.head_bias": None}, r"head_bias is missing"),
        ({f"{NAME}.head_offsets": mx.zeros((0,), mx.int64)}, "head_offsets must be integers, one for each head"),
        ({f"{NAME}.head_offsets": mx.zeros((2,), mx.float32)}, "head_offsets must be integers, one for each head"),
        ({f"{NAME}.head_bias": mx.zeros((3, 160), mx.float16)}, r"head_bias must be F16 \[2, 160\]"),
        ({f"{NAME}.shard_1.trellis": mx.zeros((18, 31), mx.int16)}, "all of one width"),
        ({f"{NAME}.shard_1.trellis": mx.zeros((18, 21), mx.int32)}, "must be I16"),
    ],
)
def test_what_is_refused(changed, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        find_ngram_tables(written(tmp_path, changed))
