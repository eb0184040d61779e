"""The arrays of a trace: safetensors, one after another, in segment files that only grow.

Written: straight from the arrays' own memory, which is hashed and written without a copy, piece by
piece while it is in the processor's cache; equal ones once. The names stand in the order in which
they were given. The index says by an :class:`Extent` where each group of arrays lies, after its
bytes are in the file. So what a process that was killed leaves behind the last extent is in no
record.

Read: opened without following links, measured first. A file of a few kilobytes on disk can claim
gigabytes (a sparse one), and a link can lead anywhere. So each part of a path is opened by itself,
an extent's size is compared with its safetensors header before the rest is read, and checksums are
taken piece by piece.
"""

import hashlib
import json
import math
import os
import re
import stat
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

import numpy as np
from safetensors.numpy import load

from leakbed.events import Array, Arrays

FULL = 1 << 30  # bytes; a segment file of as many takes no more, and the next one is begun
SEGMENTS = "segments"

Parts = list[bytes | memoryview]


class TraceError(ValueError):
    """A trace is missing, truncated, aborted, altered, of another format, or says too little."""


_DIGEST = re.compile(r"[0-9a-f]{64}")
_LAST_SEGMENT = 999_999
_PIECE = 1 << 18  # bytes that are hashed or written at once; a core's own cache holds them
_BEGINNING = 1 << 12  # bytes by which long arrays are told apart before all of them is hashed


@dataclass(frozen=True, slots=True)
class Extent:
    """Where in a trace a group of arrays lies.

    Attributes:
        digest: SHA-256 of its bytes.
        segment: Number of its segment file, from 0.
        offset: Of its first byte in that file.
        size: In bytes.
    """

    digest: str
    segment: int
    offset: int
    size: int

    @classmethod
    def of(cls, value: object) -> "Extent | None":
        """Return what a line of an index says, or None if that is no extent."""
        match value:
            case [str(digest), int(segment), int(offset), int(size)]:
                numbers = (segment, offset, size)
                if (
                    _DIGEST.fullmatch(digest)
                    and not any(isinstance(number, bool) for number in numbers)
                    and 0 <= segment <= _LAST_SEGMENT
                    and min(offset, size) >= 0
                ):
                    return cls(digest, *numbers)
        return None

    def line(self) -> list[str | int]:
        """Return what stands in the index."""
        return [self.digest, self.segment, self.offset, self.size]

    @property
    def inside(self) -> str:
        """The path of its segment file in the trace."""
        return _path_of(self.segment)


class Segments:
    """The segment files of a trace that is being written."""

    def __init__(self, folder: Path) -> None:
        """Make the folder; a file only when there are arrays."""
        (folder / SEGMENTS).mkdir(mode=0o700)
        self._folder = folder
        self._file: int | None = None
        self._number, self._offset, self._kept = -1, 0, 0
        self._known: dict[str, Extent] = {}
        self._beginnings: set[tuple[int, str]] = set()

    def add(self, parts: Parts) -> Extent:
        """Append a group of arrays, unless an equal one is there; return where it lies."""
        size = sum(map(len, parts))
        digest = checksum(parts) if self._may_be_there(parts, size) else None
        if digest is not None and (known := self._known.get(digest)) is not None:
            return known
        file = self._open()
        extent = Extent(_written(file, parts, digest), self._number, self._offset, size)
        self._offset += size
        self._known[extent.digest] = extent
        return extent

    def _may_be_there(self, parts: Parts, size: int) -> bool:
        """Say whether something equal may have been added; note how long arrays begin."""
        if size <= _PIECE:
            return True
        beginning = size, checksum([part[:_BEGINNING] for part in parts[:2]])
        seen = beginning in self._beginnings
        self._beginnings.add(beginning)
        return seen

    def keep(self) -> None:
        """Take what was added as part of the trace: the index names it."""
        self._kept = self._offset
        if self._offset >= FULL:
            self._end_file()

    def close(self) -> None:
        """Cut off what the index does not name, and take no more."""
        self._end_file()
        self._known.clear()
        self._beginnings.clear()

    def _open(self) -> int:
        if self._file is None:
            self._number, self._offset, self._kept = self._number + 1, 0, 0
            self._file = create(self._folder / _path_of(self._number))
        return self._file

    def _end_file(self) -> None:
        if self._file is None:
            return
        with suppress(OSError):
            os.ftruncate(self._file, self._kept)
        os.close(self._file)
        self._file = None


