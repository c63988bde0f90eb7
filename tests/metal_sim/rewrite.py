"""Turn Metal into "C++ for OpenCL", the closest dialect that clang compiles for a CPU.

Only what that dialect cannot say is rewritten: address spaces, vector construction and casts, threadgroup
variables, function constants, and names that OpenCL predefines.
"""

from __future__ import annotations

from .tokens import ADDRESS_SPACES, Source

# OpenCL keywords and predefined types that a Metal program may use as names.
RESERVED = set(
    "global local generic pipe read_only write_only read_write event_t queue_t sampler_t atomic_int "
    "atomic_uint atomic_long atomic_ulong atomic_float atomic_double atomic_flag".split()
)
_HALF_TYPES = ("bfloat", "bfloat16_t", "half", "float16_t")
_STATEMENT_START = (";", "{", "}", "const", "thread")
_SPACES = ("const", "thread", "device", "threadgroup", "constant")


def rewrite(source: Source, function_constants: dict, private_thread: bool = False) -> None:
    """Edit ``source`` in place.

    Args:
        source: Linted source (``source.body`` is filled).
        function_constants: Value by index or by name.
        private_thread: Whether ``thread`` is a space of its own, see ``metal41.py``.
    """
    t, k, variables, i = source.t, source.k, 0, 0
    while i < source.n:
        if i in source.attrs:
            end = source.attrs[i]
            if t[i + 2] == "function_constant" and t[end] == ";":
                _function_constant(source, i, function_constants)
            i = end
            continue
        if k[i] == "N" and t[i].endswith("bf") and not t[i].startswith(("0x", "0X")):
            source.set(i, f"((bfloat){t[i][:-2]}f)")
        elif k[i] == "I" and t[i] in RESERVED:
            source.set(i, t[i] + "_msl_")
        elif k[i] == "I" and t[i] in ADDRESS_SPACES:
            if private_thread and t[i] == "thread":
                source.set(i, "__private")
            else:
                _address_space(source, i)
            moved = _threadgroup_variables(source, i, variables) if t[i] == "threadgroup" else None
            if moved:
                variables, i = moved
                continue
        elif k[i] == "I":
            _identifier(source, i)
        i += 1


def _identifier(source, i):
    t, s = source.t, source.t[i]
    if s in source.vectors and t[i + 1] == "(" and _is_expression(source, i):
        _construct(source, i, i)
    elif s in source.vectors and _is_direct_initialisation(source, i):
        source.set(i + 1, f"{t[i + 1]} = msl_mk<{s}>")
    elif s == "vec" and t[i + 1] == "<":
        end, before = source.close(i + 1), i - 3 if t[i - 1] == "::" else i - 1
        if end > 0 and t[end + 1] == "(" and t[before] != "operator":
            _construct(source, i, end)
    elif s == "reinterpret_cast":
        end = source.close(i + 1)
        if "thread" in t[i + 2 : end]:  # private -> generic needs a C-style cast
            source.set(i, "")
            source.set(i + 1, "(")
            source.set(end, ")")
    elif s in source.structs and t[i - 1] in (*_STATEMENT_START, "constexpr"):
        _struct_copy(source, i)
    elif s == "static_cast":
        _static_cast(source, i)
    elif s in source.vectors and _is_c_cast(source, i):
        source.set(i - 1, "msl_cast<")
        source.set(i + 1, ">{} ->* ")
    elif s == "is_function_constant_defined" and t[i + 1] == "(":
        source.set(i, f"(msl_fcdef_{t[i + 2]})")
        source.blank(i + 1, i + 4)


def _is_expression(source, i):
    """`float4(...)` as a value, not `float4 (...)` in a declaration."""
    before = source.t[i - 1]
    return before in ("return", "else", "case") or (before not in (".", "->") and source.k[i - 1] != "I")


def _is_direct_initialisation(source, i):
    """`short2 v(a, b);`"""
    t = source.t
    if not (source.body[i] and source.k[i + 1] == "I" and t[i + 2] == "(" and t[i - 1] in _STATEMENT_START):
        return False
    return t[source.close(i + 2) + 1] == ";"


def _is_c_cast(source, i):
    """`(float4)x`"""
    t, k = source.t, source.k
    if t[i - 1] != "(" or t[i + 1] != ")":
        return False
    operand = t[i + 2] == "(" or (k[i + 2] in "INS" and t[i + 2] not in _SPACES)
    after_value = k[i - 2] in "INS" or t[i - 2] in (")", "]", ">")
    return operand and (t[i - 2] in ("return", "else", "case") or not after_value)


def _construct(source, a, b):
    """`float4(..)` or `vec<T, 4>(..)` (tokens a to b) -> `msl_mk<..>(..)`"""
    scope = ""
    if source.t[a - 1] == "::" and source.t[a - 2] == "metal":
        source.blank(a - 2, a)
        scope = "metal::" if source.t[a] == "vec" else ""
    if a == b:
        source.set(a, f"msl_mk<{source.t[a]}>")
    else:
        source.set(a, "msl_mk<" + scope + source.t[a])
        source.set(b, ">>")


