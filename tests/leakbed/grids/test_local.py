import threading
import time

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict

from leakbed.flower_internals import NODE_UNAVAILABLE
from leakbed.grids import LocalGrid
from leakbed.grids.local import overran
from tests.support import strange_nodes
from tests.support.strange_nodes import message, said
from tests.support.waiting import timer_free, timer_in_use, until

pytestmark = pytest.mark.usefixtures("identity")


def shared_messages(nodes: int) -> tuple[RecordDict, list[Message]]:
    """One RecordDict in every message, as FedAvg does it."""
    arrays = ArrayRecord({"x": Array(np.arange(3.0))})
    records = RecordDict({"arrays": arrays, "config": ConfigRecord({"value": 1})})
    return records, [message(node + 1, "change", records) for node in range(nodes)]


@pytest.mark.parametrize("timeout", [None, 60.0])
def test_replies_come_in_the_order_of_the_messages(timeout: float | None) -> None:
    grid = LocalGrid(strange_nodes.app, nodes=3)
    sent = [message(node, "count") for node in (3, 1, 2, 1)]
    replies = list(grid.send_and_receive(sent, timeout=timeout))
    assert [said(reply)["node"] for reply in replies] == [3, 1, 2, 1]
    assert [said(reply)["calls"] for reply in replies] == [1, 1, 1, 2]
    assert [r.metadata.reply_to_message_id for r in replies] == [
        m.metadata.message_id for m in sent
    ]


def test_each_node_gets_its_own_copy_of_a_shared_record() -> None:
    records, sent = shared_messages(3)
    replies = list(LocalGrid(strange_nodes.app, nodes=3).send_and_receive(sent))
    assert [said(reply) for reply in replies] == [{"before": 1, "size": 1}] * 3
    assert records.config_records["config"]["value"] == 1
    assert list(records.array_records["arrays"]) == ["x"]


def test_push_and_pull_give_each_reply_once() -> None:
    grid = LocalGrid(strange_nodes.app, nodes=2)
    first, second = grid.push_messages([message(1, "count"), message(2, "count")])
    assert [said(r)["node"] for r in grid.pull_messages([second])] == [2]
    assert [said(r)["node"] for r in grid.pull_messages([first, second])] == [1]
    assert list(grid.pull_messages([first, "unknown"])) == []


def test_pushed_messages_run_at_the_pull_in_the_order_they_were_pushed() -> None:
    grid = LocalGrid(strange_nodes.app, nodes=3)
    ids = list(grid.push_messages([message(node, "thread") for node in (3, 1, 2)]))
    assert not grid._host._contexts
    replies = list(grid.pull_messages([ids[2], ids[0]]))
    assert [said(reply)["node"] for reply in replies] == [3, 2]
    assert list(grid._host._contexts) == [3, 2]
    assert {said(reply)["thread"] for reply in replies} == {threading.current_thread().name}
    assert [said(reply)["node"] for reply in grid.pull_messages(ids)] == [1]


def test_a_pushed_message_whose_time_passes_is_an_error_and_not_awaited() -> None:
    grid = LocalGrid(strange_nodes.app, nodes=3)
    hangs, waits = message(1, "hang"), message(2, "count")
    for each in (hangs, waits):
        each.metadata.ttl = 0.1
    ids = list(grid.push_messages([hangs, waits]))
    strange_nodes.release.clear()
    try:
        with timer_in_use():  # else the first is stopped, and the second answers
            replies = list(grid.pull_messages(ids))
    finally:
        strange_nodes.release.set()
    until(lambda: overran() is None)
    assert [reply.error.code for reply in replies] == [NODE_UNAVAILABLE] * 2
    assert replies[0].error.reason == "no reply within 0.1 s"
    assert [r.metadata.src_node_id for r in replies] == [1, 2]
    assert list(grid.pull_messages(ids)) == []


def test_waiting_for_its_turn_costs_a_node_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    grid = LocalGrid(strange_nodes.app, nodes=2)
    sent = [message(node, "thread") for node in (1, 2)]
    for each in sent:
        each.metadata.ttl = 60.0
    ids = list(grid.push_messages(sent))
    # The server is busy meanwhile.
    monkeypatch.setattr("leakbed.grids.local.monotonic", lambda: time.monotonic() + 90.0)
    assert [reply.has_error() for reply in grid.pull_messages(ids)] == [False, False]


def test_a_message_with_time_left_is_answered() -> None:
    grid = LocalGrid(strange_nodes.app, nodes=3)
    sent = message(1, "thread")
    sent.metadata.ttl = 60.0
    with timer_free():
        (reply,) = grid.pull_messages(grid.push_messages([sent]))
    assert said(reply)["thread"] == threading.current_thread().name  # the timer would stop it
    with timer_in_use():
        (reply,) = grid.pull_messages(grid.push_messages([sent]))
    assert said(reply)["thread"] != threading.current_thread().name  # which could not be left


def test_an_unknown_node_is_an_error_reply() -> None:
    (reply,) = LocalGrid(strange_nodes.app, nodes=2).send_and_receive([message(9, "count")])
    assert reply.error.code == NODE_UNAVAILABLE
    assert reply.error.reason == "no such node; this grid has nodes 1 to 2"


def test_it_has_nodes_and_no_flower_run() -> None:
    grid = LocalGrid(strange_nodes.app, nodes=3)
    assert list(grid.get_node_ids()) == [1, 2, 3]
    assert grid.roster == {1: 0, 2: 1, 3: 2}
    grid.set_run(None)
    with pytest.raises(AttributeError, match="LocalGrid has no Flower run"):
        _ = grid.run
    created = grid.create_message(RecordDict(), 1, "query.count")
    assert created.metadata.dst_node_id == 1


def test_a_grid_without_nodes_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one node, got nodes=0"):
        LocalGrid(strange_nodes.app, nodes=0)
