"""RayGrid's workers: who serves which message, and what happens when one of them dies.

A node has one message under way at a time; where its state is home it goes to the worker with the
fewest messages, else to the one that keeps it. A worker that died is replaced, and what it left
unanswered goes to others from the nodes' last states.
"""

import logging
import math
from collections.abc import Iterable, Mapping
from itertools import count
from operator import itemgetter
from time import monotonic
from typing import Any

import ray
from flwr.app import Error, Message

from leakbed.flower_internals import CLIENT_RAISED
from leakbed.grids import ray_workers
from leakbed.grids.errands import Errand, Node, Worker, groups
from leakbed.grids.nodes import describe, unavailable
from leakbed.grids.parcel_host import Answer, Prepared, State, answers, request
from leakbed.grids.ray_workers import Recipe, start_workers, stop
from leakbed.grids.shelf import Shelf

_log = logging.getLogger(__name__)

_ATTEMPTS = 2  # a message that was with a worker as it died is tried once more
_READ_SECONDS = 10.0  # to read an answer that a worker left when it died
_WINDOW = 32  # messages of each worker to look out for at a time
_SPENT: Prepared = b"", []


class Pool:
    """The workers of one grid. One thread at a time may use it, but any number may wait."""

    def __init__(self, recipe: Recipe, roster: Mapping[int, int], *, workers: int) -> None:
        """Start the workers and wait for them.

        Args:
            recipe: How to start one.
            roster: Partition id by node id.
            workers: How many.
        """
        self._recipe, self._roster = recipe, roster
        self._shelf = Shelf(recipe.shelf) if recipe.shelf else None
        self._nodes: dict[int, Node] = {}
        self._under_way: dict[Any, list[Errand]] = {}
        self._late: list[Errand] = []
        actors = start_workers(recipe, workers=workers)
        self.workers = [Worker(number, actor) for number, actor in enumerate(actors)]
        self._numbers = count(workers)

    def send(self, errands: Iterable[Errand]) -> None:
        """Send messages to their nodes, each once its node has answered the one before.

        Args:
            errands: Not sent yet.
        """
        loads: dict[Worker, list[Errand]] = {}
        for errand in errands:
            node = self._nodes.setdefault(errand.message.metadata.dst_node_id, Node())
            node.errands.append(errand)
            if len(node.errands) == 1:
                loads.setdefault(self._assign(errand), []).append(errand)
        calls = [call for load in loads.values() for call in groups(load)]
        for _, group in sorted(calls, key=itemgetter(0)):  # every worker soon has its first
            self._dispatch(group)

    def awaited(self) -> list[Any]:
        """Return Ray's references to what comes next, for :meth:`advance` once it is there."""
        found = {worker.ready: None for worker in self.workers if worker.ready is not None}
        for worker in self.workers:
            # It answers in this order, and Ray waits for a few references faster than for all.
            found |= {errand.reference: None for errand in worker.errands[:_WINDOW]}
        return list(found)

    def patience(self) -> float:
        """Return for how many seconds a worker may still be starting; endless if none is."""
        return min((w.deadline for w in self.workers), default=math.inf) - monotonic()

    def advance(self, references: Iterable[Any]) -> None:
        """Take in what has arrived and start what that lets start.

        Args:
            references: Of :meth:`awaited`, those that are there.
        """
        for reference in references:
            errands = self._under_way.get(reference)
            if errands is not None and (why := self._receive(errands)) is not None:
                self._bury(errands[0].worker, why)
        for worker in [w for w in self.workers if w.ready is not None]:
            late = worker.deadline < monotonic()
            if (late or worker.ready in references) and not self._has_started(worker):
                self._bury(worker, "it did not start")

    def abandon(self, errand: Errand) -> None:
        """Let a message be answered for nobody, or not be sent if it has not been."""
        errand.abandoned = True
        if errand.reference is None:
            self._node(errand).errands.remove(errand)
        elif errand.reply is None:
            self._late.append(errand)

    def tidy(self) -> None:
        """Take in what nobody waits for any more, and workers that have started."""
        if (self._late or self.patience() < math.inf) and (references := self.awaited()):
            self.advance(ray.wait(references, num_returns=len(references), timeout=0)[0])
            self._late = [errand for errand in self._late if errand.reply is None]

    def stop(self) -> None:
        """End the workers."""
        stop([worker.actor for worker in self.workers])
        self.workers = []

    def _node(self, errand: Errand) -> Node:
        return self._nodes[errand.message.metadata.dst_node_id]

    def _assign(self, errand: Errand) -> Worker:
        """Choose the worker that keeps the node, else the one with the fewest messages."""
        node = self._node(errand)
        if node.keeper is not None and node.keeper.dead:
            node.keeper = None
        errand.worker = node.keeper or self._fitting(errand)
        errand.worker.errands.append(errand)
        return errand.worker

    def _fitting(self, errand: Errand) -> Worker:
        """Return the worker with the fewest messages; of several, one by the node's partition."""
        if not self.workers:
            self._start_another()
        able = [worker for worker in self.workers if worker.ready is None] or self.workers
        first = self._roster[errand.message.metadata.dst_node_id] % len(able)
        return min(able[first:] + able[:first], key=Worker.burden)

    def _dispatch(self, errands: list[Errand]) -> None:
        """Send messages that have one worker, and one broadcast or none, in one call."""
        sent: list[tuple[Prepared, State | None]] = []
        for errand in errands:
            node = self._node(errand)
            sent.append((errand.prepared, node.state if node.keeper is None else None))
        shared = () if errands[0].shared is None else (errands[0].shared,)
        reference = errands[0].worker.actor.handle.remote(request(sent, shelf=self._shelf), *shared)
        self._under_way[reference] = errands
        for errand in errands:
            errand.reference = reference

    def _receive(self, errands: list[Errand]) -> str | None:
        """Read the answer to messages of one call; return the reason if there is none to be had."""
        messages = [errand.message for errand in errands]
        try:
            came = answers(ray.get(errands[0].reference, timeout=_READ_SECONDS), messages)
        except ray.exceptions.RayTaskError as error:
            reason = Error(CLIENT_RAISED, describe(error))
            came = [Answer(Message(reason, reply_to=m), stays=False, state=None) for m in messages]
        except ray.exceptions.RayError as error:
            return type(error).__name__
        self._take(errands)
        for errand, answer in zip(errands, came, strict=True):
            node = self._node(errand)
            node.keeper = errand.worker if answer.stays else None
            node.state = node.state if answer.state is None else answer.state
            self._finish(errand, answer.reply)
        return None

    def _take(self, errands: list[Errand]) -> None:
        """Take the messages of one call from their worker."""
        del self._under_way[errands[0].reference]
        for errand in errands:
            errand.worker.errands.remove(errand)

    def _finish(self, errand: Errand, reply: Message) -> None:
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
        deadline = monotonic() + ray_workers.START_SECONDS
        self.workers.append(
            Worker(next(self._numbers), actor, ready=actor.ready.remote(), deadline=deadline)
        )

    def _bury(self, worker: Worker, why: str) -> None:
        """Start a worker in a dead one's place, and give what it left unanswered to others."""
        if worker.dead:
            return
        worker.dead = True
        self.workers.remove(worker)
        if served := self._has_started(worker):
            self._start_another()
        stop([worker.actor])  # it may hang rather than be dead
        references = dict.fromkeys(errand.reference for errand in worker.errands)
        calls = [self._under_way[reference] for reference in references]
        lost = [errands for errands in calls if self._receive(errands) is not None]
        _log.warning("worker %d is gone (%s); %d calls go elsewhere", worker.number, why, len(lost))
        for place, errands in enumerate(lost):
            self._take(errands)
            # It died over the first call: the others had not begun.
            self._retry(errands, charge=served and place == 0)

    def _retry(self, errands: list[Errand], *, charge: bool) -> None:
        """Send messages again, each in a call of its own, that a worker left unanswered."""
        for errand in errands:
            errand.attempts += charge
            if errand.attempts < _ATTEMPTS and self.workers and not errand.abandoned:
                self._assign(errand)
                self._dispatch([errand])
            else:
                again = ", like the one before it" if errand.attempts == _ATTEMPTS else ""
                reason = f"worker {errand.worker.number}, which had this message, is gone{again}"
                self._finish(errand, unavailable(errand.message, reason))
