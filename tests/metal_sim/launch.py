"""Run a compiled kernel: bind arguments, call the runtime, collect results and findings."""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .client import server
from .errors import CompileError, KernelError
from .server import Job
from .signatures import MAX_THREADS, Kernel
from .toolchain import HERE

ERROR_BYTES = 16384
# Places in the statistics, as in runtime/state.h; six numbers for each of at most 31 buffers.
STAT_SIMD, STAT_BUFFERS = 8, 64
STATS_BYTES = 8 * (STAT_BUFFERS + 6 * 31)
# Codes of shim/op_codes.h.
SIMD_OPERATIONS = {
    match[1].lower(): int(match[2])
    for match in re.finditer(r"MSL_OP_(\w+) = (\d+)", (HERE / "shim" / "op_codes.h").read_text())
}
MAX_WORKERS = 16
ORDERS = {"forward": 0, "reverse": 1, "random": 2}
RACES = {True: 3, False: 0, "threadgroup": 1}
DIVERGENCE = {"error": 0, "active": 1}


class _Buffer(ctypes.Structure):
    """Mirrors Buf in runtime/state.h."""

    _fields_ = [
        ("address", ctypes.c_uint64),
        ("size", ctypes.c_uint64),
        ("writable", ctypes.c_uint32),
        ("index", ctypes.c_uint32),
        ("shadow", ctypes.c_uint64),
        ("touched", ctypes.c_uint64),
    ]


class Out:
    """A fresh output buffer, poisoned before the run (0xFF bytes: NaN, -1)."""

    def __init__(self, shape, dtype):
        self.shape, self.dtype = shape, np.dtype(dtype)


@dataclass(frozen=True)
class Traffic:
    """Bytes of one buffer that a dispatch reads and writes: by every thread, once per threadgroup, once."""

    read: int
    read_per_group: int
    read_distinct: int
    written: int
    written_per_group: int
    written_distinct: int


class Result(dict):
    """Array by buffer index, for every buffer that the kernel may write.

    Attributes:
        stats: ``threads``, ``switches``, ``accesses``, ``threadgroup_bytes``, ``barriers`` (times a
            threadgroup passed one), ``simd`` (``{operation: times a simdgroup did it}``) and ``seconds``.
        traffic: With ``count``, :class:`Traffic` by buffer index.
        blocks: With a counted build, how often each basic block ran.
    """

    stats: dict
    traffic: dict
    blocks: list


@dataclass
class _Binding:
    """Arguments as the runtime wants them, in the server's memory."""

    arguments: ctypes.Array
    buffers: list
    threadgroup: list
    outputs: dict


def _statistics(counts, seconds):
    simd = {op: counts[STAT_SIMD + code] for op, code in SIMD_OPERATIONS.items() if counts[STAT_SIMD + code]}
    names = ("threads", "switches", "accesses", "threadgroup_bytes", "barriers")
    return {**dict(zip(names, counts)), "simd": simd, "seconds": seconds}


def _idle_cores():
    """Of this test process. Each worker is a copy of it, whose making takes as long as a small kernel runs."""
    return max(1, (os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1)))


def _triple(value):
    values = (value,) if np.isscalar(value) else tuple(value)
    return tuple(int(v) for v in values) + (1,) * (3 - len(values))


def _poisoned(out):
    return np.full(int(np.prod(out.shape)) * out.dtype.itemsize, 0xFF, np.uint8).view(out.dtype).reshape(out.shape)


