"""Builds the C++ parts that need no MLX as programs with sanitizers. Objects are kept between runs."""

from __future__ import annotations

import functools
import os
import re
import shlex
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mlx_marlin import _ext
from tests.support.objects import compiled
from tests.support.paths import ROOT

OBJECTS = ROOT / "build" / "sanitize"
COMPILER = shlex.split(os.environ.get("CXX", "c++"))
INCLUDES = [f"-I{ROOT / folder}" for folder in ("csrc", "kernels", "tests/cross")]

# Without `null` and `object-size`: on kernels that are inlined into functions of ten thousand instructions they double
# the time to compile, and what they would find ends in a report of the address sanitizer.
_UNDEFINED = (
    "alignment,bool,bounds,enum,float-cast-overflow,integer-divide-by-zero,return,shift,signed-integer-overflow"
)
SANITIZERS = {
    "address": ["-fsanitize=address", f"-fsanitize={_UNDEFINED}", "-fno-sanitize-recover=all"],
    "thread": ["-fsanitize=thread"],
}
ENVIRONMENT = {
    # Leaks are looked for through ptrace, which containers forbid.
    "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1:detect_stack_use_after_return=1",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    # A child of a process with threads may start its own.
    "TSAN_OPTIONS": "halt_on_error=1:die_after_fork=0:second_deadlock_stack=1",
}

KERNELS = [f"csrc/cpu/{path.name}" for path in sorted((ROOT / "csrc/cpu").glob("*.cpp"))]
PLAN = [f"csrc/plan/{path.name}" for path in sorted((ROOT / "csrc/plan").glob("*.cpp"))]


@functools.cache
def _is_clang() -> bool:
    return "clang" in subprocess.run([*COMPILER, "--version"], capture_output=True, text=True).stdout


def _calls_not_inlined() -> list[str]:
    """Checks as calls: inlined they take a minute for each instruction set."""
    option = "asan-instrumentation-with-call-threshold=0"
    return ["-mllvm", f"-{option}"] if _is_clang() else ["--param", option]


@functools.cache
def unavailable(sanitizer: str) -> str:
    """Why programs of a sanitizer cannot be built or run here, or ``""``."""
    with tempfile.TemporaryDirectory() as folder:
        source, program = Path(folder, "empty.cpp"), str(Path(folder, "empty"))
        source.write_text("int main() {}\n")
        try:
            command = [*COMPILER, *SANITIZERS[sanitizer], str(source), "-o", program]
            subprocess.run(command, check=True, capture_output=True)
            subprocess.run([program], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            return f"{COMPILER[0]} makes no programs with the {sanitizer} sanitizer here: {error}"
    return ""


def _expanded(text: str, variables: dict[str, str]) -> list[str]:
    return re.sub(r"\$\{(\w+)\}", lambda m: variables[m[1]], text).split()


def tier_flags() -> dict[str, list[str]]:
    """The compiler flags of each instruction set, as csrc/cpu/CMakeLists.txt gives them."""
    text = (ROOT / "csrc/cpu/CMakeLists.txt").read_text()
    variables = dict(re.findall(r"^\s*set\((\w+) ([^)]*)\)", text, re.MULTILINE))
    found = re.findall(r"^\s*marlin_cpu_tier\((\w+) ([^)]*)\)", text, re.MULTILINE)
    return {name: _expanded(flags, variables) for name, flags in found if name in _ext.compiled_instruction_sets()}


def search_sources() -> dict[str, list[str]]:
    """The sources of the encoder's search with their flags, as CMakeLists.txt gives them."""
    text = (ROOT / "CMakeLists.txt").read_text()
    found = re.findall(r"set_property\(SOURCE (csrc/viterbi/\S+) APPEND PROPERTY COMPILE_OPTIONS (.*)\)", text)
    flags = {source: options.split() for source, options in found}
    assert flags, "CMakeLists.txt gives the search's flags in another form"
    arm = "neon" in _ext.compiled_instruction_sets()
    sources = [f"csrc/viterbi/{path.name}" for path in sorted((ROOT / "csrc/viterbi").glob("*.cpp"))]
    foreign = {"csrc/viterbi/avx2.cpp", "csrc/viterbi/avx512.cpp"} if arm else {"csrc/viterbi/neon.cpp"}
    return {source: flags.get(source, []) for source in sources if source not in foreign}


def _object(source: str, flags: list[str]) -> Path:
    common = ["-std=c++20", "-g1", "-fno-omit-frame-pointer", "-Wno-psabi", *INCLUDES]
    return compiled(COMPILER, [*common, *flags], ROOT / source, OBJECTS)


def program(
    name: str, sanitizer: str, sources: dict[str, list[str]], tiers: dict[str, list[str]] | None = None
) -> Path:
    """A program.

    Args:
        name: Its file's name.
        sanitizer: A key of ``SANITIZERS``.
        sources: Flags by source.
        tiers: Flags by instruction set of the CPU kernels that are linked in.
    """
    flags = ["-O1", *SANITIZERS[sanitizer]]
    if sanitizer == "address":
        flags += _calls_not_inlined()
    wanted = [(source, [*flags, *own]) for source, own in sources.items()]
    for tier, own in (tiers or {}).items():
        wanted.append(("csrc/cpu/tier/table.cpp", [*flags, "-ffp-contract=off", f"-DMARLIN_TIER={tier}", *own]))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(lambda one: _object(*one), wanted))
    made = OBJECTS / f"{name}_{sanitizer}"
    link = [*COMPILER, *SANITIZERS[sanitizer], *map(str, objects), "-o", str(made), "-lpthread"]
    subprocess.run(link, check=True)
    return made


def run(program: Path, *arguments) -> str:
    """What a program prints. A report of a sanitizer, as any failure, raises AssertionError with all of it."""
    done = subprocess.run(
        [str(program), *map(str, arguments)], capture_output=True, text=True, env=os.environ | ENVIRONMENT
    )
    assert done.returncode == 0, f"{program.name} {' '.join(map(str, arguments))}: {done.returncode}\n{done.stderr}"
    assert "Sanitizer" not in done.stderr and "runtime error" not in done.stderr, done.stderr
    return done.stdout
