"""One forward call of a model followed by shapes alone: nothing is read, nothing is computed.

Sizes of a config can agree with every tensor and contradict each other. MLX finds that when a call's graph is built.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .host import MODEL_ERRORS, Host

# A prompt and a token after it: masks, caches and recurrent states of both kinds. No more, as recurrent layers are
# followed token by token.
_PROMPT = 3
# What MLX says where model code looks at a value, or has one computed: that call cannot be followed.
_LOOKS_AT_VALUES = ("during function transformations", "inside a graph transformation")


def check_call(model: nn.Module, path: Path, config: dict, host: Host) -> None:
    """See that a model of this config can be called. Its parameters are replaced: it is of no use afterwards.

    Args:
        model: The model as its class makes it, nothing evaluated.
        path: The checkpoint, for error messages.
        config: Its config.
        host: Whose model it is.

    Raises:
        ValueError: If it cannot; the message names the keys that the failing line depends on.
    """

    is_followed = False

    def call(tokens: mx.array) -> mx.array:
        nonlocal is_followed
        cache = host.make_cache(model)
        prompt = host.logits(model, tokens, cache)
        logits = prompt[:, :1] + host.logits(model, tokens[:, :1], cache)
        is_followed = True
        return logits

    try:
        # Compiled, so that the parameters are tracers too: what would evaluate one raises.
        mx.compile(call, inputs=[model.state])(mx.zeros((1, _PROMPT), mx.int32))
    except (RecursionError, *MODEL_ERRORS) as error:
        # MLX then simplifies the graph, which is of no use here and fails with that of glm4v_moe.
        if is_followed or any(phrase in str(error) for phrase in _LOOKS_AT_VALUES):
            return
        raise contradiction(error, path, config, host) from error


def contradiction(error: Exception, path: Path, config: dict, host: Host) -> ValueError:
    """The error for a model that cannot be called; it names the keys that the failing line depends on.

    Args:
        error: What the call raised.
        path: The checkpoint.
        config: Its config.
        host: Whose model it is.
    """
    keys = [f"{key} = {shown}" for key, shown in _keys(error.__traceback__, config, host.model_code)]
    named = f" ({', '.join(keys)})" if keys else ""
    return ValueError(
        f"{path / 'config.json'}: sizes contradict each other{named}: a {config['model_type']} model cannot be "
        f"called: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
    )


def _keys(traceback: TracebackType | None, config: dict, model_code: str) -> list[tuple[str, str]]:
    """The keys of a config that the failing statement depends on, and their values: of the innermost that has some."""
    flat = {**config, **(config["text_config"] if isinstance(config.get("text_config"), dict) else {})}
    frames = []
    while traceback is not None:
        frames.append((traceback.tb_frame, traceback.tb_lineno))
        traceback = traceback.tb_next
    for frame, line in reversed(frames):
        if str(frame.f_globals.get("__name__", "")).startswith(model_code):
            names = sorted(key for key in _of_statement(frame, line) if key in flat)
            if names:
                return [(name, _short(flat[name])) for name in names]
    return []


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _parsed(thing: Any) -> tuple[ast.AST, int] | None:
    """Source of a class or function, and the line before its first."""
    try:
        lines, start = inspect.getsourcelines(thing)
        return ast.parse(textwrap.dedent("".join(lines))), max(0, start - 1)
    except (OSError, SyntaxError, TypeError):
        return None


def _names(node: ast.AST) -> Iterator[str]:
    for part in ast.walk(node):
        if isinstance(part, ast.Attribute):
            yield part.attr
        elif isinstance(part, ast.Name):
            yield part.id


def _of_statement(frame: FrameType, line: int) -> set[str]:
    """Names that a statement uses, and those that its function and its class's ``__init__`` made them of."""
    parsed = _parsed(frame.f_code)
    if parsed is None:
        return set()
    tree, before = parsed
    statements = [
        node
        for node in ast.walk(tree)
        if isinstance(node, (ast.Assign, ast.AugAssign, ast.Return, ast.Expr, ast.Assert))
        and node.lineno <= line - before <= (node.end_lineno or node.lineno)
    ]
    names = _resolved({name for node in statements for name in _names(node)}, tree)
    owner = frame.f_locals.get("self")
    made = _parsed(type(owner).__init__) if owner is not None else None
    return _resolved(names, made[0]) if made is not None else names


def _resolved(names: set[str], tree: ast.AST) -> set[str]:
    """Names, and all that assignments to them are made of."""
    assigned: dict[str, set[str]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            for target in node.targets:
                for name in _names(target):
                    if name != "self":
                        assigned.setdefault(name, set()).update(_names(node.value))
    found, new = set(names), set(names)
    while new:
        new = {part for name in new for part in assigned.get(name, ())} - found
        found |= new
    return found
