"""RayGrid: nodes on Ray actors, on one machine or a cluster, with fractions of GPUs.

A node in the middle of a round is pinned to one actor, so that its model and data stay where they
are; between rounds its state is here, and any actor may go on. Replies are waited for, never
polled. An exchange costs about a hundredth of one in Flower's Simulation Runtime.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from functools import partial
from threading import RLock
from time import monotonic
from types import TracebackType
from typing import Any, Self

import ray
from flwr.app import Message
from flwr.clientapp import ClientApp

from leakbed.grids.base import MessageIds, ResidentGrid, expired, lateness
from leakbed.grids.ray.actors import (
    Recipe,
    equal_share,
    fitting_workers,
    refuse_crowd,
    start_ray,
    stop_ray,
)
from leakbed.grids.ray.calls import PendingMessage, there
from leakbed.grids.ray.parcels import TypedCall, failed, packed, prepared, seal
from leakbed.grids.ray.pool import Pool
from leakbed.wire.bounds import Asked
from leakbed.wire.calls import Answer, Call, Failure, Wait, offers_calls
from leakbed.wire.fields import Carried

# How long a pull waits for a first reply: a caller that pulls in a loop then waits for events.
_PULL_SECONDS = 0.005
_STORED = 90 * 1024  # bytes; records of more that several nodes get are put into Ray's store once


@offers_calls
class RayGrid(ResidentGrid):
    """A Flower grid whose nodes live in Ray actors; close it, or use it as a context manager.

    A worker that dies is replaced. What it had not answered is tried once more elsewhere, from the
    node's last state; a node that was in the middle of a round cannot go on from there and says so.

    Attributes:
        workers: How many actors there are.
    """

    def __init__(
        self,
        app: ClientApp | str,
        *,
        nodes: int,
        workers: int | None = None,
        num_gpus: float | None = 0.0,
        address: str | None = None,
    ) -> None:
        """Start the workers, and Ray unless it runs in this process already.

        Args:
            app: What every node runs: an attribute of a module that workers can import, or its
                import path ``package.module:name``.
            nodes: How many nodes there are.
            workers: How many actors; None for as many as there are free CPUs and GPU shares.
            num_gpus: GPU share of each actor, such as 0.25; of 0, actors see no GPU. None for equal
                shares of the GPUs Ray counts, with one more share on each for this process.
            address: Of a Ray cluster to join (``"auto"`` for the one that runs on this machine),
                whose machines must have the app's files at the same paths; None for this machine.

        Raises:
            ValueError: If there is no worker.
        """
        super().__init__(nodes)
        if workers is not None and workers < 1:
            raise ValueError(f"a grid needs at least one worker, got workers={workers}")
        self._ids = MessageIds("ray")
        self._pending: dict[str, tuple[PendingMessage, float]] = {}
        self._lock = RLock()
        self._pool: Pool | None = None
        self._own_ray = start_ray(address, cpus=workers)
        with ExitStack() as undo:
            undo.callback(self.close)
            if num_gpus is None:
                num_gpus = equal_share(min(nodes, workers or fitting_workers(nodes, num_gpus=0)))
            self.workers = min(nodes, workers or fitting_workers(nodes, num_gpus=num_gpus))
            refuse_crowd(self.workers, num_gpus=num_gpus)
            recipe = Recipe(app, self.roster, num_gpus=num_gpus)
            self._pool = Pool(recipe, self.roster, workers=self.workers)
            undo.pop_all()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send messages to their nodes and return their ids at once."""
        return self._push(list(messages), lambda message: monotonic() + message.metadata.ttl)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies that are there, each once; wait a moment if none is.

        Args:
            message_ids: From ``push_messages``; others are ignored.

        Returns:
            The replies in any order. A message whose time to live has passed is answered by an
            error, and what its node still says is lost.
        """
        wanted = list(message_ids)
        self._wait(wanted, _PULL_SECONDS, for_all=False)
        return self._collected(wanted, expire=True)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Send messages to their nodes and wait for the replies.

        Args:
            messages: From the strategy.
            timeout: Seconds to wait; None to wait for ever.

        Returns:
            The replies that came, in the order of the messages. One that comes later is lost.
        """
        ids = self._push(list(messages), lambda _: math.inf)
        try:
            self._wait(ids, math.inf if timeout is None else timeout, for_all=True)
            return self._collected(ids)
        finally:
            self._abandon(ids)

    def typed(self, kind: str) -> Call | None:
        """Return what hands over requests, which begin at once; None where an app has messages."""
        return partial(self._called, kind) if kind in self._open().kinds else None

    def _called(self, kind: str, node: int, request: Carried, timeout: float | None) -> Wait:
        asked, call = Asked.by_call(kind, node, request), TypedCall(node, kind, request)
        pending = PendingMessage(call, prepared(call, most=self.bounds.weight(asked)))
        call_id = self._ids.fresh()
        seconds = math.inf if timeout is None else timeout
        ends = monotonic() + seconds
        self._start({call_id: (pending, math.inf)})

        def answer() -> Answer:
            try:
                self._wait([call_id], ends - monotonic(), for_all=True)
            finally:
                self._abandon([call_id])
            reply = pending.reply
            if reply is None or isinstance(reply, Message):
                return Failure(lateness(seconds))
            return self.allowed(asked, reply)

        return answer

    def close(self) -> None:
        """End the workers, and Ray if this grid started it; the second time, do nothing."""
        if self._pool is not None:
            self._pool.stop()
            self._pool = None
        self._pending.clear()
        if self._own_ray:
            self._own_ray = False
            stop_ray()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _push(self, sent: list[Message], deadline: Callable[[Message], float]) -> list[str]:
        self._open()
        shared = _shared(sent)
        waiting = {}
        for message in sent:
            message_id = self._ids.stamp(message)
            common = shared.get(id(message.content))
            most = self.bounds.weight(Asked.by_message(message))
            sealed = prepared(message, content=common is None, most=most)
            waiting[message_id] = PendingMessage(message, sealed, common)
        self._start({i: (e, deadline(m)) for (i, e), m in zip(waiting.items(), sent, strict=True)})
        return list(waiting)

    def _start(self, waiting: dict[str, tuple[PendingMessage, float]]) -> None:
        """Send messages and calls to their nodes, each to be answered by its deadline."""
        pool = self._open()
        for pending, _ in waiting.values():
            if pending.node not in self.roster:
                nodes = f"this grid has nodes 1 to {len(self.roster)}"
                pending.reply = failed(pending.sent, f"no such node; {nodes}")
        with self._lock:
            self._pending |= waiting
            pool.tidy()
            pool.send(pending for pending, _ in waiting.values() if pending.reply is None)

    def _wait(self, message_ids: list[str], seconds: float, *, for_all: bool) -> None:
        """Wait until one, or all, of these messages are answered."""
        pool, deadline = self._open(), monotonic() + seconds
        with self._lock:
            waiting = [self._pending[i][0] for i in message_ids if i in self._pending]
        open_ = waiting
        while waiting:
            with self._lock:
                open_ = [pending for pending in open_ if pending.reply is None]
                if not open_ or (len(open_) < len(waiting) and not for_all):
                    return
                tickets = pool.awaited(open_)
                patience = min(deadline - monotonic(), pool.patience())
            ready = there(tickets, patience)
            with self._lock:
                pool.advance(ready)
            if not ready and monotonic() >= deadline:
                return

    def _collected(self, message_ids: list[str], *, expire: bool = False) -> list[Message]:
        now, replies = monotonic(), []
        with self._lock:
            for message_id in message_ids:
                pending, deadline = self._pending.get(message_id, (None, math.inf))
                if pending is None:
                    continue
                reply = pending.reply
                if reply is None and expire and now >= deadline:
                    self._open().abandon(pending)
                    reply = expired(pending.sent) if isinstance(pending.sent, Message) else None
                if isinstance(reply, Message):
                    del self._pending[message_id]
                    replies.append(reply)
        return replies

    def _abandon(self, message_ids: list[str]) -> None:
        with self._lock:
            for message_id in message_ids:
                if (pending := self._pending.pop(message_id, None)) and self._pool is not None:
                    self._pool.abandon(pending[0])

    def _open(self) -> Pool:
        if self._pool is None:
            raise RuntimeError("this RayGrid is closed; make a new one")
        return self._pool


def _shared(sent: list[Message]) -> dict[int, Any]:
    """Return large records that several messages have in common, as stored for all of them.

    FedAvg puts one RecordDict into every node's message: it is stored once, and every worker that
    reads it from the store makes records of its own.
    """
    uses = Counter(id(message.content) for message in sent)
    contents = {id(m.content): m.content for m in sent if uses[id(m.content)] > 1}
    shared: dict[int, Any] = {}
    for key, content in contents.items():
        held = packed(content)
        if sum(len(memoryview(buffer)) for buffer in held[1]) > _STORED:
            shared[key] = ray.put(seal(held))
    return shared
