"""The index of a trace: one line per record, each with the checksum of all lines before it.

So an index that is cut short, altered or put together from two shows at the first bad line. A
stranger can make the checksums fit, so every line is checked too: its kind, its fields and their
types, the arrays that its kind has, and that what it names lies in the trace.

Files of a trace: written whole, and read though they may come from a stranger.

Written: safetensors, straight from the arrays' own memory, which is hashed and written without a
copy. The names stand in the order in which they were given. Read: opened without following links,
measured first.

A file of a few kilobytes on disk can claim gigabytes (a sparse one), and a link can lead anywhere.
So each part of a path is opened by itself, a file's size is compared with its safetensors header
before the rest is read, and checksums are taken piece by piece.
"""

import hashlib
import json
import math
import os
import re
import stat
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import MISSING, Field, dataclass, fields
from pathlib import Path
from typing import IO, Any

import numpy as np
from safetensors.numpy import load

from leakbed.events import EVENT_TYPES, Array, Arrays, Event, Foreign, Phase

FORMAT = "leakbed-trace"
VERSION = 1
LONGEST_LINE = 64 << 20  # bytes; the longest that is read, far above what a recorder writes
HOLDING = "holding"
TYPES: Mapping[str, type[Event]] = {**EVENT_TYPES, "foreign": Foreign}

_DIGEST = re.compile(r"[0-9a-f]{64}")
_SEAT = re.compile(r"seat/[A-Za-z0-9._/-]+")
_PLACES = ("number", "kind", "arrays", "before")  # of every line, beside the event's own fields
_VALUES = "values"  # of a message's records, beside their arrays


class TraceError(ValueError):
    """A trace is missing, truncated, aborted, altered, of another format, or says too little."""


class ClosedTraceError(TraceError):
    """A recorder whose trace has ended is asked to write."""


@dataclass(frozen=True)
class Record:
    """One line of a trace's index.

    Attributes:
        number: Its place, from 0.
        kind: The event's kind, or ``"holding"``.
        fields: The event's plain fields.
        arrays: Checksum of each array group.
    """

    number: int
    kind: str
    fields: Mapping[str, Any]
    arrays: Mapping[str, str]

    def __str__(self) -> str:
        place = ", ".join(
            f"{k} {self.fields[k]}" for k in ("node", "round", "step", "name") if k in self.fields
        )
        return f"record {self.number} ({self.kind}, {place})"


def held_at(seat: object, name: object) -> str:
    """Return where in a trace a party's holding lies.

    Args:
        seat: The party.
        name: Of what it holds.

    Returns:
        A path in the trace.

    Raises:
        TraceError: If it would lie elsewhere.
    """
    path = f"seat/{seat}/{name}.safetensors"
    if not _SEAT.fullmatch(path) or {"", ".", ".."} & set(path.split("/")):
        raise TraceError(
            f"a party {str(seat)[:80]!r} holds {str(name)[:80]!r}: use letters, digits, '.', '_', "
            "'-' and '/', without empty parts or parts of dots, such as 'server' and 'top/round-1'"
        )
    return path


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
            f"this version reads {FORMAT!r} version {VERSION}"
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
    if not isinstance(arrays, dict) or not all(map(_is_digest, arrays.values())):
        raise TraceError(
            f"{where} ({kind}) needs 'arrays', a table of SHA-256 checksums by name, "
            f"{_seen(line, 'arrays')}"
        )
    plain = {name: value for name, value in line.items() if name not in _PLACES}
    if kind == HOLDING:
        _check_holding(plain, arrays, where)
    else:
        _check_event(TYPES[kind], plain, arrays, f"{where} ({kind})")
    return Record(number, kind, plain, arrays)


def _check_holding(plain: Mapping[str, Any], arrays: Mapping[str, Any], where: str) -> None:
    if set(plain) != {"seat", "name"} or not all(isinstance(v, str) for v in plain.values()):
        raise TraceError(f"{where} (holding) needs a seat and a name, got {_short(dict(plain))}")
    if list(arrays) != [path := held_at(plain["seat"], plain["name"])]:
        raise TraceError(
            f"{where} (holding) must name the one file {path}, got {_short(list(arrays))}"
        )


def _check_event(
    event_type: type[Event], plain: Mapping[str, Any], arrays: Mapping[str, Any], where: str
) -> None:
    own = {field.name: field for field in fields(event_type)}
    content = own.pop("content", None)  # of a foreign message: any groups of arrays
    groups = {name for name, field in own.items() if _holds_arrays(field)}
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


