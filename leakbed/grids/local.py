"""LocalGrid: every node in this process, one after another; no Ray, no sockets."""

from collections.abc import Iterable
from time import monotonic

from flwr.app import Message
from flwr.clientapp import ClientApp

from leakbed.flower_internals import with_content
from leakbed.grids.deadlines import CallThread, overran
from leakbed.grids.nodes import MessageIds, NodeHost, unavailable
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
        self._replies: dict[str, Message] = {}

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Run every message at its node, however long it takes, and keep the replies."""
        ids = []
        for message in messages:
            ids.append(self._ids.stamp(message))
            self._replies[ids[-1]] = self._answer(message, None)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies to these messages, each once."""
        return [self._replies.pop(i) for i in message_ids if i in self._replies]

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
