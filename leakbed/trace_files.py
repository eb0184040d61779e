"""Files of a trace: written whole, and read though they may come from a stranger.

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
import stat
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import numpy as np
from safetensors.numpy import load

from leakbed.events import Array, Arrays
from leakbed.trace_index import LONGEST_LINE, TraceError

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
