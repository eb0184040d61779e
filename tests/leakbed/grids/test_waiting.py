from collections.abc import Iterator
from time import monotonic
from typing import Any

import pytest
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from leakbed.grids import LocalGrid
from leakbed.grids.waiting import exchanged, wait_for
from tests import tiny


@pytest.fixture(autouse=True)
def identity() -> Iterator[None]:
    with tiny.identity():
        yield


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

    def pull_messages(self, message_ids: Any) -> Any:
        self.looks.append(list(message_ids))
        due = len(self.looks) >= self._first
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