def _holds_arrays(field: "Field[Any]") -> bool:
    return field.type in (Array, Arrays, Array | None)


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


def _is_digest(value: object) -> bool:
    return isinstance(value, str) and _DIGEST.fullmatch(value) is not None


def _seen(line: Mapping[str, Any], key: str) -> str:
    return f"got {_short(line[key])}" if key in line else "got none"


def _short(value: object) -> str:
    return f"{str(value)[:200]!r}" if isinstance(value, str) else f"{value!r}"[:200]


LONGEST_HEADER = 100_000_000  # bytes; safetensors' own limit
_ITEM_BYTES = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "I16", "U16"), 2),
    **dict.fromkeys(("I8", "U8", "BOOL"), 1),
}
"""The types that numpy has, by safetensors' names; bfloat16 and the 8-bit floats are not among."""

_NAMES = {
    np.dtype(numpy): name
    for numpy, name in (
        *(("<f8", "F64"), ("<f4", "F32"), ("<f2", "F16"), ("<c8", "C64"), ("?", "BOOL")),
        *(
            (f"<{kind}{size}", f"{kind.upper()}{8 * size}")
            for kind in "iu"
            for size in (1, 2, 4, 8)
        ),
    )
}
_ALIGNED = 8  # bytes that a header's end is padded to, as safetensors does

_NO_LINKS = getattr(os, "O_NOFOLLOW", 0)  # 0 on Windows, where links are looked for instead
_AT_ONCE = getattr(os, "O_NONBLOCK", 0)  # or a pipe of that name would hold the reader for ever


def storable(arrays: Arrays) -> tuple[dict[str, Array], list[str]]:
    """Return those arrays that a trace can hold, and what is to be said of the others.

    Args:
        arrays: By name.

    Returns:
        Those with a name and a type that safetensors has; and name, shape and type of the others.
    """
    kept, others = {}, []
    for name, value in arrays.items():
        if _can_hold(name, value):
            kept[name] = value
        else:
            others.append(f"{name[:60]!r} ({value.dtype}, {value.shape})")
    return kept, others


def _can_hold(name: str, value: Array) -> bool:
    with suppress(UnicodeEncodeError):
        name.encode()
        return name != "__metadata__" and value.dtype.newbyteorder("<") in _NAMES
    return False


def serialised(arrays: Arrays) -> list[bytes | memoryview]:
    """Return arrays as the parts of a safetensors file, without a copy of those in C order.

    Args:
        arrays: All of them storable.

    Returns:
        The header, then the arrays' bytes: those of wide types first, so that all lie aligned.

    Raises:
        TraceError: If their names are too many for one header.
    """
    lying = {
        name: np.asarray(value, value.dtype.newbyteorder("<"), order="C")
        for name, value in arrays.items()
    }
    start, parts = 0, []
    header: dict[str, Any] = dict.fromkeys(arrays)  # in their order; filled below
    for name, value in sorted(lying.items(), key=lambda item: -item[1].itemsize):
        offsets = [start, start := start + value.nbytes]
        shape = list(value.shape)
        about: dict[str, Any] = {"dtype": _NAMES[value.dtype], "shape": shape}
        header[name] = {**about, "data_offsets": offsets}
        parts.append(value.reshape(-1).view(np.uint8).data)
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNED)
    if len(text) > LONGEST_HEADER:
        raise TraceError(f"{len(arrays)} arrays have a header of {len(text)} bytes, too long")
    return [len(text).to_bytes(8, "little") + text, *parts]


