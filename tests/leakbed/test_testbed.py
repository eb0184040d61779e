"""The API passes things on to the testbed, and says what is missing where there is none."""

import importlib
import importlib.util
import os
import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

import leakbed
from leakbed import testbed
from leakbed.testbed import MissingTestbedError, ResultsFolderError

ROOT = Path(__file__).parents[2]
SETTINGS: dict[str, Any] = {"name": "tried", "attack": [{"name": "constant-image"}]}


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Work in a folder of one's own: running makes results folders."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Replace every function of the testbed that trains or writes by one that notes its call."""
    noted: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def note(*args: Any, **kwargs: Any) -> str:
        noted.append((args, kwargs))
        return "result"

    for module, name in (
        ("runner", "run"),
        ("offline", "attack_trace"),
        ("report", "write_report"),
    ):
        fake = ModuleType(f"experiments.{module}")
        setattr(fake, name, note)
        monkeypatch.setitem(sys.modules, f"experiments.{module}", fake)
    return noted


def test_run_checks_first_and_names_the_folder(
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]],
) -> None:
    returned: object = leakbed.run(SETTINGS, overrides=["data.nodes=3"])
    assert returned == "result"
    ((checked,), options) = calls[0]
    assert (checked.name, checked.data.nodes) == ("tried", 3)
    assert options == {"out": Path("runs/tried"), "progress": None}
    testbed.run(SETTINGS, out="elsewhere")
    assert calls[1][1]["out"] == Path("elsewhere")


def test_bad_settings_never_reach_the_runner(
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]],
) -> None:
    with pytest.raises(ValueError, match="did you mean 'nodes'"):
        testbed.run(SETTINGS, overrides=["data.nodse=3"])
    assert calls == []


def test_a_folder_that_cannot_be_is_refused_before_anything_runs(
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("file").touch()
    with pytest.raises(ResultsFolderError, match=r"results cannot go to file: .*File exists"):
        testbed.run(SETTINGS, out="file")
    with pytest.raises(ResultsFolderError, match="Not a directory"):
        testbed.attack_trace("t", "dlm", out="file/inside")
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(ResultsFolderError, match="not writable"):
        testbed.run(SETTINGS, out="mine")
    assert calls == []


def test_a_second_run_in_the_same_folder_is_refused(
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]], tmp_path: Path
) -> None:
    with testbed.alone(tmp_path), pytest.raises(ResultsFolderError, match="another run is writing"):
        testbed.run(SETTINGS, out=tmp_path)
    assert not calls
    testbed.run(SETTINGS, out=tmp_path)
    assert len(calls) == 1


def test_checked_settings_can_be_checked_again() -> None:
    checked = testbed.check(SETTINGS)
    assert testbed.check(checked) == checked


def test_paths_may_be_text(calls: list[tuple[tuple[Any, ...], dict[str, Any]]]) -> None:
    testbed.attack_trace("a/trace", "dlm", answers="a/answers", settings={"targets": 2})
    assert calls[0] == (
        (Path("a/trace"), "dlm"),
        {
            "answers": Path("a/answers"),
            "out": None,
            "settings": {"targets": 2},
            "seed": None,
            "device": "auto",
            "model": None,
            "about": None,
            "truth": None,
        },
    )
    testbed.report("a")
    assert calls[1] == ((Path("a"),), {})


def test_the_catalogue_comes_from_the_testbed() -> None:
    assert "mnist-5k" in testbed.catalogue()["data sets"]


def test_a_missing_package_is_named_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> ModuleType:
        raise ModuleNotFoundError("no torch", name="torch")

    monkeypatch.setattr(importlib, "import_module", absent)
    with pytest.raises(MissingTestbedError, match=r"'torch', which is not installed.*make setup"):
        testbed.run(SETTINGS)


@pytest.mark.parametrize("elsewhere", [None, "/somebody/else/experiments"])
def test_a_wheel_alone_or_a_strangers_package_is_no_testbed(
    monkeypatch: pytest.MonkeyPatch, elsewhere: str | None
) -> None:
    spec = None
    if elsewhere:
        spec = ModuleSpec("experiments", loader=None, is_package=True)
        spec.submodule_search_locations = [elsewhere]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(MissingTestbedError, match=r"no importable 'experiments'.*make setup"):
        testbed.catalogue()


def test_an_import_error_inside_the_testbed_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> ModuleType:
        raise ImportError("cannot import name 'x'")

    monkeypatch.setattr(importlib, "import_module", broken)
    with pytest.raises(ImportError, match="cannot import name") as caught:
        testbed.catalogue()
    assert not isinstance(caught.value, MissingTestbedError)


def test_the_flagship_and_the_default_folder() -> None:
    assert testbed.FLAGSHIP == ROOT / "experiments/studies/fl_vs_split/settings.toml"
    assert testbed.results_folder(SimpleNamespace(name="x")) == Path("runs/x")


def test_checking_settings_needs_no_torch() -> None:
    code = (
        "import sys; from leakbed import api; "
        f"api.check({SETTINGS!r}); sys.exit('torch' in sys.modules or 'flwr' in sys.modules)"
    )
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False)  # noqa: S603
    assert ended.returncode == 0
