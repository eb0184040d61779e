"""A message's way to a RayGrid worker and back, seen from both ends, without Ray.

A node's state travels with its message and goes home with its reply, unless the node keeps
something alive: a worker holds active nodes only, and any worker can serve any other node.
"""

import pickle
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeAlias

from flwr.app import Error, Message, RecordDict
from flwr.clientapp import ClientApp

from leakbed.flower_internals import CLIENT_RAISED, assembled
from leakbed.grids.nodes import NodeHost, describe
from leakbed.grids.parcels import (
    INLINE_BYTES,
    Parcel,
    metadata_of,
    metadata_values,
    opened,
    outlined,
    restored,
    seal,
)
from leakbed.received_array import Buffer

# A node's state packed: first its pickled outline, then its arrays. None at all is a new node.
State: TypeAlias = Sequence[Buffer]

# A message's pickled outline and the bytes of its arrays.
Prepared: TypeAlias = tuple[bytes, list[Buffer]]

# What a parcel says of the node's state, if not how many buffers of it follow.
_WITH_WORKER, _UNCHANGED = -1, -2


@dataclass(frozen=True)
class Answer:
    """What came back from a worker.

    Attributes:
        reply: To the message.
        stays: Whether the node stays with the worker, as it keeps something alive.
        state: The node's new state; None if it stays, or if the last one sent is still right.
    """

    reply: Message
    stays: bool
    state: State | None


def prepared(message: Message, *, content: bool) -> Prepared:
    """Return a message as it will travel, together with others or again if it must.

    Args:
        message: To a node.
        content: Whether its records travel with it, not in a broadcast.

    Returns:
        Its outline, pickled, and the bytes of its arrays.
    """
    outline, arrays = outlined(message.content) if content else (None, [])
    return pickle.dumps((metadata_values(message), outline), protocol=5), arrays


def request(sent: Sequence[tuple[Prepared, State | None]], *, inline: int = INLINE_BYTES) -> Parcel:
    """Return messages on their way to a worker.

    Args:
        sent: Each with what its node remembers; None if the node is with the worker.
        inline: How many bytes of arrays may travel with the call.

    Returns:
        The parcel, for :meth:`ParcelHost.handle`.
    """
    outlines, buffers = [], list[Buffer]()
    for (outline, arrays), state in sent:
        outlines.append((outline, len(arrays), _WITH_WORKER if state is None else len(state)))
        buffers += [*arrays, *(state or ())]
    return seal(outlines, buffers, inline=inline)


def answers(parcel: Parcel, messages: Sequence[Message]) -> list[Answer]:
    """Return what a worker answered.

    Args:
        parcel: From :meth:`ParcelHost.handle`.
        messages: What it answers, in the order of the request.

    Returns:
        To each message the reply, and where its node's state is now.
    """
    outlines, buffers = opened(parcel)
    rest = iter(buffers)
    pairs = zip(messages, outlines, strict=True)
    return [_answer(message, pickle.loads(outline), rest) for message, outline in pairs]  # noqa: S301  of our own run


def _answer(message: Message, outline: tuple[Any, ...], buffers: Iterator[memoryview]) -> Answer:
    said, error, count = outline
    if error is not None:
        reply = Message(Error(*error), reply_to=message)
    else:
        metadata, records = said
        reply = assembled(metadata_of(metadata), restored(records, buffers))
    # Copied, since a view would hold the whole parcel in Ray's store for as long as the node rests.
    state = [bytes(buffer) for buffer in islice(buffers, count)] if count >= 0 else None
    return Answer(reply, stays=count == _WITH_WORKER, state=state)


class ParcelHost:
    """Hosts nodes in a worker; one message at a time."""

    def __init__(
        self, app: ClientApp, roster: Mapping[int, int], *, inline: int = INLINE_BYTES
    ) -> None:
        """Host nodes.

        Args:
            app: The app every node runs.
            roster: Partition id by node id, of all nodes of the grid.
            inline: How many bytes of arrays may travel with a reply.
        """
        self._host, self._inline = NodeHost(app, roster), inline

    def handle(self, parcel: Parcel, shared: Parcel | None = None) -> Parcel:
        """Run messages at their nodes, one after another.

        Args:
            parcel: From :func:`request`.
            shared: The sealed records that the messages have in common, where they travel so.

        Returns:
            The replies, for :func:`answers`.
        """
        outlines, buffers = opened(parcel)
        rest, replies, sent = iter(buffers), list[bytes](), list[Buffer]()
        for outline, arrays, count in outlines:
            metadata, records = pickle.loads(outline)  # noqa: S301  of our own run
            own = list(islice(rest, arrays))
            if records is None:
                records, own = opened(shared)
            message = assembled(metadata_of(metadata), restored(records, iter(own)))
            state = list(islice(rest, max(count, 0)))
            if count != _WITH_WORKER:
                self._host.settle(message.metadata.dst_node_id, _unpacked(state))
            said, left = self._answered(message, state)
            replies.append(said)
            sent += left
        return seal(replies, sent, inline=self._inline)

    def _answered(self, message: Message, before: list[memoryview]) -> tuple[bytes, list[Buffer]]:
        """Return the reply and the node's state; an app may have put anything into either."""
        reply = self._host.handle(message)
        count, after = _UNCHANGED, list[Buffer]()
        try:
            if (state := self._host.depart(message.metadata.dst_node_id)) is None:
                count = _WITH_WORKER
            elif not _same(packed := _packed(state), before):
                count, after = len(packed), packed
            said, error, buffers = None, None, list[Buffer]()
            if reply.has_error():
                error = reply.error.code, reply.error.reason
            else:
                outline, buffers = outlined(reply.content)
                said = metadata_values(reply), outline
            return pickle.dumps((said, error, count), protocol=5), [*buffers, *after]
        except Exception as problem:  # noqa: BLE001  reported to the server, as Flower does
            error = CLIENT_RAISED, describe(problem)
            return pickle.dumps((None, error, count), protocol=5), after


def _packed(state: RecordDict) -> list[Buffer]:
    outline, buffers = outlined(state)
    return [pickle.dumps(outline, protocol=5), *buffers]


def _unpacked(state: list[memoryview]) -> RecordDict:
    if not state:
        return RecordDict()
    return restored(pickle.loads(state[0]), iter(state[1:]))  # noqa: S301  of our own run


def _same(after: Sequence[Buffer], before: Sequence[Buffer]) -> bool:
    """Return whether a state surely is what it was: its arrays lie where they lay."""
    return (
        len(after) == len(before)
        and after[0] == before[0]
        and all(new is old for new, old in zip(after[1:], before[1:], strict=True))
    )
