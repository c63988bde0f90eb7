"""Tiny checkpoints: EXL3 in exllamav3's tensor names, and the same weights dense in the names of the original
models, for mlx-lm's own loader. Any bit pattern is a valid trellis, so the words are random."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_marlin import TrellisWeight, codec

MARKERS = {"mcg": -877912083, "mul1": -2082680531}
HALF_RATES = [width for width in codec.WIDTHS if codec.is_half_rate(width)]
TOKEN_EMBEDDINGS = ("embed_tokens.weight", "word_embeddings.weight", "backbone.embeddings.weight", "wte.weight")
# Widths that linears take in turn, shuffled, so that every checkpoint of nine linears has each of them.
WIDTHS = [width for width in codec.WIDTHS if width <= 6]


@dataclass(frozen=True)
class Sizes:
    """Of a model. The defaults are small and need padding: 192 to 256, 160 to 256, 96 to 128."""

    hidden: int = 192
    vocab: int = 160
    head_dim: int = 64
    heads: int = 4
    kv_heads: int = 2
    experts: int = 4
    width: int = 96  # of an expert; the padded width flows
    dense_width: int = 256
    layers: int = 2

    def config(self) -> dict:
        """What every model's config.json holds."""
        return {
            "vocab_size": self.vocab,
            "hidden_size": self.hidden,
            "intermediate_size": self.dense_width,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "rms_norm_eps": 1e-6,
            "rope_theta": 10000.0,
            "rope_scaling": None,
            "max_position_embeddings": 512,
            "tie_word_embeddings": False,
            "attention_bias": False,
            "torch_dtype": "bfloat16",
            "eos_token_id": 0,
        }


SIZES = Sizes()
# Two ranks can split these at multiples of 128.
SPLITTABLE = Sizes(kv_heads=4, width=256)


