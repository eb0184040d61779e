"""LocalGrid: every node in this process, one after another; no Ray, no sockets, no waiting."""

from collections.abc import Iterable
from typing import Any, NoReturn

from flwr.app import Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from leakbed.flower_internals import with_content
from leakbed.grids.nodes import MessageIds, NodeHost, node_ids
from leakbed.wire.records import copy_records


class LocalGrid(Grid):
    """A Flower grid whose nodes run in this process, in the order of their messages.

    Attributes:
        roster: Partition id by Flower node id.
    """

    def __init__(self, app: ClientApp, *, nodes: int) -> None:
        """Make a grid.

        Args:
            app: What every node runs.
            nodes: How many nodes there are.

        Raises:
            ValueError: If there is no node.
        """
        if nodes < 1:
            raise ValueError(f"a grid needs at least one node, got nodes={nodes}")
        self.roster = node_ids(nodes)
        self._host = NodeHost(app, self.roster)
        self._ids = MessageIds("local")
        self._replies: dict[str, Message] = {}

    def set_run(self, run: Any) -> None:  # noqa: ANN401  Flower's Run moved between versions
        """Do nothing: there is only one run."""

    @property
    def run(self) -> NoReturn:
        """There is no Flower run behind this grid.

        Raises:
            AttributeError: Always.
        """
        raise AttributeError("a LocalGrid has no Flower run")

    def create_message(self, *args: Any, **kwargs: Any) -> Message:  # noqa: ANN401
        """Create a message (deprecated by Flower; use ``Message``)."""
        return Message(*args, **kwargs)

    def get_node_ids(self) -> Iterable[int]:
        """Return the nodes, by partition."""
        return list(self.roster)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Run every message at its node and keep the replies."""
        return [self._run(message) for message in messages]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies to these messages, each once."""
        return [self._replies.pop(i) for i in message_ids if i in self._replies]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Run every message at its node.

        Args:
            messages: From the strategy.
            timeout: Ignored: a node in this process answers or raises.

        Returns:
            The replies, in the order of the messages.
        """
        del timeout
        return self.pull_messages(self.push_messages(messages))

    def _run(self, message: Message) -> str:
        message_id = self._ids.stamp(message)
        # FedAvg puts one RecordDict into every node's message: each node gets its own.
        own = with_content(message, copy_records(message.content))
        self._replies[message_id] = self._host.handle(own)
        return message_id
