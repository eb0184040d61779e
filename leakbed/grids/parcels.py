"""Parcels: what RayGrid's processes hand each other, with tensor bytes beside the pickle.

A parcel is a frame (a pickled outline of plain values, then the bytes of small arrays) and the
buffers of large arrays, which the receiver reads where they lie in shared memory: on a shelf of the
grid's own, or in Ray's store.
Only processes of one run exchange parcels: nothing another party sent is ever unpickled.
"""

import pickle
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, Metadata, MetricRecord, RecordDict

from leakbed.grids.shelf import Shelf, take
from leakbed.received_array import Buffer, ReceivedArray, buffer_of

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
    records = RecordDict()
    for key, kind, held in outline:
        if kind == "arrays":
            arrays = ArrayRecord()
            for name, dtype, shape, stype in held:
                arrays[name] = ReceivedArray(dtype, shape, stype, next(buffers))
            records[key] = arrays
        else:
            records[key] = ConfigRecord(held) if kind == "config" else MetricRecord(held)
    return records


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
