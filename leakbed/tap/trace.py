"""Traces: recorded events in order, to be attacked later, elsewhere, by anyone they are given to.

A trace is a folder: ``index.jsonl`` (a header, one line per record, a closing line; every line
carries the checksum of all lines before it) and ``segments/`` (files that only grow, of safetensors
one after another; equal ones are stored once). It never holds private truth or a seed. Everything
is readable by its owner only, and nothing in it is ever unpickled.

A trace may come from a stranger. Reading one opens no file outside of it and follows no link in it,
reads no array that is longer than its own header says, and refuses all else with a TraceError.
"""

import atexit
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Any

import numpy as np
from flwr.app import RecordDict

from leakbed.errors import naming_folder
from leakbed.events import Arrays, Event, Foreign, Phase, Records, arrays_of, scalars_of
from leakbed.tap.segments import (
    Extent,
    Parts,
    Reading,
    Recent,
    Segments,
    TraceError,
    create,
    opened,
    serialised,
    storable,
)
from leakbed.tap.trace_index import (
    FORMAT,
    HELD,
    HOLDING,
    LONGEST_LINE,
    TYPES,
    VERSION,
    ClosedTraceError,
    Record,
    lines_of,
    parse,
)
from leakbed.tap.trace_values import LONGEST_TEXT, Stored, restored
from leakbed.wire.records import buffer_of

__all__ = ["Record", "Recorder", "Trace", "TraceError"]

_INDEX = "index.jsonl"
_as_line = json.JSONEncoder(separators=(",", ":")).encode
_KINDS = {cls: kind for kind, cls in TYPES.items()}
# Fields that are one array, not several by name.
_SINGLE = {"smashed", "labels", "rows", "gradient", "features"}


class Recorder:
    """A passive hook that writes every event to a trace.

    Close it (it is a context manager); at the latest it closes when the process ends. Every record
    is whole in the folder before the next one is begun, so that a trace which was never closed, or
    which an error ended (of the app inside the ``with``, or of a write here), can be read up to its
    last whole record.
    """

    draws_nothing = True
    only_reads = True

    def __init__(
        self,
        folder: str | Path,
        *,
        about: Mapping[str, Any] | None = None,
        tapped: Mapping[str, Any] | None = None,
    ) -> None:
        """Start a trace.

        Args:
            folder: Where to write; made if absent.
            about: What the adversary may know of the run, from :func:`leakbed.tap.facts.about`;
                without it the trace can be read but not attacked. JSON values, never a seed, a
                learning rate or private truth.
            tapped: What app was tapped, of which run and under which Flower, for whoever looks at
                the trace. JSON values.

        Raises:
            TraceError: If the folder already holds something.
        """
        self.folder = Path(folder)
        if self.folder.exists() and any(self.folder.iterdir()):
            raise TraceError(f"{self.folder} is not empty; record into a new folder")
        self.folder.mkdir(parents=True, exist_ok=True)
        self.folder.chmod(0o700)
        self._segments = Segments(self.folder)
        self._digest = hashlib.sha256()
        self._count = 0
        self._recent = Recent()
        self._lock = Lock()
        self._index = os.fdopen(create(self.folder / _INDEX), "wb")
        said = {"tapped": dict(tapped)} if tapped else {}
        self._write({"format": FORMAT, "version": VERSION, "about": dict(about or {}), **said})
        atexit.register(self.close)

    def __repr__(self) -> str:
        return f"Recorder({str(self.folder)!r})"

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None:
            self.close()
            return
        with self._lock:
            self._abort(error)

    def __call__(self, event: Event) -> None:
        """Write one event.

        A message whose arrays cannot be stored (a type that safetensors lacks, such as complex128,
        a name such as ``__metadata__``, or too many of them) is written as a foreign one with its
        size, so that no sender can spoil what others sent.
        """
        self._whole(self._tell, event)

    def hold(self, seat: str, name: str, arrays: Arrays) -> None:
        """Write what a party itself holds, such as its part of the model at a round's end.

        Arrays that cannot be stored are a TraceError.

        Args:
            seat: The party; only views of this seat may read it.
            name: What it is, such as ``"top/round-2"``.
            arrays: Its tensors by name.
        """
        line = {"kind": HOLDING, "seat": seat, "name": name}
        self._whole(lambda: self._record(line, {HELD: self._segments.add(_saved(arrays))}))

    def close(self) -> None:
        """Write the closing line; a second call does nothing."""
        with self._lock:
            self._end({"end": self._count})

    def _whole(self, write: Callable[..., None], *args: Any) -> None:  # noqa: ANN401  what it takes
        """Write one record whole, or end the trace: it must not look complete without it."""
        with self._lock:
            if self._index.closed:
                raise ClosedTraceError(f"{self.folder} is closed; it takes no more records")
            try:
                with naming_folder(self.folder):
                    write(*args)
            except BaseException as error:
                self._abort(error)
                raise

    def _abort(self, error: BaseException) -> None:
        reason = f"{type(error).__name__}: {error}"
        with suppress(OSError):  # a full disk takes no last line either; then it is truncated
            self._end({"aborted": reason, "number": self._count})

    def _end(self, line: Mapping[str, Any]) -> None:
        if self._index.closed:
            return
        atexit.unregister(self.close)
        self._recent.forget()
        self._segments.close()
        try:
            with naming_folder(self.folder):
                self._write(line)
        finally:
            self._index.close()

    def _tell(self, event: Event) -> None:
        try:
            event, groups, values = _sorted(event)
            parts = {name: self._parts(arrays) for name, arrays in groups.items()}
            _check_names(parts)
        except _UnstorableError as error:
            event, groups, values, parts = _as_foreign(event, str(error)), {}, {}, {}
        line = {"kind": _KINDS[type(event)], **_shortened(scalars_of(event)), **values}
        written = {name: self._added(groups[name], parts[name]) for name in groups}
        self._record(line, written)

    def _record(self, line: dict[str, Any], arrays: Mapping[str, Extent]) -> None:
        places = {name: extent.line() for name, extent in arrays.items()}
        self._write({"number": self._count, **line, "arrays": places})
        self._segments.keep()
        self._count += 1

    def _write(self, line: Mapping[str, Any]) -> None:
        chained = {**line, "before": self._digest.hexdigest()}
        data = _as_line(chained).encode() + b"\n"
        self._digest.update(data)
        self._index.write(data)
        self._index.flush()

    def _parts(self, arrays: Arrays) -> Parts | Extent:
        """Return arrays as the parts of a file, or where equal ones lie already."""
        known = self._recent.extent(arrays)
        return _saved(arrays) if known is None else known

    def _added(self, arrays: Arrays, parts: Parts | Extent) -> Extent:
        if isinstance(parts, Extent):
            return parts
        extent = self._segments.add(parts)
        self._recent.remember(arrays, extent)
        return extent


