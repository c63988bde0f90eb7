"""Count what a kernel does: operations per basic block of the optimised IR, times how often it runs.

Costs are those of an Apple GPU core: the *complex* pipe does integer multiplies, shifts and bit-field moves
and integer/float conversions at a quarter of the rate of everything else, so it is counted apart. What that
GPU does for nothing counts nothing: half-register selection (a shift by 16), a left shift by 1 to 4 that
feeds an add, width changes, half operands of float operations.
"""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass

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


class CountedLibrary(Library):
    """Kernels without the checks, whose basic blocks count themselves.

    Attributes:
        registers: Estimate of live 32-bit registers by host name: the most values live at once in the IR.
    """

    def __init__(self, path, unit, module):
        super().__init__(path, unit.kernels, unit.symbols, [], blocks=len(module.blocks))
        self._module = module
        functions = {f.name: f for f in module.functions}
        self.registers = {host: ir.live_registers(functions[s]) for host, s in unit.symbols.items()}

    def run(self, *arguments, **options) -> CountedResult:
        """As :meth:`Library.run`, with ``races`` off; the result has operation counts."""
        result = super().run(*arguments, races=False, **options)
        result.__class__ = CountedResult
        result.operations = self._sum(range(len(result.blocks)), result.blocks)
        loop = set(self._hottest_loop(result.blocks))
        result.inner_loop = self._sum(loop, result.blocks)
        result.loop_registers = max(
            ir.live_registers(f, loop) for f in self._module.functions if loop & set(f.block_ids)
        )
        result.decoders = len(
            {frozenset(self._innermost(b)) for b, block in enumerate(self._module.blocks) if block.weights}
        )
        return result

    def _sum(self, blocks, times):
        counts, weights = Counter(), 0
        for b in blocks:
            if times[b]:
                for name, n in self._module.blocks[b].operations.items():
                    counts[name] += n * times[b]
                weights += self._module.blocks[b].weights * times[b]
        return Operations(counts, weights)

    def _hottest_loop(self, times):
        decoded = [b.weights * t for b, t in zip(self._module.blocks, times)]
        if not any(decoded):
            return range(len(times))
        return self._innermost(decoded.index(max(decoded)))

    def _innermost(self, block):
        """The smallest loop around a block; its function if it is in none."""
        loops = [loop for f in self._module.functions for loop in ir.natural_loops(f) if block in loop]
        if not loops:
            return next(f.block_ids for f in self._module.functions if block in f.block_ids)
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
    text, library = CACHE / f"counted_{key}.ll", CACHE / f"counted_{key}.so"
    with building(text) as wanted:
        if wanted:
            unit_file = CACHE / f"counted_{key}.clcpp"
            write_atomically(unit_file, unit.text)
            command = [*CLANG, *with_shim(flags), "-S", "-emit-llvm", "-o", "-", str(unit_file)]
            write_atomically(text, run_tool(command, f"compiling {unit.name}").stdout)
    module = ir.Module(text.read_text())
    for function in module.functions:
        costs.classify(function)
    with building(library) as wanted:
        if wanted:
            instrumented = CACHE / f"counted_{key}_blocks.ll"
            write_atomically(instrumented, module.instrumented())
            beside, linked = CACHE / f"counted_{key}.o", CACHE / f"counted_{key}.{os.getpid()}"
            target = ["-target", "x86_64-linux-gnu", "-mavx", "-mf16c", "-mfma", "-w"]
            run_tool(
                [*CLANG, "-x", "ir", *target, "-O1", "-fPIC", "-c", "-o", str(beside), str(instrumented)],
                f"compiling {unit.name} for counting",
            )
            run_tool([*LINKER, "-shared", "-o", str(linked), str(beside)], "linking")
            linked.replace(library)
    return CountedLibrary(library, unit, module)
