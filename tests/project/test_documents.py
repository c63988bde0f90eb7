"""What the documents point to exists: links, paths and make targets."""

import re
from pathlib import Path

import pytest

from tests.project.test_workflows import commands, fault
from tests.support.paths import ROOT

DOCUMENTS = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/design.md", "docs/glossary.md", "docs/tuning.md"]
FOLDERS = ("bench", "csrc", "docs", "examples", "kernels", "models", "python", "tests")
# Where a path with folders may begin, beside the root.
STARTS = ("docs", "python/mlx_marlin", "csrc", "tests")
ENDINGS = r"py|h|cpp|metal|md|json|ipynb|toml|txt|npz|svg|yml"
# What runs write.
WRITTEN = {"plan.txt"}
WRITTEN_FOLDERS = ("build/", "configs/")


def file_names() -> set[str]:
    return {path.name for folder in FOLDERS for path in (ROOT / folder).rglob("*.*")}


def paths(text: str) -> set[str]:
    """Paths in code spans: with a known ending, or a folder of the repository."""
    spans = re.findall(r"`([^`\n]+)`", text)
    return {s for s in spans if re.fullmatch(rf"[\w./-]+\.(?:{ENDINGS})|(?:tests|csrc|bench|kernels|docs)/[\w/-]*", s)}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_paths_exist(name):
    """A name without folders is any file of that name."""
    known = file_names() | WRITTEN
    named = {path for path in paths((ROOT / name).read_text()) if not path.startswith(WRITTEN_FOLDERS)}
    starts = [ROOT, *(ROOT / start for start in STARTS)]
    missing = [p for p in named if not (any((s / p).exists() for s in starts) or p in known)]
    assert not missing, f"{name}: {', '.join(sorted(missing))}"


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_lead_somewhere(name):
    path = ROOT / name
    links = re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#([\w-]+))?\)", path.read_text())
    for target, anchor in links:
        found = path.parent / target if target else path
        assert found.exists(), f"{name}: {target}"
        assert not anchor or anchor in anchors(found), f"{name}: {target}#{anchor}"


def anchors(path: Path) -> set[str]:
    """Of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_make_targets_exist(name):
    text = (ROOT / name).read_text()
    shell = "\n".join([*re.findall(r"^```(?:\w*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)])
    found = [line for line in shell.splitlines() if line.startswith("make ")]
    found += re.findall(r"`(make [\w -]+)`", text)
    faults = [f"{line}: {fault(words)}" for line in found for words in commands(line) if fault(words)]
    assert not faults, "\n".join(faults)
