"""Stop waiting for a call that runs too long, without stopping the call.

Python cannot end a thread, so a call that overran goes on in the background. It shares the
process's random generators with whoever comes next; :func:`overran` tells that it is still there.
"""

from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from threading import Thread
from typing import Any, Generic, TypeVar

T = TypeVar("T")

# Of the whole process and not of one thread: what overran disturbs every later call in it.
_late: list[tuple[str, "Future[Any]"]] = []


class CallThread(Generic[T]):
    """A thread that runs one call after another, so that the caller can stop waiting.

    One thread serves all calls: starting one per call costs more than a short exchange.
    """

    def __init__(self) -> None:
        """Prepare; the thread starts with the first call."""
        self._calls: SimpleQueue[tuple[Callable[[], T], Future[T]]] = SimpleQueue()
        self._thread: Thread | None = None

    def run(self, call: Callable[[], T], *, seconds: float, what: str) -> T:
        """Run a call and wait for it.

        Args:
            call: Must not need this thread.
            seconds: How long to wait.
            what: Names the call in :func:`overran`.

        Returns:
            What the call returned; what it raised is raised.

        Raises:
            TimeoutError: If it has not returned in time; it still runs. A call with no time at all
                is not started.
        """
        if seconds <= 0:
            raise TimeoutError(f"no time left for {what}")
        if self._thread is None:
            self._thread = Thread(target=self._serve, name="leakbed-nodes", daemon=True)
            self._thread.start()
        result: Future[T] = Future()
        self._calls.put((call, result))
        try:
            return result.result(timeout=seconds)
        finally:  # also on Ctrl-C, which leaves the call running
            if not result.done():
                _late.append((what, result))

    def _serve(self) -> None:
        while True:
            call, result = self._calls.get()
            try:
                result.set_result(call())
            except BaseException as error:  # noqa: BLE001  raised again in the thread that waits
                result.set_exception(error)
            del call, result  # or the last message would live until the next one


def overran() -> str | None:
    """Return the name of a call that overran and still runs in this process, or None."""
    _late[:] = [(what, result) for what, result in _late if not result.done()]
    return _late[0][0] if _late else None