class Trace:
    """A trace, verified when opened.

    Attributes:
        folder: Where it lies.
        about: What was said of the run when it was recorded.
        tapped: What app was tapped, of which run; empty where nobody said so.
        records: The index, in order.
        incomplete: Why there may have been more to record; None of a closed trace.
    """

    def __init__(self, folder: str | Path, *, partial: bool = False) -> None:
        """Open and verify a trace.

        Args:
            folder: A folder a :class:`Recorder` wrote.
            partial: Whether one that was never closed is read up to its last whole record, instead
                of being refused. ``incomplete`` says whether it was one.

        Raises:
            TraceError: If it is missing, not closed or altered, or holds what no recorder writes;
                names the first bad record.
        """
        self.folder = Path(folder)
        try:
            with opened(self.folder, _INDEX) as index:
                lines = lines_of(index, self.folder)
                header, self.records, self.incomplete = parse(lines, self.folder, partial=partial)
        except OSError as error:
            raise TraceError(f"{self.folder} holds no trace: there is no {_INDEX}") from error
        self.about: Mapping[str, Any] = header["about"]
        self.tapped: Mapping[str, Any] = header.get("tapped", {})
        self._held: dict[Extent, Arrays] = {}
        checked: set[Extent] = set()
        with Reading(self.folder) as files:
            for record in self.records:
                for name, extent in record.arrays.items():
                    if extent not in checked:
                        self._read(files, record, name)
                        checked.add(extent)

    def hold(self, *, at_most: int | None = None) -> None:
        """Read every array into memory, so that the folder may go.

        Args:
            at_most: Bytes; the arrays of a longer trace stay where they are.
        """
        extents = {each for record in self.records for each in record.arrays.values()}
        if at_most is not None and sum(each.size for each in extents) > at_most:
            return
        with Reading(self.folder) as files:
            for record in self.records:
                for name, extent in record.arrays.items():
                    if extent not in self._held:
                        self._held[extent] = self._read(files, record, name, arrays=True)

    def events(self, *kinds: type[Event], round_: int | None = None) -> Iterator[Event]:
        """Yield the recorded events in order.

        Args:
            *kinds: Only events of these classes; all if none is given.
            round_: Only events of this round; all if None. Others are not read.

        Yields:
            Events with arrays of their own.
        """
        with Reading(self.folder) as files:
            for record in self.records:
                event_type = TYPES.get(record.kind)
                wanted = round_ is None or record.fields.get("round") == round_
                if wanted and event_type is not None and issubclass(event_type, kinds or Event):
                    yield self._event(files, record, event_type)

    def holding(self, seat: str, name: str) -> Arrays | None:
        """Return the tensors that a party held under a name, or None."""
        for record in self.records:
            if record.kind == HOLDING and record.fields == {"seat": seat, "name": name}:
                with Reading(self.folder) as files:
                    return self._read(files, record, HELD, arrays=True)
        return None

    def _event(self, files: Reading, record: Record, event_type: type[Event]) -> Event:
        values: dict[str, Any] = dict(record.fields)
        if "phase" in values:
            values["phase"] = Phase(values["phase"])
        groups = {name: self._read(files, record, name, arrays=True) for name in record.arrays}
        if issubclass(event_type, Records):
            values["content"] = self._records(record, values.pop("values", {}), groups)
        else:
            for name, group in groups.items():
                if name in _SINGLE and name not in group:
                    raise TraceError(f"{self.folder}: {record} lacks the array {name} in its file")
                values[name] = group[name] if name in _SINGLE else group
        return event_type(**values)

    def _records(
        self, record: Record, values: Mapping[str, Any], groups: Mapping[str, Arrays]
    ) -> RecordDict:
        try:
            return restored(values, groups)
        except TraceError as error:
            raise TraceError(f"{self.folder}: {record}: {error}") from error

    def _read(self, files: Reading, record: Record, name: str, *, arrays: bool = False) -> Arrays:
        """Check a group of a record's arrays; return them if they are wanted, else none."""
        extent = record.arrays[name]
        if extent in self._held:
            return {each: array.copy() for each, array in self._held[extent].items()}
        try:
            return files.read(extent, arrays=arrays)
        except TraceError as error:
            raise TraceError(f"{self.folder}: {record} was altered: {name}: {error}") from error
        except OSError as error:
            raise TraceError(
                f"{self.folder}: {record} is missing its file {extent.inside}, or it is a link or "
                "cannot be read"
            ) from error


