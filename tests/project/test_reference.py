"""The API reference: every public name has a docstring and is in the pages."""

import html
import importlib
import re
import runpy
from pathlib import Path

import pytest

from tests.support.paths import ROOT

REFERENCE = runpy.run_path(str(ROOT / "docs" / "reference.py"))
MODULES = ["mlx_marlin", *(f"mlx_marlin.{name}" for name in REFERENCE["MODULES"])]


def public_names(name: str) -> set[str]:
    """What a module declares public; without such a list, the functions and classes that it defines."""
    module = importlib.import_module(name)
    own = [key for key, value in vars(module).items() if getattr(value, "__module__", None) == name]
    return {key for key in getattr(module, "__all__", own) if not key.startswith("_")}


@pytest.fixture(scope="module")
def pages():
    return REFERENCE["pages"]()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference")
    REFERENCE["write"](folder)
    return folder


def page_of(folder: Path, name: str) -> str:
    return (folder / f"{name.replace('.', '/')}.html").read_text()


@pytest.mark.parametrize("name", MODULES)
def test_every_public_name_has_a_docstring(pages, name):
    assert pages[name].docstring
    members = pages[name].members
    missing = sorted(n for n in public_names(name) if n not in members or not members[n].docstring)
    assert not missing, f"{name}: {', '.join(missing)} (for a constant: a string below its definition)"


@pytest.mark.parametrize("name", MODULES)
def test_every_public_name_is_in_the_pages(folder, name):
    names = public_names(name)
    assert names
    missing = sorted(names - set(re.findall(r'id="([\w.]+)"', page_of(folder, name))))
    assert not missing, f"{name}: {', '.join(missing)}"


@pytest.mark.parametrize("name", MODULES)
def test_packages_list_what_is_public(name):
    module = importlib.import_module(name)
    assert not hasattr(module, "__path__") or hasattr(module, "__all__")


@pytest.mark.parametrize("name", MODULES)
def test_no_markup_is_left(folder, name):
    """Roles, Sphinx's abbreviations, sections that were not recognised."""
    text = re.sub(r"<(style|script|svg).*?</\1>", "", page_of(folder, name), flags=re.DOTALL)
    text = html.unescape(re.sub(r"<[^>]+>", "", text))
    left = re.findall(r":\w+:`.*|`~.*|@public.*|^ *(?:Args|Returns|Raises|Attributes|Yields):.*`.*", text, re.MULTILINE)
    assert not left


def test_the_layers_show_how_they_are_made_and_called(folder):
    """pdoc leaves both out: constructors of dictionaries, which MLX's modules are, and double underscores."""
    page = page_of(folder, "mlx_marlin.layers")
    for name, base in (
        ("TrellisLinear",) * 2,
        ("TrellisSwitchGLU", "TrellisSwitch"),
        ("TrellisSwitchMLP", "TrellisSwitch"),
    ):
        assert f'id="{name}.__init__"' in page and f'id="{base}.__call__"' in page


def test_the_packages_page_links_the_others(folder):
    assert "mlx_marlin.html" in (folder / "index.html").read_text()
    page = page_of(folder, "mlx_marlin")
    for name in MODULES[1:]:
        assert f'href="{name.replace(".", "/")}.html"' in page
