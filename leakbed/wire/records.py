"""Records: arrays into Flower records and back, with errors that name the message."""

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
from flwr.app import Array as WireArray
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict

from leakbed.events import Array, Arrays

CONFIG, METRICS, ROUND = "config", "metrics", "server-round"  # Flower's own keys
GRADIENT, SMASHED = "cut-gradient", "smashed"
SEALED = "sealed."  # what lies under keys that start so, no tap may read
BOTTOMS = {"sealed": f"{SEALED}bottom", "relayed": "relayed.bottom"}


class WireError(ValueError):
    """A message lacks a record, or holds one of another kind than its type promises."""


def pack(arrays: Arrays) -> ArrayRecord:
    """Return arrays as a Flower record."""
    return ArrayRecord({name: WireArray(np.asarray(value)) for name, value in arrays.items()})


def unpack(record: ArrayRecord) -> dict[str, Array]:
    """Return a Flower record's arrays, as copies that may be written."""
    return {name: value.numpy() for name, value in record.items()}


def copy_records(records: RecordDict) -> RecordDict:
    """Return records that share nothing mutable with the given ones (array bytes are shared)."""
    copied = RecordDict()
    for key, record in records.items():
        if isinstance(record, ArrayRecord):
            copied[key] = ArrayRecord(
                {k: WireArray(a.dtype, tuple(a.shape), a.stype, a.data) for k, a in record.items()}
            )
        else:
            copied[key] = copy.deepcopy(record)
    return copied


def count_bytes(message: Message) -> int:
    """Return the bytes of a message's arrays as they travel; 0 for an error."""
    if not message.has_content():
        return 0
    return sum(r.count_bytes() for r in message.content.array_records.values())


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


def arrays_under(
    message: Message, key: str, *, needs: str | None = None
) -> dict[str, Array] | None:
    """Return the arrays filed under a key.

    Args:
        message: One of Leakbed's own.
        key: The record's key.
        needs: An array the record cannot do without.

    Returns:
        Copies by name, or None if there is no such record.

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
    return unpack(record)


def bottom_of(message: Message) -> tuple[dict[str, Array] | None, str]:
    """Return the bottom a message carries, if any, and whether it was sealed or relayed."""
    for policy, key in BOTTOMS.items():
        if (arrays := arrays_under(message, key)) is not None:
            return arrays, policy
    return None, "sealed"
