"""Random checkpoints of a given model's shape: real names, real sizes, words that mean nothing.

Loading and running take as long as with trained weights, as no time depends on their values. EXL3 as ExLlamaV3 writes
it, and the same shape in MLX's affine format.

    python -m bench.cpu.checkpoint DIRECTORY --shape qwen3-30b-a3b --layers 4 --bits 3
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from mlx_marlin import codec
from mlx_marlin.loader.exl3 import MARKERS
from mlx_marlin.storage import safetensors

# Files of a tokenizer that any shape can have: only its ids matter, and those are below every vocabulary.
TOKENIZER = Path(__file__).parents[2] / "models" / "docs-moe"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")

# As their config.json has them.
SHAPES = {
    "qwen3-30b-a3b": {
        "model_type": "qwen3_moe",
        "hidden_size": 2048,
        "num_hidden_layers": 48,
        "intermediate_size": 6144,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "rope_theta": 1000000.0,
    },
    "tiny": {
        "model_type": "qwen3_moe",
        "hidden_size": 256,
        "num_hidden_layers": 2,
        "intermediate_size": 256,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 128,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 128,
        "vocab_size": 2048,
        "max_position_embeddings": 4096,
        "rope_theta": 10000.0,
    },
}
HEAD_BITS = 6
AFFINE_GROUP = 64

Entry = tuple[str, str, tuple[int, ...], bytes]
"""Name, dtype as safetensors calls it, shape and data of a tensor."""


def config_of(shape: str, layers: int | None = None) -> dict:
    """config.json of a shape, without what belongs to a quantization.

    Args:
        shape: A key of :data:`SHAPES`.
        layers: Number of layers. Default: ``None``, the model's own.
    """
    common = {
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
    }
    config = {**SHAPES[shape], **common}
    return config if layers is None else {**config, "num_hidden_layers": layers}


def _linears(config: dict, prefix: str) -> Iterator[tuple[str, int, int]]:
    """Name, inputs and outputs of the quantized linears of a layer, experts apart."""
    hidden, head = config["hidden_size"], config["head_dim"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    yield f"{prefix}.self_attn.q_proj", hidden, heads * head
    yield f"{prefix}.self_attn.k_proj", hidden, kv_heads * head
    yield f"{prefix}.self_attn.v_proj", hidden, kv_heads * head
    yield f"{prefix}.self_attn.o_proj", heads * head, hidden


def _projections(config: dict) -> Iterator[tuple[str, int, int]]:
    hidden, width = config["hidden_size"], config["moe_intermediate_size"]
    yield "gate_proj", hidden, width
    yield "up_proj", hidden, width
    yield "down_proj", width, hidden


class Exl3:
    """Tensors of EXL3 linears with the codebook mul1.

    Args:
        rng: Source of everything random.
        bits: K, one of ``codec.WIDTHS``, of everything but the head.
    """

    def __init__(self, rng: np.random.Generator, bits: float):
        self._rng, self._bits = rng, bits
        codec.format_word(bits, "mul1")  # raises for what is no width

    def config(self) -> dict:
        """What config.json holds besides the shape."""
        quantization = {"quant_method": "exl3", "version": "1.6.5", "bits": self._bits, "head_bits": HEAD_BITS}
        return {"quantization_config": {**quantization, "codebook": "mul1"}}

    def linear(self, name: str, k: int, n: int, bits: float | None = None) -> Iterator[Entry]:
        """A linear of k inputs and n outputs."""
        k, n = codec.padded(k), codec.padded(n)
        shape = k // codec.TILE, n // codec.TILE, codec.words_per_tile(self._bits if bits is None else bits)
        for suffix, size, spread in (("suh", k, 1.0), ("svh", n, k**-0.5)):
            signs = self._rng.choice(np.array([-spread, spread], np.float16), size)
            yield f"{name}.{suffix}", "F16", (size,), signs.tobytes()
        yield f"{name}.trellis", "I16", shape, self._rng.bytes(2 * shape[0] * shape[1] * shape[2])
        yield f"{name}.mul1", "I32", (), MARKERS["mul1"].to_bytes(4, "little")

    def experts(self, prefix: str, config: dict) -> Iterator[Entry]:
        """The experts of a layer, one linear for each projection of each."""
        for e in range(config["num_experts"]):
            for projection, k, n in _projections(config):
                yield from self.linear(f"{prefix}.mlp.experts.{e}.{projection}", k, n)

    def head(self, hidden: int, vocabulary: int) -> Iterator[Entry]:
        """The output head."""
        yield from self.linear("lm_head", hidden, vocabulary, HEAD_BITS)


class Affine:
    """Tensors of linears in MLX's affine format, group 64, as mlx-lm stacks them.

    Args:
        rng: Source of everything random.
        bits: 2, 3, 4, 6 or 8.
    """

    def __init__(self, rng: np.random.Generator, bits: int):
        self._rng, self._bits = rng, bits

    def config(self) -> dict:
        """What config.json holds besides the shape."""
        quantization = {"group_size": AFFINE_GROUP, "bits": self._bits, "mode": "affine"}
        # These stay dense, as in the EXL3 checkpoint.
        return {"quantization": {**quantization, "model.embed_tokens": False}}

    def linear(self, name: str, k: int, n: int, experts: tuple[int, ...] = ()) -> Iterator[Entry]:
        """A linear of k inputs and n outputs, or one for each expert."""
        words, groups = (*experts, n, k * self._bits // 32), (*experts, n, k // AFFINE_GROUP)
        scale = k**-0.5 / 2 ** (self._bits - 1)
        yield f"{name}.weight", "U32", words, self._rng.bytes(4 * int(np.prod(words)))
        for suffix, value in (("scales", scale), ("biases", -scale * (2**self._bits - 1) / 2)):
            yield f"{name}.{suffix}", "F16", groups, np.full(groups, value, np.float16).tobytes()

    def experts(self, prefix: str, config: dict) -> Iterator[Entry]:
        """The experts of a layer, stacked."""
        for projection, k, n in _projections(config):
            yield from self.linear(f"{prefix}.mlp.switch_mlp.{projection}", k, n, (config["num_experts"],))

    def head(self, hidden: int, vocabulary: int) -> Iterator[Entry]:
        """The output head."""
        yield from self.linear("lm_head", hidden, vocabulary)


def _dense(rng: np.random.Generator, name: str, *shape: int, spread: float) -> Entry:
    # Uniform: a normal distribution takes three times as long to draw.
    values = rng.random(shape, np.float32)
    values -= 0.5
    values *= 12**0.5 * spread
    return name, "F16", shape, values.astype(np.float16).tobytes()


def _ones(name: str, size: int) -> Entry:
    return name, "F16", (size,), np.ones(size, np.float16).tobytes()


def _layer(form: Exl3 | Affine, rng: np.random.Generator, config: dict, number: int) -> Iterator[Entry]:
    prefix, hidden, head = f"model.layers.{number}", config["hidden_size"], config["head_dim"]
    for norm, size in (
        ("input_layernorm", hidden),
        ("post_attention_layernorm", hidden),
        ("self_attn.q_norm", head),
        ("self_attn.k_norm", head),
    ):
        yield _ones(f"{prefix}.{norm}.weight", size)
    for name, k, n in _linears(config, prefix):
        yield from form.linear(name, k, n)
    yield _dense(rng, f"{prefix}.mlp.gate.weight", config["num_experts"], hidden, spread=hidden**-0.5)
    yield from form.experts(prefix, config)


def _ends(form: Exl3 | Affine, rng: np.random.Generator, config: dict) -> Iterator[Entry]:
    hidden, vocabulary = config["hidden_size"], config["vocab_size"]
    yield _dense(rng, "model.embed_tokens.weight", vocabulary, hidden, spread=1.0)
    yield _ones("model.norm.weight", hidden)
    yield from form.head(hidden, vocabulary)


def write(directory: Path, config: dict, form: Exl3 | Affine, rng: np.random.Generator) -> int:
    """Write a checkpoint: a file for each layer and one for embeddings and head.

    Args:
        directory: Where to; made if it is not there.
        config: See :func:`config_of`.
        form: What makes the quantized tensors.
        rng: Source of the dense ones.

    Returns:
        Bytes of all tensors.
    """
    directory.mkdir(parents=True, exist_ok=True)
    layers, weight_map, total = config["num_hidden_layers"], {}, 0
    for number in range(layers + 1):
        made = list(_ends(form, rng, config) if number == layers else _layer(form, rng, config, number))
        file = f"model-{number + 1:05}-of-{layers + 1:05}.safetensors"
        safetensors.write(directory / file, [entry[:3] for entry in made], (entry[3] for entry in made))
        weight_map.update({entry[0]: file for entry in made})
        total += sum(len(entry[3]) for entry in made)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (directory / "config.json").write_text(json.dumps({**config, **form.config()}, indent=1))
    for name in _TOKENIZER_FILES:
        shutil.copy(TOKENIZER / name, directory / name)
    return total


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-30b-a3b")
    parser.add_argument("--layers", type=int, help="default: the model's own")
    parser.add_argument("--bits", type=float, default=3)
    parser.add_argument("--affine", action="store_true", help="MLX's affine format instead of EXL3")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    bits = codec.as_width(arguments.bits)
    rng = np.random.default_rng(arguments.seed)
    form = Affine(rng, bits) if arguments.affine else Exl3(rng, bits)
    total = write(arguments.directory, config_of(arguments.shape, arguments.layers), form, rng)
    print(f"{total / 1e9:.2f} GB in {arguments.directory}")


if __name__ == "__main__":
    main()
