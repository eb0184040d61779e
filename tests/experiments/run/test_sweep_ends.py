"""Training runs that are shared out end where cards cannot be kept, and no wait is without end."""

from pathlib import Path
from typing import Any

import pytest
import ray

from experiments.results.cards import Card
from experiments.run import sweep
from experiments.run.attack import Cell
from experiments.run.executor import empty_card
from tests.experiments.run.test_sweep import a_sweep


class NoRay:
    """In Ray's place: of each task a card is there as soon as anybody asks, if any ever is."""

    exceptions = ray.exceptions

    def __init__(self, card: Card) -> None:
        self.card, self.waits, self.silent = card, 0, False
        self.begun: list[Cards] = []
        self.cancelled: set[Cards] = set()

    def remote(self, *given: Any) -> "NoRay | Cards":
        return self if callable(given[0]) else self.begin()

    def options(self, **_: Any) -> "NoRay":
        return self

    def begin(self) -> "Cards":
        self.begun.append(Cards(self.card))
        return self.begun[-1]

    def wait(self, refs: list[Any], **_: Any) -> tuple[list[Any], list[Any]]:
        self.waits += 1
        if self.waits > 20:
            pytest.fail("it waits without end")
        return ([], refs) if self.silent and self.waits > 1 else (refs[:1], refs[1:])

    def get(self, ref: Any) -> Any:
        return ref

    def cancel(self, task: "Cards", *, force: bool = False) -> None:
        self.cancelled.add(task)


class Cards:
    """What a task hands over: the same card, again and again."""

    def __init__(self, card: Card) -> None:
        self.card = card

    def __next__(self) -> sweep.Finished:
        return sweep.Finished(self.card, {})

    def completed(self) -> "Cards":
        return self


@pytest.fixture
def no_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> NoRay:
    _, task = a_sweep(tmp_path)
    ((key, cell), *_) = task.cells.items()
    made = NoRay(empty_card(Cell.of(cell), key, status="failed", why="as asked"))
    monkeypatch.setattr(sweep, "ray", made)
    monkeypatch.setattr(sweep, "room", lambda share: (0 if made.waits > 1 else 2, {}))
    monkeypatch.setattr(sweep, "refuse_crowd", lambda *_, **__: None)
    monkeypatch.setattr(sweep, "_NO_ROOM_SECONDS", 0.0)
    return made


@pytest.mark.parametrize("first", [OSError("disk full"), KeyboardInterrupt()])
def test_a_card_that_cannot_be_kept_ends_the_run(
    tmp_path: Path, no_ray: NoRay, first: BaseException
) -> None:
    asked: list[Card] = []

    def keep(card: Card) -> None:
        asked.append(card)
        if len(asked) > 20:
            pytest.fail("it is tried without end")
        raise first if len(asked) == 1 else OSError("disk full")

    made, task = a_sweep(tmp_path, "device=cpu")
    scheduler = sweep._Scheduler(made, {0: task, 1: task}, keep=keep, tidy=lambda _: None)
    with pytest.raises(type(first)):
        scheduler.run()
    assert len(no_ray.begun) == 2
    assert no_ray.cancelled == set(no_ray.begun), "no task goes on whose cards cannot be kept"


def test_after_an_error_a_cluster_without_room_is_not_waited_for(
    tmp_path: Path, no_ray: NoRay, caplog: pytest.LogCaptureFixture
) -> None:
    def keep(card: Card) -> None:
        raise OSError("disk full")

    no_ray.silent = True
    made, task = a_sweep(tmp_path, "device=cpu")
    scheduler = sweep._Scheduler(made, {0: task, 1: task}, keep=keep, tidy=lambda _: None)
    with pytest.raises(OSError, match="disk full"):
        scheduler.run()
    assert "ends after 1 runs that Ray was given, or by Ctrl-C" in caplog.text
    assert no_ray.cancelled == set(no_ray.begun)
