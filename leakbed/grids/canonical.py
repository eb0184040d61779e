"""Canonical: the same bits on every grid.

Flower's node ids are random, its sampling uses the global ``random``, and replies come as they
arrive, so that a sum of three replies has other bits in every run. This wrapper asks once which
partition each node is, sorts nodes and replies by it, and seeds Flower's draw from a stream of its
own. It also turns an error reply, or a reply that never came, into :class:`NodeFailed`.
"""

import random
from collections.abc import Iterable, Mapping
from time import monotonic, sleep

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from leakbed.grid_wrapper import GridWrapper
from leakbed.grids.failures import NodeFailed
from leakbed.grids.resident import ResidentGrid
from leakbed.grids.waiting import exchanged
from leakbed.seeds import derive
from leakbed.wire.messages import ROSTER

_PATIENCE = 60.0  # seconds for nodes to connect; a deployment's take about 10 on one machine
_POLL = 0.1  # seconds; Flower's grids tell of no arrival, so that there is nothing to wait on


class RosterError(RuntimeError):
    """The nodes of a grid do not tell apart, or do not answer."""


class Canonical(GridWrapper):
    """A grid in canonical order; for our own runner, never for a stranger's app.

    Attributes:
        roster: Partition id by Flower node id, in partition order.
    """

    def __init__(
        self,
        grid: Grid,
        *,
        stream: int,
        roster: Mapping[int, int] | None = None,
        nodes: int = 1,
        timeout: float | None = None,
    ) -> None:
        """Wrap a grid.

        Args:
            grid: Any Flower grid.
            stream: Where Flower's node sampling draws from.
            roster: Partition id by node id; asked of the nodes if None.
            nodes: How many nodes to wait for before they are asked.
            timeout: Seconds to wait for the roster.
        """
        super().__init__(grid)
        self._stream = stream
        self._exchanges = 0
        asked = ask_roster(grid, nodes=nodes, timeout=timeout) if roster is None else roster
        self.roster = dict(sorted(asked.items(), key=lambda item: item[1]))

    def get_node_ids(self) -> Iterable[int]:
        """Return the nodes by partition, and seed the draw Flower makes of them.

        Flower samples with the global ``random`` right after this call. The seed depends on the
        exchanges so far and not on how often Flower polls while nodes connect.
        """
        random.seed(derive(self._stream, f"sample/{self._exchanges}"))
        return list(self.roster)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Push messages through the wrapped grid."""
        self._exchanges += 1
        return self._grid.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Pull replies through the wrapped grid, in canonical order; errors stay in them."""
        return self._sorted(self._grid.pull_messages(message_ids), {})

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Exchange messages and insist on every reply.

        Args:
            messages: From the strategy.
            timeout: Seconds to wait, as the wrapped grid understands it.

        Returns:
            One reply per message, by partition, then in the order they were sent.

        Raises:
            NodeFailed: On the first error reply or missing reply, by partition.
        """
        sent = list(messages)
        self._exchanges += 1
        replies = exchanged(self._grid, sent, timeout=timeout)
        order = {message.metadata.message_id: place for place, message in enumerate(sent)}
        replies = self._sorted(replies, order)
        for reply in replies:
            if reply.has_error():
                node, kind = self._node(reply.metadata.src_node_id), reply.metadata.message_type
                raise NodeFailed(node, kind, reply.error.reason or "no reason given")
        answered = {reply.metadata.reply_to_message_id for reply in replies}
        for message in sent:
            if message.metadata.message_id not in answered:
                node = self._node(message.metadata.dst_node_id)
                raise NodeFailed(
                    node, message.metadata.message_type, f"no reply within {timeout} s"
                )
        return replies

    def _sorted(self, replies: Iterable[Message], order: Mapping[str, int]) -> list[Message]:
        def place(reply: Message) -> tuple[int, int]:
            about = reply.metadata
            return self._node(about.src_node_id), order.get(about.reply_to_message_id, 0)

        return sorted(replies, key=place)

    def _node(self, flower_id: int) -> int:
        return self.roster.get(flower_id, flower_id)


def ask_roster(grid: Grid, *, nodes: int = 1, timeout: float | None = None) -> dict[int, int]:
    """Ask every node of a grid which partition it is.

    Args:
        grid: Nodes must run a ClientApp that answers ``query.roster``.
        nodes: How many nodes to wait for: Flower starts a ServerApp before its nodes connect.
        timeout: Seconds to wait for the answers.

    Returns:
        Partition id by node id.

    Raises:
        NodeFailed: If a node answers with an error.
        RosterError: If no node connects, nodes are silent, two claim the same partition, or one
            claims none.
    """
    ids = _connected(grid, nodes)
    if not ids:
        raise RosterError(f"no node connected within {_PATIENCE} s")
    messages = [Message(RecordDict(), dst_node_id=i, message_type=ROSTER) for i in ids]
    roster: dict[int, int] = {}
    for reply in exchanged(grid, messages, timeout=timeout):
        if reply.has_error():
            raise NodeFailed(reply.metadata.src_node_id, ROSTER, reply.error.reason or "no reason")
        partition = reply.content.config_records["roster"]["partition"]
        if not isinstance(partition, int):
            raise RosterError(f"a node says it is partition {partition!r}, not a number")
        roster[reply.metadata.src_node_id] = partition
    if len(roster) < len(ids):
        raise RosterError(f"only {len(roster)} of {len(ids)} nodes said which partition they are")
    if len(set(roster.values())) < len(roster):
        raise RosterError(f"several nodes claim one partition: {sorted(roster.values())}")
    return roster


def _connected(grid: Grid, nodes: int) -> list[int]:
    """Return the nodes once there are enough and nobody has just joined, or those there are."""
    ids = list(grid.get_node_ids())
    if isinstance(grid, ResidentGrid):
        return ids  # all of them are there from the start
    deadline, before = monotonic() + _PATIENCE, -1
    while (len(ids) < nodes or len(ids) != before) and monotonic() < deadline:
        sleep(_POLL)
        before, ids = len(ids), list(grid.get_node_ids())
    return ids
