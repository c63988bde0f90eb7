"""What the machine can do at most: ``ceilings.cpp``, compiled here for this machine and run.

The clock is a chain of dependent additions, the multiply-add rate twelve independent vector chains per thread, the
memory rate the best of three reads of buffers four times the size of the last-level cache.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from mlx_marlin import device

SOURCE = Path(__file__).with_name("ceilings.cpp")
# Bounds the memory that the measurement takes.
_MAX_READ_BYTES = 2 << 30

# Vector operations per 16 weights of an exact decode with 512-bit vectors and without VNNI, and the rate at which two
# 512-bit ports retire them: counted by hand for a 2.5 GHz Skylake-X, 9 G weights/s on two cores for mul1.
_DECODE_OPERATIONS = {"mul1": 14, "mcg": 20, "3inst": 20}
_OPERATIONS_PER_CYCLE = {512: 9e9 * 14 / 16 / (2 * 2.5e9), 256: 1.5 * 9e9 * 14 / 16 / (2 * 2.5e9)}


def _compiler() -> list[str]:
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if name and shutil.which(name):
            return [name]
    return [sys.executable, "-m", "ziglang", "c++"]


def measure(threads: int) -> dict:
    """Compile and run.

    Returns:
        ``clock_ghz``, ``fma_gflops`` and ``read_gbs`` of that many threads, ``vector_bits``, ``how``.
    """
    compiler = _compiler()
    flags = ["-O3", "-std=c++20", "-march=native", "-ffp-contract=fast", "-pthread"]
    size = min(4 * device.last_level_cache(), _MAX_READ_BYTES)
    with tempfile.TemporaryDirectory() as directory:
        program = Path(directory) / "ceilings"
        subprocess.run([*compiler, *flags, str(SOURCE), "-o", str(program)], check=True)
        output = subprocess.run(
            [str(program), str(threads), str(size)], check=True, capture_output=True, text=True
        ).stdout
    how = f"{SOURCE.name}, {Path(compiler[0]).name} {' '.join(flags)}, {threads} threads, {size >> 20} MiB read"
    return {**json.loads(output), "threads": threads, "how": how}


def decode_bound(ceilings: dict, codebook: str, vector_bits: int) -> float | None:
    """Weights per second that the instruction count of an exact decode allows: derived, not measured.

    256-bit code needs each operation twice and has three ports for it.
    """
    rate = _OPERATIONS_PER_CYCLE.get(vector_bits)
    if rate is None:
        return None
    operations = _DECODE_OPERATIONS[codebook] * (512 // vector_bits)
    return ceilings["threads"] * ceilings["clock_ghz"] * 1e9 * 16 * rate / operations


if __name__ == "__main__":
    json.dump(measure(int(sys.argv[1]) if len(sys.argv) > 1 else os.cpu_count() or 1), sys.stdout, indent=1)
