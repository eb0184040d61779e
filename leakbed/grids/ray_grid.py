"""RayGrid: nodes on Ray actors, on one machine or a cluster, with fractions of GPUs.

Every node is pinned to one actor, so its model, data and state stay where they are; replies are
waited for, never polled. An exchange costs about a hundredth of one in Flower's Simulation Runtime.
"""

from collections import Counter
from collections.abc import Iterable
from contextlib import ExitStack
from threading import Lock
from types import TracebackType
from typing import Any, Self

import ray
from flwr.app import Error, Message
from flwr.clientapp import ClientApp

from leakbed.flower_internals import CLIENT_RAISED
from leakbed.grids.nodes import MessageIds, describe, unavailable
from leakbed.grids.ray_workers import fitting_workers, start_ray, start_workers, stop, stop_ray
from leakbed.grids.resident import ResidentGrid
from leakbed.wire.records import count_bytes

# Ray sends smaller arguments with the call, which took half as long as a visit to its store.
_INLINE_BYTES = 100 * 1024


class RayGrid(ResidentGrid):
    """A Flower grid whose nodes live in Ray actors; close it, or use it as a context manager.

    A worker that dies takes its nodes along: every message to them gets an error reply.

    Attributes:
        workers: How many actors the nodes are dealt out to.
    """

    def __init__(
        self,
        app: ClientApp | str,
        *,
        nodes: int,
        workers: int | None = None,
        num_gpus: float = 0.0,
        address: str | None = None,
    ) -> None:
        """Start the workers, and Ray unless it runs in this process already.

        Args:
            app: What every node runs: an attribute of a module that workers can import, or its
                import path ``package.module:name``.
            nodes: How many nodes there are.
            workers: How many actors; None for as many as there are free CPUs and GPU shares.
            num_gpus: GPU share of each actor, such as 0.25; without any, actors see no GPU.
            address: Of a Ray cluster to join; None for this machine.

        Raises:
            ValueError: If there is no worker.
        """
        super().__init__(nodes)
        if workers is not None and workers < 1:
            raise ValueError(f"a grid needs at least one worker, got workers={workers}")
        self._ids = MessageIds("ray")
        self._pending: dict[str, tuple[Any, Message]] = {}
        self._lock = Lock()
        self._actors: list[Any] = []
        self._own_ray = start_ray(address, cpus=workers)
        with ExitStack() as undo:
            undo.callback(self.close)
            self.workers = min(nodes, workers or fitting_workers(nodes, num_gpus=num_gpus))
            self._actors = start_workers(app, self.roster, workers=self.workers, num_gpus=num_gpus)
            undo.pop_all()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send messages to their nodes' workers and return at once.

        Args:
            messages: From the strategy.

        Returns:
            Their ids.

        Raises:
            RuntimeError: If the grid is closed.
        """
        if not self._actors:
            raise RuntimeError("this RayGrid is closed; make a new one")
        sent = list(messages)
        # FedAvg puts one RecordDict into every node's message: it is stored once, and every worker
        # that reads it from the store gets a copy of its own.
        uses = Counter(id(message.content) for message in sent)
        shared: dict[int, Any] = {}
        for message in sent:
            key = id(message.content)
            if uses[key] > 1 and key not in shared and count_bytes(message) > _INLINE_BYTES:
                shared[key] = ray.put(message.content)
        ids = []
        for message in sent:
            message_id = self._ids.stamp(message)
            answer = self._submit(message, shared.get(id(message.content), message.content))
            with self._lock:
                self._pending[message_id] = answer, message
            ids.append(message_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies to these messages that are there, each once."""
        return self._collected(list(message_ids), 0.0)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Send messages to their nodes' workers and wait for the replies.

        Args:
            messages: From the strategy.
            timeout: Seconds to wait; None to wait for ever.

        Returns:
            The replies that came, in the order of the messages. One that comes later is lost.
        """
        ids = list(self.push_messages(messages))
        try:
            return self._collected(ids, timeout)
        finally:
            with self._lock:
                for message_id in ids:
                    self._pending.pop(message_id, None)

    def close(self) -> None:
        """End the workers, and Ray if this grid started it; the second time, do nothing."""
        stop(self._actors)
        self._actors = []
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

    def _submit(self, message: Message, content: Any) -> Any:  # noqa: ANN401  Ray is untyped
        """Return a reference to the reply: from the node's worker, or an error at once."""
        partition = self.roster.get(message.metadata.dst_node_id)
        if partition is None:
            return ray.put(
                unavailable(message, f"no such node; this grid has nodes 1 to {len(self.roster)}")
            )
        actor = self._actors[partition % self.workers]
        return actor.handle.remote(message.metadata, content)

    def _collected(self, message_ids: list[str], timeout: float | None) -> list[Message]:
        with self._lock:
            waiting = {i: self._pending[i][0] for i in message_ids if i in self._pending}
        if not waiting:
            return []
        answers = list(waiting.values())
        ready, _ = ray.wait(answers, num_returns=len(answers), timeout=timeout)
        there = set(ready)
        replies = []
        for message_id in (i for i, answer in waiting.items() if answer in there):
            with self._lock:  # of two threads that pull one message, one gets its reply
                arrived = self._pending.pop(message_id, None)
            if arrived is not None:
                replies.append(self._reply(*arrived))
        return replies

    def _reply(self, answer: Any, message: Message) -> Message:  # noqa: ANN401  Ray is untyped
        """Return a reply that has arrived; what Ray says instead becomes an error reply."""
        try:
            reply: Message = ray.get(answer)
        except ray.exceptions.RayTaskError as error:
            return Message(Error(CLIENT_RAISED, describe(error)), reply_to=message)
        except ray.exceptions.RayError as error:
            partition = self.roster[message.metadata.dst_node_id]
            reason = f"worker {partition % self.workers} is gone: {error}"
            return unavailable(message, reason)
        return reply
