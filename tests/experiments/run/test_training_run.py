"""A training run's folder: read back when finished, swept when its process died half-way."""

import json
import os
from pathlib import Path

import pytest

from experiments.run.training_run import SUMMARY, TrainingRun, unfinished


def finished(folder: Path, **more: object) -> Path:
    folder.mkdir()
    summary = {"utility": {"test_accuracy": 0.5}, "cost": {"seconds": 1.5}, **more}
    (folder / SUMMARY).write_text(json.dumps(summary))
    return folder


def test_a_finished_run_is_read_back_and_an_unfinished_one_is_not(tmp_path: Path) -> None:
    points = [{"step": 3, "mse": 0.1}]
    run = TrainingRun.read(finished(tmp_path / "run", checkpoints=points))
    assert run is not None
    assert (run.utility, run.cost) == ({"test_accuracy": 0.5}, {"seconds": 1.5})
    assert run.checkpoints == points
    assert {path.parent for path in (run.trace, run.answers, run.decoded)} == {run.folder}
    assert TrainingRun.read(tmp_path / "other") is None


@pytest.mark.parametrize("text", ["", "[]", '{"utility": {}}', '{"cost": 1, "other": 2}'])
def test_a_damaged_run_is_none(tmp_path: Path, text: str) -> None:
    folder = finished(tmp_path / "run")
    (folder / SUMMARY).write_text(text)
    assert TrainingRun.read(folder) is None


def test_what_a_killed_process_left_is_swept_and_a_living_ones_is_not(tmp_path: Path) -> None:
    dead, alive, own = (tmp_path / f"run.unfinished-{pid}" for pid in (2**22 + 1, 1, os.getpid()))
    for left in (dead, alive, own):
        left.mkdir()
        (left / "half").touch()
    with unfinished(tmp_path / "run") as work:
        assert work.parent == tmp_path
        assert list(work.iterdir()) == []
    assert {path.name for path in tmp_path.iterdir()} == {alive.name}


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    def work() -> None:
        with unfinished(tmp_path / "run") as folder:
            (folder / "half").touch()
            raise KeyError("half-way")

    with pytest.raises(KeyError):
        work()
    assert list(tmp_path.iterdir()) == []
