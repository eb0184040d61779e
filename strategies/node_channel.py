"""The channel by which a round's requests go to its nodes, and their replies come back.

It sends a request now, waits for its reply later, and insists that it comes. A grid that hands
requests over by itself (:mod:`leakbed.wire.calls`) does so; to any other they go as Flower
messages: two carriers of the same requests and replies, with the same checks.

Pushing and pulling lets nodes work while the server does: of K nodes, one's next batch is on its
way before the next one's reply is read. Replies are taken in the order the server asks for them,
never as they happen to arrive, so the result is the same on every grid. A protocol whose server
takes them as they arrive asks a :class:`Clock`, whose time is simulated.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import inf
from time import monotonic
from typing import Any, NamedTuple

from flwr.app import Message
from flwr.serverapp import Grid

from leakbed.grids.base import NodeFailed, wait_for
from leakbed.wire.bounds import Bounds, bind
from leakbed.wire.calls import Call, Failure, typed_call
from leakbed.wire.fields import Alarms, Carried, alarms_of, stop_of
from leakbed.wire.messages import Stopped, reply_to
from leakbed.wire.records import WireError, shortened

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


class Clock:
    """Simulated time: when each node's reply arrives, whatever the speed of this machine.

    Attributes:
        now: Seconds since the run began; goes on when a reply is received.
    """

    def __init__(self, delay: Callable[[int, int], float]) -> None:
        """Start at 0.

        Args:
            delay: Seconds from a request to the arrival of its reply, by the node's partition and
                how many requests it had before.
        """
        self.now = 0.0
        self._delay = delay
        self._asked: dict[int, int] = {}

    def arrival(self, node: int) -> float:
        """Return when the reply to a request that is sent now arrives.

        Args:
            node: By partition.

        Returns:
            In seconds, not before now.

        Raises:
            ValueError: If the delay is negative or not finite.
        """
        before = self._asked.get(node, 0)
        self._asked[node] = before + 1
        seconds = self._delay(node, before)
        if not 0 <= seconds < inf:
            raise ValueError(
                f"request {before} to node {node} takes {seconds!r} s by the clock; a delay is a "
                "finite number of seconds, at least 0"
            )
        return self.now + seconds


class _Pending(NamedTuple):
    """A request without its reply: where its reply is had, of which class, and when it arrives."""

    kind: str
    reply: type[Carried]
    sent: float
    arrives: float
    wait: Callable[[], Message | Carried]


class NodeChannel:
    """One round's messages to its nodes, at most one unanswered each."""

    def __init__(
        self,
        grid: Grid,
        *,
        timeout: float | None,
        bounds: Bounds | None = None,
        clock: Clock | None = None,
    ) -> None:
        """Open for a round.

        Args:
            grid: Where the nodes are.
            timeout: Seconds to wait for each reply; None to wait as long as Flower does.
            bounds: What replies may be; None for anything.
            clock: When replies arrive; None where all arrive at once, in the order of the requests.
        """
        self._grid, self._timeout, self._bounds, self._clock = grid, timeout, bounds, clock
        if bounds is not None:
            bind(grid, bounds)
        self._calls: dict[str, Call | None] = {}
        self._sent: dict[int, _Pending] = {}

    def send(self, node: int, kind: str, request: Carried) -> None:
        """Send a request.

        Args:
            node: Flower's node id.
            kind: Type of the message it travels in.
            request: Of the class that this type has. A grid that does not take it is a
                :class:`NodeFailed`.
        """
        if kind not in self._calls:
            self._calls[kind] = typed_call(self._grid, kind)
        call = self._calls[kind]
        carried = self._pushed if call is None else partial(self._called, call)
        arrives = 0.0 if self._clock is None else self._clock.arrival(self.partition(node))
        began = monotonic()
        wait = carried(node, kind, request)
        self._sent[node] = _Pending(kind, reply_to(request, kind), began, arrives, wait)

    def first(self) -> int:
        """Return the node whose reply arrives first, of those that owe one.

        Returns:
            Flower's node id; of several at the same time, the one that was asked first.

        Raises:
            RuntimeError: If no node owes a reply.
        """
        if not self._sent:
            raise RuntimeError("no node owes a reply; send a request first")
        return min(self._sent, key=lambda node: self._sent[node].arrives)

    def receive(self, node: int) -> Carried:
        """Wait for the answer to the last request sent to a node.

        Args:
            node: Flower's node id.

        Returns:
            The reply, of the class that answers this type of message.

        Raises:
            NodeFailed: If there is no answer in time, an error, more than one answer, one that
                the plan does not allow, which nobody decodes, or one that cannot be read.
            NodeStopped: If the node answers that it trains no further.
        """
        asked = self._sent.pop(node)
        kind = asked.kind
        if self._clock is not None:
            self._clock.now = max(self._clock.now, asked.arrives)
        try:
            answer = asked.wait()
        except NodeFailed as error:
            # Where a message's time to live is over first, its grid answers with an error.
            late = self._timeout is not None and monotonic() - asked.sent >= self._timeout
            cause = f"no reply within {self._timeout} s; {_LATE}" if late else error.cause
            raise NodeFailed(self.partition(node), kind, cause) from error
        reply = self._read(node, asked, answer) if isinstance(answer, Message) else answer
        if isinstance(reply, Stopped):
            raise NodeStopped(self.partition(node), kind, reply.by, reply.alarms or {})
        return reply

    def exchange(self, node: int, kind: str, request: Carried) -> Carried:
        """Send a request to a node that owes no reply and wait, as :meth:`receive` does.

        Args:
            node: Flower's node id.
            kind: Type of the message it travels in.
            request: Of the class that this type has.

        Returns:
            The reply.
        """
        self.send(node, kind, request)
        return self.receive(node)

    def _pushed(self, node: int, kind: str, request: Carried) -> Callable[[], Message]:
        """Send a request as a message, and return the wait for the message that answers it."""
        records = request.records()
        message = Message(records, dst_node_id=node, message_type=kind, ttl=self._timeout)
        if not all(self._grid.push_messages([message])):
            raise NodeFailed(self.partition(node), kind, "the message could not be sent")

        def wait() -> Message:
            replies = wait_for(self._grid, [message.metadata.message_id], timeout=self._timeout)
            (reply,) = checked(replies, [message], bounds=self._bounds)
            return reply

        return wait

    def _called(self, call: Call, node: int, kind: str, request: Carried) -> Callable[[], Carried]:
        """Hand a request over, and return the wait for its reply."""
        own = request.handed_over()
        answer = call(node, own, self._timeout)

        def wait() -> Carried:
            reply = answer()
            if isinstance(reply, Failure):
                raise NodeFailed(self.partition(node), kind, reply.reason)
            return reply  # the grid refuses what the plan does not allow

        return wait

    def _read(self, node: int, asked: _Pending, message: Message) -> Carried:
        """Return what a message carries; what cannot be read is a failure of its sender."""
        refuse_stopped(message, self.partition(node))
        try:
            return asked.reply.of(message)
        except WireError as error:
            raise NodeFailed(self.partition(node), asked.kind, str(error)) from error

    def failure(self, node: int, kind: str, cause: str) -> NodeFailed:
        """Return the error that says which partition failed."""
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
    bounds: Bounds | None = None,
) -> list[Message]:
    """Return one reply for each message sent, in that order.

    Args:
        replies: In any order.
        sent: The messages they should answer.
        partition_of: Which partition a Flower node id is, to name a node that failed.
        bounds: What replies may be; None for anything.

    Returns:
        The replies.

    Raises:
        NodeFailed: On an error reply, a missing one, two to one message, or one that the plan does
            not allow.
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
            cause = shortened(own[0].error.reason)
        elif bounds is not None:
            cause = _excess(bounds, message, own[0])
        if cause:
            raise NodeFailed(partition_of(about.dst_node_id), about.message_type, cause)
        found.append(own[0])
    return found


def _excess(bounds: Bounds, sent: Message, reply: Message) -> str:
    """Return what of a reply the plan does not allow; empty where it does."""
    try:
        bounds.refuse(sent, reply)
    except WireError as error:
        return str(error)
    return ""
