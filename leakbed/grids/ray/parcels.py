"""Parcels: what RayGrid's processes hand each other through Ray, and what a worker does with them.

A parcel is a pickle of protocol 5 with the bytes of large arrays beside it, which Ray keeps in its
store and hands on without a copy. Only processes of one run exchange parcels: nothing another party
sent is ever unpickled.

A message's way to a worker and back, and a typed call's, seen from both ends, without Ray. A
node's state travels with them and goes home with the reply, unless the node keeps something alive:
a worker holds active nodes only, and any worker can serve any other node.
"""

import pickle
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Error, Message, Metadata, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from leakbed.flower_internals import CLIENT_RAISED, NODE_UNAVAILABLE, assembled, filled
from leakbed.grids.base import NodeHost, describe
from leakbed.wire.bounds import Weight
from leakbed.wire.calls import Answer as Answered
from leakbed.wire.calls import Failure
from leakbed.wire.fields import Carried
from leakbed.wire.records import Buffer, ReceivedArray, buffer_of

Parcel: TypeAlias = tuple[Any, ...]  # a pickle, then its large buffers
Returned: TypeAlias = tuple[Parcel, Parcel]  # a reply or error; where the node's state is now
Outline: TypeAlias = list[tuple[str, str, Any]]  # of one RecordDict: key, kind, what it holds
Packed: TypeAlias = tuple[Outline, list[Any]]  # and the bytes of its arrays, in their order

_LARGE = 16 * 1024  # bytes; a buffer of its own costs Ray about 10 us, as much as copying these

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


def seal(value: Any) -> Parcel:  # noqa: ANN401  whatever pickle takes
    """Put a value into a parcel; its large buffers are not copied.

    Args:
        value: Of plain values, arrays, and what :func:`packed` returns.

    Returns:
        What to give Ray.
    """
    apart: list[Any] = []

    def stays(buffer: pickle.PickleBuffer) -> bool:
        raw = buffer.raw()
        if raw.nbytes < _LARGE:
            return True
        apart.append(np.frombuffer(raw, np.uint8))
        return False

    return pickle.dumps(value, protocol=5, buffer_callback=stays), *apart


def opened(parcel: Parcel) -> Any:  # noqa: ANN401  what was sealed
    """Return what a process of the same run sealed; its large buffers lie where they arrived."""
    return pickle.loads(parcel[0], buffers=parcel[1:])  # noqa: S301  of our own run


def packed(records: RecordDict) -> Packed:
    """Return records as plain values and the bytes of their arrays, for :func:`seal`.

    Args:
        records: Never changed.

    Returns:
        An outline and buffers.

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
    return outline, [pickle.PickleBuffer(buffer) for buffer in buffers]


def restored(state: Packed) -> tuple[RecordDict, list[memoryview]]:
    """Return the records that were packed, and the read-only bytes their arrays lie in."""
    outline, buffers = state
    views = [memoryview(buffer).toreadonly() for buffer in buffers]
    rest = iter(views)
    return filled(
        RecordDict(), {k: _restored(kind, held, rest) for k, kind, held in outline}
    ), views


def _restored(
    kind: str,
    held: Any,  # noqa: ANN401  by kind
    buffers: Iterator[memoryview],
) -> ArrayRecord | ConfigRecord | MetricRecord:
    if kind == "config":
        return filled(ConfigRecord(), held)
    if kind == "metrics":
        return filled(MetricRecord(), held)
    arrays = {
        name: ReceivedArray(dtype, shape, stype, next(buffers))
        for name, dtype, shape, stype in held
    }
    return filled(ArrayRecord(), arrays)


def metadata_values(message: Message) -> tuple[Any, ...]:
    """Return a message's metadata as plain values; :func:`metadata_of` is the way back."""
    metadata = message.metadata
    return tuple(getattr(metadata, name) for name in _FIELDS)


def metadata_of(values: tuple[Any, ...]) -> Metadata:
    """Return the metadata of such values."""
    return Metadata(*values)


@dataclass(frozen=True)
class TypedCall:
    """A request on its way to a node.

    Attributes:
        node: Flower's node id.
        kind: Type of the message it would travel in.
        request: As handed over.
    """

    node: int
    kind: str
    request: Carried


Sent: TypeAlias = Message | TypedCall
Reply: TypeAlias = Message | Carried | Failure
_Limits: TypeAlias = tuple[int, int] | None


def node_of(sent: Sent) -> int:
    """Return Flower's id of the node that something goes to."""
    return sent.metadata.dst_node_id if isinstance(sent, Message) else sent.node


def failed(sent: Sent, reason: str, *, raised: bool = False) -> Message | Failure:
    """Return the answer in place of one that never came.

    Args:
        sent: What is not answered.
        reason: Why.
        raised: Whether the node's code is to blame, rather than its worker.

    Returns:
        An error reply to a message, a failure of a typed call.
    """
    if isinstance(sent, Message):
        return Message(Error(CLIENT_RAISED if raised else NODE_UNAVAILABLE, reason), reply_to=sent)
    return Failure(reason)


def prepared(sent: Sent, *, content: bool = True, most: Weight | None = None) -> Parcel:
    """Return a message or call as it will travel, also again if it must.

    Args:
        sent: To a node.
        content: Whether a message's records travel with it, not in a broadcast.
        most: What the reply may weigh; the worker refuses more before it sends it.

    Returns:
        For :meth:`ParcelHost.handle`.
    """
    limits = None if most is None else (most.bytes, most.parts)
    if isinstance(sent, TypedCall):
        return seal((sent, None, limits))
    return seal((metadata_values(sent), packed(sent.content) if content else None, limits))


