"""Nodes that stay where they are: what LocalGrid and RayGrid have in common.

A :class:`NodeHost` owns the contexts of some nodes and runs a ClientApp on their messages. Its
contexts are sticky: what a handler keeps in ``context.live`` is still there at the next message,
so models and data need not be rebuilt. On Flower's runtimes contexts have no such attribute.
"""

from collections.abc import Mapping
from itertools import count
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp

from leakbed.flower_internals import CLIENT_RAISED, NODE_UNAVAILABLE, set_message_id

_RUN_ID = 1


class StickyContext(Context):
    """A node's context, with memory that lives as long as the node stays in this process.

    Attributes:
        live: Anything the node's handlers keep between messages; never sent or stored.
    """

    def __init__(self, node_id: int, partition: int, partitions: int) -> None:
        """Make the context of one node.

        Args:
            node_id: Flower's id of the node.
            partition: The node's identity.
            partitions: How many nodes there are.
        """
        super().__init__(
            run_id=_RUN_ID,
            node_id=node_id,
            node_config={"partition-id": partition, "num-partitions": partitions},
            state=RecordDict(),
            run_config={},
        )
        self.live: dict[str, Any] = {}


def node_ids(partitions: int) -> dict[int, int]:
    """Return the roster of a grid of ours; node ids start at 1, as Flower takes 0 for none."""
    return {partition + 1: partition for partition in range(partitions)}


class NodeHost:
    """Runs a ClientApp for the nodes that live in this process."""

    def __init__(self, app: ClientApp, roster: Mapping[int, int]) -> None:
        """Host nodes.

        Args:
            app: The app every node runs.
            roster: Partition id by node id, of all nodes of the grid.
        """
        self._app = app
        self._roster = roster
        self._contexts: dict[int, StickyContext] = {}

    def handle(self, message: Message) -> Message:
        """Run the app on one message; an exception becomes an error reply, as in Flower.

        Args:
            message: To one of the roster's nodes; the host's own copy.

        Returns:
            The reply.
        """
        node_id = message.metadata.dst_node_id
        context = self._contexts.get(node_id)
        if context is None:  # nodes come to life with their first message
            context = StickyContext(node_id, self._roster[node_id], len(self._roster))
            self._contexts[node_id] = context
        try:
            return self._app(message, context)
        except Exception as error:  # noqa: BLE001  reported to the server, as Flower does
            return Message(Error(CLIENT_RAISED, describe(error)), reply_to=message)


def unavailable(message: Message, reason: str) -> Message:
    """Return the error reply of a node that cannot answer a message."""
    return Message(Error(NODE_UNAVAILABLE, reason), reply_to=message)


def describe(error: BaseException) -> str:
    """Say an exception in one line, with the place that raised it."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    name = trace.tb_frame.f_code.co_filename.rpartition("/")[2] if trace else "?"
    return f"{type(error).__name__}: {error} ({name}, line {trace.tb_lineno if trace else 0})"


class MessageIds:
    """Numbers messages as a SuperLink would."""

    def __init__(self, prefix: str) -> None:
        """Start counting.

        Args:
            prefix: Keeps the ids of several grids apart.
        """
        self._prefix, self._numbers = prefix, count()

    def stamp(self, message: Message) -> str:
        """Give a message the next id and return it."""
        message_id = f"{self._prefix}-{next(self._numbers)}"
        set_message_id(message, message_id)
        return message_id
