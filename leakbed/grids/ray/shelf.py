"""A shelf in shared memory, where processes of one machine leave each other the bytes of arrays.

Ray's own ways copy a batch of 400 kB eight times from process to process; over the shelf it is
written once and read where it lies. What is taken from the shelf is off it at once, and its memory
is free when nobody looks at it any more.
"""

import mmap
import os
import shutil
import tempfile
import weakref
from collections.abc import Sequence
from contextlib import suppress
from itertools import count
from pathlib import Path

from leakbed.wire.records import Buffer

_MEMORY = Path("/dev/shm")  # noqa: S108  Linux's file system in memory; the folder in it is ours
_ALIGN = 64  # bytes, so that arrays lie as NumPy and torch want them
_KEPT = ".kept"
_numbers = count()


class Shelf:
    """A folder in memory, which its owner makes and removes and others only use."""

    def __init__(self, folder: str, *, keeps: bool = False) -> None:
        """Use a shelf.

        Args:
            folder: Where it is, from :func:`make_shelf`.
            keeps: Whether what is left there can be taken many times, until its owner removes it.
        """
        self.folder, self._ending = folder, _KEPT if keeps else ""

    def leave(self, buffers: Sequence[Buffer]) -> str | None:
        """Write buffers down, one after another.

        Args:
            buffers: Any bytes.

        Returns:
            Where they lie, for :func:`take`; None if there is no room for them.
        """
        path = f"{self.folder}/{os.getpid()}-{next(_numbers)}{self._ending}"
        try:
            with open(path, "xb") as file:  # noqa: PTH123  a microsecond each
                at = 0
                for buffer in buffers:
                    at += file.write(bytes(-at % _ALIGN)) + file.write(buffer)
        except OSError:  # full, or taken down
            with suppress(OSError):
                os.unlink(path)  # noqa: PTH108
            return None
        return path


def take(path: str, sizes: Sequence[int]) -> list[memoryview]:
    """Return what was left on a shelf, and clear its place unless it is kept.

    Args:
        path: From :meth:`Shelf.leave`.
        sizes: Of the buffers, in their order.

    Returns:
        Read-only views, which keep their memory for as long as they are looked at.
    """
    with open(path, "rb") as file:  # noqa: PTH123
        there = mmap.mmap(file.fileno(), 0, flags=_FLAGS, prot=mmap.PROT_READ)
    if not path.endswith(_KEPT):
        os.unlink(path)  # noqa: PTH108
    view, at, taken = memoryview(there), 0, []
    for size in sizes:
        at += -at % _ALIGN
        taken.append(view[at : at + size])
        at += size
    return taken


def make_shelf() -> str | None:
    """Return a new shelf's folder, readable by its owner alone; None where memory has no folders.

    It is removed when this process ends, or by :func:`remove_shelf`.
    """
    try:
        folder = tempfile.mkdtemp(prefix="leakbed-", dir=_MEMORY)
    except OSError:
        return None
    weakref.finalize(_owner, remove_shelf, folder)
    return folder


def remove_shelf(folder: str | None) -> None:
    """Remove a shelf with whatever nobody took; views of what was taken stay."""
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)


class _Owner:
    """Lives as long as this process, so that shelves end with it."""


_owner = _Owner()
_FLAGS = mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0)
