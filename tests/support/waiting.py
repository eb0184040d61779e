"""Waiting for an event, for tests of things that take their time."""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

ADOPTS = """import ctypes, subprocess, sys
ctypes.CDLL(None).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER
subprocess.run([sys.executable, "-c", sys.argv[1]])
sys.stdin.read()
"""
"""A program that runs another, and is given the processes that it leaves, as a session's is."""


def until(happened: Callable[[], bool], *, within: float = 300) -> None:
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


def blocks_interrupts(process: int) -> bool:
    """Whether the process leaves Ctrl-C to the one that asked."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    (mask,) = [line.split()[1] for line in lines if line.startswith("SigBlk")]
    return bool(int(mask, 16) >> (signal.SIGINT - 1) & 1)


def descendants(process: int) -> set[int]:
    """Return what a process has started, and what those have."""
    parents: dict[int, int] = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        with suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
            parents[int(status.parent.name)] = int(status.read_text().rpartition(")")[2].split()[1])
    found, left = set[int](), {process}
    while left:
        left = {child for child, parent in parents.items() if parent in left}
        found |= left
    return found


@contextmanager
def timer_in_use() -> Iterator[None]:
    """Let somebody else use the system's timer, so that calls in time need a thread."""
    before = signal.signal(signal.SIGALRM, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGALRM, before)


@contextmanager
def timer_free() -> Iterator[None]:
    """Let nobody use the system's timer, as outside of tests; pytest-timeout's waits meanwhile."""
    left, again = signal.setitimer(signal.ITIMER_REAL, 0)
    before = signal.signal(signal.SIGALRM, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, left, again)
