"""Find kernel functions, their arguments and explicit instantiations."""

from __future__ import annotations

from dataclasses import dataclass, replace

from .tokens import Source

MAX_THREADS = 1024
MAX_BUFFER_INDEX = 30
# Thread-position attributes -> fields of msl_ids in the shim.
THREAD_IDS = {
    "thread_position_in_grid": "tpig",
    "threadgroup_position_in_grid": "tgpig",
    "thread_position_in_threadgroup": "tpitg",
    "threads_per_threadgroup": "tptg",
    "dispatch_threads_per_threadgroup": "dtptg",
    "threadgroups_per_grid": "tgpg",
    "threads_per_grid": "tpg",
    "thread_index_in_threadgroup": "tiitg",
    "thread_index_in_simdgroup": "lane",
    "simdgroup_index_in_threadgroup": "sg",
    "simdgroups_per_threadgroup": "sgptg",
    "dispatch_simdgroups_per_threadgroup": "sgptg",
    "thread_index_in_quadgroup": "qlane",
    "quadgroup_index_in_threadgroup": "qg",
    "quadgroups_per_threadgroup": "qgptg",
    "threads_per_simdgroup": "tps",
    "thread_execution_width": "tps",
    "grid_origin": "zero",
}
_SPACES = ("device", "constant", "threadgroup")


@dataclass(frozen=True)
class Parameter:
    """One kernel argument.

    Attributes:
        name: Its name.
        kind: ``"buffer"``, ``"threadgroup"`` or ``"id"``.
        index: Argument index of a buffer or of threadgroup memory; None before it is assigned.
        id_field: For an id, the field of msl_ids.
        read_only: Whether the kernel may not write it.
        optional: Whether a function constant decides if it exists.
    """

    name: str
    kind: str
    index: int | None = None
    id_field: str = "zero"
    read_only: bool = False
    optional: bool = False


@dataclass(frozen=True)
class Kernel:
    """A kernel function."""

    name: str
    host_name: str
    parameters: tuple[Parameter, ...]
    is_template: bool
    max_threads: int


@dataclass(frozen=True)
class Instantiation:
    """``template [[host_name("h")]] kernel void f<args>(...);``"""

    host_name: str
    function: str
    expression: str


def find_kernels(source: Source) -> tuple[dict[str, Kernel], list[Instantiation]]:
    """Kernels by function name and explicit instantiations; the kernel keywords are removed."""
    kernels, instantiations, i, t = {}, [], 0, source.t
    while i < source.n:
        if i not in source.attrs and not (t[i] == "kernel" and source.k[i] == "I"):
            i += 1
            continue
        start, is_kernel, host, max_threads = i, False, None, MAX_THREADS
        while i in source.attrs or t[i] in ("kernel", "static", "inline"):
            if i not in source.attrs:
                if t[i] == "kernel":
                    is_kernel = True
                    source.set(i, "")
                i += 1
                continue
            inside = t[i + 2 : source.attrs[i] - 2]
            is_kernel = is_kernel or "kernel" in inside
            if "host_name" in inside:
                host = "".join(x[1:-1] for x in inside if x[0] == '"')
            if "max_total_threads_per_threadgroup" in inside:
                limit = inside[inside.index("max_total_threads_per_threadgroup") + 2]
                max_threads = int(limit) if limit.isdigit() else MAX_THREADS
            i = source.attrs[i]
        if not is_kernel:
            continue
        if t[start - 1] == "template":
            instantiation, i = _instantiation(source, start, i, host)
            instantiations.append(instantiation)
            continue
        i, kernel, defined = _kernel(source, i, host, max_threads, t[start - 1] == ">")
        if defined or kernel.name not in kernels:
            kernels[kernel.name] = kernel
    return kernels, instantiations


def _instantiation(source, start, i, host):
    t, end = source.t, i
    while t[end] != ";":
        end += 1
    while t[i] in ("void", "decltype") or (t[i + 1] not in ("<", "::") and t[i] != "("):
        i = source.close(i + 1) + 1 if t[i] == "decltype" else i + 1
    opening = i
    while t[opening] != "<":
        opening += 1
    expression = source.text(i, source.close(opening) + 1)
    source.blank(start - 1, end + 1)
    function = source.text(i, opening).replace(" ", "")
    return Instantiation(host or expression, function, expression), end + 1


def _kernel(source, i, host, max_threads, is_template):
    t, returns = source.t, i
    while t[i] != "(":
        i += 1
    name, end = t[i - 1], source.close(i)
    if t[returns] != "void":
        source.error(returns, f"kernel {name} must return void")
    empty = t[i + 1] == ")" or (t[i + 1] == "void" and t[i + 2] == ")")
    spans = [] if empty else source.split(i + 1, end)
    found = [(a, p) for a, b in spans if (p := _parameter(source, a, b))]
    parameters = _assign_indices(source, name, found)
    kernel = Kernel(name, host or name, parameters, is_template, max_threads)
    return i, kernel, t[end + 1] == "{"


def _parameter(source, a, b):
    tokens, inside = source.without_attributes(a, b)
    if not tokens:
        return None
    name = tokens[tokens.index("[") - 1 if "[" in tokens else -1]
    is_pointer = any(x in ("*", "&", "[") for x in tokens)
    optional = "function_constant" in inside
    index = None
    if "buffer" in inside or "threadgroup" in inside[:1]:
        kind = "buffer" if "buffer" in inside else "threadgroup"
        text = inside[inside.index(kind) + 2]
        if not text.isdigit():
            source.error(a, f"{kind} index of {name} is not a number: {text}")
        index = int(text) if text.isdigit() else 0
        if not is_pointer:
            source.error(a, f"kernel argument {name}: [[{kind}(n)]] needs a pointer or reference")
    elif field := next((THREAD_IDS[x] for x in inside if x in THREAD_IDS), None):
        return Parameter(name, "id", id_field=field)
    elif is_pointer and any(x in tokens for x in _SPACES):
        kind = "threadgroup" if "threadgroup" in tokens else "buffer"
    else:
        source.error(a, f"kernel argument {name} has no (known) attribute: {' '.join(inside)}")
        return Parameter(name, "id")
    if not any(x in tokens for x in _SPACES):
        source.error(a, f"kernel argument {name} needs device, constant or threadgroup")
    star = next((q for q, x in enumerate(tokens) if x in "*&"), len(tokens))
    read_only = "constant" in tokens or "const" in tokens[:star]
    return Parameter(name, kind, index, read_only=read_only, optional=optional)


def _assign_indices(source, kernel, found):
    """Arguments without an index take the lowest free one, in order."""
    used = {(p.kind, p.index) for _, p in found if p.index is not None}
    seen, parameters = set(), []
    for at, p in found:
        if p.kind != "id" and p.index is None:
            index = next(i for i in range(len(used) + 1) if (p.kind, i) not in used)
            used.add((p.kind, index))
            p = replace(p, index=index)
        if p.kind != "id" and (p.kind, p.index) in seen and not p.optional:
            source.error(at, f"{p.kind} index {p.index} is used twice in kernel {kernel}")
        seen.add((p.kind, p.index))
        if p.kind == "buffer" and p.index > MAX_BUFFER_INDEX:
            source.error(at, f"buffer index above {MAX_BUFFER_INDEX}")
        parameters.append(p)
    return tuple(parameters)
