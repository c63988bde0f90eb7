"""What a wheel must contain, and the versions that must match."""

import ast
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import mlx_marlin
from mlx_marlin import _abi, _ext
from tests.support.paths import ROOT

PACKAGE = Path(_ext.__file__).parent
PYPROJECT = (ROOT / "pyproject.toml").read_text()


def test_pins_agree():
    """One mlx version in the build, at run time and in the import check; nanobind 3.x exactly."""
    assert PYPROJECT.count(f"mlx=={_abi.BUILT_FOR_MLX}") == 2
    assert PYPROJECT.count(f"mlx-cpu=={_abi.BUILT_FOR_MLX}") == 2
    assert "nanobind==3." in PYPROJECT
    assert metadata.version("mlx") == _abi.BUILT_FOR_MLX


def test_stub_and_marker_are_shipped():
    assert (Path(mlx_marlin.__file__).parent / "py.typed").exists()
    stub = (PACKAGE / "_ext.pyi").read_text()
    names = {node.name for node in ast.walk(ast.parse(stub)) if isinstance(node, ast.FunctionDef)}
    assert {"trellis_linear", "trellis_swiglu", "trellis_decode"} <= names
    assert "mlx.core.array" in stub and "mlx::core" not in stub


def test_licences_are_shipped_in_full():
    """The bundled calibration text is Python's: its licence must come with every copy."""
    assert 'license = "MIT AND PSF-2.0"' in PYPROJECT
    package = Path(mlx_marlin.__file__).parent
    notices = [package / "quantize" / "calibration.LICENSE.txt", ROOT / "models" / "docs-moe" / "heldout.LICENSE.txt"]
    for notice in notices:
        text = notice.read_text()
        assert "PYTHON SOFTWARE FOUNDATION LICENSE VERSION 2" in text
        assert "Licensee\nagrees to be bound by the terms and conditions of this License" in text
    listed = metadata.metadata("mlx_marlin").get_all("License-File")
    assert [Path(name).name for name in listed] == ["LICENSE", "calibration.LICENSE.txt"]


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    return done.stderr


def test_another_mlx_version_is_explained():
    error = run("import mlx.core as mx; mx.__version__ = '0.33.0'; import mlx_marlin")
    assert "built for mlx 0.32.4, but mlx 0.33.0 is installed" in error
    assert "pip install mlx==0.32.4" in error


def test_another_nanobind_is_explained():
    """What a wrong nanobind does: every array is refused as an incompatible argument."""
    error = run(
        "import mlx.core, importlib.machinery, importlib.util, sys, types\n"
        "def refuse(a): raise TypeError('abi_probe(): incompatible function arguments')\n"
        "fake = types.ModuleType('mlx_marlin._ext'); fake.abi_probe = refuse\n"
        "sys.modules['mlx_marlin._ext'] = fake\n"
        "import mlx_marlin"
    )
    assert "different generations of nanobind" in error and "rebuild with" in error


def test_a_missing_extension_is_explained():
    error = run("import mlx.core, sys; sys.modules['mlx_marlin._ext'] = None; import mlx_marlin")
    assert "could not be loaded" in error and "reinstall" in error


# None of the optional packages, and nothing that only tuning and converting need.
HEAVY = {"mlx_lm", "scipy", "matplotlib", "rich", "threadpoolctl", "mlx_marlin.autotune", "mlx_marlin.quantize"}


def test_import_is_quiet_and_light():
    code = f"import sys, mlx_marlin; print(sorted({HEAVY!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n" and done.stderr == ""
