"""Waiting for an event, for tests of things that take their time."""

import time
from collections.abc import Callable
from pathlib import Path


def until(happened: Callable[[], bool], *, within: float = 60) -> None:
    """Return once it has happened; what never does is a failure and not a hang."""
    deadline = time.monotonic() + within
    while not happened():
        assert time.monotonic() < deadline, f"it has not happened within {within:g} s"
        time.sleep(0.01)


def running(process: int) -> bool:
    """Whether there is such a process, other than one that only waits to be counted out."""
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"