class Library:
    """Compiled kernels.

    Attributes:
        path: The shared library.
        kernels: :class:`~metal_sim.signatures.Kernel` by host name.
        diagnostics: Findings that were not errors.
    """

    def __init__(self, path: Path, kernels: dict[str, Kernel], symbols: dict[str, str], diagnostics, blocks=0):
        self.path, self.kernels, self.diagnostics = path, kernels, diagnostics
        self._symbols, self._blocks = symbols, blocks
        try:
            server().load(path)
        except OSError as error:
            raise CompileError(
                f"link: {error} (a function constant without a value, or a function the shim lacks)"
            ) from error

    def run(
        self,
        name: str,
        buffers,
        *,
        grid=None,
        grid_threads=None,
        threads=(1, 1, 1),
        threadgroup_memory: dict | None = None,
        order: str = "forward",
        races=True,
        divergence: str = "error",
        uninit: bool = False,
        count: bool = False,
        workers: int | None = None,
        timeout: int = 120,
    ) -> Result:
        """Execute one dispatch.

        Args:
            name: Host name of the kernel.
            buffers: List, or dict by index, of arrays, NumPy scalars, bytes, :class:`Out` or None (unbound).
                Arrays that the kernel may write are updated in place.
            grid: Threadgroups (``dispatchThreadgroups``).
            grid_threads: Or threads (``dispatchThreads``, uneven groups at the edges).
            threads: Threads per threadgroup.
            threadgroup_memory: Bytes by ``[[threadgroup(n)]]`` index.
            order: ``"forward"``, ``"reverse"`` or ``"random:<seed>"``: which threads and groups run first.
            races: True, ``"threadgroup"`` or False: which memory is checked for data races.
            divergence: ``"error"``, or ``"active"``: the lanes that arrive go on, as on the hardware.
            uninit: Also report reads of unwritten threadgroup memory.
            count: Also count the bytes of every buffer (one worker).
            workers: Processes that share the threadgroups; by default those that the test processes leave idle.
            timeout: Seconds before an endless loop is assumed.

        Raises:
            KernelError: For the first broken rule.
        """
        if name not in self.kernels:
            raise KeyError(f"no kernel {name!r}; have {sorted(self.kernels)[:20]}")
        kernel, threads = self.kernels[name], _triple(threads)
        if (grid is None) == (grid_threads is None):
            raise ValueError("give grid or grid_threads")
        if grid_threads is None:
            grid = _triple(grid)
            total = tuple(g * t for g, t in zip(grid, threads))
        else:
            total = _triple(grid_threads)
            threads = tuple(map(min, threads, total))
            grid = tuple(-(-a // b) for a, b in zip(total, threads))
        size, limit = threads[0] * threads[1] * threads[2], min(MAX_THREADS, kernel.max_threads)
        if not 1 <= size <= limit:
            raise KernelError(f"{name}: {size} threads per threadgroup (limit {limit})")
        order_name, _, seed = order.partition(":")
        workers = 1 if count or self._blocks else workers or _idle_cores()
        settings = (
            ORDERS[order_name],
            int(seed or 0),
            RACES[races],
            DIVERGENCE[divergence],
            int(uninit),
            max(1, min(workers, grid[0] * grid[1] * grid[2], MAX_WORKERS)),
            timeout,
            int(count),
        )
        with server().memory():
            binding = self._bind(name, kernel, buffers, dict(threadgroup_memory or {}))
            return self._execute(name, binding, (grid, threads, total), settings)

    def _bind(self, name, kernel, buffers, threadgroup_memory):
        if not isinstance(buffers, dict):
            buffers = dict(enumerate(buffers))
        by_kind = {k: [p for p in kernel.parameters if p.kind == k] for k in ("buffer", "threadgroup")}
        surplus = set(buffers) - {p.index for p in by_kind["buffer"]}
        missing = {p.index for p in by_kind["buffer"] if not p.optional} - set(buffers)
        if surplus or missing:
            raise KernelError(
                f"{name}: buffers {sorted(surplus)} are not arguments of the kernel; "
                f"buffers {sorted(missing)} are missing"
            )
        wanted = {p.index for p in by_kind["threadgroup"]}
        if set(threadgroup_memory) != wanted:
            raise KernelError(
                f"{name}: threadgroup memory indices {sorted(wanted)} needed, {sorted(threadgroup_memory)} given"
            )
        binding = _Binding((ctypes.c_uint64 * max(1, len(kernel.parameters)))(), [], [], {})
        for position, parameter in enumerate(kernel.parameters):
            if parameter.kind == "threadgroup":
                binding.threadgroup += [position, int(threadgroup_memory[parameter.index])]
            elif parameter.kind == "buffer" and buffers.get(parameter.index) is not None:
                value = buffers[parameter.index]
                address, size = self._bind_buffer(name, parameter, value, binding)
                binding.arguments[position] = address
                binding.buffers.append((address, size, int(not parameter.read_only), parameter.index, 0, 0))
        return binding

    @staticmethod
    def _bind_buffer(name, parameter, value, binding):
        if isinstance(value, Out):
            array, target = _poisoned(value), None
        elif isinstance(value, (bytes, bytearray)):
            array, target = np.frombuffer(bytes(value), np.uint8), None
        elif isinstance(value, (np.ndarray, np.generic)):
            array, target = np.asarray(value), value
        else:
            raise TypeError(
                f"{name}: buffer {parameter.index}: NumPy array or scalar, bytes or Out expected, not {type(value)}"
            )
        array = np.ascontiguousarray(array)
        address = server().place(array)
        if parameter.read_only:
            return address, array.nbytes
        binding.outputs[parameter.index] = (address, array, target)
        return address, array.nbytes

    def _execute(self, name, binding, shape, settings):
        memory = server()
        error, stats, blocks = (memory.zeros(n) for n in (ERROR_BYTES, STATS_BYTES, 8 * self._blocks))
        buffers = (_Buffer * max(1, len(binding.buffers)))(*(_Buffer(*b) for b in binding.buffers))
        threadgroup = (ctypes.c_uint32 * max(2, len(binding.threadgroup)))(*binding.threadgroup)
        job = Job(
            None,
            memory.place(ctypes.create_string_buffer(name.encode())),
            memory.place(binding.arguments),
            memory.place(buffers),
            memory.place(threadgroup),
            error,
            stats,
            blocks,
            len(binding.arguments),
            len(binding.buffers),
            len(binding.threadgroup) // 2,
            ERROR_BYTES,
            *((ctypes.c_uint32 * 3)(*x) for x in shape),
            *settings,
        )
        started = time.perf_counter()
        status = memory.run(self.path, self._symbols[name], memory.place(job)) if all(shape[0]) else 0
        seconds = time.perf_counter() - started
        message = f"{name}: worker failed ({status})" if status else None
        if ctypes.c_int.from_address(error).value:
            message = ctypes.string_at(error + 4).decode(errors="replace")
        result = self._collect(binding, message is None)
        counts = list((ctypes.c_uint64 * (STATS_BYTES // 8)).from_address(stats))
        result.stats = _statistics(counts, seconds)
        result.traffic = {
            b[3]: Traffic(*counts[STAT_BUFFERS + 6 * i : STAT_BUFFERS + 6 * i + 6])
            for i, b in enumerate(binding.buffers)
        }
        result.blocks = list((ctypes.c_uint64 * self._blocks).from_address(blocks))
        if message:
            raise KernelError(re.sub(r"@pc([0-9a-f]+)", self._source_line, message))
        return result

    @staticmethod
    def _collect(binding, succeeded):
        result = Result()
        for index, (address, array, target) in binding.outputs.items():
            filled = np.empty(array.shape, array.dtype)
            ctypes.memmove(filled.ctypes.data, address, array.nbytes)
            result[index] = filled
            if isinstance(target, np.ndarray) and target.flags.writeable and succeeded:
                target[...] = filled
        return result

    def _source_line(self, match):
        address = int(match.group(1), 16) - 1  # the call, not the return address
        command = ["addr2line", "-e", str(self.path), "-i", hex(address)]
        try:
            lines = subprocess.run(command, capture_output=True, text=True).stdout.split("\n")
        except OSError:  # no binutils: the address must do
            return f"pc {address + 1:#x}"
        own = [x for x in lines if x and "/shim/" not in x and not x.startswith("??")]
        return Path(own[0].split(" (")[0]).name if own else f"pc {address + 1:#x}"
