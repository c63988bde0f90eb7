"""The Metal encoder compiles against MLX's own headers: what of a Mac's build the quick tests look at."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.cross import build_macos

ziglang = pytest.importorskip("ziglang", reason="the macOS cross-build needs PyPI's ziglang (pip install ziglang)")


ENCODER = build_macos.ROOT / "csrc/metal/encode.cpp"

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="on a Mac the encoder is part of the extension")


@pytest.fixture(scope="module")
def include():
    try:
        return build_macos.mlx_site() / "mlx/include"
    except build_macos.NoNetwork as error:
        pytest.skip(f"NOT TESTED: the Metal encoder. {error}")


def build(source: Path, include: Path, folder: Path) -> subprocess.CompletedProcess:
    """Compile a source as for macOS."""
    command = [sys.executable, "-m", "ziglang", "c++", "-target", build_macos.TARGET, "-std=c++20", "-c"]
    command += ["-Wall", "-Wextra", "-Werror"]
    command += [f"-I{build_macos.ROOT / name}" for name in ("csrc", "kernels")]
    for system in (include, include / "metal_cpp", build_macos.HERE / "stubs"):
        command += ["-isystem", str(system)]
    return subprocess.run([*command, "-o", str(folder / "encode.o"), str(source)], capture_output=True, text=True)


def test_the_encoder_compiles(include, tmp_path):
    done = build(ENCODER, include, tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.slow
def test_a_wrong_call_is_found(include, tmp_path):
    text = ENCODER.read_text()
    assert text.count("encoder.set_input_array(") == 1
    wrong = tmp_path / "encode.cpp"
    wrong.write_text(text.replace("encoder.set_input_array(", "encoder.set_input_arrays("))
    done = build(wrong, include, tmp_path)
    assert done.returncode != 0 and "set_input_arrays" in done.stderr
