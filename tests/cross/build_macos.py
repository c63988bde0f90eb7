"""Build the macOS arm64 wheel on Linux, with PyPI's ziglang, against the real mlx-metal wheel.

python tests/cross/build_macos.py [folder]      # prints the wheel's path, its files and whose symbols it needs
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
import zipfile
from pathlib import Path

from tests.cross import mach_o, symbols
from tests.support.paths import ROOT

HERE = Path(__file__).resolve().parent
MLX_VERSION = "0.32.4"
TARGET = "aarch64-macos.14.0"
PYTHON_TAG = f"cp{sys.version_info.major}{sys.version_info.minor}"
TAG = f"{PYTHON_TAG}-{PYTHON_TAG}-macosx_14_0_arm64"
SUFFIX = f".cpython-{sys.version_info.major}{sys.version_info.minor}-darwin.so"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mlx_marlin" / "macos"
TOOLCHAIN = """\
set(CMAKE_SYSTEM_NAME Darwin)
set(CMAKE_SYSTEM_PROCESSOR arm64)
set(CMAKE_OSX_DEPLOYMENT_TARGET 14.0 CACHE STRING "")
set(CMAKE_OSX_SYSROOT "" CACHE STRING "")
set(CMAKE_C_COMPILER "{tools}/cc")
set(CMAKE_CXX_COMPILER "{tools}/c++")
set(CMAKE_AR "{tools}/ar" CACHE FILEPATH "")
set(CMAKE_RANLIB "{tools}/ranlib" CACHE FILEPATH "")
# Neither is needed: libraries get their final rpath when they are linked.
set(CMAKE_INSTALL_NAME_TOOL "/bin/true" CACHE FILEPATH "")
set(CMAKE_BUILD_WITH_INSTALL_RPATH ON)
set(CMAKE_FIND_ROOT_PATH_MODE_PROGRAM NEVER)
"""
# CMake's Darwin platform passes flags that say what -target says already; Apple's frameworks are not here,
# so that their symbols, CPython's and the Objective-C runtime's stay undefined (test_macos_wheel.py looks
# at each).
TOOL = """\
#!{python} -I
import os, sys
arguments, given = [], iter(sys.argv[1:])
for a in given:
    if a in ("-arch", "-isysroot", "-framework"):
        next(given)
    # zig takes its own names of CPUs only; its macOS baseline is the M1, which has all that the tiers ask for.
    elif not a.startswith(("-march=", "-mmacosx-version-min", "-Wl,-dead_strip", "-Wl,-x", "-Wl,-S", "-Wl,@", "-F")):
        arguments.append(a)
if "-bundle" in arguments:  # zig's linker makes no bundles; Python loads a dylib as well
    arguments = ["-shared" if a == "-bundle" else a for a in arguments] + ["-Wl,-undefined,dynamic_lookup"]
os.execv(sys.executable, [sys.executable, "-I", "-m", "ziglang", {command}, *arguments])
"""


# pip warns of the first where it cannot connect, and at last finds nothing.
_UNREACHABLE = ("Connect", "No matching distribution found")


class NoNetwork(RuntimeError):
    """What the macOS build needs cannot be downloaded."""


def mlx_site() -> Path:
    """A folder with the macOS mlx and mlx-metal wheels unpacked, downloaded once.

    Raises:
        NoNetwork: If pip cannot download them.
    """
    site = CACHE / f"mlx-{MLX_VERSION}-{PYTHON_TAG}"
    if (site / "mlx" / "lib" / "libmlx.dylib").exists():
        return site
    wheels = CACHE / "wheels"
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--only-binary=:all:", "--no-deps"]
    command += ["--platform", "macosx_14_0_arm64", "--python-version", version, "--dest", str(wheels)]
    command += [f"mlx-metal=={MLX_VERSION}", f"mlx=={MLX_VERSION}"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise NoNetwork(f"pip cannot download mlx-metal {MLX_VERSION} for macOS:\n{done.stderr[-800:]}")
    beside = site.with_name(f"{site.name}.{os.getpid()}")
    for wheel in wheels.glob(f"mlx*-{MLX_VERSION}-*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(beside)
    beside.replace(site)
    return site


def _stub() -> Path:
    """The stub of the extension that is installed here: a cross-built one cannot be imported to make it.

    Raises:
        RuntimeError: If there is none.
    """
    found = importlib.util.find_spec("mlx_marlin._ext")
    stub = Path(found.origin).with_name("_ext.pyi") if found else None
    if stub is None or not stub.exists():
        raise RuntimeError("install mlx_marlin here first (pip install .): the wheel takes the stub from it")
    return stub


def _write_tools(folder: Path) -> Path:
    """Compiler wrappers and the CMake toolchain file."""
    folder.mkdir(parents=True, exist_ok=True)
    stubs = ["-target", TARGET, "-I", str(HERE / "stubs")]
    commands = {"cc": ["cc", *stubs], "c++": ["c++", *stubs], "ar": ["ar"], "ranlib": ["ranlib"]}
    for name, command in commands.items():
        tool = folder / name
        tool.write_text(TOOL.format(python=sys.executable, command=", ".join(map(repr, command))))
        tool.chmod(0o755)
    toolchain = folder / "macos.cmake"
    toolchain.write_text(TOOLCHAIN.format(tools=folder))
    return toolchain


def build(output: Path) -> Path:
    """Build the wheel.

    Args:
        output: Folder for the wheel.

    Returns:
        The wheel's path.

    Raises:
        NoNetwork: If MLX's macOS wheels cannot be downloaded.
        RuntimeError: If the build fails, with the end of its output.
    """
    site = mlx_site()
    work = CACHE / "build" / ROOT.name
    toolchain = _write_tools(work / "tools")
    settings = {
        "build-dir": work / "cmake",
        "wheel.tags": TAG,
        "cmake.define.CMAKE_TOOLCHAIN_FILE": toolchain,
        "cmake.define.MLX_DIR": site / "mlx" / "share" / "cmake" / "MLX",
        "cmake.define.MARLIN_STUB": _stub(),
    }
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", str(output)]
    command += [x for k, v in settings.items() for x in ("-C", f"{k}={v}")] + ["-v", str(ROOT)]
    # scikit-build-core names the extension after this.
    environment = {**os.environ, "SETUPTOOLS_EXT_SUFFIX": SUFFIX}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        printed = done.stdout + done.stderr
        if all(sign in printed for sign in _UNREACHABLE):
            raise NoNetwork("pip cannot download what the build needs:\n" + printed[-1000:])
        raise RuntimeError("the macOS build failed:\n" + printed[-6000:])
    return max(output.glob(f"mlx_marlin-*-{TAG}.whl"), key=lambda path: path.stat().st_mtime)


def describe(wheel: Path) -> tuple[str, bool]:
    """The wheel's files and where its extension's undefined symbols come from; whether all of these are known."""
    library = mach_o.read((mlx_site() / "mlx" / "lib" / "libmlx.dylib").read_bytes())
    with zipfile.ZipFile(wheel) as archive:
        files = [f"{entry.file_size:9d}  {entry.filename}" for entry in archive.infolist()]
        extension = mach_o.read(archive.read(f"mlx_marlin/_ext{SUFFIX}"))
    found = symbols.origins(extension.undefined, library.defined)
    return "\n".join([str(wheel), *files, str(found), *sorted(found.unknown)]), not found.unknown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT / "dist")
    text, complete = describe(build(parser.parse_args().folder))
    print(text)
    sys.exit(not complete)


if __name__ == "__main__":
    main()
