"""Lines: Unix sockets between RayGrid and its workers, where both are on one machine.

Ray still starts, places and ends the workers, but a call through it costs its two processes 0.6 ms;
over a line it is one write and one read. A worker reads its line at all times, so that whoever
writes to it never waits for a handler; that the line breaks says at once that the worker is gone.
"""

import math
import os
import pickle
import select
import socket
import sys
import weakref
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener
from queue import SimpleQueue
from threading import Condition, Thread
from time import monotonic
from typing import Any

from leakbed.grids.base import describe
from leakbed.grids.ray.calls import CallFailedError, Worker, WorkerGoneError, there
from leakbed.grids.ray.parcels import Outline, Parcel, seal
from leakbed.grids.ray.shelf import Shelf
from leakbed.wire.records import Buffer

_START_SECONDS = 0.02  # between looks whether a worker has started, which is Ray's to say


class Ticket:
    """A call under way; equal only to itself.

    Attributes:
        line: That it went over.
        said: The answer, once it is there.
    """

    __slots__ = ("line", "said")

    def __init__(self, line: "_Line") -> None:
        """Belong to a line."""
        self.line = line
        self.said: bytes | None = None

    def ready(self) -> bool:
        """Return whether waiting for it is over, with an answer or without."""
        return self.said is not None or self.line.broken


class Broadcast:
    """What several calls have in common: on the shelf for as long as one of them may need it."""

    def __init__(self, parcel: Parcel) -> None:
        """Keep a parcel.

        Args:
            parcel: Sealed for a shelf that keeps, if there was room.
        """
        self.parcel = parcel
        if isinstance(parcel, tuple) and isinstance(parcel[1], str):
            weakref.finalize(self, _remove, parcel[1])


class _Line:
    """The driver's end of one line."""

    def __init__(self) -> None:
        self.connection: Connection[Any, Any] | None = None
        self.broken = False
        self.held: list[bytes] = []  # until the worker has started
        self.tickets: deque[Ticket] = deque()

    def send(self, said: bytes) -> None:
        if self.connection is None:
            self.held.append(said)
            return
        with suppress(OSError):  # a worker that is gone: reading will tell
            self.connection.send_bytes(said)

    def read(self) -> None:
        """Give the next answer, which is there, to the oldest call."""
        try:
            assert self.connection is not None  # noqa: S101  for mypy
            said = self.connection.recv_bytes()
            self.tickets.popleft().said = said
        except (OSError, EOFError):
            self.broken = True


class Lines:
    """Calls over lines; see :class:`~leakbed.grids.ray.calls.Calls`.

    Of the threads that wait, one reads all lines for all of them.
    """

    def __init__(self, folder: str, key: bytes) -> None:
        """Prepare.

        Args:
            folder: Of the shelf.
            key: What proves to each end that the other one belongs to the grid.
        """
        self._shelf, self._key = Shelf(folder, keeps=True), key
        self._lines: dict[Worker, _Line] = {}
        self._arrived, self._reading = Condition(), False
        self._news = os.eventfd(0, os.EFD_NONBLOCK)  # tells the reader of another line
        weakref.finalize(self, os.close, self._news)

    def connect(self, worker: Worker, address: str | None) -> None:
        """Open the line of a worker that has started, and send what waited for that."""
        line = self._lines.setdefault(worker, _Line())
        try:
            line.connection = Client(str(address), authkey=self._key)
        except (OSError, EOFError):  # it is gone again
            line.broken = True
            return
        os.eventfd_write(self._news, 1)
        for said in line.held:
            line.send(said)
        line.held.clear()

    def share(self, outline: Outline, buffers: Sequence[Buffer]) -> Hashable:
        """Put records on the shelf."""
        return Broadcast(seal(outline, buffers, shelf=self._shelf))

    def start(self, worker: Worker, parcel: Parcel, shared: Hashable) -> Hashable:
        """Call a worker and return the ticket."""
        line = self._lines.setdefault(worker, _Line())
        common = shared.parcel if isinstance(shared, Broadcast) else None
        line.tickets.append(ticket := Ticket(line))
        line.send(pickle.dumps((parcel, common), protocol=5))
        return ticket

    def there(self, tickets: Sequence[Any], seconds: float) -> list[Any]:
        """Return the tickets that can be answered, after waiting for a first one."""
        calls = [ticket for ticket in tickets if isinstance(ticket, Ticket)]
        if len(calls) < len(tickets):
            started = there([t for t in tickets if not isinstance(t, Ticket)], 0.0)
            seconds = 0.0 if started else min(seconds, _START_SECONDS)
            return started + self._ready(calls, monotonic() + seconds)
        return self._ready(calls, monotonic() + seconds)

    def answer(self, ticket: Any) -> Parcel:  # noqa: ANN401  as Ray's are
        """Return the answer to a call.

        Args:
            ticket: That call's, ready or on a line that nobody will read again.

        Returns:
            The parcel.

        Raises:
            CallFailedError: If the worker raised.
            WorkerGoneError: If the line broke before the answer was there.
        """
        if ticket.said is None:
            raise WorkerGoneError("its line is broken")
        parcel, reason = pickle.loads(ticket.said)  # noqa: S301  of our own run
        if reason is not None:
            raise CallFailedError(reason)
        return parcel

    def disconnect(self, worker: Worker) -> None:
        """Close a worker's line."""
        line = self._lines.pop(worker, None)
        if line is not None:
            line.broken = True
            if line.connection is not None:
                _cut(line.connection)

    def _ready(self, calls: list[Ticket], deadline: float) -> list[Ticket]:
        while True:
            with self._arrived:
                ready = [ticket for ticket in calls if ticket.ready()]
                left = deadline - monotonic()
                if ready or (left <= 0 and (self._reading or not calls)):
                    return ready
                if self._reading:
                    self._arrived.wait(None if math.isinf(left) else left)
                    continue
                self._reading = True
            try:
                self._read(left)
            finally:
                with self._arrived:
                    self._reading = False
                    self._arrived.notify_all()
            if left <= 0:
                return [ticket for ticket in calls if ticket.ready()]

    def _read(self, seconds: float) -> None:
        """Wait for an answer on any line, and take in all that are there."""
        open_ = {}
        for line in list(self._lines.values()):
            if line.connection is not None and not line.broken:
                with suppress(OSError):  # hung up at this moment
                    open_[line.connection.fileno()] = line
        poll = select.poll()
        for descriptor in (self._news, *open_):
            poll.register(descriptor, select.POLLIN)
        # Rounded up, or the last millisecond would be spent turning round.
        found = poll.poll(None if math.isinf(seconds) else max(0, math.ceil(seconds * 1000)))
        for descriptor, _ in found:
            if descriptor == self._news:
                os.eventfd_read(self._news)
            else:
                open_[descriptor].read()


