"""The index of a trace: one line per record, each with the checksum of all lines before it.

So an index that is cut short, altered or put together from two shows at the first bad line. A
stranger can make the checksums fit, so every line is checked too: its kind, its fields and their
types, the arrays that its kind has, and that what it names lies in the trace.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, fields
from pathlib import Path
from typing import IO, Any

from leakbed.events import ARRAY_FIELDS, EVENT_TYPES, Event, Foreign, Phase
from leakbed.tap.segments import Extent, TraceError

FORMAT = "leakbed-trace"
VERSION = 2
LONGEST_LINE = 64 << 20  # bytes; the longest that is read, far above what a recorder writes
HOLDING = "holding"
HELD = "held"  # the one group of arrays of a holding
TYPES: Mapping[str, type[Event]] = {**EVENT_TYPES, "foreign": Foreign}

_PLACES = ("number", "kind", "arrays", "before")  # of every line, beside the event's own fields
_VALUES = "values"  # of a message's records, beside their arrays


class ClosedTraceError(TraceError):
    """A recorder whose trace has ended is asked to write."""


@dataclass(frozen=True)
class Record:
    """One line of a trace's index.

    Attributes:
        number: Its place, from 0.
        kind: The event's kind, or ``"holding"``.
        fields: The event's plain fields.
        arrays: Where each group of arrays lies, with its checksum.
    """

    number: int
    kind: str
    fields: Mapping[str, Any]
    arrays: Mapping[str, Extent]

    def __str__(self) -> str:
        place = ", ".join(
            f"{k} {self.fields[k]}" for k in ("node", "round", "step", "name") if k in self.fields
        )
        return f"record {self.number} ({self.kind}, {place})"


def parse(
    lines: Iterable[bytes], folder: Path, *, partial: bool = False
) -> tuple[dict[str, Any], list[Record], str | None]:
    """Check the chain of lines; an altered line shows at the next one's checksum.

    Args:
        lines: Of the index, with their line ends.
        folder: The trace, for messages.
        partial: Whether one that was never closed is read up to its last whole record, as a
            process that was killed leaves it. Whatever is altered is refused still.

    Returns:
        The header, the records, and why there may be more to come; None of a closed trace.

    Raises:
        TraceError: If the index is not as it was written, or not closed.
    """
    parsed: list[dict[str, Any]] = []
    digest = hashlib.sha256()
    torn = None
    for number, raw in enumerate(lines, start=-1):  # the header is line -1, record 0 follows
        if torn is not None:  # what cannot be read may stand at the very end alone
            raise TraceError(torn)
        line = _decoded(raw)
        if line is None:
            torn = f"{folder} is truncated: record {max(number, 0)} cannot be read"
            if not partial:
                raise TraceError(torn)
            continue
        place = line.get("number", line.get("end"))
        if number >= 0 and (type(place) is not int or place != number):
            raise TraceError(f"{folder} is truncated: record {number} is missing")
        if line.get("before") != digest.hexdigest():
            raise TraceError(f"{folder}: the index was altered at record {max(number - 1, 0)}")
        digest.update(raw)
        parsed.append(line)
    header = parsed[0] if parsed else {}
    _check_header(header, folder)
    why = torn or _unclosed(parsed, folder)
    if why is not None and not partial:
        raise TraceError(why)
    closed = len(parsed) > 1 and ("aborted" in parsed[-1] or "end" in parsed[-1])
    ended = len(parsed) - 1 if closed else len(parsed)
    return header, [_record(line, folder) for line in parsed[1:ended]], why


def _check_header(header: Mapping[str, Any], folder: Path) -> None:
    if header.get("format") != FORMAT or header.get("version") != VERSION:
        raise TraceError(
            f"{folder} is format {header.get('format')!r} version {header.get('version')!r}; "
            f"this version of Leakbed reads {FORMAT!r} version {VERSION}; record it again, or "
            "read it with the version that wrote it"
        )
    for table in ("about", "tapped"):
        if not isinstance(header.get(table, {} if table == "tapped" else None), dict):
            raise TraceError(
                f"{folder}: the header's {table!r} must be a table, {_seen(header, table)}"
            )


def _unclosed(parsed: Sequence[Mapping[str, Any]], folder: Path) -> str | None:
    """Say how a trace ended that has no closing line."""
    if "aborted" in parsed[-1]:
        return f"{folder} was aborted after {len(parsed) - 2} records: {parsed[-1]['aborted']}"
    if parsed[-1].get("end") != len(parsed) - 2:
        return f"{folder} is truncated: record {len(parsed) - 1} should follow"
    return None


def _decoded(raw: bytes) -> dict[str, Any] | None:
    try:
        line = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    return line if isinstance(line, dict) and raw.endswith(b"\n") else None


def _record(line: Mapping[str, Any], folder: Path) -> Record:
    """Return a line as a record, or refuse what no recorder writes."""
    number, kind, arrays = line.get("number"), line.get("kind"), line.get("arrays")
    where = f"{folder}: record {number}"
    if not isinstance(number, int):
        raise TraceError(f"{folder} ends before its last line")
    if not isinstance(kind, str) or kind not in {*TYPES, HOLDING}:
        known = ", ".join(sorted({*TYPES, HOLDING}))
        raise TraceError(
            f"{where} needs a kind this version knows ({known}), {_seen(line, 'kind')}"
        )
    places = (
        {k: Extent.of(v) for k, v in arrays.items()} if isinstance(arrays, dict) else {"": None}
    )
    extents = {name: extent for name, extent in places.items() if extent is not None}
    if len(extents) < len(places):
        raise TraceError(
            f"{where} ({kind}) needs 'arrays', a table of [SHA-256, segment, offset, bytes] by "
            f"name, {_seen(line, 'arrays')}"
        )
    plain = {name: value for name, value in line.items() if name not in _PLACES}
    if kind == HOLDING:
        _check_holding(plain, extents, where)
    else:
        _check_event(TYPES[kind], plain, extents, f"{where} ({kind})")
    return Record(number, kind, plain, extents)


def _check_holding(plain: Mapping[str, Any], arrays: Mapping[str, Any], where: str) -> None:
    if set(plain) != {"seat", "name"} or not all(isinstance(v, str) for v in plain.values()):
        raise TraceError(f"{where} (holding) needs a seat and a name, got {_short(dict(plain))}")
    if list(arrays) != [HELD]:
        raise TraceError(
            f"{where} (holding) must have the one group {HELD!r}, got {_short(list(arrays))}"
        )


def _check_event(
    event_type: type[Event], plain: Mapping[str, Any], arrays: Mapping[str, Any], where: str
) -> None:
    own = {field.name: field for field in fields(event_type)}
    content = own.pop("content", None)  # of a foreign message: any groups of arrays
    groups = set(ARRAY_FIELDS[event_type])
    needed = {name for name, field in own.items() if field.default is MISSING}
    if content:
        plain = dict(plain)
        _check_values(plain.pop(_VALUES, {}), where)
    found = {*plain, *(() if content else arrays)}
    if (
        found - set(own)
        or needed - found
        or groups & set(plain)
        or (not content and set(arrays) - groups)
    ):
        raise TraceError(
            f"{where} needs the fields {', '.join(sorted(needed))} and may have "
            f"{', '.join(sorted(set(own) - needed)) or 'no others'}, "
            f"got {_short(sorted(found))}"
        )
    for name, value in plain.items():
        if not _fits(value, own[name]):
            raise TraceError(f"{where}: {name} must be {_named(own[name])}, got {_short(value)}")


def _check_values(values: object, where: str) -> None:
    tables = isinstance(values, dict) and all(isinstance(each, dict) for each in values.values())
    if not tables:
        raise TraceError(f"{where}: values must be a table of tables, got {_short(values)}")


def _fits(value: object, field: "Field[Any]") -> bool:
    if field.type is Phase:
        return isinstance(value, str) and value in list(Phase)
    if isinstance(value, bool):
        return field.type is bool
    wanted: Any = field.type if field.type != float | None else int | float
    return isinstance(value, wanted)


def _named(field: "Field[Any]") -> str:
    if field.type is Phase:
        return " or ".join(repr(str(phase)) for phase in Phase)
    return field.type.__name__ if isinstance(field.type, type) else str(field.type)


def _seen(line: Mapping[str, Any], key: str) -> str:
    return f"got {_short(line[key])}" if key in line else "got none"


def _short(value: object) -> str:
    return f"{str(value)[:200]!r}" if isinstance(value, str) else f"{value!r}"[:200]


def lines_of(file: IO[bytes], folder: Path) -> Iterator[bytes]:
    """Yield an index's lines with their ends; one that never ends is not read whole.

    Args:
        file: The index.
        folder: The trace, for the message.

    Yields:
        One line after another.

    Raises:
        TraceError: If a line is longer than any that is written.
    """
    number = -1  # the header; record 0 follows
    while line := file.readline(LONGEST_LINE + 1):
        if len(line) > LONGEST_LINE:
            raise TraceError(
                f"{folder}: record {max(number, 0)} takes more than {LONGEST_LINE} bytes of the "
                "index; no trace has such lines"
            )
        yield line
        number += 1
