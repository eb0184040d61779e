"""Parcels: what RayGrid's processes hand each other, with tensor bytes beside the pickle.

A parcel is a frame (a pickled outline of plain values, then the bytes of small arrays) and the
buffers of large arrays, which the receiver reads where they lie in shared memory: on a shelf of the
grid's own, or in Ray's store.
Only processes of one run exchange parcels: nothing another party sent is ever unpickled.

A message's way to a RayGrid worker and back, seen from both ends, without Ray.

A node's state travels with its message and goes home with its reply, unless the node keeps
something alive: a worker holds active nodes only, and any worker can serve any other node.
"""

import pickle
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeAlias

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Error, Message, Metadata, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from leakbed.flower_internals import CLIENT_RAISED, assembled, filled
from leakbed.grids.base import NodeHost, describe
from leakbed.grids.ray.shelf import Shelf, take
from leakbed.wire.bounds import Weight
from leakbed.wire.records import Buffer, ReceivedArray, buffer_of

Parcel: TypeAlias = Any  # bytes, or a tuple of bytes and NumPy arrays: what Ray is quick with
Outline: TypeAlias = list[tuple[str, str, Any]]  # of one RecordDict: key, kind, what it holds

# Ray sends up to 100 kB with the call, raw bytes fastest of all; beyond, it uses its store.
INLINE_BYTES = 90 * 1024
_LARGE = 16 * 1024  # bytes; a buffer of its own costs Ray about 10 us, as much as copying these
_ALIGN = 64  # bytes, so that arrays in a frame lie as NumPy and torch want them
_LENGTH = 8  # bytes that tell the length of the pickled part

_FIELDS = (
    "run_id",
    "message_id",
    "src_node_id",
    "dst_node_id",
    "reply_to_message_id",
    "group_id",
    "created_at",
    "ttl",
    "message_type",
    "src_task_id",
    "dst_task_id",
)


def outlined(records: RecordDict) -> tuple[Outline, list[Buffer]]:
    """Return records as plain values and, in their order, the bytes of their arrays.

    Args:
        records: Never changed.

    Returns:
        The outline and the buffers.

    Raises:
        TypeError: If a record is none of Flower's three kinds.
    """
    outline: Outline = []
    buffers: list[Buffer] = []
    for key, record in records.items():
        if isinstance(record, ArrayRecord):
            arrays = [(n, a.dtype, tuple(a.shape), a.stype) for n, a in record.items()]
            outline.append((key, "arrays", arrays))
            buffers += map(buffer_of, record.values())
        elif isinstance(record, ConfigRecord | MetricRecord):
            kind = "config" if isinstance(record, ConfigRecord) else "metrics"
            outline.append((key, kind, dict(record.items())))
        else:
            raise TypeError(f"record {key!r} is a {type(record).__name__}, which cannot travel")
    return outline, buffers


def restored(outline: Outline, buffers: Iterator[memoryview]) -> RecordDict:
    """Return the records of an outline, over the next buffers.

    Args:
        outline: From :func:`outlined`.
        buffers: Taken from as far as the outline needs them.

    Returns:
        New records; their arrays lie in the buffers.
    """
    records: dict[str, Any] = {}
    for key, kind, held in outline:
        if kind == "arrays":
            arrays = {
                name: ReceivedArray(dtype, shape, stype, next(buffers))
                for name, dtype, shape, stype in held
            }
            records[key] = filled(ArrayRecord(), arrays)
        elif kind == "config":
            records[key] = filled(ConfigRecord(), held)
        else:
            records[key] = filled(MetricRecord(), held)
    return filled(RecordDict(), records)


def seal(
    outline: Any,  # noqa: ANN401  plain values
    buffers: Sequence[Buffer],
    *,
    shelf: Shelf | None = None,
) -> Parcel:
    """Put plain values and buffers into one parcel.

    Args:
        outline: What pickle handles by itself: numbers, strings, lists, tuples, dicts.
        buffers: Bytes of arrays.
        shelf: Where to leave the large ones, if the receiver is on this machine. Such a parcel can
            be opened once.

    Returns:
        What to give Ray.
    """
    sizes = [len(buffer) for buffer in buffers]
    apart = sum(sizes) > INLINE_BYTES
    large = [apart and size >= _LARGE for size in sizes]
    said = pickle.dumps((sizes, large, outline), protocol=5)
    parts: list[Buffer] = [len(said).to_bytes(_LENGTH, "little"), said]
    at = _LENGTH + len(said)
    for buffer, size, elsewhere in zip(buffers, sizes, large, strict=True):
        if not elsewhere:
            parts += [bytes(-at % _ALIGN), buffer]
            at += -at % _ALIGN + size
    frame = b"".join(parts)
    if not any(large):
        return frame
    own = [buffer for buffer, elsewhere in zip(buffers, large, strict=True) if elsewhere]
    if shelf is not None and (path := shelf.leave(own)) is not None:
        return (frame, path)
    return (frame, *(np.frombuffer(buffer, np.uint8) for buffer in own))


