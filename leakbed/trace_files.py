"""Files of a trace that may come from a stranger: opened without following links, measured first.

A file of a few kilobytes on disk can claim gigabytes (a sparse one), and a link can lead anywhere.
So each part of a path is opened by itself, a file's size is compared with its safetensors header
before the rest is read, and checksums are taken piece by piece.
"""

import hashlib
import json
import math
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from leakbed.trace_index import LONGEST_LINE, TraceError

LONGEST_HEADER = 100_000_000  # bytes; safetensors' own limit
_ITEM_BYTES = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "I16", "U16"), 2),
    **dict.fromkeys(("I8", "U8", "BOOL"), 1),
}
"""The types that numpy has, by safetensors' names; bfloat16 and the 8-bit floats are not among."""

_NO_LINKS = getattr(os, "O_NOFOLLOW", 0)  # 0 on Windows, where links are looked for instead
_AT_ONCE = getattr(os, "O_NONBLOCK", 0)  # or a pipe of that name would hold the reader for ever


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
