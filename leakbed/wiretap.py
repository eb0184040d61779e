"""The wiretap: a Flower grid around any other, at which every exchange can be seen or rewritten.

Plug it into an app that exists already::

    @app.main()
    def main(grid, context):
        grid = Wiretap(grid, [Recorder("trace")])
        strategy.start(grid, ...)

A passive hook cannot change the training: it gets its own copies, its draws from global generators
are undone, and what it raises is recorded instead of stopping the app (unless ``strict``).
"""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from threading import RLock
from typing import Any

import numpy as np
from flwr.app import Message
from flwr.serverapp import Grid

from leakbed.events import Arrays, Event, Foreign
from leakbed.flower_internals import with_content
from leakbed.grid_wrapper import GridWrapper
from leakbed.seeds import guarded
from leakbed.wire.messages import HARNESS
from leakbed.wire.records import copy_records, count_bytes
from leakbed.wire.translation import events_down, events_up, rewritten, silence

PassiveHook = Callable[[Event], object]
ActiveHook = Callable[[Event], Event | None]

_log = logging.getLogger("leakbed")


class Wiretap(GridWrapper):
    """A grid that shows every exchange to hooks and otherwise behaves as the one it wraps.

    Attributes:
        bytes_down: Bytes of arrays sent to nodes so far, the harness's own messages excluded.
        bytes_up: Bytes of arrays received from nodes so far, likewise.
        failures: What went wrong: errors and silences of nodes, exceptions of hooks.
    """

    def __init__(
        self,
        grid: Grid,
        hooks: Sequence[PassiveHook] = (),
        *,
        active: ActiveHook | None = None,
        roster: Mapping[int, int] | None = None,
        strict: bool = False,
    ) -> None:
        """Wrap a grid.

        Args:
            grid: Any Flower grid.
            hooks: Called with every event as it crosses the wire; what they return is ignored.
            active: Called with every event; an event it returns replaces the original. It stands
                at the server, so hooks see messages down after it and replies before it.
            roster: Partition id of each Flower node id; nodes missing here keep Flower's id.
            strict: Let a hook's exception stop the run instead of recording it.
        """
        super().__init__(grid)
        self.bytes_down = 0
        self.bytes_up = 0
        self.failures: list[str] = []
        self._hooks = tuple(hooks)
        self._active = active
        self._roster = dict(roster or {})
        self._strict = strict
        self._pending: dict[str, Message] = {}
        self._lock = RLock()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Show messages to the hooks, then push them."""
        outgoing = [self._outgoing(message) for message in messages]
        ids = list(self._grid.push_messages(outgoing))
        with self._lock:
            self._pending |= {m.metadata.message_id: m for m in outgoing}
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Pull replies, then show them to the hooks."""
        replies = self._grid.pull_messages(message_ids)
        return [self._incoming(reply) for reply in replies]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Show messages to the hooks, exchange them, and show the replies.

        Args:
            messages: From the strategy.
            timeout: Seconds to wait, as the wrapped grid understands it.

        Returns:
            The replies, in the wrapped grid's order.
        """
        outgoing = [self._outgoing(message) for message in messages]
        received = list(self._grid.send_and_receive(outgoing, timeout=timeout))
        with self._lock:
            self._pending |= {m.metadata.message_id: m for m in outgoing}
        replies = [self._incoming(reply) for reply in received]
        self._note_silence(outgoing)
        return replies

    def _outgoing(self, message: Message) -> Message:
        if message.metadata.message_type in HARNESS:
            return message
        node = self._node(message.metadata.dst_node_id)
        with self._lock:
            message = self._rewrite(message, self._decoded(events_down, message, node))
            self.bytes_down += count_bytes(message)
            self._show(lambda: events_down(message, node))
        return message

    def _incoming(self, reply: Message) -> Message:
        with self._lock:
            sent = self._pending.pop(reply.metadata.reply_to_message_id, None)
            if sent is None or sent.metadata.message_type in HARNESS:
                return reply
            node = self._node(reply.metadata.src_node_id)
            self.bytes_up += count_bytes(reply)
            if reply.has_error():
                self._note(sent, node, reply.error.reason or "no reason given")
            self._show(lambda: events_up(sent, reply, node))
            return self._rewrite(reply, self._decoded(events_up, sent, reply, node))

    def _decoded(self, decode: Callable[..., list[Event]], *args: Any) -> list[Event]:  # noqa: ANN401
        return decode(*args) if self._active else []

    def _rewrite(self, message: Message, events: list[Event]) -> Message:
        """Return the message, or a copy with what the active hook returned in its place."""
        for event in events:
            with guarded():
                wanted = self._active(event) if self._active else None
            if wanted is not None:
                message = with_content(message, rewritten(message, wanted))
        return message

    def _show(self, decode: Callable[[], list[Event]]) -> None:
        """Give every hook its own copies of the events, undoing what it does to generators."""
        if not self._hooks:
            return
        try:
            events = decode()
        except Exception as error:  # noqa: BLE001  a message that cannot be read must not stop the app
            self._failed("decoding a message", error)
            return
        for event in events:
            for index, hook in enumerate(self._hooks):
                own = event if index == len(self._hooks) - 1 else _copied(event)
                try:
                    with guarded():
                        hook(own)
                except Exception as error:  # noqa: BLE001  recorded; raised where strict
                    self._failed(f"hook {hook!r} on {type(event).__name__}", error)

    def _failed(self, what: str, error: Exception) -> None:
        if self._strict:
            raise error
        self.failures.append(f"{what}: {error!r}")
        _log.warning("wiretap: %s failed: %r", what, error)

    def _note_silence(self, outgoing: Sequence[Message]) -> None:
        with self._lock:
            silent = [self._pending.pop(m.metadata.message_id, None) for m in outgoing]
            for message in silent:
                if message is not None and message.metadata.message_type not in HARNESS:
                    node = self._node(message.metadata.dst_node_id)
                    self._note(message, node, "no reply")
                    self._show(partial(silence, message, node))

    def _note(self, sent: Message, node: int, reason: str) -> None:
        self.failures.append(f"node {node}, {sent.metadata.message_type}: {reason}")

    def _node(self, flower_id: int) -> int:
        return self._roster.get(flower_id, flower_id)


def _copied(event: Event) -> Event:
    changes: dict[str, Any] = {}
    for name, value in vars(event).items():
        if isinstance(value, np.ndarray):
            changes[name] = value.copy()
        elif isinstance(event, Foreign) and name == "content":
            changes[name] = copy_records(value)
        elif isinstance(value, Mapping):
            changes[name] = _copied_arrays(value)
    return replace(event, **changes)


def _copied_arrays(arrays: Arrays) -> Arrays:
    return {name: array.copy() for name, array in arrays.items()}
