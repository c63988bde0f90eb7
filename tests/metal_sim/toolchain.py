"""The compiler behind the simulator: PyPI's ziglang brings clang, ld.lld and a libc for the runtime."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

from .errors import CompileError

HERE = Path(__file__).resolve().parent
# The user's cache, by content: a clone, a branch or a reinstalled package finds what another has built.
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mlx_marlin" / "metal_sim"
# A run of all tests leaves 300 MB. Above the limit what has not been used for longest goes, down to half of it.
CACHE_LIMIT = 1 << 30
_PACKAGE = importlib.util.find_spec("ziglang")
# Not `python -m ziglang`: starting Python four times per kernel takes as long as a small kernel takes to compile.
ZIG = str(Path(_PACKAGE.origin).with_name("zig")) if _PACKAGE and _PACKAGE.origin else "zig"
CLANG = [ZIG, "clang"]
# `zig cc -x c++` without exceptions: `zig c++` would first build libc++ for two minutes.
CXX = [ZIG, "cc", "-x", "c++", "-fno-exceptions", "-fno-rtti"]
LINKER = [ZIG, "ld.lld"]
# No AVX2 or AVX-512: the memory callbacks exist for at most 16 bytes.
ISA = ["-mavx", "-mf16c", "-mfma"]
# Without these, x86 clang keeps chains of half and bfloat operations in float.
PRECISION = ["-Xclang", "-ffloat16-excess-precision=none", "-Xclang", "-fbfloat16-excess-precision=none"]
MAX_REPORTED_LINES = 120


def unavailable() -> str | None:
    """Why the simulator cannot run here, or None."""
    if _PACKAGE is None:
        return "the Metal simulator needs PyPI's ziglang (pip install ziglang)"
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return f"the Metal simulator runs on x86-64 Linux, not on {sys.platform} {platform.machine()}"
    flags = next((x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("flags")), "")
    missing = {"avx", "f16c", "fma"} - set(flags.split())
    return f"the Metal simulator needs the CPU features {sorted(missing)}" if missing else None


def digest(*parts: str | bytes) -> str:
    """A short content hash; parts are delimited, so that moving text between them changes it."""
    sha = hashlib.sha256()
    for part in parts:
        sha.update(part.encode() if isinstance(part, str) else part)
        sha.update(b"\0")
    return sha.hexdigest()[:24]


def write_atomically(path: Path, content: bytes) -> None:
    """Write beside and rename: other processes share the cache."""
    beside = path.with_name(f"{path.name}.{os.getpid()}")
    beside.write_bytes(content)
    beside.replace(path)


@contextmanager
def building(*made: Path):
    """Yields whether these files, whose names are digests of what they are made from, are still to be made.

    One process makes them, others wait: two test workers want the same kernels at the same time.
    """
    CACHE.mkdir(parents=True, exist_ok=True)
    if all(path.exists() for path in made):
        yield False
    else:
        _trim_once()
        # A few lock files for all names; that two names share one costs a wait.
        with FileLock(CACHE / f"{digest(made[0].name)[:2]}.lock"):
            yield not all(path.exists() for path in made)
    for path in made:
        os.utime(path)


@functools.cache
def _trim_once() -> None:
    trim(CACHE, CACHE_LIMIT)


def trim(folder: Path, limit: int) -> None:
    """Where the files of a folder have more bytes than `limit`, remove the least recently used down to half of it."""
    known = []
    for path in folder.iterdir():
        try:
            found = path.stat()
        except FileNotFoundError:  # another process renamed or removed it
            continue
        if path.suffix != ".lock":
            known.append((found.st_mtime, found.st_size, path))
    total = sum(size for _, size, _ in known)
    if total <= limit:
        return
    for _, size, path in sorted(known):
        if total <= limit // 2:
            break
        path.unlink(missing_ok=True)
        total -= size


def _errors_only(stderr: str) -> str:
    """Errors and the lines that belong to them, without the warnings."""
    kept, following = [], 0
    for line in stderr.splitlines():
        if "error:" in line:
            following = 6
        elif ": warning:" in line:
            following = 0
        elif ": note:" in line:
            following = 3
        else:
            following -= 1
        if following > 0 and len(kept) < MAX_REPORTED_LINES:
            kept.append(line[:500])
    return "\n".join(kept) or stderr[-4000:]


def run_tool(command: list[str], what: str) -> subprocess.CompletedProcess:
    """Run a tool; a failure raises CompileError with the errors it printed."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise CompileError(f"{what} failed:\n{_errors_only(done.stderr)}")
    return done


@functools.cache
def sources_digest() -> str:
    """Hash of the shim, the runtime and the compiler's version: a change rebuilds everything."""
    files = sorted([*(HERE / "shim").iterdir(), *(HERE / "runtime").iterdir()])
    return digest(importlib.metadata.version("ziglang"), *(f.read_text() for f in files))


@functools.cache
def passes_digest() -> str:
    """Hash of the passes over the source: a change translates everything again."""
    return digest(*(f.read_text() for f in sorted(HERE.glob("*.py"))))


@functools.cache
def runtime() -> Path:
    """The library that executes threadgroups, built once per content."""
    flags = ["-std=c++20", "-O2", "-g1", "-fPIC", "-shared", "-fno-sanitize=all", "-fomit-frame-pointer"]
    library = CACHE / f"runtime_{digest(sources_digest(), *ISA, *flags)}.so"
    with building(library) as wanted:
        if wanted:
            beside = library.with_name(f"{library.name}.{os.getpid()}")
            source = str(HERE / "runtime" / "runtime.cpp")
            run_tool([*CXX, *flags, *ISA, *PRECISION, "-o", str(beside), source], "building the runtime")
            beside.replace(library)
    return library


def with_shim(flags: list[str]) -> list[str]:
    """Clang's flags for a unit that begins with the shim, which it finds parsed already: half the work of a small unit.

    The parsed header names its files and their sizes, but not their times: the name of the result holds both contents
    and place.
    """
    parsed = CACHE / f"shim_{digest(sources_digest(), str(HERE), *flags)}.pch"
    include = f"-I{HERE / 'shim'}"
    with building(parsed) as wanted:
        if wanted:
            beside = parsed.with_suffix(f".{os.getpid()}")
            emit = ["-Xclang", "-emit-pch", "-Xclang", "-fno-pch-timestamp", "-c", "-o", str(beside)]
            run_tool([*CLANG, *flags, include, *emit, str(HERE / "shim" / "msl.h")], "parsing the shim")
            beside.replace(parsed)
    return [*flags, include, "-include-pch", str(parsed)]