@dataclass(frozen=True)
class Answer:
    """What came back from a worker.

    Attributes:
        reply: To the message or call.
        stays: Whether the node stays with the worker, as it keeps something alive.
        state: The node's new state, sealed; None if it stays, or if the last one is still right.
    """

    reply: Reply
    stays: bool
    state: Parcel | None


def answers(returned: Sequence[Returned], sent: Sequence[Sent]) -> list[Answer]:
    """Return what a worker answered.

    A reply that this process cannot read, say for want of its class, is a failed one of its node.

    Args:
        returned: From :meth:`ParcelHost.handle`.
        sent: What they answer, in their order.

    Returns:
        To each the reply, and where its node's state is now.
    """
    return [_answer(one, *parcels) for one, parcels in zip(sent, returned, strict=True)]


def _answer(sent: Sent, reply: Parcel, rest: Parcel) -> Answer:
    stays, state = False, None
    try:
        stays, state = opened(rest)
        read = _reply(sent, *opened(reply))
    except Exception as problem:  # noqa: BLE001  what a node sent may raise anything
        why = (
            f"the reply of node {node_of(sent)} cannot be read where the run is driven: "
            f"{describe(problem)}; its class must be importable there, as at the workers"
        )
        read = failed(sent, why, raised=True)
    if state is None:
        return Answer(read, stays=stays, state=None)
    # Copied, since a view would hold the whole reply in Ray's store while the node rests.
    own = [pickle.PickleBuffer(bytes(buffer)) for buffer in state[1]]
    return Answer(read, stays=stays, state=seal((state[0], own)))


def _reply(
    sent: Sent,
    said: Any,  # noqa: ANN401  by what was sent
    error: tuple[int, str | None] | None,
) -> Reply:
    if isinstance(sent, Message):
        if error is not None:
            return Message(Error(*error), reply_to=sent)
        metadata, records = said
        return assembled(metadata_of(metadata), restored(records)[0])
    reply: Reply = said
    return reply


class ParcelHost:
    """Hosts nodes in a worker; one message or call at a time."""

    def __init__(self, app: ClientApp, roster: Mapping[int, int]) -> None:
        """Host nodes.

        Args:
            app: The app every node runs.
            roster: Partition id by node id, of all nodes of the grid.
        """
        self._host = NodeHost(app, roster)
        self.kinds = self._host.kinds

    def handle(
        self, sent: Sequence[tuple[Parcel, Parcel | None, bool]], shared: Parcel | None = None
    ) -> list[Returned]:
        """Serve messages and calls at their nodes, one after another.

        Args:
            sent: From :func:`prepared`, each with its node's state, None of a new one, and whether
                the node is here already.
            shared: The sealed records that the messages have in common, where they travel so.

        Returns:
            The replies, for :func:`answers`.
        """
        return [self._served(*one, shared) for one in sent]

    def _served(
        self,
        parcel: Parcel,
        state: Parcel | None,
        here: bool,
        shared: Parcel | None,
    ) -> Returned:
        asked, records, limits = opened(parcel)
        if isinstance(asked, TypedCall):
            node = asked.node
        else:
            content = restored(opened(shared or ()) if records is None else records)[0]
            message = assembled(metadata_of(asked), content)
            node = message.metadata.dst_node_id
        outline, before = list[Any](), list[memoryview]()
        if not here:
            outline, buffers = ([], []) if state is None else opened(state)
            known, before = restored((outline, buffers))
            self._host.settle(node, known)
        said, error = (
            (self._called(asked, limits), None)
            if isinstance(asked, TypedCall)
            else self._answered(message, limits)
        )
        stays, after = False, None
        try:
            left = self._host.depart(node)
            stays, after = left is None, None if left is None else packed(left)
            if after is not None and state is not None and _same(after, (outline, before)):
                after = None
            return seal((said, error)), seal((stays, after))
        except Exception as problem:  # noqa: BLE001  reported to the server, as Flower does
            why = describe(problem)
            failure = Failure(why) if isinstance(asked, TypedCall) else None
            return seal((failure, (CLIENT_RAISED, why))), seal((stays, after))

    def _called(self, call: TypedCall, limits: _Limits) -> Answered:
        """Return a call's reply or failure."""
        handler = self._host.handler(call.kind)
        if handler is None:
            return Failure(f"this worker's app serves no {call.kind!r}")
        reply = self._host.call(call.node, handler, call.request)
        if limits is not None and isinstance(reply, Carried):
            try:
                Weight(*limits).refuse(reply.groups())
            except ValueError as problem:
                return Failure(describe(problem))
        return reply

    def _answered(
        self, message: Message, limits: _Limits
    ) -> tuple[Any, tuple[int, str | None] | None]:
        """Return a message's reply as it travels, or its error; an app may reply with anything."""
        reply = self._host.handle(message)
        try:
            if reply.has_error():
                return None, (reply.error.code, reply.error.reason)
            if limits is not None:
                Weight(*limits).refuse(reply.content)
            return (metadata_values(reply), packed(reply.content)), None
        except Exception as problem:  # noqa: BLE001  reported to the server, as Flower does
            return None, (CLIENT_RAISED, describe(problem))


def _same(after: Packed, before: Packed) -> bool:
    """Return whether a state surely is what it was: its arrays lie where they lay."""
    return after[0] == before[0] and list(map(_place, after[1])) == list(map(_place, before[1]))


def _place(buffer: Any) -> tuple[int, int]:  # noqa: ANN401  any buffer
    seen = np.frombuffer(buffer, np.uint8)
    return seen.ctypes.data, seen.nbytes
