"""Count what a kernel does: operations per basic block of the optimised IR, times how often it runs.

Costs are those of an Apple GPU core: the *complex* pipe does integer multiplies, shifts and bit-field moves
and integer/float conversions at a quarter of the rate of everything else, so it is counted apart. What that
GPU does for nothing counts nothing: half-register selection (a shift by 16), a left shift by 1 to 4 that
feeds an add, width changes, half operands of float operations.
"""

from __future__ import annotations

import os
import pickle
from collections import Counter
from dataclasses import dataclass
from functools import cached_property

from . import costs, ir
from .compiler import DIALECT, translate
from .launch import Library, Result
from .toolchain import (
    CACHE,
    CLANG,
    HERE,
    LINKER,
    building,
    digest,
    run_tool,
    sources_digest,
    with_shim,
    write_atomically,
)

CLASSES = (
    *("multiply", "shift", "variable_shift", "wide_variable_shift", "convert"),
    *("integer", "half", "float", "special", "load", "store", "branch"),
)
# Multiples of one complex operation (4 cycles on M1 to M4). A 64-bit shift by a register amount is several
# instructions, together 3 to 4 complex operations.
COMPLEX = {"multiply": 1, "shift": 1, "convert": 1, "variable_shift": 2, "wide_variable_shift": 3.5}


@dataclass(frozen=True)
class Operations:
    """Operations summed over threads.

    Attributes:
        counts: By class (:data:`CLASSES`).
        weights: Trellis weights decoded: multiplies by a codebook's constant.
    """

    counts: Counter
    weights: int

    @property
    def complex(self) -> float:
        """Time on the complex pipe, in multiples of one multiply."""
        return sum(self.counts[name] * times for name, times in COMPLEX.items())

    def per_weight(self) -> dict[str, float]:
        """Complex, integer, half, float, load and store operations per decoded weight."""
        if not self.weights:
            raise ValueError("no trellis weight is decoded here")
        names = ("integer", "half", "float", "load", "store")
        return {"complex": self.complex / self.weights} | {n: self.counts[n] / self.weights for n in names}


class CountedResult(Result):
    """A :class:`Result` with operation counts.

    Attributes:
        operations: Of the whole dispatch.
        inner_loop: Of the innermost loop that decodes most weights; the whole dispatch if none decodes any.
        loop_registers: Estimate of live 32-bit registers in that loop.
        decoders: Innermost loops that decode weights, whether they ran or not.
    """

    operations: Operations
    inner_loop: Operations
    loop_registers: int
    decoders: int


@dataclass(frozen=True)
class _Function:
    """What counting needs of a function.

    Attributes:
        name: Its symbol.
        blocks: Numbers of its blocks.
        loops: Block numbers of each loop.
        registers: Estimate of live 32-bit registers, by block numbers: of each loop and of the whole.
    """

    name: str
    blocks: range
    loops: list[frozenset[int]]
    registers: dict[frozenset[int], int]

    @classmethod
    def of(cls, function: ir.Function) -> _Function:
        loops = [frozenset(loop) for loop in ir.natural_loops(function)]
        registers = {part: ir.live_registers(function, part) for part in (*loops, frozenset(function.block_ids))}
        return cls(function.name, function.block_ids, loops, registers)


