"""Tiny models that answer with a tool call when their chat template is given tools, and say letters otherwise."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np

from tests.support.checkpoints import TOKEN_EMBEDDINGS, Checkpoint
from tests.support.paths import MODELS
from tests.support.vlm_checkpoints import PROCESSED, SPECIAL, write_processor

NAME, ARGUMENTS = "weather", {"city": "Paris"}
TOOL = {
    "type": "function",
    "function": {
        "name": NAME,
        "description": "How the weather is",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
_CALL = json.dumps({"name": NAME, "arguments": ARGUMENTS}, separators=(",", ":"))
# Tokens of their own: the end of a prompt with tools, and what is said then.
_TOKENS = ("<|tools|>", "<tool_call>", _CALL, "</tool_call>")
SIZES = replace(PROCESSED, vocab=PROCESSED.vocab + len(_TOKENS))
_FIRST = PROCESSED.vocab - len(SPECIAL)
_END = 2  # <|im_end|>


def plant_tool_call(c: Checkpoint) -> Checkpoint:
    """A head, unquantized, that says each token of the call behind the one before it, and otherwise letters.

    Args:
        c: A model of :data:`SIZES`.
    """
    vocabulary = json.loads((MODELS / "random-qwen3_moe" / "tokenizer.json").read_text())["model"]["vocab"]
    letters = [number for text, number in vocabulary.items() if len(text) == 1 and text.isascii()]
    embedding = np.array(next(v for k, v in c.exl3.items() if k.endswith(TOKEN_EMBEDDINGS)).astype(mx.float32))
    head = np.zeros(embedding.shape)
    # What comes behind a letter is for the layers to say.
    basis = np.linalg.qr(embedding[letters].T)[0]
    rows = c.rng.normal(size=(len(letters), c.sizes.hidden))
    rows -= rows @ basis @ basis.T
    head[letters] = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    said = [_FIRST + i for i in range(len(_TOKENS))]
    for token, following in zip(said, [*said[1:], _END]):
        head[following] = embedding[token] / np.linalg.norm(embedding[token])
    c.drop_head()
    c.exl3["lm_head.weight"] = c.dense["lm_head.weight"] = mx.array(head.astype(np.float16))
    for part in (c.config, c.config.get("text_config", {})):
        part.update(eos_token_id=_END, max_position_embeddings=1 << 22)
    return c


def write_tool_processor(directory: Path) -> Path:
    """:func:`write_processor` with these tokens, and tools in the template."""
    write_processor(directory, _TOKENS)
    file = directory / "tokenizer_config.json"
    config = json.loads(file.read_text())
    named = "{% if tools %}{% for tool in tools %}{{ tool.function.name }}\n{% endfor %}{% endif %}"
    # Hosts tell by such a loop how calls are written.
    calls = "{% for tool_call in m.tool_calls or [] %}<tool_call>{{ tool_call.name }}</tool_call>{% endfor %}"
    template = config["chat_template"].replace("<|im_end|>\n{% endfor %}", f"{calls}<|im_end|>\n{{% endfor %}}")
    ending = "<|im_start|>assistant\n"
    config["chat_template"] = named + template.replace(ending, ending + "{% if tools %}<|tools|>{% endif %}")
    file.write_text(json.dumps(config))
    return directory
