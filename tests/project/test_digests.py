"""A digest changes with every file that it stands for: timings and verdicts hold for one digest."""

import shutil
import subprocess
from pathlib import Path

import pytest

from mlx_marlin import _ext
from tests.support.paths import ROOT

# One file of each folder that a digest covers.
COVERED = {
    "cpu": [
        "csrc/format.h",
        "csrc/cpu/CMakeLists.txt",
        "csrc/cpu/product.cpp",
        "csrc/cpu/simd/avx2.h",
        "csrc/cpu/tier/gemm.h",
    ],
    "plan": ["csrc/format.h", "csrc/call.h", "csrc/plan/stages.cpp", "csrc/metal/encode.cpp"],
}

pytestmark = pytest.mark.skipif(shutil.which("cmake") is None, reason="needs cmake on the path")


def digest(kind: str, root: Path) -> str:
    command = ["cmake", f"-DKIND={kind}", f"-DROOT={root}", "-P", str(root / "cmake/digest.cmake")]
    return subprocess.run(command, check=True, capture_output=True, text=True).stderr.strip()


@pytest.fixture
def tree(tmp_path):
    for folder in ("csrc", "cmake"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    return tmp_path


@pytest.mark.parametrize("kind, name", [(kind, name) for kind, names in COVERED.items() for name in names])
def test_a_changed_byte_changes_the_digest(tree, kind, name):
    before = digest(kind, tree)
    data = bytearray((tree / name).read_bytes())
    data[-2] ^= 1
    (tree / name).write_bytes(data)
    assert digest(kind, tree) != before


@pytest.mark.parametrize("kind", COVERED)
def test_new_files_and_new_names_change_the_digest(tree, kind):
    digests = [digest(kind, tree)]
    folder = (tree / COVERED[kind][-1]).parent
    (folder / "deeper").mkdir()
    (folder / "deeper/one.h").write_text("// one\n")
    digests.append(digest(kind, tree))
    (folder / "deeper/one.h").rename(folder / "deeper/two.h")
    digests.append(digest(kind, tree))
    assert len(set(digests)) == 3


@pytest.mark.parametrize("kind", COVERED)
def test_every_folder_has_an_example(kind):
    """No folder of the sources is left out of this test."""
    roots = {"cpu": ["cpu"], "plan": ["plan", "metal"]}[kind]
    folders = {p.parent for root in roots for p in (ROOT / "csrc" / root).rglob("*") if p.is_file()}
    assert folders == {(ROOT / name).parent for name in COVERED[kind]} - {ROOT / "csrc"}


def test_the_digests_of_a_tree_do_not_depend_on_where_it_lies(tree):
    for kind in COVERED:
        assert digest(kind, tree) == digest(kind, ROOT)


def test_what_is_elsewhere_is_not_covered(tree):
    before = digest("cpu", tree), digest("plan", tree)
    (tree / "csrc/primitives/linear.cpp").write_text("// another\n")
    assert (digest("cpu", tree), digest("plan", tree)) == before


def test_a_missing_folder_is_an_error(tree):
    shutil.rmtree(tree / "csrc/metal")
    with pytest.raises(subprocess.CalledProcessError) as error:
        digest("plan", tree)
    assert "csrc/metal" in error.value.stderr


def test_the_plan_digest_of_the_build_is_that_of_its_sources():
    """The CPU's digest has the compiler in it as well."""
    assert len(_ext.cpu_digest()) == 64
    assert digest("plan", ROOT) == _ext.plan_digest()
