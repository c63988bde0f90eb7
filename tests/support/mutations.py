"""Mutations of files: of their bytes, and of what they say as JSON. The same generator gives the same ones."""

from __future__ import annotations

import copy
import json
import random
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def refusals(seed: int, error: type[Exception], path: Path) -> Iterator[None]:
    """What is done with a mutation may be refused with an error that names the path; all else fails, with the seed."""
    try:
        yield
    except error as refusal:
        assert str(path) in str(refusal), seed
    except Exception as other:
        raise AssertionError(f"seed {seed}: {type(other).__name__}: {other}") from other


# What a field is not expected to be, and what is only just too much.
_VALUES = (
    None, True, False, 0, -1, 1, 2, 3, 63, 2**15, 2**31 - 1, 2**31, 2**53, 2**63, 2**64, 10**30, 0.5, -0.0, 1e308,
    "", "x", "F16", "I16", "F32", "U64", "exl3", "..", "../a.safetensors", "\0", "\ud800", "9" * 400, [], [1], [[]], {},
    {"a": 1}, [0, 8], [-1, 4], ["x"], {"content": 3},
)  # fmt: skip


def of_bytes(rng: random.Random, data: bytes) -> bytes:
    """A few bytes changed, some left out, some twice, or the end cut off."""
    kind = rng.choice(("bits", "bytes", "cut", "out", "twice", "zeros"))
    i, j = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    if kind == "cut":
        return data[:i]
    if kind == "out":
        return data[:i] + data[min(j, i + 64) :]
    if kind == "twice":
        return data[:j] + data[i:j][:64] + data[j:]
    if kind == "zeros":
        return data[:i] + bytes(min(j, i + 64) - i) + data[min(j, i + 64) :]
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4) if changed else 0):
        at = rng.randrange(len(changed))
        changed[at] = changed[at] ^ (1 << rng.randrange(8)) if kind == "bits" else rng.randrange(256)
    return bytes(changed)


def _nodes(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) below a value."""
    found, level = [], [value]
    while level:
        inner = level.pop()
        keys = inner if isinstance(inner, dict) else range(len(inner)) if isinstance(inner, list) else ()
        for key in keys:
            found.append((inner, key))
            level.append(inner[key])
    return found


def of_json(rng: random.Random, value: Any) -> Any:
    """A few entries replaced, removed, added, exchanged, or put inside of another."""
    value = copy.deepcopy(value)
    for _ in range(rng.randint(1, 3)):
        nodes = _nodes(value)
        if not nodes:
            return rng.choice(_VALUES)
        (inside, key), (other, name) = rng.choice(nodes), rng.choice(nodes)
        kind = rng.choice(("value", "value", "number", "remove", "add", "exchange", "wrap", "rename"))
        if kind == "value":
            inside[key] = copy.deepcopy(rng.choice(_VALUES))
        elif kind == "number" and isinstance(inside[key], (int, float)) and not isinstance(inside[key], bool):
            inside[key] = rng.choice(
                (inside[key] * 2, inside[key] + 1, inside[key] - 1, -inside[key], str(inside[key]))
            )
        elif kind == "remove":
            del inside[key]
        elif kind == "add" and isinstance(inside, dict):
            inside[rng.choice(("a", "", "lm_head.weight", "x.trellis", "__metadata__"))] = rng.choice(_VALUES)
        elif kind == "exchange":
            first, second = copy.deepcopy(inside[key]), copy.deepcopy(other[name])
            inside[key] = second
            if other is not inside[key]:
                other[name] = first
        elif kind == "wrap":
            inside[key] = [inside[key]]
        elif kind == "rename" and isinstance(inside, dict):
            inside[str(key)[:-1] + rng.choice("0123x.")] = inside.pop(key)
    return value


def of_json_file(rng: random.Random, data: bytes) -> bytes:
    """A file of JSON: mostly another that can be read."""
    if rng.random() < 0.2:
        return of_bytes(rng, data)
    return json.dumps(of_json(rng, json.loads(data))).encode()


def of_safetensors(rng: random.Random, data: bytes) -> bytes:
    """A safetensors file: mostly another header that can be read, over the same data."""
    (length,) = struct.unpack("<Q", data[:8])
    header, rest = data[8 : 8 + length], data[8 + length :]
    kind = rng.choice(("json", "json", "json", "bytes", "length", "data"))
    if kind == "json":
        header = json.dumps(of_json(rng, json.loads(header))).encode()
    elif kind == "bytes":
        header = of_bytes(rng, header)
    elif kind == "length":
        return struct.pack("<Q", rng.choice((0, length - 1, length + 1, 2**31, 2**63, 2**64 - 1))) + header + rest
    else:
        rest = rest[: rng.randrange(len(rest) + 1)]
    return struct.pack("<Q", len(header)) + header + rest
