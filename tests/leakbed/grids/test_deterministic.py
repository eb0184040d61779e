import random
from collections.abc import Iterable

import pytest
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy.strategy_utils import sample_nodes

from leakbed.grids import DeterministicGrid, LocalGrid, NodeFailed, RosterError, ask_roster
from leakbed.tap.wiretap import GridWrapper
from tests.support import strange_nodes
from tests.support.strange_nodes import message, said

pytestmark = pytest.mark.usefixtures("identity")

NODES = 8


class Shuffled(GridWrapper):
    """A grid as Flower's: nodes in no order, with other ids every time, replies as they come."""

    def __init__(self, grid: Grid, *, seed: int, lose: frozenset[int] = frozenset()) -> None:
        super().__init__(grid)
        self._chance = random.Random(seed)
        self._lose = lose

    def get_node_ids(self) -> Iterable[int]:
        ids = list(super().get_node_ids())
        self._chance.shuffle(ids)
        return ids

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        return self._mixed(super().send_and_receive(messages, timeout=timeout))

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return self._mixed(super().pull_messages(message_ids))

    def _mixed(self, replies: Iterable[Message]) -> list[Message]:
        kept = [reply for reply in replies if reply.metadata.src_node_id not in self._lose]
        self._chance.shuffle(kept)
        return kept


def shuffled(seed: int, lose: frozenset[int] = frozenset()) -> Grid:
    return Shuffled(LocalGrid(strange_nodes.app, nodes=NODES), seed=seed, lose=lose)


@pytest.mark.parametrize("seed", range(3))
def test_nodes_and_replies_come_by_partition_then_as_sent(seed: int) -> None:
    grid = DeterministicGrid(shuffled(seed), stream=1)
    assert list(grid.roster.values()) == list(range(NODES))
    assert [grid.roster[node] for node in grid.get_node_ids()] == list(range(NODES))
    sent = [message(node, "count") for node in (5, 2, 2, 8, 2)]
    replies = [said(reply) for reply in grid.send_and_receive(sent)]
    assert [reply["node"] for reply in replies] == [2, 2, 2, 5, 8]
    assert [reply["calls"] for reply in replies] == [1, 2, 3, 1, 1]
    ids = grid.push_messages([message(node, "count") for node in (7, 3, 6)])
    assert [said(reply)["node"] for reply in grid.pull_messages(ids)] == [3, 6, 7]


def draws(seed: int, stream: int, *, polls: int = 1) -> list[list[int]]:
    random.seed(seed)
    grid = DeterministicGrid(shuffled(seed), stream=stream)
    found = []
    for _ in range(3):
        for _ in range(polls):
            grid.get_node_ids()
        found.append(sample_nodes(grid, 4, 4)[0])
        grid.send_and_receive([message(1, "count")])
    return found


def test_flowers_draw_depends_on_the_stream_and_the_exchanges_alone() -> None:
    expected = draws(0, 1)
    assert draws(1, 1) == expected
    assert draws(2, 1, polls=7) == expected  # Flower polls while nodes connect
    assert draws(0, 2) != expected
    assert expected[0] != expected[1] != expected[2]


def test_a_missing_reply_names_the_node_and_the_message() -> None:
    grid = DeterministicGrid(
        shuffled(0, frozenset({6})), stream=1, roster={n + 1: n for n in range(NODES)}
    )
    with pytest.raises(NodeFailed, match=r"node 5 failed on 'query.count': no reply within 9 s"):
        grid.send_and_receive([message(2, "count"), message(6, "count")], timeout=9)


def test_a_roster_that_is_given_is_not_asked_for() -> None:
    roster = {4: 1, 9: 0}
    grid = DeterministicGrid(LocalGrid(strange_nodes.app, nodes=1), stream=1, roster=roster)
    assert list(grid.get_node_ids()) == [9, 4]


class Arriving(GridWrapper):
    """Flower's ServerApp starts before its nodes have connected; one more comes with each look."""

    def __init__(self) -> None:
        super().__init__(LocalGrid(strange_nodes.app, nodes=3))
        self._looks = 0

    def get_node_ids(self) -> Iterable[int]:
        self._looks += 1
        return list(super().get_node_ids())[: self._looks - 1]


def test_the_roster_waits_until_all_nodes_have_connected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("leakbed.grids.deterministic._POLL", 0.01)
    assert DeterministicGrid(Arriving(), stream=1, nodes=3).roster == {1: 0, 2: 1, 3: 2}
    assert (
        len(DeterministicGrid(Arriving(), stream=1).roster) == 3
    )  # nor is one who comes a little later lost


def test_nodes_that_never_connect_are_not_awaited_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("leakbed.grids.deterministic._POLL", 0.01)
    monkeypatch.setattr("leakbed.grids.deterministic._PATIENCE", 0.2)
    assert len(ask_roster(Arriving(), nodes=4)) == 3
    monkeypatch.setattr(Arriving, "get_node_ids", lambda _: [])
    with pytest.raises(RosterError, match=r"no node connected within 0\.2 s"):
        ask_roster(Arriving())


def test_silent_nodes_leave_the_roster_incomplete() -> None:
    with pytest.raises(RosterError, match=f"only {NODES - 2} of {NODES} nodes said"):
        ask_roster(shuffled(0, frozenset({1, 2})))


class Lying(GridWrapper):
    """Nodes that claim whatever partition they are told to claim."""

    def __init__(self, claim: object) -> None:
        super().__init__(LocalGrid(strange_nodes.app, nodes=2))
        self._claim = claim

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        replies = super().send_and_receive(messages, timeout=timeout)
        for reply in replies:
            claim: ConfigRecord = ConfigRecord({"partition": self._claim})  # type: ignore[dict-item]
            reply.content = RecordDict({"roster": claim})
        return replies


@pytest.mark.parametrize(
    ("claim", "complaint"),
    [
        (3, r"several nodes claim one partition: \[3, 3\]"),
        ("x", "partition 'x', not a number from 0; every node must run"),
        (-1, "partition -1, not a number from 0"),
        (True, "partition True, not a number from 0"),
    ],
)
def test_nodes_that_cannot_be_told_apart_are_refused(claim: object, complaint: str) -> None:
    with pytest.raises(RosterError, match=complaint):
        ask_roster(Lying(claim))


def test_a_node_that_fails_at_the_roster_is_named() -> None:
    from flwr.clientapp import ClientApp  # noqa: PLC0415

    with pytest.raises(NodeFailed, match=r"node 1 failed on 'query.roster'"):
        ask_roster(LocalGrid(ClientApp(), nodes=1))


@pytest.mark.parametrize(
    "records",
    [
        RecordDict(),
        RecordDict({"roster": MetricRecord({"partition": 0})}),
        RecordDict({"roster": ConfigRecord({"party": 0})}),
    ],
)
def test_a_reply_that_names_no_partition_is_refused(records: RecordDict) -> None:
    class Odd(GridWrapper):
        def send_and_receive(
            self, messages: Iterable[Message], *, timeout: float | None = None
        ) -> Iterable[Message]:
            return [Message(records, reply_to=sent) for sent in messages]

    with pytest.raises(RosterError, match="a node says it is partition None, not a number"):
        ask_roster(Odd(LocalGrid(strange_nodes.app, nodes=2)))
