"""RayGrid's workers: who serves which message, and what happens when one of them dies.

A node has one message under way at a time; where its state is home it goes to the worker with the
fewest messages, else to the one that keeps it. A worker that died is replaced, and what it left
unanswered goes to others from the nodes' last states.
"""

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import count
from operator import itemgetter
from time import monotonic
from typing import Any

import ray

from leakbed.grids.ray import actors
from leakbed.grids.ray.actors import Recipe, start_workers, stop
from leakbed.grids.ray.calls import (
    CallFailedError,
    Node,
    PendingMessage,
    Worker,
    WorkerGoneError,
    answer,
    groups,
    start,
    there,
)
from leakbed.grids.ray.parcels import Answer, Parcel, Reply, answers, failed

_log = logging.getLogger(__name__)

_ATTEMPTS = 2  # a message that was with a worker as it died is tried once more
_WINDOW = 32  # messages of each worker to look out for at a time
_SPENT: Parcel = ()


class Pool:
    """The workers of one grid. One thread at a time may use it, but any number may wait.

    Attributes:
        workers: Those that live.
        kinds: Types of messages whose requests the nodes also take by themselves.
    """

    def __init__(self, recipe: Recipe, roster: Mapping[int, int], *, workers: int) -> None:
        """Start the workers and wait for them."""
        self._recipe, self._roster = recipe, roster
        self._nodes: dict[int, Node] = {}
        self._under_way: dict[Any, list[PendingMessage]] = {}
        self._late: list[PendingMessage] = []
        started, self.kinds = start_workers(recipe, workers=workers)
        self.workers = [Worker(number, actor) for number, actor in enumerate(started)]
        self._numbers = count(workers)

    def send(self, errands: Iterable[PendingMessage]) -> None:
        """Send messages to their nodes, each once its node has answered the one before."""
        loads: dict[Worker, list[PendingMessage]] = {}
        for errand in errands:
            node = self._nodes.setdefault(errand.node, Node())
            node.errands.append(errand)
            if len(node.errands) == 1:
                loads.setdefault(self._assign(errand), []).append(errand)
        calls = [call for load in loads.values() for call in groups(load)]
        for _, group in sorted(calls, key=itemgetter(0)):  # every worker soon has its first
            self._dispatch(group)

    def awaited(self, errands: Sequence[PendingMessage]) -> list[Any]:
        """Return tickets of what comes next, to wait for; those there are for :meth:`advance`.

        Args:
            errands: Those whose answers are wanted, none of which is there.

        Returns:
            Ray's references.
        """
        found = {worker.ready: None for worker in self.workers if worker.ready is not None}
        if len(errands) == 1 and errands[0].ticket is not None:
            return [*found, errands[0].ticket]  # nothing else has to be looked at for it
        for worker in self.workers:
            # It answers in this order, and waiting for a few is faster than for all.
            found |= {errand.ticket: None for errand in worker.errands[:_WINDOW]}
        return list(found)

    def patience(self) -> float:
        """Return for how many seconds a worker may still be starting; endless if none is."""
        return min((w.deadline for w in self.workers), default=math.inf) - monotonic()

    def advance(self, tickets: Iterable[Any]) -> None:
        """Take in what has arrived and start what that lets start.

        Args:
            tickets: Of :meth:`awaited`, those that are there.
        """
        for ticket in tickets:
            errands = self._under_way.get(ticket)
            if errands is not None and (why := self._receive(errands)) is not None:
                self._replace_worker(errands[0].worker, why)
        for worker in [w for w in self.workers if w.ready is not None]:
            late = worker.deadline < monotonic()
            if (late or worker.ready in tickets) and not self._has_started(worker):
                self._replace_worker(worker, "it did not start")

    def abandon(self, errand: PendingMessage) -> None:
        """Let a message be answered for nobody, or not be sent if it has not been."""
        errand.abandoned = True
        if errand.ticket is None:
            self._node(errand).errands.remove(errand)
        elif errand.reply is None:
            self._late.append(errand)

    def tidy(self) -> None:
        """Take in what nobody waits for any more, and workers that have started."""
        if (self._late or self.patience() < math.inf) and (tickets := self.awaited(())):
            self.advance(there(tickets, 0.0))
            self._late = [errand for errand in self._late if errand.reply is None]

    def stop(self) -> None:
        """End the workers."""
        stop([worker.actor for worker in self.workers])
        self.workers = []

    def _node(self, errand: PendingMessage) -> Node:
        return self._nodes[errand.node]

    def _assign(self, errand: PendingMessage) -> Worker:
        """Choose the worker that keeps the node, else the one with the fewest messages."""
        node = self._node(errand)
        if node.owner is not None and node.owner.dead:
            node.owner = None
        errand.worker = node.owner or self._fitting(errand)
        errand.worker.errands.append(errand)
        return errand.worker

    def _fitting(self, errand: PendingMessage) -> Worker:
        """Return the worker with the fewest messages; of several, one by the node's partition."""
        if not self.workers:
            self._start_another()
        able = [worker for worker in self.workers if worker.ready is None] or self.workers
        first = self._roster[errand.node] % len(able)
        return min(able[first:] + able[:first], key=Worker.load_key)

    def _dispatch(self, errands: list[PendingMessage]) -> None:
        """Send messages that have one worker, and one broadcast or none, in one call."""
        sent: list[tuple[Parcel, Parcel | None, bool]] = []
        for errand in errands:
            node = self._node(errand)
            here = node.owner is not None
            sent.append((errand.prepared, None if here else node.state, here))
        ticket = start(errands[0].worker, sent, errands[0].shared)
        self._under_way[ticket] = errands
        for errand in errands:
            errand.ticket = ticket

    def _receive(self, errands: list[PendingMessage]) -> str | None:
        """Read the answer to messages of one call; return the reason if there is none to be had."""
        sent = [errand.sent for errand in errands]
        try:
            came = answers(answer(errands[0].ticket), sent)
        except CallFailedError as error:
            replies = [failed(each, str(error), raised=True) for each in sent]
            came = [Answer(reply, stays=False, state=None) for reply in replies]
        except WorkerGoneError as error:
            return str(error)
        self._take(errands)
        for errand, found in zip(errands, came, strict=True):
            node = self._node(errand)
            node.owner = errand.worker if found.stays else None
            node.state = node.state if found.state is None else found.state
            self._finish(errand, found.reply)
        return None

    def _take(self, errands: list[PendingMessage]) -> None:
        """Take the messages of one call from their worker."""
        del self._under_way[errands[0].ticket]
        for errand in errands:
            errand.worker.errands.remove(errand)

    def _finish(self, errand: PendingMessage, reply: Reply) -> None:
        errand.reply, errand.shared, errand.prepared = reply, None, _SPENT
        waiting = self._node(errand).errands
        del waiting[0]
        if waiting:
            self._assign(waiting[0])
            self._dispatch([waiting[0]])

    def _has_started(self, worker: Worker) -> bool:
        if worker.ready is not None:
            try:
                ray.get(worker.ready, timeout=0)
            except ray.exceptions.RayActorError as error:
                # It may have died over its first message before word of its start got out.
                return bool(worker.errands) and not error.actor_init_failed
            except ray.exceptions.GetTimeoutError:
                return False
            worker.ready, worker.deadline = None, math.inf
        return True

    def _start_another(self) -> None:
        actor = self._recipe.start()
        deadline = monotonic() + actors.START_SECONDS
        self.workers.append(
            Worker(next(self._numbers), actor, ready=actor.ready.remote(), deadline=deadline)
        )

    def _replace_worker(self, worker: Worker, why: str) -> None:
        """Start a worker in a dead one's place, and give what it left unanswered to others."""
        if worker.dead:
            return
        worker.dead = True
        self.workers.remove(worker)
        if served := self._has_started(worker):
            self._start_another()
        stop([worker.actor])  # it may hang rather than be dead
        tickets = dict.fromkeys(errand.ticket for errand in worker.errands)
        calls = [self._under_way[ticket] for ticket in tickets]
        lost = [errands for errands in calls if self._receive(errands) is not None]
        _log.warning("worker %d is gone (%s); %d calls go elsewhere", worker.number, why, len(lost))
        for place, errands in enumerate(lost):
            self._take(errands)
            # It died over the first call: the others had not begun.
            self._retry(errands, charge=served and place == 0)

    def _retry(self, errands: list[PendingMessage], *, charge: bool) -> None:
        """Send messages again, each in a call of its own, that a worker left unanswered."""
        for errand in errands:
            errand.attempts += charge
            if errand.attempts < _ATTEMPTS and self.workers and not errand.abandoned:
                self._assign(errand)
                self._dispatch([errand])
            else:
                again = ", like the one before it" if errand.attempts == _ATTEMPTS else ""
                reason = f"worker {errand.worker.number}, which had this message, is gone{again}"
                self._finish(errand, failed(errand.sent, reason))
