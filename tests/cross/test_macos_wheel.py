"""The macOS arm64 wheel, built on Linux: what is in it, and that every symbol it needs exists on a Mac."""

import sys
import zipfile
from pathlib import Path

import pytest

from tests.cross import build_macos, mach_o, symbols

ziglang = pytest.importorskip("ziglang", reason="the macOS cross-build needs PyPI's ziglang (pip install ziglang)")


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="on a Mac the wheel is built natively"),
]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    try:
        site = build_macos.mlx_site()
        path = build_macos.build(tmp_path_factory.mktemp("wheel"))
    except build_macos.NoNetwork as error:
        pytest.skip(f"NOT TESTED: the macOS wheel. {error}")
    with zipfile.ZipFile(path) as archive:
        return path, site, {name: archive.read(name) for name in archive.namelist()}


@pytest.fixture(scope="module")
def extension(wheel):
    return mach_o.read(wheel[2][f"mlx_marlin/_ext{build_macos.SUFFIX}"])


def test_tags(wheel):
    path, _, files = wheel
    assert path.name.endswith(f"-{build_macos.TAG}.whl")
    metadata = next(text for name, text in files.items() if name.endswith(".dist-info/WHEEL")).decode()
    assert f"Tag: {build_macos.TAG}" in metadata
    assert "Root-Is-Purelib: false" in metadata


def test_contents(wheel):
    files = wheel[2]
    sources = Path(build_macos.ROOT)
    shaders = [p.name for pattern in ("*.metal", "*.h") for p in (sources / "kernels").glob(pattern)]
    assert any(name.endswith(".metal") for name in shaders)
    for name in [*shaders, "format.h"]:
        assert f"mlx_marlin/shaders/{name}" in files
    for name in shaders:
        text = files[f"mlx_marlin/shaders/{name}"]
        assert text == (sources / "kernels" / name).read_bytes()
        assert text.isascii(), f"{name}: Metal's run-time compiler takes ASCII only"
    assert b"def trellis_" in files["mlx_marlin/_ext.pyi"]
    assert "mlx_marlin/py.typed" in files
    assert not any(name.endswith((".so", ".dylib")) and "_ext" not in name for name in files)


def test_finds_mlx_beside_itself(extension):
    assert extension.rpaths == ["@loader_path/../mlx/lib"]
    assert "@rpath/libmlx.dylib" in extension.libraries
    assert all(x.startswith(("/usr/lib/", "@rpath/", "/System/Library/")) for x in extension.libraries)


def test_minimum_macos(extension):
    assert extension.minimum_macos == (14, 0)


@pytest.fixture(scope="module")
def library(wheel):
    return mach_o.read((wheel[1] / "mlx" / "lib" / "libmlx.dylib").read_bytes())


def test_every_symbol_exists(library, extension):
    found = symbols.origins(extension.undefined, library.defined)
    print(found)
    assert not found.unknown
    assert any("CommandEncoder" in s for s in found.mlx), "the Metal encoder is not in this build"
    assert found.cpython and found.system
    assert "_PyInit__ext" in extension.defined


@pytest.mark.parametrize("invented", ["__ZN3mlx4core13no_such_thingEv", "_PyObject_NoSuchThing", "_objc_noSuchThing"])
def test_the_check_sees_a_missing_symbol(library, extension, invented):
    found = symbols.origins({*extension.undefined, invented}, library.defined)
    assert found.unknown == {invented}


def test_a_linux_library_is_refused():
    with pytest.raises(ValueError, match="not a thin arm64 Mach-O"):
        mach_o.read(b"\x7fELF" + bytes(60))