def create(path: Path) -> int:
    """Open a new file for writing, readable by its owner only."""
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)


class Reading:
    """The segment files of a trace that is being read, each opened once; a context manager."""

    def __init__(self, folder: Path) -> None:
        """Open nothing yet."""
        self._folder, self._ends = folder, ExitStack()
        self._files: dict[int, IO[bytes]] = {}

    def __enter__(self) -> "Reading":
        return self

    def __exit__(self, *error: object) -> None:
        self._ends.close()

    def read(self, extent: Extent, *, arrays: bool) -> dict[str, Array]:
        """Check an extent against its checksum and its own header, and read it if asked.

        A file that is missing, a link, no plain file or behind a link is an :class:`OSError`.

        Args:
            extent: What the index says.
            arrays: Whether its arrays are wanted; else it is checked piece by piece.

        Returns:
            The arrays by name, in their order; none if they are not wanted.

        Raises:
            TraceError: If it is not what was written there.
        """
        file = self._file(extent)
        held = os.fstat(file.fileno()).st_size
        if extent.offset + extent.size > held:
            raise TraceError(f"{extent.inside} ends at byte {held}, before its last")
        file.seek(extent.offset)
        _check_header(file, size=extent.size)
        data = file.read(extent.size) if arrays else b""
        found = hashlib.sha256(data).hexdigest() if arrays else _digest_of(file, extent.size)
        if found != extent.digest:
            raise TraceError("it fails its checksum")
        if not arrays:
            return {}
        try:
            return deserialised(data)
        except Exception as error:  # safetensors raises classes of several libraries
            raise TraceError(f"it is damaged: {error}") from error

    def _file(self, extent: Extent) -> IO[bytes]:
        if extent.segment not in self._files:
            file = self._ends.enter_context(opened(self._folder, extent.inside))
            self._files[extent.segment] = file
        return self._files[extent.segment]


def _path_of(segment: int) -> str:
    return f"{SEGMENTS}/{segment:06}.bin"


def _written(file: int, parts: Parts, digest: str | None) -> str:
    """Append parts to a file, and take their checksum a piece at a time if it is not known."""
    taken = None if digest else hashlib.sha256()
    for part in parts:
        for start in range(0, len(part), _PIECE):
            piece = memoryview(part)[start : start + _PIECE]
            if taken is not None:
                taken.update(piece)
            while piece:
                piece = piece[os.write(file, piece) :]
    return str(digest) if taken is None else taken.hexdigest()


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
_REPEATED = 1 << 14  # characters of names; longer headers, of any sender's choice, are not kept
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
        if _can_hold(name, value.dtype):
            kept[name] = value
        else:
            others.append(f"{name[:60]!r} ({value.dtype}, {value.shape})")
    return kept, others


def _can_hold(name: str, dtype: np.dtype[Any]) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return name != "__metadata__" and _little(dtype) in _NAMES


@lru_cache(maxsize=64)
def _little(dtype: np.dtype[Any]) -> np.dtype[Any]:
    return dtype.newbyteorder("<")


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
        name: np.asarray(value, _little(value.dtype), order="C") for name, value in arrays.items()
    }
    layout = tuple((name, value.dtype, value.shape) for name, value in lying.items())
    made = _header if sum(map(len, lying)) <= _REPEATED else _header.__wrapped__
    header = made(layout)
    if len(header) - 8 > LONGEST_HEADER:
        raise TraceError(f"{len(arrays)} arrays have a header of {len(header)} bytes, too long")
    ordered = sorted(lying.values(), key=_by_width)
    return [header, *(value.reshape(-1).view(np.uint8).data for value in ordered)]


