from threading import Event, Lock
from time import monotonic
from typing import Any

import pytest
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from leakbed.grids import LocalGrid
from leakbed.grids.base import exchanged, wait_for
from leakbed.grids.deterministic import DeterministicGrid

pytestmark = pytest.mark.usefixtures("identity")


class Slow(LocalGrid):
    """One reply a look, from the third look on."""

    def __init__(self, *, first: float = 3) -> None:
        app = ClientApp()

        @app.query()
        def answer(message: Message, context: Context) -> Message:
            return Message(RecordDict(), reply_to=message)

        super().__init__(app, nodes=3)
        self.looks: list[list[str]] = []
        self._first = first
        self._one_at_a_time = Lock()  # as a network's grid may be pulled by several threads

    def pull_messages(self, message_ids: Any) -> Any:
        self.looks.append(list(message_ids))
        due = len(self.looks) >= self._first
        with self._one_at_a_time:
            return super().pull_messages(self.looks[-1][:1]) if due else []

    def send_and_receive(self, messages: Any, *, timeout: float | None = None) -> Any:
        raise AssertionError("Flower's own wait was used")


class Flowers(Slow):
    """A grid that comes from Flower, as far as one can see."""


Flowers.__module__ = "flwr.server.grid"


def messages() -> list[Message]:
    return [Message(RecordDict(), dst_node_id=n, message_type="query") for n in (1, 2, 3)]


def test_every_reply_is_waited_for_and_pulled_once() -> None:
    grid = Slow()
    ids = list(grid.push_messages(messages()))
    replies = wait_for(grid, ids, timeout=None)
    assert sorted(r.metadata.reply_to_message_id for r in replies) == sorted(ids)
    assert [len(look) for look in grid.looks] == [3, 3, 3, 2, 1]


def test_what_has_come_when_time_is_up_is_returned() -> None:
    grid = Slow(first=float("inf"))
    ids = list(grid.push_messages(messages()))
    started = monotonic()
    assert wait_for(grid, ids, timeout=0.1) == []
    assert 0.1 <= monotonic() - started < 2
    grid = Slow(first=1)
    ids = list(grid.push_messages(messages()))
    assert len(wait_for(grid, ids, timeout=0.0)) == 1  # one look even without any time


def test_flowers_grids_are_pulled_and_ours_wait_themselves() -> None:
    assert len(exchanged(Flowers(), messages(), timeout=10.0)) == 3
    with pytest.raises(AssertionError, match="Flower's own wait was used"):
        exchanged(Slow(), messages(), timeout=10.0)


def test_a_message_that_could_not_be_sent_has_no_reply() -> None:
    class Lossy(Flowers):
        def push_messages(self, messages: Any) -> Any:
            ids = list(super().push_messages(messages))
            return [ids[0], None, ids[2]]

    Lossy.__module__ = "flwr.server.grid"
    assert len(exchanged(Lossy(), messages(), timeout=10.0)) == 2


class Announcing(Flowers):
    """Flower's grid where node 2 announces a reply and does not upload it until it is let go."""

    def __init__(self) -> None:
        super().__init__(first=1)
        self.uploaded = Event()
        self.announced = ""

    def push_messages(self, messages: Any) -> Any:
        ids = list(super().push_messages(messages))
        self.announced = ids[1]
        return ids

    def pull_messages(self, message_ids: Any) -> Any:
        ids = list(message_ids)
        if self.announced in ids:
            assert self.uploaded.wait(60)
        return super().pull_messages(ids)


Announcing.__module__ = "flwr.server.grid"


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_reply_that_is_announced_and_never_uploaded_holds_nobody(
    monkeypatch: pytest.MonkeyPatch, wrapped: bool
) -> None:
    monkeypatch.setattr("leakbed.grids.base._LOOK", 0.1)
    grid = Announcing()
    ids = list(grid.push_messages(messages()))
    started = monotonic()
    try:
        asked = DeterministicGrid(grid, stream=1, roster=grid.roster) if wrapped else grid
        replies = wait_for(asked, ids, timeout=0.5)
        assert monotonic() - started < 10
        assert {r.metadata.reply_to_message_id for r in replies} == {ids[0], ids[2]}
    finally:
        grid.uploaded.set()
    (late,) = wait_for(grid, ids[1:2], timeout=60)
    assert late.metadata.reply_to_message_id == ids[1]


def test_an_error_of_a_pull_is_raised_by_who_waits() -> None:
    class Down(Flowers):
        def pull_messages(self, message_ids: Any) -> Any:
            raise ConnectionError("the link is down")

    Down.__module__ = "flwr.server.grid"
    with pytest.raises(ConnectionError, match="the link is down"):
        exchanged(Down(), messages(), timeout=10.0)
