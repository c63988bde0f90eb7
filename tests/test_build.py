"""What a wheel must contain, and the versions that must match."""

import ast
import graphlib
import importlib
import re
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


def test_licences_are_shipped_in_full():
    """The bundled calibration text is Python's: its licence must come with every copy."""
    assert 'license = "MIT AND PSF-2.0"' in PYPROJECT
    notices = [PACKAGE / "quantize" / "calibration.LICENSE.txt", ROOT / "models" / "docs-moe" / "heldout.LICENSE.txt"]
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


# docs/design.md: a module or package imports only those above it. A package may order its own modules as it likes, as
# long as there is an order. `ops`, `lm` and `quantize` are packages.
ORDER = [
    "_abi",
    "codec",
    "safetensors",
    "grid",
    "weights",
    "reference",
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
    "layer_state",
    "layers",
    "loader",
    "dispatch",
    "online",
    "lm",
    "quantize",
    "cli",
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
SOURCES = ROOT / "python/mlx_marlin"
# Pure modules: neither MLX nor anything of ours beside what is named.
PURE = {
    "codec": set(),
    "safetensors": set(),
    "measure": {"mlx"},
    "metal_rules": set(),
    "cpu_rules": set(),
    "search_space": {"cpu_rules", "metal_rules"},
    "kernels": {"metal_rules", "cpu_rules", "search_space"},
    "stats": set(),
    "files": set(),
}


def files_of(module: str) -> list[Path]:
    """The sources of a module or package of ours."""
    return sorted((SOURCES / module).glob("*.py")) or [SOURCES / f"{module}.py"]


def imports(path: Path) -> tuple[set[str], set[str]]:
    """What a source imports: modules of ours, and modules of its own package."""
    ours, siblings = set(), set()
    inside = path.parent != SOURCES
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = (node.module or "").split(".")[0]
            names = {base} if base else {alias.name for alias in node.names}
            (siblings if inside and node.level == 1 else ours).update(names)
    return ours & {p.stem for p in SOURCES.iterdir()}, siblings & {p.stem for p in path.parent.iterdir()}


@pytest.mark.parametrize("module", ORDER)
def test_imports_run_one_way(module):
    above = set(ORDER[: ORDER.index(module)])
    for path in files_of(module):
        ours, _ = imports(path)
        assert ours - {"_ext"} <= above, path
        if module not in ("_abi", "ops"):
            assert "_ext" not in ours, "ops is the only door to the extension"


@pytest.mark.parametrize("package", [name for name in ORDER if (SOURCES / name).is_dir()])
def test_packages_import_one_way(package):
    graph = {path.stem: imports(path)[1] for path in files_of(package)}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError


@pytest.mark.parametrize("module", PURE)
def test_pure_modules_import_little(module):
    (path,) = files_of(module)
    ours, _ = imports(path)
    assert ours <= PURE[module]
    tree = ast.parse(path.read_text())
    absolute = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    absolute |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and not node.level}
    if "mlx" not in PURE[module]:
        assert not {name for name in absolute if name.split(".")[0].startswith("mlx")}


def test_the_design_lists_the_modules_in_this_order():
    table = (ROOT / "docs/design.md").read_text().partition("## The modules")[2].partition("## ")[0]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    assert [name for row in rows for name in re.findall(r"`(\w+)`", row)] == ORDER


def test_every_module_is_ordered():
    found = {p.stem for p in SOURCES.glob("*.py")} | {p.parent.name for p in SOURCES.glob("*/__init__.py")}
    assert found - {"__init__", "__main__", SOURCES.name} == set(ORDER)
    for name in ORDER:
        importlib.import_module(f"mlx_marlin.{name}")