def checksum(parts: Sequence[bytes | memoryview]) -> str:
    """Return the SHA-256 of a file's parts."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def deserialised(data: bytes) -> dict[str, Array]:
    """Return the arrays of a safetensors file, in the order of its header.

    Args:
        data: The file, whose header was checked.

    Returns:
        Arrays by name.
    """
    arrays: Mapping[str, Array] = load(data)
    length = int.from_bytes(data[:8], "little")
    names = json.loads(data[8 : 8 + length])
    return {name: arrays[name] for name in names if name != "__metadata__"}


class Recent:
    """Checksums of the arrays that were written last, so that equal ones are not hashed again.

    A model that is sent to many nodes is one object in memory, which is known by sight; replies
    that are equal are found by a look at their bytes, which ends at the first that differs. Only
    arrays over ``bytes`` are known so: nothing else is sure to stay as it was.
    """

    def __init__(self) -> None:
        """Know of none."""
        self._known: deque[tuple[_Look, str]] = deque(maxlen=_REMEMBERED)

    def checksum(self, arrays: Arrays) -> str | None:
        """Return the checksum of arrays equal to these; None if it is not known.

        Args:
            arrays: By name.

        Returns:
            As it was remembered.
        """
        look = _look(arrays)
        for entry in [] if look is None else list(self._known):
            if entry[0] == look:
                self._known.remove(entry)
                self._known.append(entry)  # the last to be forgotten
                return entry[1]
        return None

    def remember(self, arrays: Arrays, checksum: str) -> None:
        """Know arrays from now on, and forget the ones that were not met for longest.

        Args:
            arrays: By name; their memory is kept for as long as they are known.
            checksum: Theirs.
        """
        if (look := _look(arrays)) is not None:
            self._known.append((look, checksum))

    def forget(self) -> None:
        """Let go of all memory."""
        self._known.clear()


_Look = list[tuple[str, str, tuple[int, ...], tuple[int, ...], int, bytes]]
_REMEMBERED = 2  # groups of arrays: what was sent to a node, and what came back
_WORTH_A_LOOK = 1 << 16  # bytes; fewer are hashed at once


def _look(arrays: Arrays) -> _Look | None:
    """Return what tells arrays apart: their names, layouts and the bytes they lie in."""
    look: _Look = []
    if sum(value.nbytes for value in arrays.values()) < _WORTH_A_LOOK:
        return None
    for name, value in arrays.items():
        owner: Any = value
        while isinstance(owner, np.ndarray):
            owner = owner.base
        owner = owner.obj if isinstance(owner, memoryview) else owner
        if not isinstance(owner, bytes):
            return None
        start = value.__array_interface__["data"][0] - np.frombuffer(owner, np.uint8).ctypes.data
        look.append((name, value.dtype.str, value.shape, value.strides, start, owner))
    return look


@contextmanager
def opened(folder: Path, inside: str) -> Iterator[IO[bytes]]:
    """Open a file of a trace for reading; nothing outside the folder, and no link.

    Args:
        folder: The trace; may itself be reached by a link.
        inside: The file's path in it, checked already: no empty parts, no dots.

    Yields:
        The file.

    Raises:
        OSError: If it is missing, a link or no plain file, or lies behind a link.
    """
    place = folder
    for part in Path(inside).parts[:-1]:
        place /= part
        if not stat.S_ISDIR(place.lstat().st_mode):
            raise OSError(f"{place} is a link or no folder")
    path = folder / inside
    if not stat.S_ISREG(path.lstat().st_mode):
        raise OSError(f"{path} is a link or no plain file")
    with os.fdopen(os.open(path, os.O_RDONLY | _NO_LINKS | _AT_ONCE), "rb") as file:
        yield file


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


def checked_header(file: IO[bytes], *, size: int) -> None:
    """Refuse a file whose size is not what its safetensors header says, before the rest is read.

    Args:
        file: At its beginning; it is there again afterwards.
        size: Of the file, in bytes.

    Raises:
        TraceError: If the header is none, names a type that numpy lacks, or does not fit the size.
    """
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > min(LONGEST_HEADER, size - 8):  # noqa: PLR2004  the length's own bytes
        raise TraceError(f"{size} bytes are too few for its safetensors header")
    try:
        header = json.loads(file.read(length))
        said = sum(_bytes_of(about) for name, about in header.items() if name != "__metadata__")
    except Exception as error:
        raise TraceError(f"its safetensors header is none: {type(error).__name__}") from error
    if said != size - 8 - length:
        raise TraceError(
            f"its safetensors header tells of {said} bytes of arrays, it holds {size - 8 - length}"
        )
    file.seek(0)


def digest_of(file: IO[bytes]) -> str:
    """Return a file's SHA-256, read piece by piece."""
    return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]


def _bytes_of(about: Any) -> int:  # noqa: ANN401  whatever a stranger wrote
    start, stop = about["data_offsets"]
    size: int = math.prod(about["shape"]) * _ITEM_BYTES[about["dtype"]]
    if min(about["shape"], default=0) < 0 or stop - start != size:
        raise ValueError(f"an array of {size} bytes from {start} to {stop}")
    return size
