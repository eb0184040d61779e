"""The testbed's modules are loaded by name, and what is missing is said where there is none."""

import importlib
import importlib.util
import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import leakbed
from leakbed.testbed import MissingTestbedError
from leakbed.testbed import testbed as load_module

ROOT = Path(__file__).parents[2]
SETTINGS: dict[str, Any] = {"name": "tried", "attack": [{"name": "constant-image"}]}
Call = tuple[tuple[Any, ...], dict[str, Any]]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    """Replace the runner by one that notes its calls."""
    noted: list[Call] = []

    def note(*args: Any, **kwargs: Any) -> list[str]:
        noted.append((args, kwargs))
        return ["card"]

    fake = ModuleType("experiments.run.runner")
    fake.run = note  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, fake.__name__, fake)
    return noted


def test_run_checks_first_and_hands_on_to_the_runner(calls: list[Call]) -> None:
    assert leakbed.run(SETTINGS, overrides=["data.nodes=3"]) == ["card"]
    ((checked,), options) = calls[0]
    assert (checked.name, checked.data.nodes) == ("tried", 3)
    assert options == {"out": None, "progress": None}
    leakbed.run(checked, out="elsewhere")
    assert calls[1] == ((checked,), {"out": Path("elsewhere"), "progress": None})


def test_bad_settings_never_reach_the_runner(calls: list[Call]) -> None:
    with pytest.raises(ValueError, match="did you mean 'nodes'"):
        leakbed.run(SETTINGS, overrides=["data.nodse=3"])
    assert calls == []


def test_a_missing_package_is_named_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> ModuleType:
        raise ModuleNotFoundError("no torch", name="torch")

    monkeypatch.setattr(importlib, "import_module", absent)
    with pytest.raises(MissingTestbedError, match=r"'torch', which is not installed.*make setup"):
        leakbed.run(SETTINGS)


def test_a_frame_without_pandas_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = ModuleType("experiments.report.export")
    fake.records = lambda folder, by_seed: [{"attack": f"{folder} {by_seed}"}]  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, fake.__name__, fake)
    assert leakbed.results("runs/a", by_seed=True)["attack"].tolist() == ["runs/a True"]
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(MissingTestbedError, match=r"'pandas', which is not installed.*make setup"):
        leakbed.results("runs/a")


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
        load_module("experiments.catalogue")


def test_an_import_error_inside_the_testbed_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> ModuleType:
        raise ImportError("cannot import name 'x'")

    monkeypatch.setattr(importlib, "import_module", broken)
    with pytest.raises(ImportError, match="cannot import name") as caught:
        load_module("experiments.catalogue")
    assert not isinstance(caught.value, MissingTestbedError)


def test_checking_settings_needs_no_torch() -> None:
    code = (
        "import sys; from experiments.settings.load import load_settings; "
        f"load_settings({SETTINGS!r}); sys.exit('torch' in sys.modules or 'flwr' in sys.modules)"
    )
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False)  # noqa: S603
    assert ended.returncode == 0