def _struct_copy(source, i):
    """`S s = expr;` -> `S s = msl_ld(expr);`: clang does not copy structs out of constant memory."""
    t = source.t
    name = source.close(i + 1) + 1 if t[i + 1] == "<" else i + 1
    if source.k[name] != "I" or t[name + 1] != "=" or t[name + 2] == "{":
        return
    end = name + 2
    while end < source.n and t[end] not in (";", ","):
        end = source.close(end) + 1 if t[end] in ("(", "[", "{") else end + 1
    if t[end] == ";":
        source.set(name + 1, "= msl_ld(")
        source.set(end, ");")


def _static_cast(source, i):
    t, end = source.t, source.close(i + 1)
    target = i + 4 if t[i + 2] == "metal" else i + 2
    if end == i + 3 and t[i + 2] in _HALF_TYPES:  # half <-> bfloat is explicit only
        source.set(i, "msl_num")
    is_vec = t[target] == "vec" and source.close(target + 1) == end - 1
    if is_vec or (t[target] in source.vectors and end == target + 1):
        source.set(i, "msl_mk")


def _address_space(source, i):
    t, s = source.t, source.t[i]
    if source.edited(i):
        return
    of_method = t[i - 1] == ")" or (t[i - 1] == "const" and t[i - 2] == ")")
    if s == "constant" and of_method:
        source.set(i, "__constant")
    elif s == "thread" and not of_method and _is_pointee(source, i):
        source.set(i, "__generic")
    else:
        source.set(i, ADDRESS_SPACES[s])


def _is_pointee(source, i):
    """True for `thread T*`; not for `thread T x` or `thread T&`: clang rejects a deduced `__generic T&`."""
    t, j = source.t, i + 1
    while j < source.n:
        if t[j] == "<" and source.close(j) > 0:
            j = source.close(j)
        elif t[j] == "*":
            return True
        elif t[j] == "[":
            return not source.body[i]  # an array parameter
        elif t[j] == "(" and t[j + 1] in ("*", "&"):
            return t[j + 1] == "*"
        elif t[j] in "&,)=;{[(>":
            return False
        j += 1
    return False


def _function_constant(source, i, values):
    """A constant without a value stays an undefined symbol: using it fails when the library is loaded."""
    t, start = source.t, i - 1
    while t[start - 1] not in (";", "}") and source.k[start - 1] != "E" and start > 0:
        start -= 1
    name, index = t[i - 1], int(t[i + 4])
    type_name = " ".join(x for x in t[start : i - 1] if x not in ("constant", "const", "static"))
    source.blank(start, i)
    given = index in values or name in values
    value = values.get(index, values.get(name))
    text = str(value).lower() if isinstance(value, bool) else str(value)
    flag = f"constexpr __constant bool msl_fcdef_{name} = {str(given).lower()}; "
    constant = f"constexpr __constant {type_name} {name} = {text}"
    source.set(start, flag + (constant if given else f"extern __constant const {type_name} {name}"))


def _threadgroup_variables(source, i, count):
    """`threadgroup T x[N], y;` as a statement -> references into the group's arena.

    Returns:
        (variables so far, next token), or None if token i begins no such statement.
    """
    t, before = source.t, i - 1
    while t[before] in ("const", "static", "volatile", "constexpr") or _alignas_before(source, before):
        before = _alignas_before(source, before) - 1 if t[before] == ")" else before - 1
    end = _declaration_end(source, i) if t[before] in (";", "{", "}") else None
    if end is None:
        return None
    declarations = source.split(i + 1, end)
    first = _declared_name(source, *declarations[0])
    if first == i + 1:
        return None
    type_name = " ".join(
        ADDRESS_SPACES.get(x, x + "_msl_" if x in RESERVED else x) for x in t[i + 1 : first] if x != "const"
    )
    text = ""
    for number, (a, b) in enumerate(declarations):
        name = a if number else first
        count += 1
        equals = name + 1
        while equals < b and t[equals] != "=":
            equals = source.close(equals) + 1 if t[equals] == "[" else equals + 1
        if equals < b:
            source.warn(i, f"initialiser of threadgroup variable {t[name]} is ignored (memory stays poisoned)")
        extents = source.output(name + 1, equals) if equals > name + 1 else ""
        text += f"typedef {type_name} msl_t{count} {extents}; "
        text += f"__local msl_t{count}& {t[name]} = msl_tgvar<msl_t{count}>({count}); "
    source.blank(before + 1, end + 1)
    source.set(i, text)
    return count, end + 1


def _declaration_end(source, i):
    """The semicolon of a variable declaration; None for pointers, references, functions and parameters."""
    t, end = source.t, i
    while t[end] != ";":
        if t[end] == "(" and t[end - 1] not in ("decltype", "alignas", "__attribute__"):
            return None
        if t[end] in ("*", "&"):
            return None
        if t[end] in ("(", "[", "{") or (t[end] == "<" and source.close(end) > 0):
            end = source.close(end)
        end += 1
    return end


def _alignas_before(source, p):
    """Position of `alignas` if token p closes `alignas(..)`, else 0."""
    if source.t[p] != ")":
        return 0
    depth = 0
    while p > 0:
        depth += (source.t[p] == ")") - (source.t[p] == "(")
        if depth == 0:
            return p - 1 if source.t[p - 1] == "alignas" else 0
        p -= 1
    return 0


def _declared_name(source, a, b):
    i = last = a
    while i < b and source.t[i] not in ("[", "="):
        if source.t[i] == "<":
            i = source.close(i)
        elif source.k[i] == "I":
            last = i
        i += 1
    return last
