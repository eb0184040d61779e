"""Traces: recorded events in order, to be attacked later, elsewhere, by anyone they are given to.

A trace is a folder: ``index.jsonl`` (a header, one line per record, a closing line; every line
carries the checksum of all lines before it), ``blobs/`` (safetensors files named by their SHA-256,
equal ones stored once) and ``seat/<name>/`` (what that party itself holds). It never holds private
truth or a seed. Everything is readable by its owner only, and nothing in it is ever unpickled.
"""

import atexit
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Any

import numpy as np
from flwr.app import RecordDict
from safetensors.numpy import load, save

from leakbed.events import EVENT_TYPES, Arrays, Event, Foreign, Phase, arrays_of, scalars_of
from leakbed.trace_index import FORMAT, VERSION, Record, TraceError, parse
from leakbed.wire.records import pack, unpack

__all__ = ["Record", "Recorder", "Trace", "TraceError"]

_INDEX, _BLOBS, _SEAT = "index.jsonl", "blobs", "seat"
_TYPES: dict[str, type[Event]] = {**EVENT_TYPES, "foreign": Foreign}
_KINDS = {cls: kind for kind, cls in _TYPES.items()}
_SINGLE = {"smashed", "labels", "rows", "gradient"}  # fields that are one array, not several


class Recorder:
    """A passive hook that writes every event to a trace.

    Close it (it is a context manager); at the latest it closes when the process ends. A trace that
    was never closed is refused as truncated, and one that an error ended, of the app inside the
    ``with`` or of a write here, as aborted.
    """

    draws_nothing = True

    def __init__(self, folder: str | Path, *, about: Mapping[str, Any] | None = None) -> None:
        """Start a trace.

        Args:
            folder: Where to write; made if absent.
            about: What the adversary may know of the run, from :func:`leakbed.about.about`; without
                it the trace can be read but not attacked. JSON values, never a seed, a learning
                rate or private truth.

        Raises:
            TraceError: If the folder already holds something.
        """
        self.folder = Path(folder)
        if self.folder.exists() and any(self.folder.iterdir()):
            raise TraceError(f"{self.folder} is not empty; record into a new folder")
        self.folder.mkdir(parents=True, exist_ok=True)
        self.folder.chmod(0o700)
        for part in (_BLOBS, _SEAT):
            (self.folder / part).mkdir(mode=0o700)
        self._digest = hashlib.sha256()
        self._count = 0
        self._lock = Lock()
        self._index = os.fdopen(_create(self.folder / _INDEX), "wb")
        self._write({"format": FORMAT, "version": VERSION, "about": dict(about or {})})
        atexit.register(self.close)

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
        """Write one event."""
        with self._whole():
            groups = _foreign_arrays(event) if isinstance(event, Foreign) else arrays_of(event)
            line = {"kind": _KINDS[type(event)], **scalars_of(event)}
            self._record(line, {name: self._blob(arrays) for name, arrays in groups.items()})

    def hold(self, seat: str, name: str, arrays: Arrays) -> None:
        """Write what a party itself holds, such as its part of the model at a round's end.

        Args:
            seat: The party; only views of this seat may read it.
            name: What it is, such as ``"top/round-2"``.
            arrays: Its tensors by name.
        """
        path = f"{_SEAT}/{seat}/{name}.safetensors"
        with self._whole():
            data = _saved(arrays)
            target = self.folder / path
            for parent in reversed(target.relative_to(self.folder).parents[:-1]):
                (self.folder / parent).mkdir(mode=0o700, exist_ok=True)
            _write_private(target, data)
            digest = hashlib.sha256(data).hexdigest()
            self._record({"kind": "holding", "seat": seat, "name": name}, {path: digest})

    def close(self) -> None:
        """Write the closing line; a second call does nothing."""
        with self._lock:
            self._end({"end": self._count})

    @contextmanager
    def _whole(self) -> Iterator[None]:
        """Write one record whole, or end the trace: it must not look complete without it."""
        with self._lock:
            if self._index.closed:
                raise TraceError(f"{self.folder} is closed; it takes no more records")
            try:
                yield
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
        try:
            self._write(line)
        finally:
            self._index.close()

    def _record(self, line: dict[str, Any], arrays: dict[str, str]) -> None:
        self._write({"number": self._count, **line, "arrays": arrays})
        self._count += 1

    def _write(self, line: Mapping[str, Any]) -> None:
        chained = {**line, "before": self._digest.hexdigest()}
        data = json.dumps(chained, separators=(",", ":")).encode() + b"\n"
        self._digest.update(data)
        self._index.write(data)
        self._index.flush()

    def _blob(self, arrays: Arrays) -> str:
        data = _saved(arrays)
        digest = hashlib.sha256(data).hexdigest()
        path = self.folder / _BLOBS / f"{digest}.safetensors"
        if not path.exists():
            _write_private(path, data)
        return digest