class _UnstorableError(TraceError):
    """Arrays have a name or type that safetensors cannot hold, or there are too many."""


def _sorted(event: Event) -> tuple[Event, dict[str, Arrays], dict[str, Any]]:
    """Return an event, its groups of arrays, and what else its line says."""
    if not isinstance(event, Records):
        return event, arrays_of(event), {}
    stored = Stored(event.content)
    skipped = ", ".join([*([event.skipped] if event.skipped else []), *stored.skipped])
    event = replace(event, size=stored.size or event.size, skipped=skipped or None)
    return event, stored.arrays, {"values": stored.values} if stored.values else {}


def _as_foreign(event: Event, why: str) -> Foreign:
    """Return what is kept of a message whose arrays cannot be stored: how many bytes they are."""
    kind = _KINDS[type(event)]
    if isinstance(event, Records):
        kind, up = event.message_type, event.up
        records = event.content.array_records.values()
        size = sum(len(buffer_of(array)) for record in records for array in record.values())
    else:
        up = bool(getattr(event, "up", kind.endswith("-up")))
        arrays = [a for group in arrays_of(event).values() for a in group.values()]
        size = sum(np.asarray(array).nbytes for array in arrays)
    return Foreign(
        node=event.node,
        round=event.round,
        step=event.step,
        message_type=kind,
        up=up,
        content=RecordDict(),
        size=size,
        skipped=why,
    )


def _shortened(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return fields with at most so much of a message's own words as an index can bear."""
    return {k: v[:LONGEST_TEXT] if isinstance(v, str) else v for k, v in fields.items()}


def _check_names(groups: Mapping[str, object]) -> None:
    """Refuse names that fill an index's line; each may take six times its length, and a digest."""
    if 6 * sum(map(len, groups)) + 100 * len(groups) > LONGEST_LINE // 2:
        raise _UnstorableError(f"{len(groups)} groups of arrays, too many for one record")


def _saved(arrays: Arrays) -> Parts:
    """Return arrays as the parts of a safetensors file; one that it cannot hold is refused."""
    kept, others = storable({name: np.asarray(value) for name, value in arrays.items()})
    if others:
        raise _UnstorableError(f"arrays of these names and types cannot be stored: {others}")
    try:
        return serialised(kept)
    except TraceError as error:
        raise _UnstorableError(str(error)) from error
