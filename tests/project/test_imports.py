"""Imports run one way: between packages, inside them, and among the tests' own helpers (C++: test_includes.py)."""

import importlib
import re

import pytest

from tests.support import imports
from tests.support.paths import ROOT

# docs/design.md: a module or package imports only those above it.
ORDER = [
    "_abi",
    "codec",
    "storage",
    "kernels",
    "weights",
    "measure",
    "ops",  # above device: which instruction set runs is known to the extension alone
    "device",
    "profile",
    "selection",
    "layers",
    "loader",
    "dispatch",
    "lm",
    "vlm",
    "quantize",
    "autotune",
    "__main__",
]
# What imports neither MLX nor anything of ours beside what is named.
PURE = {
    "codec": set(),
    "storage": set(),
    "kernels": {"codec"},
    "measure.stats": set(),
    "device.fingerprint": {"kernels"},
}
PACKAGE = imports.PACKAGE
MODULES = imports.python_graph(PACKAGE, PACKAGE.parent)


def ours(module: str) -> dict[str, set[str]]:
    """The imports of a module or package of ours, by source; names below mlx_marlin."""
    prefix = f"{PACKAGE.name}."
    found = {}
    for path in imports.python_files(PACKAGE):
        name = imports.module_name(path, PACKAGE.parent).removeprefix(prefix)
        if name == module or name.startswith(f"{module}."):
            targets = imports.imported(path, PACKAGE.parent)
            found[name] = {t.removeprefix(prefix) for t in targets if t.startswith(prefix)}
    return found


@pytest.mark.parametrize("module", ORDER)
def test_packages_import_one_way(module):
    allowed = {module, *ORDER[: ORDER.index(module)], "_ext"}
    for source, targets in ours(module).items():
        assert {t.split(".")[0] for t in targets} <= allowed, source
        if module not in ("_abi", "ops"):
            assert not any(t.split(".")[0] == "_ext" for t in targets), (
                f"{source}: ops is the only door to the extension"
            )


@pytest.mark.parametrize("module", ORDER)
def test_private_names_stay_inside_their_package(module):
    for source, targets in ours(module).items():
        foreign = [t for t in targets if t.split(".")[0] not in (module, "_ext", "_abi")]
        assert not [t for t in foreign if any(part.startswith("_") for part in t.split("."))], source


def test_no_circle():
    graph = {name: targets - {PACKAGE.name} for name, targets in MODULES.items() if name != PACKAGE.name}
    assert imports.circle(graph) is None
    assert imports.circle(imports.python_graph(ROOT / "tests" / "support", ROOT)) is None
    assert imports.circle(imports.include_graph(imports.CSRC)) is None


def test_helpers_of_the_tests_import_no_test():
    for path in imports.python_files(ROOT / "tests" / "support"):
        assert not [t for t in imports.imported(path, ROOT) if re.search(r"\.test_", t)], path


@pytest.mark.parametrize("module", PURE)
def test_pure_modules_import_little(module):
    for source, targets in ours(module).items():
        own = module.split(".")[0]
        assert {t.split(".")[0] for t in targets} - {own} <= PURE[module], source
    for path in imports.python_files(PACKAGE):
        name = imports.module_name(path, PACKAGE.parent).removeprefix(f"{PACKAGE.name}.")
        if name == module or name.startswith(f"{module}."):
            assert not [t for t in imports.imported(path, PACKAGE.parent) if t.split(".")[0] in ("mlx", "mlx_lm")], name


def test_every_module_is_ordered():
    entries = {p.stem for p in PACKAGE.iterdir() if p.name != "__pycache__"}
    assert entries - {"__init__", "py"} == set(ORDER)
    assert len(entries) <= 20
    for name in ORDER:
        importlib.import_module(f"mlx_marlin.{name}")


def test_the_design_lists_the_packages_in_this_order():
    table = (ROOT / "docs/design.md").read_text().partition("## The modules")[2].partition("## ")[0]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    assert [name for row in rows for name in re.findall(r"`(\w+)`", row)] == ORDER


def test_a_forbidden_import_is_seen(tmp_path):
    """The parser itself: absolute, relative and late imports, and a circle of includes."""
    package = tmp_path / "mlx_marlin"
    (package / "low").mkdir(parents=True)
    (package / "low" / "__init__.py").write_text("")
    (package / "low" / "a.py").write_text("def f():\n    from mlx_marlin.high import b\n")
    (package / "high.py").write_text("from .low import a\n")
    assert imports.imported(package / "low" / "a.py", tmp_path) >= {"mlx_marlin.high"}
    assert imports.circle(imports.python_graph(package, tmp_path))
    (tmp_path / "x.h").write_text('#include "y.h"\n')
    (tmp_path / "y.h").write_text('#include "x.h"\n')
    assert imports.circle(imports.include_graph(tmp_path))
