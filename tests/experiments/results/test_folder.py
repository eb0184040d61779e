"""A results folder is made or refused before anything runs, and is one run's at a time."""

import os
from pathlib import Path
from typing import Any

import pytest

from experiments.results.folder import (
    ResultsFolderError,
    default_folder,
    lock_folder,
    make_folder,
)
from experiments.run import runner

SETTINGS: dict[str, Any] = {"name": "tried", "attack": [{"name": "constant-image"}]}


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Work in a folder of one's own, where nothing is ever trained."""
    monkeypatch.chdir(tmp_path)

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("it ran")

    monkeypatch.setattr(runner, "prepare", never)


def test_a_folder_that_cannot_be_is_refused_before_anything_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    Path("file").touch()
    with pytest.raises(ResultsFolderError, match=r"results cannot go to file: .*File exists"):
        runner.run(SETTINGS, out=Path("file"))
    with pytest.raises(ResultsFolderError, match="Not a directory"):
        make_folder(Path("file/inside"))
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(ResultsFolderError, match="not writable"):
        runner.run(SETTINGS, out=Path("mine"))


def test_a_second_run_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    with (
        lock_folder(tmp_path),
        pytest.raises(ResultsFolderError, match="another run is writing"),
    ):
        runner.run(SETTINGS, out=tmp_path)
    with pytest.raises(AssertionError, match="it ran"):
        runner.run(SETTINGS, out=tmp_path)


def test_the_default_folder_has_the_experiments_name() -> None:
    assert default_folder("x") == Path("runs/x")
    with pytest.raises(AssertionError, match="it ran"):
        runner.run(SETTINGS)
    assert Path("runs/tried").is_dir()
