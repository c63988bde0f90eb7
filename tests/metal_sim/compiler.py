"""Metal source -> a shared library whose kernels the runtime executes."""

from __future__ import annotations

import os
import pickle
import re
import zlib
from dataclasses import dataclass
from pathlib import Path

from .address_spaces import pointer_warnings
from .errors import CompileError
from .launch import Library
from .lint import lint
from .rewrite import rewrite
from .signatures import Instantiation, Kernel, find_kernels
from .tokens import Source
from .toolchain import (
    CACHE,
    CLANG,
    HERE,
    ISA,
    LINKER,
    PRECISION,
    building,
    digest,
    passes_digest,
    run_tool,
    sources_digest,
    with_shim,
    write_atomically,
)

UNDEFINED_BEHAVIOUR = (
    "bounds,alignment,null,shift-exponent,integer-divide-by-zero,signed-integer-overflow,bool,return,"
    "unreachable,vla-bound,float-cast-overflow"
)
DIALECT = [
    *("-x", "clcpp", "-cl-std=CLC++2021", "-cl-no-stdinc", "-cl-single-precision-constant"),
    *("-target", "x86_64-linux-gnu", *ISA, *PRECISION),
    "-Xclang",
    "-cl-ext=-all,+cl_khr_fp16,+__opencl_c_generic_address_space,+__cl_clang_function_pointers,+__cl_clang_bitfields",
    # The memory callbacks see at most 16 bytes: nothing may be vectorised.
    *("-fno-vectorize", "-fno-slp-vectorize", "-fno-strict-aliasing"),
]
CHECKS = [
    *("-fPIC", "-fvisibility=hidden", "-ftrivial-auto-var-init=pattern", "-fsanitize=thread"),
    *("-mllvm", "-tsan-instrument-func-entry-exit=0", "-mllvm", "-tsan-instrument-atomics=0"),
    *("-gline-tables-only", "-gdwarf-4", "-fno-color-diagnostics", "-ferror-limit=40"),
    *("-Wall", "-Wimplicit-float-conversion", "-Wno-unknown-pragmas", "-Wno-unused", "-Wno-psabi"),
    *("-Wno-missing-braces", "-Wno-implicit-int-float-conversion", "-Wno-duplicate-decl-specifier"),
    *("-Wno-parentheses", "-Wno-implicit-const-int-float-conversion"),
]
# Warnings of clang that are errors in Metal.
_HARD = re.compile(r"address space|precision: .* to '(bfloat|__bf16)|to 'bfloat16_t'|sizeof\(|vla|return type")


@dataclass(frozen=True)
class Unit:
    """A translation unit for clang.

    Attributes:
        text: C++ for OpenCL.
        name: Where it came from, for messages.
        kernels: Kernels by host name.
        symbols: Entry point by host name.
        errors: Findings that make it illegal Metal.
        warnings: Findings that may.
    """

    text: str
    name: str
    kernels: dict[str, Kernel]
    symbols: dict[str, str]
    errors: list[str]
    warnings: list[str]


def _preprocess(source, include_dirs, defines, metal_version):
    CACHE.mkdir(parents=True, exist_ok=True)
    if "\n" not in source and os.path.exists(source):
        path = Path(source).resolve()
    else:
        path = CACHE / f"source_{digest(source)}.metal"
        if not path.exists():
            write_atomically(path, source.encode())
    macros = {"__METAL__": 1, "__METAL_VERSION__": metal_version, "__METAL_MACOS__": 1, **(defines or {})}
    includes = [str(HERE / "include"), *map(str, include_dirs)]
    command = [*CLANG, "-E", "-x", "c++", "-std=c++17", "-nostdinc", "-Wno-everything"]
    command += ["-U__linux__", "-U__x86_64__", *(f"-I{x}" for x in includes)]
    command += [*(f"-D{k}={v}" for k, v in macros.items()), str(path)]
    text = run_tool(command, "preprocessing").stdout
    # Short names in line markers: messages read better, and every checkout shares the cache.
    for folder in sorted({str(path.parent), *includes}, key=len, reverse=True):
        text = text.replace(f'"{folder}/', '"')
    return text, path.name


def tokenise(source: str, include_dirs=(), defines=None, metal_version: int = 310, unroll: bool = False):
    """The tokens of preprocessed Metal source, and its name in messages. Arguments as in :func:`compile`."""
    text, name = _preprocess(source, include_dirs, defines, metal_version)
    return Source(text, unroll), name


def _entry_points(source, kernels, wanted):
    """The dispatch functions: argument words and thread ids -> a kernel's typed arguments."""
    table, symbols, text = {}, {}, ""
    for number, instance in enumerate(wanted):
        base = instance.function.split("::")[-1]
        if base not in kernels:
            raise CompileError(f"no kernel function {base} for {instance.host_name}")
        if instance.host_name in table:
            source.errors.append(f"two kernels are called {instance.host_name}")
        kernel = kernels[base]
        arguments = ", ".join(
            f"msl_idarg<S::at<{i}>>(t->{p.id_field})" if p.kind == "id" else f"msl_barg<S::at<{i}>>::get(b[{i}])"
            for i, p in enumerate(kernel.parameters)
        )
        symbol = f"msl_k{number}"
        text += (
            'extern "C" __attribute__((no_sanitize("thread", "undefined"), visibility("default"))) '
            f"void {symbol}(__global const ulong* b, __global const msl_ids* t) {{\n"
            f"  typedef msl_sig<decltype({instance.expression})> S;\n"
            f"  static_assert(S::n == {len(kernel.parameters)});\n"
            f"  {instance.expression}({arguments});\n}}\n"
        )
        table[instance.host_name], symbols[instance.host_name] = kernel, symbol
    return table, symbols, text


