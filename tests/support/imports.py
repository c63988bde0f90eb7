"""The imports of the sources, parsed: who needs whom, on how many floors, and where a circle closes.

python -m tests.support.imports     # prints the structure
"""

from __future__ import annotations

import ast
import graphlib
import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from tests.support.paths import ROOT

PACKAGE = ROOT / "python" / "mlx_marlin"
CSRC = ROOT / "csrc"

Graph = dict[str, set[str]]
"""For each module the modules that it imports."""


def module_name(path: Path, top: Path) -> str:
    """The dotted name of a source below the folder that holds its package."""
    parts = path.relative_to(top).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def python_files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.py"))


@cache
def imported(path: Path, top: Path) -> frozenset[str]:
    """The dotted names that a source imports, relative and absolute ones, wherever in the file they stand."""
    package = module_name(path, top).split(".")
    if path.name != "__init__.py":
        package.pop()
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *filter(None, [node.module])])
            found.update({source, *(f"{source}.{alias.name}" for alias in node.names)})
    return frozenset(found)


def python_graph(folder: Path, top: Path) -> Graph:
    """The imports among the sources of a folder, each as the most specific module that is meant."""
    names = {module_name(path, top) for path in python_files(folder)}
    graph: Graph = {}
    for path in python_files(folder):
        name = module_name(path, top)
        targets = imported(path, top) & names
        # `from ..kernels import Problem` means the package, `from ..kernels import cpu` the module in it.
        graph[name] = {t for t in targets if not any(other.startswith(f"{t}.") for other in targets)} - {name}
    return graph


def include_graph(folder: Path) -> Graph:
    """The includes with quotes among the C++ sources of a folder, by path below it."""
    files = {str(p.relative_to(folder)): p for p in folder.rglob("*") if p.suffix in (".h", ".cpp")}
    graph: Graph = {}
    for name, path in files.items():
        graph[name] = set()
        for wanted in re.findall(r'^\s*#\s*include\s+"([^"]+)"', path.read_text(), re.MULTILINE):
            beside = str((path.parent / wanted).resolve().relative_to(folder.resolve())) if ".." in wanted else wanted
            near = str((Path(name).parent / wanted).as_posix())
            graph[name].update(n for n in (near, beside) if n in files)
    return graph


def folders(graph: Graph, separator: str, depth: int) -> Graph:
    """A graph of modules as one of their packages; what lies at the top stands for itself."""

    def home(name: str) -> str:
        return separator.join(name.split(separator)[:depth])

    merged: Graph = {}
    for name, targets in graph.items():
        merged.setdefault(home(name), set()).update(home(t) for t in targets if home(t) != home(name))
    return merged


def circle(graph: Graph) -> list[str] | None:
    """A circle of imports, or ``None``."""
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return None


def floors(graph: Graph) -> int:
    """Modules on the longest chain of imports."""
    height: dict[str, int] = {}
    for name in graphlib.TopologicalSorter(graph).static_order():
        height[name] = 1 + max((height[t] for t in graph.get(name, ())), default=0)
    return max(height.values(), default=0)


def described(title: str, graph: Graph) -> str:
    found = circle(graph)
    arrows = sum(map(len, graph.values()))
    height = "-" if found else floors(graph)
    return f"{title:28} {len(graph):4} nodes {arrows:4} arrows {height:>3} floors  circle: {found or 'none'}"


def structure() -> Iterable[str]:
    """What the sources look like, a line each."""
    entries = [p for p in PACKAGE.iterdir() if p.name != "__pycache__"]
    yield f"python/mlx_marlin: {len(entries)} entries, {sum(p.suffix == '.py' for p in entries)} of them modules"
    modules = python_graph(PACKAGE, PACKAGE.parent)
    # The package's own front door hands on names and is imported by nothing.
    modules.pop(PACKAGE.name)
    yield described("python modules", {n: t - {PACKAGE.name} for n, t in modules.items()})
    yield described("python packages", folders({n: t - {PACKAGE.name} for n, t in modules.items()}, ".", 2))
    includes = include_graph(CSRC)
    yield described("csrc files", includes)
    yield described("csrc folders", folders(includes, "/", 1))
    yield described("tests/support", python_graph(ROOT / "tests" / "support", ROOT))


if __name__ == "__main__":
    print("\n".join(structure()))