class CountedLibrary(Library):
    """Kernels without the checks, whose basic blocks count themselves.

    Attributes:
        registers: Estimate of live 32-bit registers by host name: the most values live at once in the IR.
    """

    def __init__(self, path, unit, functions: list[_Function], operations: list[Operations]):
        super().__init__(path, unit.kernels, unit.symbols, [], blocks=len(operations))
        self._functions, self._operations = functions, operations
        whole = {f.name: f.registers[frozenset(f.blocks)] for f in functions}
        self.registers = {host: whole[symbol] for host, symbol in unit.symbols.items()}

    @cached_property
    def module(self) -> ir.Module:
        """The optimised IR."""
        return ir.Module(self.path.with_suffix(".ll").read_text())

    def run(self, *arguments, **options) -> CountedResult:
        """As :meth:`Library.run`, with ``races`` off; the result has operation counts."""
        result = super().run(*arguments, races=False, **options)
        result.__class__ = CountedResult
        result.operations = self._sum(range(len(result.blocks)), result.blocks)
        loop = self.hottest_loop(result.blocks)
        result.inner_loop = self._sum(loop, result.blocks)
        parts = ((f, loop & frozenset(f.blocks)) for f in self._functions)
        result.loop_registers = max(f.registers[part] for f, part in parts if part)
        result.decoders = len({self._innermost(b) for b, of in enumerate(self._operations) if of.weights})
        return result

    def _sum(self, blocks, times):
        counts, weights = Counter(), 0
        for b in blocks:
            if times[b]:
                for name, n in self._operations[b].counts.items():
                    counts[name] += n * times[b]
                weights += self._operations[b].weights * times[b]
        return Operations(counts, weights)

    def hottest_loop(self, times: list[int]) -> frozenset[int]:
        """The innermost loop that decodes most weights; every block if none decodes any. times: runs of each block."""
        decoded = [of.weights * t for of, t in zip(self._operations, times)]
        if not any(decoded):
            return frozenset(range(len(times)))
        return self._innermost(decoded.index(max(decoded)))

    def _innermost(self, block):
        """The smallest loop around a block; its function if it is in none."""
        loops = [loop for f in self._functions for loop in f.loops if block in loop]
        if not loops:
            return next(frozenset(f.blocks) for f in self._functions if block in f.blocks)
        return min(loops, key=len)


def compile_counted(source: str, *, fp_contract: str = "off", **options) -> CountedLibrary:
    """Compile for counting; arguments as in :func:`metal_sim.compile`. ``#pragma unroll`` is kept.

    Raises:
        CompileError: With the messages of clang.
    """
    unit = translate(source, **{"unroll": True, **options})
    flags = [*DIALECT, "-O2", f"-ffp-contract={fp_contract}", "-fPIC", "-fvisibility=hidden", "-w"]
    counter = "\n".join((HERE / f).read_text() for f in ("counting.py", "costs.py", "ir.py"))
    key = digest(unit.text, sources_digest(), counter, *flags)
    library = CACHE / f"counted_{key}.so"
    text, counted = library.with_suffix(".ll"), library.with_suffix(".pickle")
    with building(text, counted, library) as wanted:
        if wanted:
            module = _build(unit, flags, text, library)
            operations = [Operations(b.operations, b.weights) for b in module.blocks]
            write_atomically(counted, pickle.dumps(([_Function.of(f) for f in module.functions], operations)))
    return CountedLibrary(library, unit, *pickle.loads(counted.read_bytes()))


def _build(unit, flags, text, library) -> ir.Module:
    """Compile to IR, and that to a library. Returns the classified module."""
    beside = library.with_suffix(f".{os.getpid()}")
    source, instrumented, object_file = (beside.with_suffix(f".{end}") for end in ("clcpp", "blocks.ll", "o"))
    source.write_text(unit.text)
    command = [*CLANG, *with_shim(flags), "-S", "-emit-llvm", "-o", "-", str(source)]
    write_atomically(text, run_tool(command, f"compiling {unit.name}").stdout.encode())
    module = ir.Module(text.read_text())
    for function in module.functions:
        costs.classify(function)
    instrumented.write_text(module.instrumented())
    target = ["-target", "x86_64-linux-gnu", "-mavx", "-mf16c", "-mfma", "-w"]
    run_tool(
        [*CLANG, "-x", "ir", *target, "-O1", "-fPIC", "-c", "-o", str(object_file), str(instrumented)],
        f"compiling {unit.name} for counting",
    )
    run_tool([*LINKER, "-shared", "-o", str(beside), str(object_file)], "linking")
    for made in (source, instrumented, object_file):
        made.unlink()
    beside.replace(library)
    return module
