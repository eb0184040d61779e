"""DeterministicGrid: the same bits on every grid.

Flower's node ids are random, its sampling uses the global ``random``, and replies come as they
arrive, so that a sum of three replies has other bits in every run. This wrapper asks once which
partition each node is, sorts nodes and replies by it, and seeds Flower's draw from a stream of its
own. It also turns an error reply, or a reply that never came, into :class:`NodeFailed`.
"""

import random
from collections.abc import Iterable, Mapping
from functools import partial
from time import monotonic, sleep

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from leakbed.grids.base import NodeFailed, ResidentGrid, exchanged, pulled, refused
from leakbed.seeds import derive
from leakbed.tap.wiretap import GridWrapper
from leakbed.wire.bounds import Bounds
from leakbed.wire.calls import Call, Wait, offers_calls, typed_call
from leakbed.wire.fields import Carried
from leakbed.wire.messages import ROSTER
from leakbed.wire.records import WireError

_PATIENCE = 60.0  # seconds for nodes to connect; a deployment's take about 10 on one machine
_POLL = 0.1  # seconds; Flower's grids tell of no arrival, so that there is nothing to wait on


class RosterError(RuntimeError):
    """The nodes of a grid do not tell apart, or do not answer."""


@offers_calls
class DeterministicGrid(GridWrapper):
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
        self._bounds = Bounds()
        self._sent: dict[str, Message] = {}
        asked = ask_roster(grid, nodes=nodes, timeout=timeout) if roster is None else roster
        self.roster = dict(sorted(asked.items(), key=lambda item: item[1]))

    def get_node_ids(self) -> Iterable[int]:
        """Return the nodes by partition, and seed the draw Flower makes of them.

        Flower samples with the global ``random`` right after this call. The seed depends on the
        exchanges so far and not on how often Flower polls while nodes connect.
        """
        random.seed(derive(self._stream, f"sample/{self._exchanges}"))
        return list(self.roster)

    def bound_by(self, bounds: Bounds) -> None:
        """Refuse from now on what a plan does not allow, here and in the wrapped grid."""
        self._bounds = bounds
        super().bound_by(bounds)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Push messages through the wrapped grid."""
        self._exchanges += 1
        sent = list(messages)
        ids = list(self._grid.push_messages(sent))
        self._sent |= {message.metadata.message_id: message for message in sent}
        return ids

    def typed(self, kind: str) -> Call | None:
        """Return the wrapped grid's way of handing requests over; it refuses what no plan allows.

        Args:
            kind: Type of the message a request would travel in.

        Returns:
            None where the wrapped grid has none.
        """
        call = typed_call(self._grid, kind)
        return None if call is None else partial(self._called, call)

    def _called(self, call: Call, node: int, request: Carried, timeout: float | None) -> Wait:
        self._exchanges += 1
        return call(node, request, timeout)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Pull replies through the wrapped grid, in canonical order; errors stay in them.

        A reply that the plan does not allow becomes an error before anyone reads it.
        """
        replies = self._sorted(pulled(self._grid, message_ids), {})
        return [self._allowed(reply, self._sent) for reply in replies]

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
            NodeFailed: On the first error reply, missing reply, or reply that the plan does not
                allow, by partition.
        """
        sent = list(messages)
        self._exchanges += 1
        replies = exchanged(self._grid, sent, timeout=timeout)
        order = {message.metadata.message_id: place for place, message in enumerate(sent)}
        asked = {message.metadata.message_id: message for message in sent}
        replies = [self._allowed(reply, asked) for reply in self._sorted(replies, order)]
        for reply in replies:
            if reply.has_error():
                node, kind = self._node(reply.metadata.src_node_id), reply.metadata.message_type
                raise NodeFailed(node, kind, reply.error.reason)
        answered = {reply.metadata.reply_to_message_id for reply in replies}
        for message in sent:
            if message.metadata.message_id not in answered:
                node = self._node(message.metadata.dst_node_id)
                raise NodeFailed(
                    node, message.metadata.message_type, f"no reply within {timeout} s"
                )
        return replies

    def _allowed(self, reply: Message, sent: dict[str, Message]) -> Message:
        """Return a reply, or an error in place of one that the plan does not allow."""
        asked = sent.pop(reply.metadata.reply_to_message_id, None)
        if asked is None:
            return reply
        try:
            self._bounds.refuse(asked, reply)
        except WireError as error:
            return refused(asked, error)
        return reply

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
            raise NodeFailed(reply.metadata.src_node_id, ROSTER, reply.error.reason)
        roster[reply.metadata.src_node_id] = _claimed(reply)
    if len(roster) < len(ids):
        raise RosterError(f"only {len(roster)} of {len(ids)} nodes said which partition they are")
    if len(set(roster.values())) < len(roster):
        raise RosterError(f"several nodes claim one partition: {sorted(roster.values())}")
    return roster


def _claimed(reply: Message) -> int:
    """Return which partition a node says it is; the reply may be anything."""
    record = reply.content.get("roster") if reply.has_content() else None
    partition = record.get("partition") if isinstance(record, ConfigRecord) else None
    if isinstance(partition, bool) or not isinstance(partition, int) or partition < 0:
        raise RosterError(
            f"a node says it is partition {partition!r}, not a number from 0; every node must run "
            "a ClientApp that answers query.roster, such as clients:node_app"
        )
    return partition


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
