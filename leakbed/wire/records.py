"""Records: arrays into Flower records and back, with errors that name the message."""

import copy
from collections.abc import Mapping
from functools import lru_cache
from io import BytesIO
from typing import Any

import numpy as np
from flwr.app import Array as WireArray
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from numpy.lib.format import (
    dtype_to_descr,
    magic,
    read_array_header_1_0,
    write_array_header_1_0,
)

from leakbed.events import Array, Arrays
from leakbed.received_array import buffer_of

CONFIG, METRICS, ROUND = "config", "metrics", "server-round"  # Flower's own keys
GRADIENT, SMASHED = "cut-gradient", "smashed"
FEATURES, UPPER_GRADIENT = "features", "upper-gradient"
BOTTOM_GRADIENT = "relayed.bottom-gradient"
SEALED = "sealed."  # what lies under keys that start so, no tap may read
BOTTOMS = {"sealed": f"{SEALED}bottom", "relayed": "relayed.bottom"}


_STYPE = "numpy.ndarray"  # Flower's name for what np.save writes
_MAGIC = magic(1, 0)
_MAGIC_BYTES = len(_MAGIC)
_NUMBERS = frozenset(map(np.dtype, "?bhilqBHILQefdFD"))  # what a tensor can be a view of


class WireError(ValueError):
    """A message lacks a record, or holds one of another kind than its type promises."""


def pack(arrays: Arrays) -> ArrayRecord:
    """Return arrays as a Flower record, in one copy of their bytes.

    Args:
        arrays: Numbers by name, of any shape.

    Returns:
        What Flower's own ``ArrayRecord`` of these arrays would hold, byte for byte.
    """
    record = ArrayRecord()
    for name, value in arrays.items():
        record[name] = _packed(np.asarray(value))
    return record


def unpack(record: ArrayRecord) -> dict[str, Array]:
    """Return a Flower record's arrays, as copies that may be written; see :func:`views`."""
    return {name: value.copy() for name, value in views(record).items()}


def views(record: ArrayRecord) -> dict[str, Array]:
    """Return a Flower record's arrays over the record's own bytes, without a copy.

    Bytes that are no array of numbers are a :class:`WireError`; nothing is ever unpickled.

    Args:
        record: Of any sender.

    Returns:
        Read-only arrays by name.
    """
    return {name: _viewed(name, value) for name, value in record.items()}


def _packed(array: Array) -> WireArray:
    array = np.asarray(array, order="C")
    if array.dtype.hasobject:
        raise WireError(f"an array of {array.dtype} cannot travel; send numbers")
    dtype, header = _header(array.dtype, array.shape)
    data = b"".join((header, array.reshape(-1).view(np.uint8).data))
    return WireArray(dtype, array.shape, _STYPE, data)


