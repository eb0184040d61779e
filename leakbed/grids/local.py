"""LocalGrid: every node in this process, one after another; no Ray, no sockets."""

from collections.abc import Iterable
from time import monotonic

from flwr.app import Message
from flwr.clientapp import ClientApp

from leakbed.flower_internals import USUAL_TTL, with_content
from leakbed.grids.deadlines import CallThread, overran
from leakbed.grids.nodes import MessageIds, NodeHost, expired, unavailable
from leakbed.grids.resident import ResidentGrid
from leakbed.wire.records import copy_records


class LocalGrid(ResidentGrid):
    """A Flower grid whose nodes run in this process, in the order of their messages."""

    def __init__(self, app: ClientApp, *, nodes: int) -> None:
        """Make a grid.

        Args:
            app: What every node runs.
            nodes: How many nodes there are.
        """
        super().__init__(nodes)
        self._host = NodeHost(app, self.roster)
        self._ids = MessageIds("local")
        self._thread: CallThread[Message] = CallThread()
        self._pushed: dict[str, tuple[Message, float]] = {}

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Keep messages until they are pulled; a node runs in the thread that pulls."""
        ids = []
        for message in messages:
            ids.append(self._ids.stamp(message))
            self._pushed[ids[-1]] = message, monotonic() + message.metadata.ttl
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Run messages at their nodes.

        Args:
            message_ids: From ``push_messages``; others are ignored.

        Returns:
            The replies, each once, in the order the messages were pushed. A message whose time to
            live passes first is answered by an error.
        """
        wanted = set(message_ids)
        replies = []
        for message_id in [i for i in self._pushed if i in wanted]:
            message, deadline = self._pushed.pop(message_id)
            try:
                # Flower's own time to live is half a day: no reason to start a thread.
                short = message.metadata.ttl < USUAL_TTL
                replies.append(self._answer(message, deadline if short else None))
            except TimeoutError:  # the deadline's: what a node raises is an error reply
                replies.append(expired(message))
        return replies

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Run every message at its node.

        A node that overruns cannot be stopped. Until it returns, every further message of this
        process gets an error reply: both would draw from the same global generators.

        Args:
            messages: From the strategy.
            timeout: Seconds for all of them together; None to wait for ever.

        Returns:
            The replies, in the order of the messages; none from the first that came too late on.
        """
        deadline = None if timeout is None else monotonic() + timeout
        replies = []
        try:
            for message in messages:
                self._ids.stamp(message)
                replies.append(self._answer(message, deadline))
        except TimeoutError:  # the deadline's: what a node raises is an error reply
            return replies
        return replies

    def _answer(self, message: Message, deadline: float | None) -> Message:
        node = message.metadata.dst_node_id
        if node not in self.roster:
            return unavailable(
                message, f"no such node; this grid has nodes 1 to {len(self.roster)}"
            )
        if (late := overran()) is not None:
            return unavailable(message, f"{late} overran and still runs in this process")
        # FedAvg puts one RecordDict into every node's message: each node gets its own.
        own = with_content(message, copy_records(message.content))
        if deadline is None:
            return self._host.handle(own)
        return self._thread.run(
            lambda: self._host.handle(own),
            seconds=deadline - monotonic(),
            what=f"node {self.roster[node]} on {message.metadata.message_type!r}",
        )
