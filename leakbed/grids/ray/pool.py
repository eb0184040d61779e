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

    def send(self, waiting: Iterable[PendingMessage]) -> None:
        """Send messages to their nodes, each once its node has answered the one before."""
        loads: dict[Worker, list[PendingMessage]] = {}
        for pending in waiting:
            node = self._nodes.setdefault(pending.node, Node())
            node.waiting.append(pending)
            if len(node.waiting) == 1:
                loads.setdefault(self._assign(pending), []).append(pending)
        calls = [call for load in loads.values() for call in groups(load)]
        for _, group in sorted(calls, key=itemgetter(0)):  # every worker soon has its first
            self._dispatch(group)

    def awaited(self, waiting: Sequence[PendingMessage]) -> list[Any]:
        """Return tickets of what comes next, to wait for; those there are for :meth:`advance`.

        Args:
            waiting: Those whose answers are wanted, none of which is there.

        Returns:
            Ray's references.
        """
        found = {worker.ready: None for worker in self.workers if worker.ready is not None}
        if len(waiting) == 1 and waiting[0].ticket is not None:
            return [*found, waiting[0].ticket]  # nothing else has to be looked at for it
        for worker in self.workers:
            # It answers in this order, and waiting for a few is faster than for all.
            found |= {pending.ticket: None for pending in worker.waiting[:_WINDOW]}
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
            waiting = self._under_way.get(ticket)
            if waiting is not None and (why := self._receive(waiting)) is not None:
                self._replace_worker(waiting[0].worker, why)
        for worker in [w for w in self.workers if w.ready is not None]:
            late = worker.deadline < monotonic()
            if (late or worker.ready in tickets) and not self._has_started(worker):
                self._replace_worker(worker, "it did not start")

    def abandon(self, pending: PendingMessage) -> None:
        """Let a message be answered for nobody, or not be sent if it has not been."""
        pending.abandoned = True
        if pending.ticket is None:
            self._node(pending).waiting.remove(pending)
        elif pending.reply is None:
            self._late.append(pending)

    def tidy(self) -> None:
        """Take in what nobody waits for any more, and workers that have started."""
        if (self._late or self.patience() < math.inf) and (tickets := self.awaited(())):
            self.advance(there(tickets, 0.0))
            self._late = [pending for pending in self._late if pending.reply is None]

    def stop(self) -> None:
        """End the workers."""
        stop([worker.actor for worker in self.workers])
        self.workers = []

    def _node(self, pending: PendingMessage) -> Node:
        return self._nodes[pending.node]

    def _assign(self, pending: PendingMessage) -> Worker:
        """Choose the worker that keeps the node, else the one with the fewest messages."""
        node = self._node(pending)
        if node.owner is not None and node.owner.dead:
            node.owner = None
        pending.worker = node.owner or self._fitting(pending)
        pending.worker.waiting.append(pending)
        return pending.worker

    def _fitting(self, pending: PendingMessage) -> Worker:
        """Return the worker with the fewest messages; of several, one by the node's partition."""
        if not self.workers:
            self._start_another()
        able = [worker for worker in self.workers if worker.ready is None] or self.workers
        first = self._roster[pending.node] % len(able)
        return min(able[first:] + able[:first], key=Worker.load_key)

    def _dispatch(self, waiting: list[PendingMessage]) -> None:
        """Send messages that have one worker, and one broadcast or none, in one call."""
        sent: list[tuple[Parcel, Parcel | None, bool]] = []
        for pending in waiting:
            node = self._node(pending)
            here = node.owner is not None
            sent.append((pending.prepared, None if here else node.state, here))
        ticket = start(waiting[0].worker, sent, waiting[0].shared)
        self._under_way[ticket] = waiting
        for pending in waiting:
            pending.ticket = ticket

    def _receive(self, waiting: list[PendingMessage]) -> str | None:
        """Read the answer to messages of one call; return the reason if there is none to be had."""
        sent = [pending.sent for pending in waiting]
        try:
            came = answers(answer(waiting[0].ticket), sent)
        except CallFailedError as error:
            replies = [failed(each, str(error), raised=True) for each in sent]
            came = [Answer(reply, stays=False, state=None) for reply in replies]
        except WorkerGoneError as error:
            return str(error)
        self._take(waiting)
        for pending, found in zip(waiting, came, strict=True):
            node = self._node(pending)
            node.owner = pending.worker if found.stays else None
            node.state = node.state if found.state is None else found.state
            self._finish(pending, found.reply)
        return None

    def _take(self, waiting: list[PendingMessage]) -> None:
        """Take the messages of one call from their worker."""
        del self._under_way[waiting[0].ticket]
        for pending in waiting:
            pending.worker.waiting.remove(pending)

    def _finish(self, pending: PendingMessage, reply: Reply) -> None:
        pending.reply, pending.shared, pending.prepared = reply, None, _SPENT
        waiting = self._node(pending).waiting
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
                return bool(worker.waiting) and not error.actor_init_failed
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
        tickets = dict.fromkeys(pending.ticket for pending in worker.waiting)
        calls = [self._under_way[ticket] for ticket in tickets]
        lost = [waiting for waiting in calls if self._receive(waiting) is not None]
        _log.warning("worker %d is gone (%s); %d calls go elsewhere", worker.number, why, len(lost))
        for place, waiting in enumerate(lost):
            self._take(waiting)
            # It died over the first call: the others had not begun.
            self._retry(waiting, charge=served and place == 0)

    def _retry(self, waiting: list[PendingMessage], *, charge: bool) -> None:
        """Send messages again, each in a call of its own, that a worker left unanswered."""
        for pending in waiting:
            pending.attempts += charge
            if pending.attempts < _ATTEMPTS and self.workers and not pending.abandoned:
                self._assign(pending)
                self._dispatch([pending])
            else:
                again = ", like the one before it" if pending.attempts == _ATTEMPTS else ""
                reason = f"worker {pending.worker.number}, which had this message, is gone{again}"
                self._finish(pending, failed(pending.sent, reason))
