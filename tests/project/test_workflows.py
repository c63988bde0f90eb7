"""The workflows, hooks and make targets: every command that they name exists, and versions agree with the package."""

import re
import runpy
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.support.paths import ROOT

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
PYPROJECT = (ROOT / "pyproject.toml").read_text()
MAKEFILE = (ROOT / "Makefile").read_text().replace("\\\n", " ")
# What a runner brings, beside make and python, whose arguments are looked at.
BROUGHT = {"apt-get"}
MODULES = {"pip", "pytest", "scikit_build_core"}


def make_targets() -> set[str]:
    """Targets of the Makefile that are no files."""
    (phony,) = re.findall(r"^\.PHONY: (.*)$", MAKEFILE, re.MULTILINE)
    return {target for target in phony.split() if re.search(rf"^{re.escape(target)}:", MAKEFILE, re.MULTILINE)}


def commands(script: str) -> list[list[str]]:
    """The words of each command of a shell script."""
    lines = [shlex.split(line, comments=True) for line in script.replace("\\\n", " ").splitlines()]
    return [words for words in lines if words]


def fault(words: list[str]) -> str | None:
    """Why a command cannot run in a clone, or ``None``."""
    program, *arguments = words[1:] if words[0] == "sudo" else words
    if program == "make":
        wanted = {a for a in arguments if "=" not in a}
        unknown = wanted - make_targets()
        return f"no such make target: {', '.join(sorted(unknown))}" if unknown or not wanted else None
    if program == "python":
        module = arguments[1] if arguments[0] == "-m" else ""
        path = f"{module.replace('.', '/')}.py" if module else arguments[0]
        known = module.partition(".")[0] in MODULES or (ROOT / path).is_file()
        return None if known else f"no such script: {path}"
    return None if program in BROUGHT or (ROOT / program).is_file() else f"no such program: {program}"


def jobs(path: Path) -> dict[str, dict]:
    return yaml.safe_load(path.read_text())["jobs"]


def steps():
    """(workflow and job, step) of every workflow."""
    for path in WORKFLOWS:
        for name, job in jobs(path).items():
            for step in job["steps"]:
                yield f"{path.name}: {name}", step


def supported() -> list[str]:
    """The Python versions that the package may be installed in."""
    ((low, high),) = re.findall(r'requires-python = ">=3\.(\d+),<3\.(\d+)"', PYPROJECT)
    return [f"3.{minor}" for minor in range(int(low), int(high))]


def test_every_command_exists():
    found = [(where, words) for where, step in steps() for words in commands(step.get("run", ""))]
    assert len(found) >= 8
    faults = [f"{where}: {fault(words)}" for where, words in found if fault(words)]
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize(
    "command", ["make tset", "make", "python tests/nothing.py", "python -m tests.nothing", "sudo nothing", "./nothing"]
)
def test_missing_commands_are_found(command):
    (words,) = commands(command)
    assert fault(words)


def recipe(target: str) -> list[list[str]]:
    """The commands of a make target that run Python."""
    lines = re.findall(rf"^{target}:.*\n((?:\t.*\n)*)", MAKEFILE, re.MULTILINE)
    return [words for words in commands("".join(lines).replace("$(RUN)", "python")) if words[0] == "python"]


def test_make_targets_run_what_exists():
    """Every target without running it, and every script that its recipe names."""
    listed = set(re.findall(r"^([a-z][\w-]*):", MAKEFILE, re.MULTILINE))
    assert listed == make_targets()
    faults = [f"{target}: {fault(words)}" for target in listed for words in recipe(target) if fault(words)]
    assert not faults, "\n".join(faults)
    assert len([target for target in listed if recipe(target)]) >= 6
    for target in sorted(listed):
        subprocess.run(["make", "--dry-run", target], cwd=ROOT, check=True, capture_output=True)


def test_python_versions_are_those_of_the_package():
    """Linux tests and wheels have every one; the others one of them."""
    for path in WORKFLOWS:
        for job in jobs(path).values():
            matrix = job.get("strategy", {}).get("matrix", {})
            assert matrix.get("python", supported()) == supported()
            for step in job["steps"]:
                version = step.get("with", {}).get("python-version", "${{ matrix.python }}")
                assert version in supported() or (version == "${{ matrix.python }}"), version
    assert jobs(ROOT / ".github/workflows/tests.yml")["linux"]["strategy"]["matrix"]["python"] == supported()
    assert jobs(ROOT / ".github/workflows/wheels.yml")["wheel"]["strategy"]["matrix"]["python"] == supported()
    classified = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', PYPROJECT)
    assert classified == supported()


def test_actions_have_a_version():
    used = {step["uses"] for _, step in steps() if "uses" in step}
    assert used and all(re.fullmatch(r"[\w-]+/[\w-]+@v\d+", name) for name in used), used
    names = [name.partition("@")[0] for name in used]
    assert len(set(names)) == len(names), f"one action in two versions: {used}"


def test_the_report_of_a_first_run_is_uploaded():
    """Under the name that the script gives it."""
    ((_, _, module),) = recipe("first-run")
    assert '"first_run_"' in (ROOT / f"{module.replace('.', '/')}.py").read_text()
    steps = jobs(ROOT / ".github/workflows/tests.yml")["macos"]["steps"]
    assert any("make first-run" in step.get("run", "") for step in steps)
    assert [step["with"]["path"] for step in steps if "upload-artifact" in step.get("uses", "")] == ["first_run_*.json"]


def test_hooks_run_the_pinned_tools():
    """From .venv, where make dev puts the versions of pyproject.toml."""
    (lint,) = re.findall(r"^lint = \[(.*?)\]$", PYPROJECT, re.MULTILINE | re.DOTALL)
    pinned = re.findall(r'"([\w-]+)==', lint)
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert repository["repo"] == "local"
    for hook in repository["hooks"]:
        program, *arguments = shlex.split(hook["entry"])
        if program == "make":
            assert fault([program, *arguments]) is None
        else:
            assert program.removeprefix(".venv/bin/") in pinned


def test_the_smoke_test_of_wheels(capsys):
    smoke = runpy.run_path(str(ROOT / "tests" / "project" / "smoke.py"))
    errors = smoke["errors"]()
    assert set(errors) == {"linear", "experts"} and max(errors.values()) < smoke["TOLERANCE"]