def opened(parcel: Parcel) -> tuple[Any, list[memoryview]]:
    """Return what was sealed, the buffers as read-only views into the parcel.

    Args:
        parcel: From :func:`seal` in a process of the same run.

    Returns:
        The outline and the buffers.
    """
    frame, own = (parcel, ()) if isinstance(parcel, bytes) else (parcel[0], parcel[1:])
    view = memoryview(frame)
    at = _LENGTH + int.from_bytes(view[:_LENGTH], "little")
    sizes, large, outline = pickle.loads(view[_LENGTH:at])  # noqa: S301  of our own run
    if own and isinstance(own[0], str):
        own = take(own[0], [size for size, apart in zip(sizes, large, strict=True) if apart])
    elsewhere = iter(own)
    buffers = []
    for size, apart in zip(sizes, large, strict=True):
        if apart:
            buffers.append(memoryview(next(elsewhere)).toreadonly())
            continue
        at += -at % _ALIGN
        buffers.append(view[at : at + size])
        at += size
    return outline, buffers


def metadata_values(message: Message) -> tuple[Any, ...]:
    """Return a message's metadata as plain values; :func:`metadata_of` is the way back."""
    metadata = message.metadata
    return tuple(getattr(metadata, name) for name in _FIELDS)


def metadata_of(values: tuple[Any, ...]) -> Metadata:
    """Return the metadata of such values."""
    return Metadata(*values)


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


def prepared(message: Message, *, content: bool, most: Weight | None = None) -> Prepared:
    """Return a message as it will travel, together with others or again if it must.

    Args:
        message: To a node.
        content: Whether its records travel with it, not in a broadcast.
        most: What its reply may weigh; the worker refuses more before it sends it.

    Returns:
        Its outline, pickled, and the bytes of its arrays.
    """
    outline, arrays = outlined(message.content) if content else (None, [])
    limits = None if most is None else (most.bytes, most.parts)
    return pickle.dumps((metadata_values(message), outline, limits), protocol=5), arrays


def request(sent: Sequence[tuple[Prepared, State | None]], *, shelf: Shelf | None = None) -> Parcel:
    """Return messages on their way to a worker.

    Args:
        sent: Each with what its node remembers; None if the node is with the worker.
        shelf: Where to leave large arrays; None to give them to Ray.

    Returns:
        The parcel, for :meth:`ParcelHost.handle`.
    """
    outlines, buffers = [], list[Buffer]()
    for (outline, arrays), state in sent:
        outlines.append((outline, len(arrays), _WITH_WORKER if state is None else len(state)))
        buffers += [*arrays, *(state or ())]
    return seal(outlines, buffers, shelf=shelf)


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
        self, app: ClientApp, roster: Mapping[int, int], *, shelf: Shelf | None = None
    ) -> None:
        """Host nodes.

        Args:
            app: The app every node runs.
            roster: Partition id by node id, of all nodes of the grid.
            shelf: Where to leave large arrays; None to give them to Ray.
        """
        self._host, self._shelf = NodeHost(app, roster), shelf

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
            metadata, records, limits = pickle.loads(outline)  # noqa: S301  of our own run
            own = list(islice(rest, arrays))
            if records is None:
                records, own = opened(shared)
            message = assembled(metadata_of(metadata), restored(records, iter(own)))
            state = list(islice(rest, max(count, 0)))
            if count != _WITH_WORKER:
                self._host.settle(message.metadata.dst_node_id, _unpacked(state))
            said, left = self._answered(message, state, limits)
            replies.append(said)
            sent += left
        return seal(replies, sent, shelf=self._shelf)

    def _answered(
        self, message: Message, before: list[memoryview], limits: tuple[int, int] | None
    ) -> tuple[bytes, list[Buffer]]:
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
                if limits is not None:
                    Weight(*limits).refuse(reply.content)
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
