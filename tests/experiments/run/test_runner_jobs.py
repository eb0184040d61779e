"""Processes that share an experiment: the same numbers, resuming, errors, tidying up."""

from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, ClassVar

import pytest

from experiments.run import runner
from experiments.run.runner import run
from experiments.run.train import grids_of
from experiments.settings.load import load_settings
from leakbed.flower_internals import FlowerMovedError
from leakbed.grids import NodeFailed

TABLE: dict[str, Any] = {
    "name": "shared",
    "jobs": 2,
    "data": {"name": "tests.support.tiny:images", "nodes": 2},
    "model": {"name": "mlp2", "cut": 1},
    "protocol": {"name": "vanilla-split", "batch_size": 8, "local_steps": 3},
    "attack": [{"name": "smashed-as-image", "targets": 4}, {"name": "constant-image"}],
    "sweep": {"seed": [0, 1, 2]},
}


class Here:
    """A pool whose only process is this one."""

    taken: ClassVar[list[runner.Task]] = []
    closed: ClassVar[bool] = False

    def __init__(self, size: int, **_: Any) -> None:
        assert size >= 1
        Here.taken, Here.closed = [], False

    def submit(self, work: Callable[[runner.Task], Any], task: runner.Task) -> "Future[Any]":
        Here.taken.append(task)
        future: Future[Any] = Future()
        try:
            future.set_result(work(task))
        except RuntimeError as error:
            future.set_exception(error)
        return future

    def shutdown(self, *, cancel_futures: bool) -> None:
        assert cancel_futures
        Here.closed = True


class TwoPartsError(ValueError):
    """As a plugin may raise: it pickles, and then cannot be made from its one argument."""

    def __init__(self, name: str, value: int) -> None:
        super().__init__(f"{name} is {value}")


class Told:
    def __init__(self) -> None:
        self.total, self.done = 0, list[str]()

    def start(self, total: int, *, left_out: int = 0) -> None:
        self.total = total

    def advance(self, label: str) -> None:
        self.done.append(label)

    def note(self, text: str) -> None: ...


def test_two_processes_find_what_one_does_and_go_on_where_they_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = Told()
    alone = run(TABLE, out=tmp_path / "a", overrides=["jobs=1"])
    beside = run(TABLE, out=tmp_path / "b", progress=told)
    assert [card.key for card in beside] == [card.key for card in alone]
    assert [card.scores for card in beside] == [card.scores for card in alone]
    assert [card.utility for card in beside] == [card.utility for card in alone]
    assert told.total == len(told.done) == len(set(told.done)) == 6

    lost = beside[2]
    (tmp_path / "b" / "cards" / f"{lost.key}.json").unlink()
    monkeypatch.setattr(runner, "ProcessPoolExecutor", Here)
    again = run(TABLE, out=tmp_path / "b", overrides=["keep_runs=false"])
    assert [len(task.done) for task in Here.taken] == [1], "one task lacks one of its two cards"
    assert [card for card in again if card.key != lost.key] == beside[:2] + beside[3:]
    assert again[2].scores == lost.scores
    assert list((tmp_path / "b" / "runs").iterdir()) == []
    monkeypatch.setattr(runner, "ProcessPoolExecutor", pytest.fail)
    assert run(TABLE, out=tmp_path / "b") == again, "nothing is left to share"


@pytest.mark.parametrize(
    ("raised", "seen", "match"),
    [
        (NodeFailed(0, "train", "disk full"), NodeFailed, "disk full"),
        (FlowerMovedError("it"), FlowerMovedError, "^it is not what it was"),
        (TwoPartsError("rows", 3), runner.JobError, "TwoPartsError: rows is 3"),
        (
            BrokenProcessPool(),
            runner.JobGoneError,
            "one of 2 processes ended before.*-o jobs=1",
        ),
    ],
)
def test_an_error_of_a_process_ends_the_run(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    raised: Exception,
    seen: type[Exception],
    match: str,
) -> None:
    def fail(_: runner.Task) -> None:
        raise raised

    monkeypatch.setattr(runner, "ProcessPoolExecutor", Here)
    monkeypatch.setattr(runner, "cards_of", fail)
    with pytest.raises(seen, match=match):
        run(TABLE, out=tmp_path)
    assert Here.closed
    assert len(Here.taken) == 2, "the third of three was never begun"


def test_a_lent_grid_is_not_shared_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "ProcessPoolExecutor", pytest.fail)
    lent = grids_of(load_settings(TABLE, []))
    assert len(run(TABLE, out=tmp_path, grids=lent, overrides=["sweep={}"])) == 2
