"""What Metal forbids and clang would accept."""

from __future__ import annotations

from .tokens import ADDRESS_SPACES, Source

FORBIDDEN = {
    "double": "MSL has no double",
    "goto": "MSL has no goto",
    "virtual": "no virtual functions in MSL",
    "new": "no new in MSL",
    "delete": "no delete in MSL",
    "throw": "no exceptions in MSL",
    "try": "no exceptions in MSL",
    "catch": "no exceptions in MSL",
    "dynamic_cast": "no dynamic_cast in MSL",
    "typeid": "no RTTI in MSL",
    "thread_local": "no thread_local in MSL",
    "std": "no std:: in MSL",
    "asm": "no asm in MSL",
    "__asm__": "no asm in MSL",
    "wchar_t": "no wchar_t in MSL",
}
# Qualifiers of functions and address spaces; clang would take them for names.
KEYWORDS = {"kernel", "vertex", "fragment", "ray_data", "object_data", "threadgroup_imageblock"}
_STATEMENTS = set("if constexpr while for switch return sizeof decltype alignas catch else static_assert".split())
_AFTER_PARAMETERS = {"const", "thread", "device", "threadgroup", "constant", "noexcept", "override"}


def lint(source: Source) -> None:
    """Append findings to ``source.errors`` and fill ``source.body``."""
    t, k = source.t, source.k
    functions = {}  # name -> [(is a template, first token of the body, end of the body)]
    for i in range(source.n):
        if k[i] != "I":
            continue
        _forbidden(source, i)
        body = _function_body(source, i)
        if body:
            start, end = body
            before = i - 1
            while before > 0 and t[before] not in (";", "}", "{"):
                before -= 1
            functions.setdefault(t[i], []).append(("template" in t[before:i], start, end))
            source.body[start:end] = b"\1" * (end - start)
            _parameters(source, i)
        declares = t[i + 1] in ("*", "&") and k[i + 2] == "I" and t[i + 3] in ("=", ";", "[")
        if t[i - 1] in (";", "{", "}") and declares and t[i + 2] != "operator":
            if t[i] not in ("auto", "return", "else", "case"):
                source.error(i, f"pointer or reference without an address space: {source.text(i, i + 3)}")
    _recursion(source, functions)


def _forbidden(source, i):
    t, s = source.t, source.t[i]
    allowed = (s == "std" and t[i + 1] != "::") or (s == "delete" and t[i - 1] == "=")
    if s in FORBIDDEN and not allowed:
        source.error(i, FORBIDDEN[s])
    if s in KEYWORDS and not any(first <= i < end for first, end in source.attrs.items()):
        qualifies = source.k[i + 1] == "I" or i + 1 in source.attrs
        if not qualifies or t[i - 1] in ("*", "&"):
            source.error(i, f"{s} is a keyword in MSL")


def _function_body(source, i):
    """Span of the body if token i names a function that is defined here."""
    t = source.t
    if t[i + 1] != "(" or t[i] in _STATEMENTS:
        return None
    end = source.close(i + 1)
    j = end + 1
    while t[j] in _AFTER_PARAMETERS or j in source.attrs:
        j = source.attrs.get(j, j + 1)
    has_type = source.k[i - 1] == "I" or t[i - 1] in ("*", "&", ">", "::", "]")
    if end > 0 and t[j] == "{" and has_type and t[i - 1] != "return":
        return j, source.close(j)
    return None


def _parameters(source, i):
    for a, b in source.split(i + 2, source.close(i + 1)):
        tokens, _ = source.without_attributes(a, b)
        for stop in ("(", "="):
            if stop in tokens:
                tokens = tokens[: tokens.index(stop)]
        if any(x in ADDRESS_SPACES for x in tokens):
            continue
        if any(x in ("*", "&") for x in tokens):
            text = source.text(a, b)
            source.error(a, f"pointer or reference parameter without an address space: {text}")
        elif "[" in tokens:
            source.warn(
                a,
                "array parameter without an address space (Apple's compiler may reject it): " + source.text(a, b),
            )


def _recursion(source, functions):
    """Among plain functions; overloads and templates may call their own name."""
    plain = {f: v[0] for f, v in functions.items() if len(v) == 1 and not v[0][0]}
    calls = {
        f: {
            source.t[x]
            for x in range(start, end)
            if source.k[x] == "I" and source.t[x + 1] == "(" and source.t[x] in functions
        }
        for f, (_, start, end) in plain.items()
    }
    for f in calls:
        seen, todo = set(), list(calls[f])
        while todo:
            g = todo.pop()
            if g == f:
                source.error(functions[f][0][1], f"recursion: {f}")
                break
            if g not in seen:
                seen.add(g)
                todo += list(calls.get(g, ()))
