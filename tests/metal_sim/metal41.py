"""What Metal 4.1 (macOS 27) rejects and earlier versions accept.

There, pointers and references without an address space are generic, and so is ``this`` of a member function that does
not say ``thread`` after its parameters: none of them may become a ``thread`` pointer or reference, which MSL 3 and 4
allow. In this syntax-only pass ``thread`` is clang's ``__private``, and what has no space is generic by OpenCL's rules.
"""

from __future__ import annotations

import os
import subprocess

from .compiler import DIALECT, tokenise, translate
from .tokens import ADDRESS_SPACES
from .toolchain import CACHE, CLANG, building, digest, sources_digest, with_shim, write_atomically

_FLAGS = [*DIALECT, "-w", "-ferror-limit=0", "-ftemplate-backtrace-limit=1", "-DMSL_PRIVATE_THREAD"]


def rejected(source: str, **options) -> list[str]:
    """The errors of a compiler of Metal 4.1, each as ``file:line:column: error: what``; once per content.

    Args:
        source: A path, or source text.
        options: As in :func:`compile`. Templates are checked where ``instantiate`` names their instances.
    """
    unit = translate(source, private_thread=True, **options)
    found = CACHE / f"metal41_{digest(unit.text, sources_digest(), *_FLAGS)}.errors"
    with building(found) as wanted:
        if wanted:
            path = found.with_suffix(f".{os.getpid()}.clcpp")
            path.write_text(unit.text)
            command = [*CLANG, *with_shim(_FLAGS), "-fsyntax-only", str(path)]
            done = subprocess.run(command, capture_output=True, text=True)
            path.unlink()
            errors = [line for line in done.stderr.splitlines() if " error: " in line]
            # A compiler that fails in another way has not accepted anything.
            if done.returncode and not errors:
                errors = done.stderr.splitlines()[-1:] or [f"{unit.name}: error: clang ended with {done.returncode}"]
            write_atomically(found, "\n".join(dict.fromkeys(errors)).encode())
    return found.read_text().splitlines()


def risky_members(source: str, include_dirs=(), defines: dict | None = None) -> list[str]:
    """Members of structs that work only where ``this`` is known to be in thread memory, as ``file:line: what``.

    Non-static member functions without an address space after their parameters, and members that hold a
    ``simdgroup_matrix``, whose constructors want ``this`` in thread memory. Arguments as in :func:`compile`.
    """
    tokens, _ = tokenise(source, include_dirs, defines, metal_version=400)
    matrices = {"simdgroup_matrix", "simdgroup_float8x8", "simdgroup_half8x8", "simdgroup_bfloat8x8"}
    matrices |= _aliases(tokens, matrices)
    t, found = tokens.t, []
    for i in range(tokens.n):
        opens = t[i] in ("struct", "class") and tokens.k[i + 1] == "I"
        at = i + 2
        while opens and t[at] not in ("{", ";", ")", ">", ","):
            at += 1
        if opens and t[at] == "{":
            found += _members(tokens, at, matrices)
    return found


def _aliases(source, matrices):
    """Names that a typedef or using gives to one of these types."""
    t, names = source.t, set()
    for i in range(source.n):
        if t[i] in ("typedef", "using"):
            end = t.index(";", i)
            if matrices & set(t[i:end]):
                names.add(t[end - 1] if t[i] == "typedef" else t[i + 1])
    return names


def _members(source, opening, matrices):
    t, i, end = source.t, opening + 1, source.close(opening)
    while i < end:
        start, parameters = i, None
        while t[i] not in (";", "{"):
            if i in source.attrs:
                i = source.attrs[i]
                continue
            if t[i] == "(" and source.k[i - 1] == "I" and t[i - 1] != "__attribute__":
                parameters = i
            i = source.close(i) + 1 if t[i] in ("(", "[") else i + 1
        declared = set(t[start:i])
        is_type = declared & {"typedef", "using", "struct", "class", "enum", "static_assert"}
        if parameters is not None and not is_type and "static" not in declared:
            if not set(t[source.close(parameters) : i]) & set(ADDRESS_SPACES):
                yield f"{source.place(parameters)}: {t[parameters - 1]} has no address space after its parameters"
        elif parameters is None and not is_type and declared & matrices:
            yield f"{source.place(start)}: a member holds matrices: {source.text(start, i)}"
        i = source.close(i) + 1 if t[i] == "{" else i + 1