@lru_cache(maxsize=1024)
def _header(dtype: np.dtype[Any], shape: tuple[int, ...]) -> tuple[str, bytes]:
    """Return the type's name, and what ``np.save`` writes before an array's bytes."""
    buffer = BytesIO()
    about = {"descr": dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    write_array_header_1_0(buffer, about)
    return str(dtype), buffer.getvalue()


def _viewed(name: str, wire: WireArray) -> Array:
    data = memoryview(buffer_of(wire))
    start = _MAGIC_BYTES + 2
    start += int.from_bytes(data[_MAGIC_BYTES:start], "little")
    try:
        shape, fortran, dtype = _about(wire.stype, bytes(data[:start]))
        viewed = np.frombuffer(data, dtype, offset=start)
        viewed = viewed.reshape(shape, order="F" if fortran else "C")
    except Exception as error:
        raise WireError(f"array {name!r} is no NumPy array of numbers: {error}") from error
    viewed.flags.writeable = False
    return viewed


@lru_cache(maxsize=1024)
def _about(stype: str, header: bytes) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Return shape, order and type that a header tells."""
    if stype != _STYPE or header[:_MAGIC_BYTES] != _MAGIC:
        raise ValueError(f"stype {stype!r}, first bytes {header[:_MAGIC_BYTES]!r}")
    buffer = BytesIO(header[_MAGIC_BYTES:])
    shape, fortran, dtype = read_array_header_1_0(buffer)
    if dtype not in _NUMBERS or min(shape, default=0) < 0:
        raise ValueError(f"shape {shape} of {dtype}")
    return shape, fortran, dtype


def copy_records(records: RecordDict) -> RecordDict:
    """Return records that share nothing mutable with the given ones (array bytes are shared)."""
    copied = RecordDict()
    for key, record in records.items():
        if isinstance(record, ArrayRecord):
            own = ArrayRecord()
            for name, value in record.items():
                own[name] = copy.copy(value)
            copied[key] = own
        elif isinstance(record, ConfigRecord):
            copied[key] = ConfigRecord({k: _copied(v) for k, v in record.items()})
        else:
            copied[key] = MetricRecord({k: _copied(v) for k, v in record.items()})
    return copied


def _copied(value: Any) -> Any:  # noqa: ANN401  any scalar or list a record may hold
    return list(value) if isinstance(value, list) else value


def count_bytes(message: Message) -> int:
    """Return the bytes of a message's arrays as they travel; 0 for an error."""
    if not message.has_content():
        return 0
    return sum(
        len(name) + len(buffer_of(array))  # names travel too; so Flower counts
        for record in message.content.array_records.values()
        for name, array in record.items()
    )


def sole_arrays(message: Message) -> str | None:
    """Return the key of a message's only ``ArrayRecord``; None if none, several or sealed."""
    keys = list(message.content.array_records)
    return keys[0] if len(keys) == 1 and not keys[0].startswith(SEALED) else None


def where(message: Message) -> str:
    """Name a message in an error: its type and its records."""
    return f"a {message.metadata.message_type!r} message with records {sorted(message.content)}"


def config_of(message: Message) -> Mapping[str, Any]:
    """Return the message's configuration.

    Args:
        message: One of Leakbed's own.

    Returns:
        The record, as a mapping.

    Raises:
        WireError: If there is none.
    """
    config = message.content.get(CONFIG)
    if not isinstance(config, ConfigRecord):
        raise WireError(f"{where(message)} needs a ConfigRecord under {CONFIG!r}")
    return config


def whole(message: Message, record: Mapping[str, Any], key: str) -> int:
    """Return a whole number of a record.

    Args:
        message: The record's message, to name it in an error.
        record: A configuration or metrics.
        key: The number's key.

    Returns:
        The number.

    Raises:
        WireError: If it is missing or of another type.
    """
    number = record.get(key)
    if not isinstance(number, int):
        raise WireError(f"{where(message)} needs a whole number {key!r}, got {number!r}")
    return number


def views_under(message: Message, key: str, *, needs: str | None = None) -> dict[str, Array] | None:
    """Return the arrays filed under a key.

    Args:
        message: One of Leakbed's own.
        key: The record's key.
        needs: An array the record cannot do without.

    Returns:
        Read-only views by name, or None if there is no such record.

    Raises:
        WireError: If the record is not an ``ArrayRecord``, or lacks the array it needs.
    """
    record = message.content.get(key)
    if record is None:
        return None
    if not isinstance(record, ArrayRecord):
        raise WireError(f"{where(message)} needs an ArrayRecord under {key!r}")
    if needs is not None and needs not in record:
        raise WireError(f"{where(message)} needs an array {needs!r} under {key!r}")
    return views(record)


def sole_view(message: Message, key: str, name: str) -> Array | None:
    """Return the one array a record is there for, as a read-only view; None without the record."""
    arrays = views_under(message, key, needs=name)
    return None if arrays is None else arrays[name]


def bottom_of(message: Message) -> tuple[dict[str, Array] | None, str]:
    """Return the bottom a message carries, if any, and whether it was sealed or relayed."""
    for policy, key in BOTTOMS.items():
        if (arrays := views_under(message, key)) is not None:
            return arrays, policy
    return None, "sealed"