def translate(
    source: str,
    include_dirs=(),
    defines: dict | None = None,
    function_constants: dict | None = None,
    kernels=None,
    instantiate: dict | None = None,
    metal_version: int = 310,
    unroll: bool = False,
    private_thread: bool = False,
) -> Unit:
    """Metal source -> a unit for clang, once per content. Arguments as in :func:`compile`.

    private_thread: For ``metal41.py``, which says what it is.

    Raises:
        CompileError: If the preprocessor rejects it or a kernel is missing.
    """
    text, name = _preprocess(source, include_dirs, defines, metal_version)
    if kernels is not None and not isinstance(kernels, str):
        kernels = sorted(kernels)
    options = function_constants or {}, kernels, instantiate or {}, unroll, private_thread
    # Hashing what the preprocessor leaves takes a hundredth of the time of the passes over its tokens.
    kept = CACHE / f"unit_{digest(text, name, repr(options), passes_digest())}.pickle"
    with building(kept) as wanted:
        if wanted:
            unit = _translated(text, name, *options)
            write_atomically(kept, zlib.compress(pickle.dumps(unit), 1))
    return pickle.loads(zlib.decompress(kept.read_bytes()))


def _translated(text, name, function_constants, kernels, instantiate, unroll, private_thread):
    tokens = Source(text, unroll)
    functions, instances = find_kernels(tokens)
    lint(tokens)
    rewrite(tokens, dict(function_constants), private_thread)
    if not tokens.has_stdlib:
        tokens.errors.append("no Metal standard header is included (#include <metal_stdlib>)")
    wanted = [Instantiation(f.host_name, n, n) for n, f in functions.items() if not f.is_template] + instances
    for host, expression in instantiate.items():
        wanted.append(Instantiation(host, expression.split("<")[0].split("::")[-1].strip(), expression))
    if kernels is not None:
        is_wanted = re.compile(kernels).fullmatch if isinstance(kernels, str) else set(kernels).__contains__
        wanted = [x for x in wanted if is_wanted(x.host_name)]
    table, symbols, dispatch = _entry_points(tokens, functions, wanted)
    unit = (
        f'# 1 "msl_prefix"\n#include "msl.h"\n{tokens.output()}\n# 1 "msl_dispatch"\n'
        f"#pragma OPENCL EXTENSION __cl_clang_function_pointers : enable\n{dispatch}"
    )
    return Unit(unit, name, table, symbols, tokens.errors, tokens.warnings)


def _build(unit, flags):
    """Compile and link, once per content. Returns the library's path and clang's warnings."""
    key = digest(unit.text, sources_digest(), *flags)
    library, diagnostics = CACHE / f"kernel_{key}.so", CACHE / f"kernel_{key}.diagnostics"
    with building(library, diagnostics) as wanted:
        if wanted:
            beside = CACHE / f"kernel_{key}.{os.getpid()}"
            source, object_file = beside.with_suffix(".clcpp"), beside.with_suffix(".o")
            source.write_text(unit.text)
            built = run_tool(
                [*CLANG, *with_shim(flags), "-c", "-o", str(object_file), str(source)], f"compiling {unit.name}"
            )
            warnings = built.stderr.splitlines() + pointer_warnings(unit.text, [*flags, f"-I{HERE / 'shim'}"])
            run_tool([*LINKER, "-shared", "-o", str(beside), str(object_file)], "linking")
            object_file.unlink()
            source.unlink()
            write_atomically(diagnostics, "\n".join(warnings).encode())
            beside.replace(library)
    found = [
        w
        for w in diagnostics.read_text().splitlines()
        if ": warning:" in w and "msl_prefix" not in w and "/shim/" not in w
    ]
    return library, found


def compile(source: str, *, fp_contract: str = "off", strict: bool = True, optimise: str = "-O2", **options) -> Library:
    """Compile Metal source with every check on.

    Args:
        source: A path, or source text.
        fp_contract: ``"fast"`` fuses a*b+c, as Apple's compiler may.
        strict: Whether findings of the lint are errors; False leaves them in ``Library.diagnostics``.
        optimise: Optimisation level.
        include_dirs: Where ``#include`` looks.
        defines: Preprocessor macros.
        function_constants: Value by index or by name.
        kernels: Host names (a list, or a pattern): build only these.
        instantiate: ``{host name: "function<args>"}``, further template kernels.
        metal_version: ``__METAL_VERSION__``.
        unroll: Keep ``#pragma unroll`` (slow with the checks).

    Raises:
        CompileError: With the messages of clang or of the lint.
    """
    unit = translate(source, **options)
    if strict and unit.errors:
        raise CompileError("rejected by the front-end checks:\n" + "\n".join(unit.errors))
    flags = [*DIALECT, optimise, f"-ffp-contract={fp_contract}", f"-fsanitize={UNDEFINED_BEHAVIOUR}", *CHECKS]
    library, warnings = _build(unit, flags)
    hard = [w for w in warnings if _HARD.search(w)]
    soft = [w for w in warnings if w not in hard and "loses floating-point precision" not in w]
    if strict and (unit.errors or hard):
        raise CompileError("rejected by the front-end checks:\n" + "\n".join(unit.errors + hard))
    return Library(library, unit.kernels, unit.symbols, unit.errors + hard + unit.warnings + soft)