@lru_cache(maxsize=64)
def _header(layout: tuple[tuple[str, np.dtype[Any], tuple[int, ...]], ...]) -> bytes:
    """Return what stands before arrays of such names, types and shapes."""
    start = 0
    header: dict[str, Any] = dict.fromkeys(name for name, _, _ in layout)  # in their order
    for name, dtype, shape in sorted(layout, key=lambda each: -each[1].itemsize):
        offsets = [start, start := start + math.prod(shape) * dtype.itemsize]
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNED)
    return len(text).to_bytes(8, "little") + text


def _by_width(array: Array) -> int:
    return -array.itemsize


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
    """The arrays that were written last, so that equal ones are not hashed again.

    A model that is sent to many nodes is one object in memory, which is known by sight; replies
    that are equal are found by a look at their bytes, which ends at the first that differs. Only
    arrays over ``bytes`` are known so: nothing else is sure to stay as it was.
    """

    def __init__(self) -> None:
        """Begin without any arrays."""
        self._known: deque[tuple[_Look, Extent]] = deque(maxlen=_REMEMBERED)

    def extent(self, arrays: Arrays) -> Extent | None:
        """Return where arrays equal to these lie; None if it is not known."""
        look = _look(arrays)
        for entry in [] if look is None else list(self._known):
            if entry[0] == look:
                self._known.remove(entry)
                self._known.append(entry)  # the last to be forgotten
                return entry[1]
        return None

    def remember(self, arrays: Arrays, extent: Extent) -> None:
        """Know arrays from now on, and forget the ones that were not met for longest.

        Args:
            arrays: By name; their memory is kept for as long as they are known.
            extent: Where they lie.
        """
        if (look := _look(arrays)) is not None:
            self._known.append((look, extent))

    def forget(self) -> None:
        """Let go of all memory."""
        self._known.clear()


_Look = list[tuple[str, str, tuple[int, ...], tuple[int, ...], int, bytes]]
_REMEMBERED = 2  # groups of arrays: what was sent to a node, and what came back
_WORTH_A_LOOK = 1 << 16  # bytes; fewer are hashed at once


def _look(arrays: Arrays) -> _Look | None:
    """Return what tells arrays apart: their names, layouts and the bytes they lie in."""
    look: _Look = []
    for name, value in arrays.items():
        if value.base is None:  # what is over bytes is a view of them
            return None
        owner: Any = value
        while isinstance(owner, np.ndarray):
            owner = owner.base
        owner = owner.obj if isinstance(owner, memoryview) else owner
        if not isinstance(owner, bytes):
            return None
        start = value.__array_interface__["data"][0] - np.frombuffer(owner, np.uint8).ctypes.data
        look.append((name, value.dtype.str, value.shape, value.strides, start, owner))
    return look if sum(value.nbytes for value in arrays.values()) >= _WORTH_A_LOOK else None


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


def _check_header(file: IO[bytes], *, size: int) -> None:
    """Refuse an extent whose size is not what its header says, before the rest is read.

    Args:
        file: At its beginning; it is there again afterwards.
        size: Of the extent, in bytes.

    Raises:
        TraceError: If the header is none, names a type that numpy lacks, or does not fit the size.
    """
    start = file.tell()
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
    file.seek(start)


def _digest_of(file: IO[bytes], size: int) -> str:
    digest = hashlib.sha256()
    while size > 0 and (piece := file.read(min(size, _PIECE))):
        digest.update(piece)
        size -= len(piece)
    return digest.hexdigest()


def _bytes_of(about: Any) -> int:  # noqa: ANN401  whatever a stranger wrote
    start, stop = about["data_offsets"]
    size: int = math.prod(about["shape"]) * _ITEM_BYTES[about["dtype"]]
    if min(about["shape"], default=0) < 0 or stop - start != size:
        raise ValueError(f"an array of {size} bytes from {start} to {stop}")
    return size
