"""Post: send a message now, wait for its reply later, and insist that it comes.

Pushing and pulling lets nodes work while the server does: of K nodes, one's next batch is on its
way before the next one's reply is read. Replies are taken in the order the server asks for them,
never as they arrive, so the result is the same on every grid.
"""

from collections.abc import Callable, Mapping, Sequence
from time import monotonic
from typing import Any

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from leakbed.grids.failures import NodeFailed
from leakbed.grids.waiting import wait_for
from leakbed.wire.alarms import Alarms, alarms_of, stop_of
from leakbed.wire.records import WireError

_LATE = "raise protocol.timeout if its steps take longer"


class NodeStopped(NodeFailed):
    """A node's detector took the server for a hijacker, and the node trains no further.

    Attributes:
        by: The detector.
        alarms: What all the node's detectors found.
    """

    def __init__(self, node: int, message_type: str, by: str, alarms: Alarms) -> None:
        """Say who stopped, and why.

        Args:
            node: Partition id.
            message_type: Of the message it answered so.
            by: The detector.
            alarms: What all the node's detectors found.
        """
        cause = f"{by} takes the server for a hijacker; the node trains no further"
        super().__init__(node, message_type, cause)
        self.by, self.alarms = by, alarms

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.node, self.message_type, self.by, self.alarms)


class Post:
    """One round's messages to its nodes, at most one unanswered each."""

    def __init__(self, grid: Grid, *, timeout: float | None) -> None:
        """Open for a round.

        Args:
            grid: Where the nodes are.
            timeout: Seconds to wait for each reply; None to wait as long as Flower does.
        """
        self._grid, self._timeout = grid, timeout
        self._sent: dict[int, tuple[Message, float]] = {}

    def send(self, node: int, kind: str, records: RecordDict) -> None:
        """Send a message.

        Args:
            node: Flower's node id.
            kind: The message's type.
            records: What it carries.

        Raises:
            NodeFailed: If the grid does not take it.
        """
        message = Message(records, dst_node_id=node, message_type=kind, ttl=self._timeout)
        if not all(self._grid.push_messages([message])):
            raise NodeFailed(self.partition(node), kind, "the message could not be sent")
        self._sent[node] = message, monotonic()

    def receive(self, node: int) -> Message:
        """Wait for the answer to the last message sent to a node.

        Args:
            node: Flower's node id.

        Returns:
            The reply.

        Raises:
            NodeFailed: If there is no answer in time, an error, or more than one answer; as
                :class:`NodeStopped` where the node answers that it trains no further.
        """
        message, sent = self._sent.pop(node)
        kind = message.metadata.message_type
        replies = wait_for(self._grid, [message.metadata.message_id], timeout=self._timeout)
        try:
            (reply,) = checked(replies, [message])
        except NodeFailed as error:
            # Where a message's time to live is over first, its grid answers with an error.
            late = self._timeout is not None and monotonic() - sent >= self._timeout
            cause = f"no reply within {self._timeout} s; {_LATE}" if late else error.cause
            raise NodeFailed(self.partition(node), kind, cause) from error
        refuse_stopped(reply, self.partition(node))
        return reply

    def exchange(self, message: Message) -> Message:
        """Send a finished message and wait for its reply, as :meth:`receive` does.

        Args:
            message: To a node that owes no reply.

        Returns:
            The reply.
        """
        about = message.metadata
        self.send(about.dst_node_id, about.message_type, message.content)
        return self.receive(about.dst_node_id)

    def failure(self, node: int, kind: str, cause: str) -> NodeFailed:
        """Return the error that says which partition failed.

        Args:
            node: Flower's node id.
            kind: The message's type.
            cause: What went wrong.

        Returns:
            To be raised.
        """
        return NodeFailed(self.partition(node), kind, cause)

    def partition(self, node: int) -> int:
        """Return which partition a Flower node id is, as :func:`partition` does."""
        return partition(self._grid, node)


def partition(grid: Grid, node: int) -> int:
    """Return which partition a Flower node id is, where the grid knows, else the id itself."""
    roster: Mapping[int, int] = getattr(grid, "roster", {})
    return roster.get(node, node)


def refuse_stopped(reply: Message, node: int) -> None:
    """Refuse a reply that says its node trains no further.

    Args:
        reply: With content.
        node: Its sender's partition.

    Raises:
        NodeStopped: If it says so.
        NodeFailed: If it says so in a way that cannot be read.
    """
    kind = reply.metadata.message_type
    try:
        by = stop_of(reply)
        alarms = alarms_of(reply) if by is not None else None
    except WireError as error:
        raise NodeFailed(node, kind, str(error)) from error
    if by is not None:
        raise NodeStopped(node, kind, by, alarms or {})


def checked(
    replies: Sequence[Message],
    sent: Sequence[Message],
    *,
    partition_of: Callable[[int], int] = int,
) -> list[Message]:
    """Return one reply for each message sent, in that order.

    Args:
        replies: In any order.
        sent: The messages they should answer.
        partition_of: Which partition a Flower node id is, to name a node that failed.

    Returns:
        The replies.

    Raises:
        NodeFailed: On an error reply, a missing one, or two to one message.
    """
    answers: dict[str, list[Message]] = {}
    for reply in replies:
        answers.setdefault(reply.metadata.reply_to_message_id, []).append(reply)
    found = []
    for message in sent:
        about = message.metadata
        own = answers.get(about.message_id, [])
        cause = ""
        if len(own) != 1:
            cause = f"answered {len(own)} times" if own else "no reply"
        elif own[0].has_error():
            cause = own[0].error.reason or "no reason given"
        if cause:
            raise NodeFailed(partition_of(about.dst_node_id), about.message_type, cause)
        found.append(own[0])
    return found