class Checkpoint:
    """Collects the tensors of one model in both forms.

    Args:
        sizes: Of the model.
        config: What config.json holds beside them.
        dense: Whether the dense form is made too.
    """

    def __init__(self, sizes: Sizes, config: dict, *, dense: bool = True):
        self.sizes = sizes
        self.config = {**sizes.config(), **config}
        self.rng = np.random.default_rng(0)
        self.exl3: dict[str, mx.array] = {}
        self.dense: dict[str, mx.array] = {}
        self.bits: dict[str, int | float] = {}
        self._makes_dense = dense
        self._widths: list[int | float] = []

    def linear(self, name: str, k: int, n: int, *, bits=None, bias=False, zero_padding=False) -> None:
        """A quantized linear, in both forms."""
        rng, (kp, np_) = self.rng, (codec.padded(k), codec.padded(n))
        bits = self._next_width() if bits is None else bits
        codebook = "mul1" if codec.is_half_rate(bits) else codec.CODEBOOKS[rng.integers(3)]
        shape = (kp // codec.TILE, np_ // codec.TILE, codec.words_per_tile(bits))
        trellis = rng.integers(-(2**15), 2**15, shape, dtype=np.int16)
        suh, svh = ((rng.choice([-1, 1], size) * rng.uniform(0.5, 1.5, size)).astype(np.float32) for size in (kp, np_))
        suh = (suh / np.sqrt(k)).astype(np.float16)
        svh = svh.astype(np.float16)
        if zero_padding:
            svh[n:] = 0
        self.bits[name] = bits
        self.exl3.update(
            {f"{name}.trellis": mx.array(trellis), f"{name}.suh": mx.array(suh), f"{name}.svh": mx.array(svh)}
        )
        if codebook in MARKERS:
            self.exl3[f"{name}.{codebook}"] = mx.array(MARKERS[codebook], mx.int32)
        if bias:
            values = np.zeros(np_, np.float16)
            values[:n] = rng.normal(0, 0.3, n)
            self.exl3[f"{name}.bias"] = mx.array(values)
            self.dense[f"{name}.bias"] = mx.array(values[:n].astype(np.float32))
        if self._makes_dense:
            w = TrellisWeight(trellis, suh, svh, codebook, in_features=k, out_features=n)
            self.dense[f"{name}.weight"] = mx.array(codec.dequantize(w).T)

    def _next_width(self) -> int | float:
        if not self._widths:
            self._widths = [WIDTHS[i] for i in self.rng.permutation(len(WIDTHS))]
        return self._widths.pop()

    def plain(self, name: str, *shape: int, mean=0.0, spread=1.0, dtype=mx.bfloat16) -> None:
        """An unquantized tensor."""
        values = mx.array(self.rng.normal(mean, spread, shape).astype(np.float32)).astype(dtype)
        self.exl3[name] = values
        self.dense[name] = values

    def norm(self, name: str, size: int, mean=1.0) -> None:
        self.plain(f"{name}.weight", size, mean=mean, spread=0.1)

    def ends(self, model="model", head="lm_head", norm_mean=1.0, embeddings="embed_tokens") -> None:
        s = self.sizes
        self.plain(f"{model}.{embeddings}.weight", s.vocab, s.hidden)
        self.norm(f"{model}.norm", s.hidden, norm_mean)
        self.linear(head, s.hidden, s.vocab, bits=6)

    def quantize_embedding(self, bits: int = 4, parts: int = 1) -> str:
        """Replace the token embedding by a quantized one, split by rows into ``parts``; returns its name."""
        name = next(key for key in self.exl3 if key.endswith(TOKEN_EMBEDDINGS)).removesuffix(".weight")
        rows, features = self.exl3.pop(f"{name}.weight").shape
        groups = -(-features // codec.TILE_SIZE)
        rings = self.rng.integers(0, 1 << 16, (rows, groups, 1 + 16 * bits), np.uint16)
        rings[..., 0] = self.rng.uniform(0.5, 1.5, (rows, groups)).astype(np.float16).view(np.uint16)
        trellis = rings.reshape(rows, -1).view(np.int16)
        signs = self.rng.choice([-1.0, 1.0], (groups, codec.TILE_SIZE)).astype(np.float16)
        height = -(-rows // parts)
        for i in range(parts):
            key = f"{name}.trellis" if parts == 1 else f"{name}.shard_{i}.trellis"
            self.exl3[key] = mx.array(trellis[i * height : (i + 1) * height])
        self.exl3[f"{name}.signs"] = mx.array(signs)
        self.dense[f"{name}.weight"] = mx.array(codec.decode_embedding(trellis, signs, features))
        return name

    def drop_head(self, name: str = "lm_head") -> None:
        """Leave the head to the embeddings."""
        for form in (self.exl3, self.dense):
            for key in [key for key in form if key.startswith(f"{name}.")]:
                del form[key]

    def block_norms(self, layer: str, mean=1.0, names=("input_layernorm", "post_attention_layernorm")) -> None:
        for name in names:
            self.norm(f"{layer}.{name}", self.sizes.hidden, mean)

    def attention(self, layer: str, *, bias=False, o_bias=False, norms=None, gated=False, norm_mean=1.0) -> None:
        s, attn = self.sizes, f"{layer}.self_attn"
        widths = {"q": s.heads * s.head_dim, "k": s.kv_heads * s.head_dim, "v": s.kv_heads * s.head_dim}
        for name, width in widths.items():
            self.linear(f"{attn}.{name}_proj", s.hidden, width * (2 if gated and name == "q" else 1), bias=bias)
        self.linear(f"{attn}.o_proj", s.heads * s.head_dim, s.hidden, bias=o_bias)
        for name in "qk" if norms else "":
            self.norm(f"{attn}.{name}_norm", s.head_dim if norms == "head" else widths[name], norm_mean)

    def latent_attention(self, layer: str, name="self_attn", output="o_proj", *, q_rank: int | None = 128) -> None:
        """q_rank: without it queries are made directly."""
        s, attn = self.sizes, f"{layer}.{name}"
        nope, rope, rank, value = 64, 32, 128, 64
        if q_rank is None:
            self.linear(f"{attn}.q_proj", s.hidden, s.heads * (nope + rope))
        else:
            self.linear(f"{attn}.q_a_proj", s.hidden, q_rank)
            self.norm(f"{attn}.q_a_layernorm", q_rank)
            self.linear(f"{attn}.q_b_proj", q_rank, s.heads * (nope + rope))
        self.linear(f"{attn}.kv_a_proj_with_mqa", s.hidden, rank + rope)
        self.norm(f"{attn}.kv_a_layernorm", rank)
        self.plain(f"{attn}.kv_b_proj.weight", s.heads * (nope + value), rank, spread=rank**-0.5, dtype=mx.float16)
        self.linear(f"{attn}.{output}", s.heads * value, s.hidden)

    def gated_mlp(self, name: str, width: int | None = None) -> None:
        hidden, width = self.sizes.hidden, width or self.sizes.dense_width
        self.linear(f"{name}.gate_proj", hidden, width, zero_padding=True)
        self.linear(f"{name}.up_proj", hidden, width, zero_padding=True)
        self.linear(f"{name}.down_proj", width, hidden)

    def experts(self, block: str, names=("gate_proj", "up_proj", "down_proj"), *, router="gate", bias=False) -> None:
        s = self.sizes
        self.plain(f"{block}.{router}.weight", s.experts, s.hidden, spread=s.hidden**-0.5, dtype=mx.float16)
        for e in range(s.experts):
            for projection, name in enumerate(names):
                k, n = (s.width, s.hidden) if projection == 2 else (s.hidden, s.width)
                self.linear(f"{block}.experts.{e}.{name}", k, n, bias=bias, zero_padding=projection != 2)

    def divide_ups(self, block: str, divisor: float) -> None:
        """Quantized up projections of a block as ExLlamaV3 writes them for models whose activations are large."""
        for e in range(self.sizes.experts):
            self.exl3[f"{block}.experts.{e}.up_proj.svh"] = self.exl3[f"{block}.experts.{e}.up_proj.svh"] / divisor

    def fuse_experts(self, block: str, *, interleaved: bool, bias=False) -> None:
        """Replace the dense form of the experts by the fused one of the original models."""
        s = self.sizes

        def take(name: str, leaf: str) -> np.ndarray:
            return np.stack([np.array(self.dense.pop(f"{block}.experts.{e}.{name}.{leaf}")) for e in range(s.experts)])

        for leaf in ("weight", "bias") if bias else ("weight",):
            gate, up, down = (take(name, leaf) for name in ("gate_proj", "up_proj", "down_proj"))
            if interleaved:  # gate and up rows in turn
                gate_up = np.stack([gate, up], 2).reshape(s.experts, 2 * s.width, *gate.shape[2:])
            else:
                gate_up = np.concatenate([gate, up], 1)
            suffix = "_bias" if leaf == "bias" else ".weight" if interleaved else ""
            self.dense[f"{block}.experts.gate_up_proj{suffix}"] = mx.array(gate_up)
            self.dense[f"{block}.experts.down_proj{suffix}"] = mx.array(down)

    def selection_bias(self, name: str) -> None:
        self.plain(name, self.sizes.experts, spread=0.1, dtype=mx.float16)

    def write(self, directory: Path, *, shards: int = 1) -> Path:
        """The EXL3 directory."""
        quantization = {
            "quant_method": "exl3",
            "version": "1.6.5",
            "bits": 3.5,
            "head_bits": 6,
            "out_scales": "always",
        }
        config = {**self.config, "quantization_config": {**quantization, "codebook": "mul1"}}
        return write_directory(directory, config, self.exl3, shards)

    def write_dense(self, directory: Path) -> Path:
        """The same weights as the original model would hold them; the head is not tied if EXL3 has its own."""
        config = json.loads(json.dumps(self.config))
        for part in (config, config.get("text_config", {})):
            part["tie_word_embeddings"] = not any("lm_head." in name for name in self.dense)
        return write_directory(directory, config, self.dense, 1)


def write_directory(directory: Path, config: dict, tensors: dict[str, mx.array], shards: int) -> Path:
    """config.json and the tensors, in one file or in several with their index."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    names = list(tensors)
    if shards == 1:
        mx.save_safetensors(str(directory / "model.safetensors"), tensors)
        return directory
    files = {
        name: f"model-{1 + i * shards // len(names):05}-of-{shards:05}.safetensors" for i, name in enumerate(names)
    }
    for file in sorted(set(files.values())):
        mx.save_safetensors(str(directory / file), {name: tensors[name] for name in names if files[name] == file})
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return directory


def mixture(c: Checkpoint, attention: Callable[[str], None], model: str = "model") -> Checkpoint:
    """Layers of experts beside a shared one, as GLM and DeepSeek have them: the first is dense."""
    s = c.sizes
    c.ends(model)
    for i in range(s.layers):
        layer = f"{model}.layers.{i}"
        c.block_norms(layer)
        attention(layer)
        if i < 1:
            c.gated_mlp(f"{layer}.mlp")
            continue
        c.experts(f"{layer}.mlp")
        c.selection_bias(f"{layer}.mlp.gate.e_score_correction_bias")
        c.gated_mlp(f"{layer}.mlp.shared_experts", s.width)
    return c


def mixture_config(s: Sizes) -> dict:
    """What the configs of such models say."""
    return {
        "moe_intermediate_size": s.width,
        "n_group": 1,
        "topk_group": 1,
        "n_shared_experts": 1,
        "n_routed_experts": s.experts,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.5,
    }
