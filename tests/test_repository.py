"""The repository as a whole: sizes, layout, tests by name, and nothing private in its text."""

import ast
import importlib
import re
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PACKAGES = ["attacks", "clients", "defenses", "experiments", "leakbed", "strategies"]
CODE = [*PACKAGES, "benchmarks", "tests"]
# Written in two parts, so that this file does not find itself.
PRIVATE = {
    "a package registry": re.compile(
        r"python" r"hosted\.org|py" r"pi\.org|registry\.np" r"mjs|deb\.deb" r"ian|index-url\s*=",
        re.I,
    ),
    "a path of somebody's machine": re.compile(
        r"(?<![\w.])/(?:ho" r"me|ro" r"ot|Us" r"ers|wo" r"rk)/\w"
    ),
}


def sources(*folders: str) -> list[Path]:
    return [file for folder in folders for file in sorted((ROOT / folder).rglob("*.py"))]


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def tracked() -> Iterator[Path]:
    """Every file git tracks or would track; a source tree without git has nothing else in it."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    git = shutil.which("git")
    if git is None or not (ROOT / ".git").exists():
        pytest.skip("needs the git repository")
    listing = subprocess.run([git, *command[1:]], cwd=ROOT, check=True, capture_output=True)  # noqa: S603
    return (ROOT / name for name in listing.stdout.decode().split("\0") if name)


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_come_from_this_repository(package: str) -> None:
    module = importlib.import_module(package)
    assert module.__file__ is not None, f"{package}/ has no __init__.py"
    assert Path(module.__file__).parents[1] == ROOT


def test_no_file_is_over_600_lines() -> None:
    lengths = {file: len(file.read_text().splitlines()) for file in sources(*CODE)}
    assert {str(file.relative_to(ROOT)): n for file, n in lengths.items() if n > 600} == {}


def imported_by(module: Path) -> set[str]:
    """Return the modules of this repository that a file imports, wherever in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(module.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{each.name}" for each in node.names)}
        elif isinstance(node, ast.Import):
            found |= {each.name for each in node.names}
    return found


def test_no_small_module_serves_one_other_alone() -> None:
    """Under 80 lines with one importer it belongs there; catalogue entries may be short."""
    imports = {file: imported_by(file) for file in sources(*PACKAGES)}
    lonely = []
    for file in imports:
        name = ".".join(file.relative_to(ROOT).with_suffix("").parts)
        users = [user for user, names in imports.items() if name in names and user != file]
        small = len(file.read_text().splitlines()) < 80 and file.stem != "__init__"
        if small and len(users) == 1 and users[0] != file.with_name("__init__.py"):
            lonely.append(f"{name} serves {users[0].relative_to(ROOT)} alone")
    assert lonely == []


def test_no_function_is_over_50_lines() -> None:
    long = [
        f"{file.relative_to(ROOT)}:{node.lineno} {node.name}"
        for file in sources(*PACKAGES)
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and body_lines(node) > 50
    ]
    assert long == []


def body_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines from the first statement after the docstring to the last."""
    body = function.body[1:] if ast.get_docstring(function) else function.body
    return (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0


def test_nearly_every_source_file_has_a_test_of_its_name() -> None:
    found = [file.relative_to(ROOT) for file in sources(*PACKAGES) if file.stem != "__init__"]
    files = [file for file in found if "studies" not in file.parts]  # whose app is audited whole
    without = [
        str(file)
        for file in files
        if not (ROOT / "tests" / file.with_name(f"test_{file.name}")).exists()
    ]
    assert len(without) <= 0.05 * len(files), without


def test_no_test_folder_is_a_package() -> None:
    # pytest would import tests/attacks as `attacks`.
    assert list((ROOT / "tests").rglob("__init__.py")) == []


# Slow nodes, hooks and calls are slow by sleeping; only `until` sleeps between two looks.
SLEEPERS = {
    "tests/leakbed/test_cli.py",
    "tests/leakbed/tap/test_wiretap_threads.py",
    "tests/support/slow_nodes.py",
    "tests/support/strange_nodes.py",
    "tests/support/waiting.py",
}


def test_no_test_waits_by_sleeping() -> None:
    called = re.compile(r"\bsleep" r"\(")  # in two parts, so that this file does not find itself
    found = {str(f.relative_to(ROOT)) for f in sources("tests") if called.search(f.read_text())}
    assert found == SLEEPERS


@pytest.mark.parametrize("kind", sorted(PRIVATE))
def test_the_text_names_nothing_private(kind: str) -> None:
    found = []
    for file in tracked():
        text = file.read_bytes().decode(errors="ignore") if file.is_file() else ""
        found += [f"{file.relative_to(ROOT)}: {m[0]}" for m in PRIVATE[kind].finditer(text)]
    assert found == []


def test_the_wheel_ships_leakbed_alone() -> None:
    assert project()["tool"]["hatch"]["build"]["targets"]["wheel"] == {"packages": ["leakbed"]}


def test_the_wheel_needs_no_torch() -> None:
    names = {Requirement(line).name for line in project()["project"]["dependencies"]}
    assert names == {"flwr", "numpy", "safetensors"}


def test_versions_agree() -> None:
    stated = project()["project"]["version"]
    assert version("leakbed") == stated
    assert f"\nversion: {stated}\n" in (ROOT / "CITATION.cff").read_text()


def test_tested_versions_cover_the_direct_dependencies() -> None:
    metadata = project()["project"]
    extras = metadata["optional-dependencies"].values()
    wanted = [Requirement(line) for line in sum(extras, start=metadata["dependencies"])]
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    tested = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert {need.name for need in wanted} == set(tested)
    assert [need for need in wanted if tested[need.name] not in need.specifier] == []


def test_git_ignores_what_runs_leave_behind() -> None:
    ignored = set((ROOT / ".gitignore").read_text().splitlines())
    assert {".venv/", "runs/", "*.fab", "__pycache__/", ".coverage"} <= ignored


def test_make_help_names_every_target() -> None:
    text = (ROOT / "Makefile").read_text()
    (phony,) = re.findall(r"^\.PHONY: (.*)$", text, re.M)
    described = re.findall(r"^([a-z-]+):.*  ## .+$", text, re.M)
    assert sorted(phony.split()) == sorted(described)


def test_every_decision_is_numbered_once() -> None:
    numbers = sorted(file.name[:4] for file in (ROOT / "docs/decisions").glob("*.md"))
    assert numbers == [f"{n:04d}" for n in range(1, len(numbers) + 1)]


def test_documents_link_to_files_that_exist() -> None:
    broken = [
        f"{page.relative_to(ROOT)}: {target}"
        for page in [
            *ROOT.glob("*.md"),
            *(ROOT / "docs").rglob("*.md"),
            *ROOT.glob("experiments/studies/*/*.md"),
        ]
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text())
        if not target.startswith("https://") and not (page.parent / target).exists()
    ]
    assert broken == []
