import importlib
import sys
from pathlib import Path

import pytest

from leakbed import provenance, reach
from leakbed.provenance import (
    CodeFolderError,
    EditedCodeError,
    code_digest,
    find_first,
    own_modules,
)
from leakbed.reach import reached

FILES = {
    "mine_own.py": "import os, torch\nfrom mine_blocks import ACT\nimport leakbed.cli\nimport gone",
    "mine_blocks.py": "ACT = 1\ndef later():\n    from mine_parts import nets",
    "mine_parts/__init__.py": "from .deep import one",
    "mine_parts/nets.py": "from . import layers\nfrom ..beyond import nothing",
    "mine_parts/layers.py": "from importlib import *\nimport_module('mine_named')\nimport mine_own",
    "mine_parts/deep/__init__.py": "",
    "mine_parts/deep/one.py": "import importlib\nimportlib.import_module('..unnamed', __package__)",
    "mine_parts/unnamed.py": "import sys; importlib.import_module('mine_' + 'parts.never')",
    "mine_parts/never.py": "",
    "mine_named.py": "__import__('mine_space.inner')",
    "mine_space/inner.py": "this is no Python",
    "mine_other.py": "",
}
REACHED = sorted(
    file.removesuffix("/__init__.py").removesuffix(".py").replace("/", ".")
    for file in FILES
    if file not in {"mine_other.py", "mine_parts/never.py"}
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, content in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    monkeypatch.setattr(provenance, "_FIRST", {})
    return tmp_path


def test_every_file_that_imports_reach_is_found_and_none_is_executed(folder: Path) -> None:
    found = reached(["mine_own"])
    assert list(found) == REACHED
    assert found["mine_parts.nets"] == folder / "mine_parts" / "nets.py"
    assert not [name for name in sys.modules if name.startswith("mine_")]


@pytest.mark.parametrize("edited", [file for file in FILES if "never" not in file])
def test_an_edit_of_any_of_them_is_seen(folder: Path, edited: str) -> None:
    before = code_digest(("mine_own",))
    (folder / edited).write_text(FILES[edited] + "\nEDITED = 1")
    if edited == "mine_other.py":
        assert code_digest(("mine_own",)) == before
        return
    with pytest.raises(EditedCodeError, match=f"{edited} was changed after .* new process"):
        code_digest(("mine_own",))
    provenance._FIRST.clear()  # as in a new process
    assert code_digest(("mine_own",)) != before


def test_an_edit_is_seen_whatever_is_asked_for_beside_it(folder: Path) -> None:
    code_digest(("mine_other",))
    (folder / "mine_other.py").write_text("EDITED = 1")
    with pytest.raises(EditedCodeError, match="mine_other"):
        code_digest(("mine_named", "mine_other"))


def test_the_folder_does_not_count(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    before = code_digest(("mine_own",))
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "moved"
    folder.rename(elsewhere)
    sys.path[0] = str(elsewhere)
    importlib.invalidate_caches()
    assert code_digest(("mine_own",)) == before


def test_folders_without_an_init_may_lie_in_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = tmp_path / "outer_folder" / "inner_folder"
    inner.mkdir(parents=True)
    (inner / "net.py").write_text("raise SystemExit")
    monkeypatch.syspath_prepend(tmp_path)
    assert reached(["outer_folder.inner_folder.net"]) == {
        "outer_folder.inner_folder.net": inner / "net.py"
    }
    assert "outer_folder" not in sys.modules


def test_what_is_installed_or_ours_is_not_followed() -> None:
    assert reached(["json", "torch.nn", "leakbed.cli", "no_such_module", "__main__", ""]) == {}
    assert code_digest(()) == ""


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder of installed packages: a plug-in in two files, and a library."""
    site = tmp_path / "site-packages"
    files = {
        "mine_shipped/__init__.py": "",
        "mine_shipped/attack.py": "from .blocks import ACT\nimport mine_library, torch",
        "mine_shipped/blocks.py": "ACT = 1",
        "mine_library.py": "",
        "mine_shipped-1.0.dist-info/METADATA": "Name: mine-shipped\nVersion: 1.0\n",
        "mine_shipped-1.0.dist-info/entry_points.txt": "[leakbed.attacks]\n"
        "mine-shipped = mine_shipped.attack:Grey\n",
    }
    for name, content in files.items():
        (site / name).parent.mkdir(parents=True, exist_ok=True)
        (site / name).write_text(content)
    monkeypatch.setattr(reach, "_INSTALLED", (*reach._INSTALLED, site))
    monkeypatch.syspath_prepend(str(site))
    importlib.invalidate_caches()
    monkeypatch.setattr(provenance, "_FIRST", {})
    return site


def test_another_version_of_an_installed_plugin_is_other_code(site: Path) -> None:
    before = code_digest(("mine_shipped.attack",))
    (site / "mine_shipped" / "blocks.py").write_text("ACT = 2")
    provenance._FIRST.clear()  # as in a new process
    assert code_digest(("mine_shipped.attack",)) != before
    assert list(reached(["mine_shipped.attack"])) == [
        "mine_shipped",
        "mine_shipped.attack",
        "mine_shipped.blocks",
    ]


@pytest.mark.parametrize("name", ["site-packages", "dist-packages"])
def test_a_library_of_another_environment_on_the_path_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "mine_library.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path / name))
    importlib.invalidate_caches()
    assert reached(["mine_library"]) == {}


def test_names_of_a_catalogue_are_no_modules() -> None:
    assert own_modules(["mnist", None, "b.c:D", "a:f", "b.c:E"]) == ("a", "b.c")


@pytest.mark.parametrize("key", ["code", "experiment"])
def test_the_folder_that_a_run_config_names_is_found_first(
    folder: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path[1:]))
    assert reached(["mine_other"]) == {}
    named = folder if key == "code" else folder / "settings.toml"
    assert find_first({key: str(named), "out": ""}) == folder
    assert sys.path[0] == str(folder)
    assert reached(["mine_other"]) == {"mine_other": folder / "mine_other.py"}
    before = list(sys.path)
    find_first({key: str(named)})
    assert sys.path == before


@pytest.mark.parametrize("config", [{}, {"code": "", "experiment": "experiments/first.toml"}])
def test_a_run_config_that_names_no_folder_changes_nothing(config: dict[str, str]) -> None:
    before = list(sys.path)
    assert find_first(config) is None
    assert sys.path == before


@pytest.mark.parametrize("code", ["here", "/no/such/folder"])
def test_a_relative_or_missing_folder_is_refused(code: str) -> None:
    with pytest.raises(CodeFolderError, match="is no folder, or not an absolute path"):
        find_first({"code": code})
