"""How much memory a data set takes while a run lasts, and whether this process may have as much.

A set that does not fit is refused before it is decoded: otherwise a process ends in the middle of
its work, or the system ends it without a word.
"""

import resource
from collections.abc import Sequence
from math import prod
from pathlib import Path

_COPIES = 3  # a run holds the whole set, the nodes' rows and the answer key
_FLOAT = 4
_MACHINE = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")
_GB = 1e9


class TooLargeError(ValueError):
    """Data that need more memory than there is."""


def available() -> int | None:
    """Return how many more bytes this process may take.

    Returns:
        The least of what the machine has free, what its control group leaves and what the process
        is limited to; ``None`` where the system tells none of them.
    """
    rooms = [_free(), _left_by_group(), _left_by_limit()]
    return min((room for room in rooms if room is not None), default=None)


def refuse_too_large(name: str, shape: Sequence[int], *, kept: int | None = None) -> None:
    """Refuse images that would not fit into memory.

    Args:
        name: What they are; the error names it.
        shape: Rows, channels, height and width, as bytes.
        kept: How many of the rows are kept as floats; ``None`` for all.

    Raises:
        TooLargeError: They need more than is available.
    """
    rows, *one = shape
    needed = rows * prod(one) + (kept or rows) * prod(one) * _FLOAT * _COPIES
    room = available()
    if room is not None and needed > room:
        raise TooLargeError(
            f"{name}: {rows} images of {' x '.join(map(str, one))} need about "
            f"{needed / _GB:.3g} GB of memory, and {max(room, 0) / _GB:.3g} GB are left; set "
            "data.image_size to make them smaller, or data.size to keep fewer"
        )


def _free() -> int | None:
    """Return what the machine could give without swapping."""
    return _entry(_MACHINE, "MemAvailable:", unit=1024)


def _left_by_group() -> int | None:
    """Return what the control group of a container leaves; memory of files is given back."""
    try:
        most = int((_CGROUP / "memory.max").read_text())
    except (OSError, ValueError):  # no such group, or "max"
        return None
    taken = _entry(_CGROUP / "memory.stat", "anon ", unit=1)
    return most - (taken or 0)


def _left_by_limit() -> int | None:
    """Return what a limit on the process's addresses leaves (``ulimit -v``)."""
    most, _ = resource.getrlimit(resource.RLIMIT_AS)
    taken = _entry(Path("/proc/self/status"), "VmSize:", unit=1024)
    return None if most == resource.RLIM_INFINITY else most - (taken or 0)


def _entry(file: Path, key: str, *, unit: int) -> int | None:
    """Return the number of a line that begins with a key, in bytes."""
    try:
        lines = file.read_text().splitlines()
    except OSError:  # another system, which tells it in another way
        return None
    found = [int(line.removeprefix(key).split()[0]) for line in lines if line.startswith(key)]
    return found[0] * unit if found else None
