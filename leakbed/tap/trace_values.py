"""Records of a message in a trace: numbers and words in the index's line, all else in files.

A metric or a setting of a message is what an app says of its training in the clear: a loss, a
count, statistics of a query, or the masked vector that secure aggregation sends as bytes. Short
values stand in the line as JSON; bytes, and lists of many numbers, are arrays of the record's file.
"""

import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from leakbed.events import Array, Arrays
from leakbed.tap.segments import TraceError, storable
from leakbed.tap.trace_index import LONGEST_LINE
from leakbed.wire.records import buffer_of, pack, readable

LONGEST_TEXT = 10_000  # characters of a message's own words that are kept
_LONGEST_LIST = 1000  # numbers that are kept as text
_LONGEST_VALUES = LONGEST_LINE // 8
_KINDS = {"metrics": MetricRecord, "config": ConfigRecord}


class Stored:
    """What is kept of a message's records.

    Attributes:
        arrays: By record and name.
        values: Of metrics and configurations, as JSON has them.
        size: Bytes of the arrays that are not kept.
        skipped: What is not kept, and why.
    """

    def __init__(self, content: RecordDict) -> None:
        """Sort what a message carries."""
        self.arrays: dict[str, Arrays] = {}
        self.values: dict[str, Any] = {}
        self.size = 0
        self.skipped: list[str] = []
        for key, record in content.items():
            if isinstance(record, ArrayRecord):
                self._keep_arrays(key, record)
            else:
                self._keep_values(key, record)

    def _keep_arrays(self, key: str, record: ArrayRecord) -> None:
        read, others = readable(record)
        kept, unstorable = storable(read)
        self.skipped += [f"{key}/{said}" for said in [*others, *unstorable]]
        self.size += sum(len(buffer_of(wire)) for name, wire in record.items() if name not in kept)
        if kept:
            self.arrays[key] = kept

    def _keep_values(self, key: str, record: ConfigRecord | MetricRecord) -> None:
        values: dict[str, Any] = {}
        arrays: dict[str, Array] = {}
        for name, value in record.items():
            if isinstance(value, str) and len(value) > LONGEST_TEXT:
                self.skipped.append(f"{key}/{name[:60]} (its end: {len(value)} characters)")
            values[name], array = _split(value)
            if array is not None:
                arrays[name] = array
        kept, unstorable = storable(arrays)
        kind = "metrics" if isinstance(record, MetricRecord) else "config"
        said = {"is": kind, "values": values}
        if unstorable or len(json.dumps([key, self.values, said])) > _LONGEST_VALUES:
            self.skipped.append(f"{key[:60]} ({len(record)} values)")
            return
        self.values[key] = said
        if kept:
            self.arrays[key] = kept


def restored(values: Mapping[str, Any], arrays: Mapping[str, Arrays]) -> RecordDict:
    """Return the records that were kept.

    Args:
        values: From the index's line, whatever a stranger wrote there.
        arrays: By record and name.

    Returns:
        Them, arrays first.

    Raises:
        TraceError: If they are none that a recorder writes.
    """
    content = RecordDict({k: pack(group) for k, group in arrays.items() if k not in values})
    for key, said in values.items():
        try:
            inner = {
                name: _joined(value, arrays.get(key, {}).get(name))
                for name, value in said["values"].items()
            }
            content[key] = _KINDS[said["is"]](inner)
        except Exception as error:  # Flower's records raise several kinds
            raise TraceError(f"the values of {key[:60]!r} are none: {error}") from error
    return content


def _split(value: Any) -> tuple[Any, Array | None]:  # noqa: ANN401  whatever a record may hold
    """Return a value as the line has it, and what of it is an array."""
    if isinstance(value, bytes):
        return {"bytes": len(value)}, np.frombuffer(value, np.uint8)
    if not isinstance(value, list):
        return _cut_short(value), None
    if value and isinstance(value[0], bytes):
        return {"bytes": [len(each) for each in value]}, np.frombuffer(b"".join(value), np.uint8)
    if len(value) > _LONGEST_LIST and not isinstance(value[0], str):
        array = np.asarray(value)
        if array.dtype.kind in "if" and array.tolist() == value:
            return {"numbers": len(value)}, array
    return [_cut_short(each) for each in value], None


def _cut_short(value: Any) -> Any:  # noqa: ANN401  whatever a record may hold
    return value[:LONGEST_TEXT] if isinstance(value, str) else value


def _joined(value: Any, array: Array | None) -> Any:  # noqa: ANN401  whatever a record may hold
    """Return what :func:`_split` split."""
    if not isinstance(value, dict):
        return value
    if array is None:
        raise TraceError("its array is missing")
    if "numbers" in value:
        return array.tolist()
    return _cut(array.tobytes(), value["bytes"])


def _cut(data: bytes, lengths: int | Sequence[int]) -> bytes | list[bytes]:
    """Return bytes as they were, one piece or several."""
    each = [lengths] if isinstance(lengths, int) else lengths
    if min(each, default=0) < 0 or sum(each) != len(data):
        raise TraceError(f"{len(data)} bytes are not those of lengths {each!r:.200}")
    if isinstance(lengths, int):
        return data
    ends = np.cumsum([0, *lengths]).tolist()
    return [data[start:end] for start, end in pairwise(ends)]