def one_thread() -> None:
    """Let torch compute in this thread alone; call it again in every thread that computes."""
    if "torch" in sys.modules:
        from leakbed.tensors import configure_torch  # noqa: PLC0415  an app may do without torch

        configure_torch()


def listen(handle: Callable[[Parcel, Parcel | None], Parcel], *, folder: str, key: bytes) -> str:
    """Answer calls from now on, in a thread of their own.

    Args:
        handle: Answers a parcel, and what it has in common with others.
        folder: Of the shelf, where only this user can enter.
        key: As for :class:`Lines`.

    Returns:
        Where the driver finds this end of the line.
    """
    address = f"{folder}/{os.getpid()}.line"
    listener = Listener(address, family="AF_UNIX", authkey=key)

    def serve() -> None:
        with listener:  # removed then: there is one driver
            connection = _accepted(listener)
        said: SimpleQueue[bytes | None] = SimpleQueue()
        Thread(target=_read, args=(connection, said), daemon=True).start()
        one_thread()
        try:
            _serve(handle, connection, said)
        finally:  # also when the handler ends this thread: the driver must know
            _cut(connection)

    Thread(target=serve, daemon=True, name="line").start()
    return address


def _cut(connection: "Connection[Any, Any]") -> None:
    """End a line for both its ends, also where a thread of this one is reading it."""
    with suppress(OSError), socket.socket(fileno=os.dup(connection.fileno())) as end:
        end.shutdown(socket.SHUT_RDWR)


def _accepted(listener: Listener) -> "Connection[Any, Any]":
    """Return the line to the driver, past whoever has not its key."""
    while True:
        with suppress(AuthenticationError, OSError, EOFError):
            return listener.accept()


def _read(connection: "Connection[Any, Any]", said: "SimpleQueue[bytes | None]") -> None:
    try:
        while True:
            said.put(connection.recv_bytes())
    except (OSError, EOFError):  # the driver is gone, or has hung up
        said.put(None)


def _serve(
    handle: Callable[[Parcel, Parcel | None], Parcel],
    connection: "Connection[Any, Any]",
    said: "SimpleQueue[bytes | None]",
) -> None:
    while (call := said.get()) is not None:
        parcel, shared = pickle.loads(call)  # noqa: S301  of our own run
        del call
        answer: tuple[Parcel | None, str | None]
        try:
            answer = handle(parcel, shared), None
        except SystemExit:  # which ends an actor of Ray's, too
            return
        except Exception as error:  # noqa: BLE001  reported to the driver
            answer = None, describe(error)
        del parcel, shared
        try:
            connection.send_bytes(pickle.dumps(answer, protocol=5))
        except OSError:  # the driver is gone, or has hung up
            return


def _remove(path: str) -> None:
    with suppress(OSError):
        os.unlink(path)  # noqa: PTH108
