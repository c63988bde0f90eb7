"""The process that runs threadgroups, and the memory that it shares with the process that launches them.

The runtime copies its process for every worker of every dispatch. Copying the tests' process takes 20 to 50 ms, this
small one half a millisecond: it is run by itself and imports nothing of the package.
"""

import ctypes
import json
import os
import signal
import sys

# Both processes map the shared memory here, far from where the kernel puts anything, so that addresses mean the same
# to both. It is sparse.
ADDRESS = 0x2000_0000_0000
SIZE = 1 << 36
_MAP_SHARED, _MAP_NORESERVE, _MAP_FIXED_NOREPLACE = 0x01, 0x4000, 0x100000
_PROT_READ, _PROT_WRITE = 0x1, 0x2


class Job(ctypes.Structure):
    """Mirrors Job in runtime/state.h."""

    _fields_ = (
        [("entry", ctypes.c_void_p)]
        + [(x, ctypes.c_void_p) for x in ("kernel", "arguments", "buffers", "threadgroup", "error", "stats", "blocks")]
        + [(x, ctypes.c_uint32) for x in ("n_arguments", "n_buffers", "n_threadgroup", "error_size")]
        + [(x, ctypes.c_uint32 * 3) for x in ("grid", "threads", "total")]
        + [
            (x, ctypes.c_uint32)
            for x in ("order", "seed", "races", "tolerant", "uninit", "workers", "timeout", "count")
        ]
    )


def map_shared(file: int) -> None:
    """Map the shared memory's file to its place.

    Raises:
        OSError: If something else is there.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    flags = _MAP_SHARED | _MAP_NORESERVE | _MAP_FIXED_NOREPLACE
    if libc.mmap(ADDRESS, SIZE, _PROT_READ | _PROT_WRITE, flags, file, 0) != ADDRESS:
        raise OSError(ctypes.get_errno(), f"cannot map the simulator's memory to {ADDRESS:#x}")


def _run(runtime, library, symbol, address) -> int:
    job = Job.from_address(address)
    # Workers write the addresses of their own threadgroup memory among the arguments.
    own = (ctypes.c_uint64 * job.n_arguments).from_address(job.arguments)
    own = type(own).from_buffer_copy(own)
    job.arguments = ctypes.addressof(own)
    job.entry = ctypes.cast(getattr(library, symbol), ctypes.c_void_p).value
    return runtime.msl_run(ctypes.byref(job))


def _serve(runtime_path: str, file: int) -> None:
    """Answers each line: ``[library]`` with how loading it fails, ``[library, symbol, job]`` with how running ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it ends where its input does
    map_shared(file)
    ctypes.CDLL("libm.so.6", ctypes.RTLD_GLOBAL)  # kernels call libm by name
    runtime, libraries = ctypes.CDLL(runtime_path, ctypes.RTLD_GLOBAL), {}
    for line in sys.stdin:
        path, *call = json.loads(line)
        try:
            library = libraries.get(path) or libraries.setdefault(path, ctypes.CDLL(path, os.RTLD_NOW))
            answer = _run(runtime, library, *call) if call else None
        except OSError as error:
            answer = str(error)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    _serve(sys.argv[1], int(sys.argv[2]))