class Trace:
    """A closed trace, verified when opened.

    Attributes:
        folder: Where it lies.
        about: What was said of the run when it was recorded.
        records: The index, in order.
    """

    def __init__(self, folder: str | Path) -> None:
        """Open and verify a trace.

        Args:
            folder: A folder a :class:`Recorder` wrote and closed.

        Raises:
            TraceError: If it is missing, truncated or altered; names the first bad record.
        """
        self.folder = Path(folder)
        path = self.folder / _INDEX
        if not path.is_file():
            raise TraceError(f"{self.folder} holds no trace: there is no {_INDEX}")
        lines = path.read_bytes().splitlines(keepends=True)
        header, self.records = parse(lines, self.folder)
        self.about: Mapping[str, Any] = header["about"]
        for record in self.records:
            for name, digest in record.arrays.items():
                self._verified(record, name, digest)

    def events(self, *kinds: type[Event], round_: int | None = None) -> Iterator[Event]:
        """Yield the recorded events in order; of a foreign message, only its arrays were kept.

        Args:
            *kinds: Only events of these classes; all if none is given.
            round_: Only events of this round; all if None. Others are not read.

        Yields:
            Events with arrays of their own.
        """
        for record in self.records:
            event_type = _TYPES.get(record.kind)
            wanted = round_ is None or record.fields.get("round") == round_
            if wanted and event_type is not None and issubclass(event_type, kinds or Event):
                yield self._event(record, event_type)

    def holding(self, seat: str, name: str) -> Arrays | None:
        """Return what a party held under a name, or None.

        Args:
            seat: The party.
            name: As given to :meth:`Recorder.hold`.

        Returns:
            Its tensors by name.
        """
        wanted = f"{_SEAT}/{seat}/{name}.safetensors"
        for record in self.records:
            if record.kind == "holding" and wanted in record.arrays:
                held: Arrays = load(self._verified(record, wanted, record.arrays[wanted]))
                return held
        return None

    def _event(self, record: Record, event_type: type[Event]) -> Event:
        values: dict[str, Any] = dict(record.fields)
        if "phase" in values:
            values["phase"] = Phase(values["phase"])
        groups = {n: load(self._verified(record, n, d)) for n, d in record.arrays.items()}
        if event_type is Foreign:
            values["content"] = RecordDict({name: pack(group) for name, group in groups.items()})
        else:
            values |= {n: g[n] if n in _SINGLE else g for n, g in groups.items()}
        return event_type(**values)

    def _verified(self, record: Record, name: str, digest: str) -> bytes:
        inside = name if record.kind == "holding" else f"{_BLOBS}/{digest}.safetensors"
        path = self.folder / inside
        if not path.is_file() or ".." in Path(inside).parts:
            raise TraceError(f"{self.folder}: {record} is missing its file {path.name}")
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() != digest:
            raise TraceError(f"{self.folder}: {record} was altered: {name} fails its checksum")
        return data


def _foreign_arrays(event: Foreign) -> dict[str, Arrays]:
    content: RecordDict = event.content
    return {key: unpack(record) for key, record in content.array_records.items() if record}


def _saved(arrays: Arrays) -> bytes:
    """Return arrays as safetensors, which would silently mix up those that are not in C order."""
    data: bytes = save({name: np.asarray(value, order="C") for name, value in arrays.items()})
    return data


def _create(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)


def _write_private(path: Path, data: bytes) -> None:
    """Write a file whole or not at all, readable by its owner only."""
    temporary = path.with_suffix(".partial")
    with os.fdopen(_create(temporary), "wb") as file:
        file.write(data)
    temporary.replace(path)
