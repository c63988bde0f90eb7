"""What a wheel must contain, and the versions that must match."""

import ast
import importlib
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import mlx_marlin
from mlx_marlin import _abi, _ext

PACKAGE = Path(_ext.__file__).parent
ROOT = Path(__file__).parents[1]
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


def test_import_is_quiet_and_light():
    """Nothing printed, and none of the optional packages imported."""
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys, mlx_marlin; print(sorted({'mlx_lm', 'scipy', 'matplotlib'} & set(sys.modules)))",
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "[]\n" and done.stderr == ""


# DESIGN: a module imports only modules above it. `codec`, `measure` and `kernels` import nothing of ours.
ORDER = [
    "_abi",
    "codec",
    "safetensors",
    "weights",
    "grid",
    "metal_marlin",
    "metal_rules",
    "cpu_rules",
    "search_space",
    "kernels",
    "shaders",
    "ops",  # above device: which instruction set runs is known to the extension alone
    "files",
    "device",
    "profile_data",
    "lookup",
    "profile_io",
    "profile",
    "stats",
    "measure",
    "race",
    "evidence",
    "adaptation",
    "choices",
    "rules",
    "selection",
    "selftest",
    "layers",
    "loader",
    "dispatch",
    "online",
    "cli",
    "reference",
    "workload",
    "trial",
    "progress",
    "autotune",
    "plot",
    "session",
    "tuning_run",
    "regression",
    "report",
    "tune_cli",
    "convert_cli",
]

# Built on the modules; only the commands import them.
PACKAGES = {"lm", "quantize"}


def own_imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = (node.module or "").split(".")[0]
            found |= {base} if base else {alias.name for alias in node.names}
    return found & {p.stem for p in (ROOT / "python/mlx_marlin").iterdir()}


@pytest.mark.parametrize("module", ORDER)
def test_imports_run_one_way(module):
    path = ROOT / "python/mlx_marlin" / f"{module}.py"
    allowed = set(ORDER[: ORDER.index(module)]) | (PACKAGES if module in ("cli", "tune_cli", "convert_cli") else set())
    assert own_imports(path) - {"_ext"} <= allowed
    if module not in ("_abi", "ops"):
        assert "_ext" not in own_imports(path), "ops is the only door to the extension"


def test_every_module_is_ordered():
    modules = {p.stem for p in (ROOT / "python/mlx_marlin").glob("*.py")} - {"__init__", "__main__"}
    assert modules == set(ORDER)
    for name in ORDER:
        importlib.import_module(f"mlx_marlin.{name}")
