"""What RayGrid's driver knows of workers, nodes and messages; plain data, no Ray."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from flwr.app import Message

from leakbed.grids.parcel_host import Prepared, State

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
    errands: list["Errand"] = field(default_factory=list)
    dead: bool = False

    def burden(self) -> tuple[bool, int]:
        """Return whether it is at something nobody waited for to the end, and its messages."""
        return bool(self.errands) and self.errands[0].abandoned, len(self.errands)


@dataclass(eq=False)
class Errand:
    """A message on its way.

    Attributes:
        message: From the strategy, with its id.
        prepared: The message as it travels.
        shared: Ray's reference to its records, where it has them in common with others.
        attempts: Workers that died over it.
        worker: Where it is; not set before it is sent.
        reference: Ray's reference to the answer; None before it is sent.
        reply: The reply, once it is there.
        abandoned: Whether nobody waits for the reply any more.
    """

    message: Message
    prepared: Prepared
    shared: Any = None
    attempts: int = 0
    worker: Worker = field(init=False)
    reference: Any = None
    reply: Message | None = None
    abandoned: bool = False


@dataclass(eq=False, slots=True)
class Node:
    """What the driver knows of a node that has been sent a message.

    Attributes:
        state: Its last state, packed; empty for a new node.
        keeper: The worker that keeps something of it alive.
        errands: Its messages; the first is under way, the others wait for that one's state.
    """

    state: State = ()
    keeper: Worker | None = None
    errands: list[Errand] = field(default_factory=list)


def groups(load: list[Errand]) -> Iterator[tuple[int, list[Errand]]]:
    """Yield messages to one worker by the call they share, after how many come before it.

    A call costs Ray as much as a short message costs its node; but replies of one call come
    together, so that a worker with few messages answers each by itself.
    """
    size = max(1, min(_GROUP, len(load) // _CALLS))
    for _, alike in groupby(enumerate(load), key=lambda item: item[1].shared):
        places = list(alike)
        for at in range(0, len(places), size):
            yield places[at][0], [errand for _, errand in places[at : at + size]]
