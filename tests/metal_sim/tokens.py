"""A token-level view of preprocessed Metal source, with an editable text behind every token."""

from __future__ import annotations

import re

ADDRESS_SPACES = {
    "device": "__global",
    # MLX passes `const constant int&` to `constant int&`, so constness is part of the space.
    "constant": "const __constant",
    "threadgroup": "__local",
    "thread": "",
}
VECTORS = {
    f"{t}{n}" for t in "bool char uchar short ushort int uint long ulong half float bfloat".split() for n in (2, 3, 4)
} | {f"packed_{t}{n}" for t in "char uchar short ushort int uint half float bfloat".split() for n in (2, 4)}
KEPT_ATTRIBUTES = ("maybe_unused", "nodiscard", "fallthrough", "clang", "likely", "unlikely", "unroll")

_TOKEN = re.compile(
    r"(?P<L>^[ \t]*#[^\n]*\n?)|(?P<W>\s+)|(?P<I>[A-Za-z_]\w*)|(?P<N>\.?\d(?:[eEpP][+-]|[\w.\'])*)"
    r'|(?P<S>"(?:\\.|[^"\\])*"|\'(?:\\.|[^\'\\])*\')|(?P<P>::|->|.)',
    re.M | re.S,
)


class Source:
    """Significant tokens of a translation unit.

    Attributes:
        t: Token texts; four empty ones follow the last, so that looking ahead needs no checks.
        k: Token kinds: I identifier, N number, S string, P punctuation, E end.
        n: How many tokens there are.
        attrs: ``[[`` position -> position after ``]]``.
        vectors: Names of vector types, aliases included.
        structs: Names of structs.
        body: 1 where a token is inside a function body (the lint fills it).
        errors: What makes the source illegal.
        warnings: What Apple's compiler may treat differently.
    """

    def __init__(self, text: str, keep_unroll: bool = False):
        self.t, self.k, self._where, self._piece, self._pieces = [], [], [], [], []
        self.errors, self.warnings = [], []
        self.has_stdlib = False
        self._tokenise(text, keep_unroll)
        self.n = len(self._piece)
        self.body = bytearray(self.n + 1)
        self.attrs = self._attributes()
        self.vectors = VECTORS | self._vector_aliases()
        self.structs = {
            self.t[i + 1]
            for i in range(self.n)
            if self.t[i] == "struct" and self.k[i + 1] == "I" and self.t[i + 2] in ("{", ":", "final")
        }

    def _tokenise(self, text, keep_unroll):
        file, line = "?", 1
        for match in _TOKEN.finditer(text):
            kind, s = match.lastgroup, match.group()
            if kind == "L":
                marker = re.match(r'\s*#\s*(?:line\s+)?(\d+)\s+"([^"]*)"', s)
                if marker:
                    file, line = marker.group(2), int(marker.group(1)) - 1
                if "msl stdlib_included" in s:
                    self.has_stdlib, s = True, "\n"
                # Unrolling under sanitizers takes clang 20 to 100 s per file.
                elif not keep_unroll and re.match(r"\s*#\s*pragma\s+(unroll|nounroll|clang\s+loop)", s):
                    s = "\n"
            elif kind != "W":
                self.k.append(kind)
                self.t.append(s)
                self._where.append((file, line))
                self._piece.append(len(self._pieces))
            line += s.count("\n")
            self._pieces.append(s)
        self.k += ["E"] * 4
        self.t += [""] * 4
        self._where += [(file, line)] * 4

    def _attributes(self):
        attrs, i, t = {}, 0, self.t
        while i < self.n:
            opens = t[i] == "[" and t[i + 1] == "[" and self._piece[i + 1] == self._piece[i] + 1
            lambda_in_index = self.k[i - 1] == "I" and t[i - 1] != "void" and t[i + 2] in ("&", "=", "]")
            if opens and not lambda_in_index:
                end = self.close(i) + 1
                attrs[i] = end
                if t[i + 2] not in KEPT_ATTRIBUTES:
                    self.blank(i, end)
                i = end
            else:
                i += 1
        return attrs

    def _vector_aliases(self):
        names, t = set(), self.t
        for i in range(self.n):
            if t[i] == "using" and t[i + 2] == "=":
                if t[i + 3] in VECTORS or t[i + 3] == "vec" or (t[i + 3] == "metal" and t[i + 5] == "vec"):
                    names.add(t[i + 1])
            elif t[i] == "typedef":
                j = i + 3 if t[i + 1] == "metal" else i + 1
                end = self.close(j + 1) if t[j] == "vec" else -1
                if end > 0 and t[end + 2] == ";":
                    names.add(t[end + 1])
        return names

    def place(self, i: int) -> str:
        """file:line of token i."""
        return "{}:{}".format(*self._where[min(i, self.n - 1)])

    def error(self, i: int, message: str) -> None:
        self.errors.append(f"{self.place(i)}: {message}")

    def warn(self, i: int, message: str) -> None:
        self.warnings.append(f"{self.place(i)}: {message}")

    def set(self, i: int, text: str) -> None:
        """Replace the text of token i; the token itself stays."""
        self._pieces[self._piece[i]] = text

    def blank(self, a: int, b: int) -> None:
        for i in range(a, b):
            self.set(i, "")

    def edited(self, i: int) -> bool:
        """Whether the text of token i was replaced."""
        return self._pieces[self._piece[i]] != self.t[i]

    def output(self, a: int | None = None, b: int | None = None) -> str:
        """The edited text, of everything or of tokens [a, b)."""
        return "".join(self._pieces if a is None else self._pieces[self._piece[a] : self._piece[b]])

    def text(self, a: int, b: int) -> str:
        return " ".join(self.t[a:b])

    def close(self, i: int) -> int:
        """Index of the token that closes the bracket at i, or -1."""
        opening, depth = self.t[i], 0
        closing = {"(": ")", "[": "]", "{": "}", "<": ">"}[opening]
        while i < self.n:
            s = self.t[i]
            if s == opening:
                depth += 1
            elif s == closing:
                depth -= 1
                if depth == 0:
                    return i
            elif opening == "<" and s in "([":
                i = self.close(i)
            elif opening == "<" and s in ";{":
                return -1
            i += 1
        return -1

    def split(self, a: int, b: int) -> list[tuple[int, int]]:
        """[a, b) split at top-level commas."""
        spans, start, i = [], a, a
        while i < b:
            template = self.t[i] == "<" and self.k[i - 1] == "I" and -1 != self.close(i) < b
            if self.t[i] in ("(", "[", "{") or template:
                i = self.close(i)
            elif self.t[i] == ",":
                spans.append((start, i))
                start = i + 1
            i += 1
        return spans + [(start, b)] if b > start or spans else spans

    def without_attributes(self, a: int, b: int) -> tuple[list[str], list[str]]:
        """Tokens of [a, b) outside attributes, and the tokens inside them."""
        plain, inside, i = [], [], a
        while i < b:
            if i in self.attrs:
                inside += self.t[i + 2 : self.attrs[i] - 2]
                i = self.attrs[i]
            else:
                plain.append(self.t[i])
                i += 1
        return plain, inside
