"""Where the macOS extension's undefined symbols come from."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Set
from dataclasses import dataclass
from pathlib import Path

import ziglang

# metal-cpp calls everything through this function of the Objective-C runtime.
OBJECTIVE_C = {"_objc_msgSend"}


@dataclass(frozen=True)
class Origins:
    """Symbols by who defines them.

    Attributes:
        mlx: libmlx.dylib.
        cpython: The interpreter: the one that runs here exports them too, and it has the same minor version.
        system: libSystem, by the list that ziglang brings, and the Objective-C runtime.
        unknown: Nobody: the extension would not load.
    """

    mlx: frozenset[str]
    cpython: frozenset[str]
    system: frozenset[str]
    unknown: frozenset[str]

    def __str__(self) -> str:
        total = sum(map(len, (self.mlx, self.cpython, self.system, self.unknown)))
        return (
            f"{total} undefined symbols: {len(self.mlx)} in libmlx, {len(self.cpython)} CPython's, "
            f"{len(self.system)} the system's, {len(self.unknown)} unknown"
        )


def system_symbols() -> frozenset[str]:
    """Everything that libSystem exports on macOS."""
    text = (Path(ziglang.__file__).parent / "lib" / "libc" / "darwin" / "libSystem.tbd").read_text()
    symbols = frozenset(re.findall(r"[\w$.]+", text))
    if not {"_malloc", "_pthread_create", "dyld_stub_binder"} <= symbols:
        raise RuntimeError("ziglang's libSystem.tbd is not the list of symbols that this expects")
    return symbols


def origins(undefined: Set[str], mlx: Set[str]) -> Origins:
    """Sort symbols by who defines them.

    Args:
        undefined: What the extension needs, with the leading underscore of Mach-O.
        mlx: What libmlx.dylib defines.
    """
    from_mlx = frozenset(undefined & mlx)
    cpython = frozenset(
        s for s in undefined - from_mlx if re.match(r"__?Py", s) and hasattr(ctypes.pythonapi, s.removeprefix("_"))
    )
    system = frozenset((undefined - from_mlx - cpython) & (system_symbols() | OBJECTIVE_C))
    return Origins(from_mlx, cpython, system, frozenset(undefined) - from_mlx - cpython - system)
