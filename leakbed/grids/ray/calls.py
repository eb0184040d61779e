"""What RayGrid's driver knows of workers, nodes and messages, and calls to workers through Ray.

A call is sent to a worker and answered some time later; what it is to the driver's other code is
Ray's reference to the answer, to wait for.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import ray

from leakbed.grids.base import describe
from leakbed.grids.ray.parcels import Parcel, Reply, Returned, Sent, node_of

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
        waiting: What it has not answered, in the order it was sent.
        dead: Whether it is gone.
    """

    number: int
    actor: Any
    ready: Any = None
    deadline: float = math.inf
    waiting: list["PendingMessage"] = field(default_factory=list)
    dead: bool = False

    def load_key(self) -> tuple[bool, int]:
        """Return whether it is at something nobody waited for to the end, and its messages."""
        return bool(self.waiting) and self.waiting[0].abandoned, len(self.waiting)


@dataclass(eq=False)
class PendingMessage:
    """A message or typed call on its way.

    Attributes:
        sent: A message from the strategy, with its id, or a call.
        prepared: The same as it travels.
        shared: Its records as stored for several, where it has them in common with others.
        attempts: Workers that died over it.
        worker: Where it is; not set before it is sent.
        ticket: Of the call it is part of; None before it is sent.
        reply: The reply, once it is there.
        abandoned: Whether nobody waits for the reply any more.
    """

    sent: Sent
    prepared: Parcel
    shared: Any = None
    attempts: int = 0
    worker: Worker = field(init=False)
    ticket: Any = None
    reply: Reply | None = None
    abandoned: bool = False

    @property
    def node(self) -> int:
        """Flower's id of the node it goes to."""
        return node_of(self.sent)


@dataclass(eq=False, slots=True)
class Node:
    """What the driver knows of a node that has been sent a message.

    Attributes:
        state: Its last state, sealed; None of a new node.
        owner: The worker that keeps something of it alive.
        waiting: Its messages; the first is under way, the others wait for that one's state.
    """

    state: Parcel | None = None
    owner: Worker | None = None
    waiting: list[PendingMessage] = field(default_factory=list)


def groups(load: list[PendingMessage]) -> Iterator[tuple[int, list[PendingMessage]]]:
    """Yield messages to one worker by the call they share, after how many come before it.

    A call costs Ray as much as a short message costs its node; but replies of one call come
    together, so that a worker with few messages answers each by itself.
    """
    size = max(1, min(_GROUP, len(load) // _CALLS))
    for _, alike in groupby(enumerate(load), key=lambda item: item[1].shared):
        places = list(alike)
        for at in range(0, len(places), size):
            yield places[at][0], [pending for _, pending in places[at : at + size]]


READ_SECONDS = 10.0  # to read an answer that a worker left when it died


class WorkerGoneError(RuntimeError):
    """A worker that will not answer a call any more."""


class CallFailedError(RuntimeError):
    """A call that a worker could not even begin to understand."""


def start(
    worker: Worker,
    sent: Sequence[tuple[Parcel, Parcel | None, bool]],
    shared: Any,  # noqa: ANN401  Ray is untyped
) -> Any:  # noqa: ANN401  likewise
    """Call a worker, which answers its calls in their order.

    Args:
        worker: Any, also one that is still starting.
        sent: For :meth:`~leakbed.grids.ray.parcels.ParcelHost.handle`.
        shared: Ray's reference to the records that they have in common; None for none. An argument
            of its own, so that Ray looks it up.

    Returns:
        Ray's reference to the answer.
    """
    return worker.actor.handle.remote(sent, *([] if shared is None else [shared]))


def answer(reference: Any) -> list[Returned]:  # noqa: ANN401  Ray is untyped
    """Return the answer to a call.

    Args:
        reference: One that is there.

    Returns:
        For :func:`~leakbed.grids.ray.parcels.answers`, of each message of the call.

    Raises:
        CallFailedError: If the worker raised.
        WorkerGoneError: If there is no answer to be had.
    """
    try:
        returned: list[Returned] = ray.get(reference, timeout=READ_SECONDS)
    except ray.exceptions.RayTaskError as error:
        raise CallFailedError(describe(error)) from error
    except ray.exceptions.RayError as error:
        raise WorkerGoneError(type(error).__name__) from error
    return returned


def there(references: Sequence[Any], seconds: float) -> list[Any]:
    """Return the references of Ray's that are there, after waiting for a first one."""
    timeout = None if math.isinf(seconds) else max(seconds, 0.0)
    ready, others = ray.wait(list(references), num_returns=1, timeout=timeout)
    if ready and others:
        ready += ray.wait(others, num_returns=len(others), timeout=0)[0]
    return list(ready)
