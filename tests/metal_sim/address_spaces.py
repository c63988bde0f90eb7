"""Find device and threadgroup pointers that become `thread` pointers.

The generic space that stands for `thread` takes everything but `__constant`, so in this second, syntax-only
pass device and threadgroup *are* `__constant`. Most errors of the pass mean nothing (writes, struct copies,
redefinitions); only pointer conversions are kept.
"""

from __future__ import annotations

import os
import re
import subprocess

from .toolchain import CACHE, CLANG, digest

_INITIALISED = re.compile(
    r"error: cannot initialize a (?:variable|parameter|return object|member)[^']*of type '([^']*\*[^']*)'"
    r"(?: \(aka '([^']*)'\))? with an .value of type '([^']*__constant[^']*)'"
)
_PASSED = re.compile(
    r"cannot pass pointer to address space '__constant' as a pointer to "
    r"(address space '__(generic|private)'|generic|default)"
    r"|no known conversion from '__constant [^']*'[^*]* to '(__generic|__private) [^']*\*"
)


def pointer_warnings(unit: str, flags: list[str]) -> list[str]:
    """Warnings, in clang's form, about pointers of one space that are used as pointers of another.

    Args:
        unit: The translation unit that is also compiled.
        flags: Its compiler flags.
    """
    # A qualifier after a parameter list belongs to a method and is dropped.
    text = re.sub(r"(\)\s*(?:const\s*)?)__(?:global|local)\b", r"\1", unit)
    text = text.replace("__global", "MSL_D").replace("__local", "MSL_G")
    path = CACHE / f"pointers_{digest(text)}.{os.getpid()}.clcpp"
    path.write_text(text)
    kept = [
        x for i, x in enumerate(flags) if not x.startswith(("-fsan", "-O", "-W")) and "-mllvm" not in (x, flags[i - 1])
    ]
    extra = ["-w", "-ferror-limit=0", "-fsyntax-only", "-DMSL_POINTER_PASS"]
    lines = subprocess.run([*CLANG, *kept, *extra, str(path)], capture_output=True, text=True).stderr
    path.unlink()
    return list(dict.fromkeys(_warnings(lines.splitlines())))


def _warnings(lines):
    for i, line in enumerate(lines):
        match = _INITIALISED.search(line)
        if match and "__constant" not in match.group(1) + (match.group(2) or ""):
            yield (
                line.split("error:")[0]
                + "warning: pointer into another address space used as a thread pointer [address space]"
            )
        if ": note: candidate" not in line or not _PASSED.search(line):
            continue
        error = max((x for x in range(i) if ": error:" in lines[x]), default=None)
        if error is None or "/shim/" in lines[error]:
            continue
        following = next((y for y in range(error + 1, len(lines)) if ": error:" in lines[y]), len(lines))
        # With several candidates another one may fit: only a sole candidate is sure.
        if sum(": note: candidate" in x for x in lines[error + 1 : following]) == 1:
            yield (
                lines[error].split("error:")[0] + "warning: device, threadgroup or constant pointer "
                "passed as a thread pointer [address space]"
            )
