"""Calls to RayGrid's workers, seen from the driver, and the way of making them through Ray.

A call is sent to a worker and answered some time later; what a call is to the driver's other code
is a ticket to wait for. Ray's way works on any cluster; :mod:`leakbed.grids.ray.lines` is the fast
one.

What RayGrid's driver knows of workers, nodes and messages; plain data, no Ray.
"""

import math
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Protocol

import ray
from flwr.app import Message

from leakbed.grids.base import describe
from leakbed.grids.ray.parcels import Outline, Parcel, Prepared, State, seal
from leakbed.wire.records import Buffer

_CALLS = 8  # calls to a worker, from which on messages pushed together share them
_GROUP = 16  # messages that share a call at most


@dataclass(eq=False)
class Worker:
    """One actor.

    Attributes:
        number: Names it in messages.
        actor: Ray's handle.
        ready: Ray's reference to its first sign of life; None once that has come.
        deadline: When to give up waiting for it.
        errands: What it has not answered, in the order it was sent.
        dead: Whether it is gone.
    """

    number: int
    actor: Any
    ready: Any = None
    deadline: float = math.inf
    errands: list["PendingMessage"] = field(default_factory=list)
    dead: bool = False

    def load_key(self) -> tuple[bool, int]:
        """Return whether it is at something nobody waited for to the end, and its messages."""
        return bool(self.errands) and self.errands[0].abandoned, len(self.errands)


@dataclass(eq=False)
class PendingMessage:
    """A message on its way.

    Attributes:
        message: From the strategy, with its id.
        prepared: The message as it travels.
        shared: Its records as stored for several, where it has them in common with others.
        attempts: Workers that died over it.
        worker: Where it is; not set before it is sent.
        ticket: Of the call it is part of; None before it is sent.
        reply: The reply, once it is there.
        abandoned: Whether nobody waits for the reply any more.
    """

    message: Message
    prepared: Prepared
    shared: Any = None
    attempts: int = 0
    worker: Worker = field(init=False)
    ticket: Any = None
    reply: Message | None = None
    abandoned: bool = False


@dataclass(eq=False, slots=True)
class Node:
    """What the driver knows of a node that has been sent a message.

    Attributes:
        state: Its last state, packed; empty for a new node.
        owner: The worker that keeps something of it alive.
        errands: Its messages; the first is under way, the others wait for that one's state.
    """

    state: State = ()
    owner: Worker | None = None
    errands: list[PendingMessage] = field(default_factory=list)


def groups(load: list[PendingMessage]) -> Iterator[tuple[int, list[PendingMessage]]]:
    """Yield messages to one worker by the call they share, after how many come before it.

    A call costs Ray as much as a short message costs its node; but replies of one call come
    together, so that a worker with few messages answers each by itself.
    """
    size = max(1, min(_GROUP, len(load) // _CALLS))
    for _, alike in groupby(enumerate(load), key=lambda item: item[1].shared):
        places = list(alike)
        for at in range(0, len(places), size):
            yield places[at][0], [errand for _, errand in places[at : at + size]]


READ_SECONDS = 10.0  # to read an answer that a worker left when it died


class WorkerGoneError(RuntimeError):
    """A worker that will not answer a call any more."""


class CallFailedError(RuntimeError):
    """A call that a worker could not even begin to understand."""


class Calls(Protocol):
    """A way of calling workers. One thread at a time may use it, but any number may wait."""

    def connect(self, worker: Worker, address: str | None) -> None:
        """Take up a worker that has started."""

    def share(self, outline: Outline, buffers: Sequence[Buffer]) -> Hashable:
        """Return what several calls have in common, stored once."""

    def start(self, worker: Worker, parcel: Parcel, shared: Hashable) -> Hashable:
        """Call a worker and return the ticket; a worker answers its calls in their order."""

    def there(self, tickets: Sequence[Hashable], seconds: float) -> list[Any]:
        """Return the tickets that can be answered, after waiting for a first one.

        A ticket may also be Ray's reference to a worker's start.
        """

    def answer(self, ticket: Any) -> Parcel:  # noqa: ANN401  each way has its own
        """Return the answer to a call that is there, or whose worker is ended."""

    def disconnect(self, worker: Worker) -> None:
        """Let go of a worker whose answers are all read or lost."""


class RayCalls:
    """Calls as Ray's own, between any machines."""

    def connect(self, worker: Worker, address: str | None) -> None:
        """Do nothing: Ray's handle is all it takes."""

    def share(self, outline: Outline, buffers: Sequence[Buffer]) -> Hashable:
        """Put records into Ray's store."""
        shared: Hashable = ray.put(seal(outline, buffers))
        return shared

    def start(self, worker: Worker, parcel: Parcel, shared: Hashable) -> Hashable:
        """Call an actor and return Ray's reference to the answer."""
        reference: Hashable = worker.actor.handle.remote(parcel, *([shared] if shared else []))
        return reference

    def there(self, tickets: Sequence[Hashable], seconds: float) -> list[Any]:
        """Return the references that are there, after waiting for a first one."""
        return there(tickets, seconds)

    def answer(self, ticket: Any) -> Parcel:  # noqa: ANN401  Ray is untyped
        """Return the answer.

        Args:
            ticket: One that is there.

        Returns:
            The parcel.

        Raises:
            CallFailedError: If the worker raised.
            WorkerGoneError: If there is no answer to be had.
        """
        try:
            return ray.get(ticket, timeout=READ_SECONDS)
        except ray.exceptions.RayTaskError as error:
            raise CallFailedError(describe(error)) from error
        except ray.exceptions.RayError as error:
            raise WorkerGoneError(type(error).__name__) from error

    def disconnect(self, worker: Worker) -> None:
        """Do nothing: Ray lets go of an actor that is ended."""


def there(references: Sequence[Any], seconds: float) -> list[Any]:
    """Return the references of Ray's that are there, after waiting for a first one."""
    timeout = None if math.isinf(seconds) else max(seconds, 0.0)
    ready, others = ray.wait(list(references), num_returns=1, timeout=timeout)
    if ready and others:
        ready += ray.wait(others, num_returns=len(others), timeout=0)[0]
    return list(ready)
