"""The API reference from the docstrings, as static pages.

python docs/reference.py build/docs
"""

from __future__ import annotations

import importlib
import re
import sys
import warnings
from pathlib import Path

from pdoc import doc, render

PACKAGE = "mlx_marlin"
MODULES = (
    "autotune",
    "codec",
    "dispatch",
    "kernels",
    "layers",
    "lm",
    "vlm",
    "loader",
    "ops",
    "profile",
    "quantize",
    "selection",
    "weights",
)
"""The public modules. Everything else is the package's own."""


def _constants() -> dict[tuple[str, int], str]:
    """The docstrings of all constants of the package, by name and object."""
    found = {}
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == PACKAGE and getattr(module, "__file__", "").endswith(".py"):
            for member in doc.Module(module).members.values():
                if member.docstring and not isinstance(member, (doc.Class, doc.Function)):
                    found[member.name, id(getattr(module, member.name, None))] = member.docstring
    return found


def _prepare(member: doc.Doc) -> None:
    """Make pdoc read a docstring as it is meant here."""
    # Sphinx shows of `~package.module.Name` the name.
    member.docstring = re.sub(r"`~[\w.]*?(\w+)`", r"`\1`", member.docstring)
    # A named tuple's constructor is its __new__, whose annotations pdoc cannot resolve.
    written = getattr(getattr(member, "obj", None), "__name__", "") == member.name
    if member.name in ("__init__", "__call__") and written and member.taken_from[0].startswith(PACKAGE):
        # Their signatures are wanted also where the class's docstring says the rest.
        member.docstring += "@public"
    if isinstance(member, doc.Class):
        init = vars(member.obj).get("__init__")
        if init is not None and "__init__" not in member.members:
            # pdoc leaves out constructors of dictionaries, which MLX's modules are.
            where = (member.modulename, f"{member.qualname}.__init__")
            constructor = doc.Function(*where, init, where)
            constructor.docstring = init.__doc__ or ""  # not the base class's
            member.members = {"__init__": constructor} | member.members
        for part in member.members.values():
            _prepare(part)


def pages() -> dict[str, doc.Module]:
    """A page for the package and for each public module, by name."""
    modules = [importlib.import_module(name) for name in (PACKAGE, *(f"{PACKAGE}.{m}" for m in MODULES))]
    for module in modules:
        for name in getattr(module, "__all__", ()):
            # pdoc reads the module's dictionary, where names that are imported on first use are not yet.
            setattr(module, name, getattr(module, name))
    constants = _constants()
    found = {module.__name__: doc.Module(module) for module in modules}
    for module, page in zip(modules, found.values()):
        for member in page.members.values():
            # A constant's docstring stands where it is defined, which may be another module.
            if not member.docstring:
                member.docstring = constants.get((member.name, id(getattr(module, member.name, None))), "")
            _prepare(member)
    package, *rest = found.values()
    package.submodules = rest  # pdoc would list those that are names of the package's __all__
    return found


def write(folder: Path) -> None:
    """Write the pages, an index and its search.

    Args:
        folder: Made if it does not exist; pages of the same names are replaced.
    """
    # Attributes without a docstring of their own stand in their class's.
    render.configure(docformat="google", include_undocumented=False, show_source=False)
    found = pages()
    with warnings.catch_warnings():
        # Of named tuples, whose constructors are shown with the annotations as they are written.
        warnings.filterwarnings("ignore", "Error parsing type annotation", UserWarning)
        files = {f"{name.replace('.', '/')}.html": render.html_module(page, found) for name, page in found.items()}
        files |= {"index.html": render.html_index(found), "search.js": render.search_index(found)}
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
    print(Path(sys.argv[1]) / "index.html")
