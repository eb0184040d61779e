"""The wiretap: a Flower grid around any other, at which every exchange can be seen or rewritten.

:func:`leakbed.tap.tapped` puts it around whatever grid an app gets. By hand, in an app's own code::

    @app.main()
    def main(grid, context):
        grid = Wiretap(grid, [Recorder("trace")])
        strategy.start(grid, ...)

A passive hook cannot change the training: it gets its own copies, its draws from global generators
are undone, and what it raises is recorded instead of stopping the app (unless ``strict``).

Generators are the process's, not a thread's, so undoing a hook's draws also rewinds what the app's
other threads drew meanwhile. An app with threads that draw from the global generators should use
hooks that say ``draws_nothing = True``, as the recorder does: around those nothing is undone.

:class:`GridWrapper` hands everything on to the grid that it wraps; other wrappers inherit it too.
"""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from threading import RLock
from typing import Any, TypeVar

import numpy as np
from flwr.app import Message
from flwr.serverapp import Grid

from leakbed.events import Arrays, Event, Records
from leakbed.flower_internals import with_content
from leakbed.seeds import guarded
from leakbed.tap.trace_index import ClosedTraceError
from leakbed.wire.bounds import Bounds, bind
from leakbed.wire.calls import Answer, Call, Failure, Wait, offers_calls, typed_call
from leakbed.wire.event_codec import (
    events_down,
    events_up,
    replaced,
    reply_events,
    request_events,
    rewritten,
    silence,
    unasked,
    unread,
)
from leakbed.wire.fields import Carried
from leakbed.wire.messages import HARNESS
from leakbed.wire.records import copy_records, count_bytes, shortened


class GridWrapper(Grid):
    """A Flower grid that passes everything on to the one it wraps, until overridden."""

    def __init__(self, grid: Grid) -> None:
        """Wrap a grid."""
        self._grid = grid

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401  whatever the wrapped grid has
        """Delegate what this class does not define.

        Args:
            name: Of the attribute.

        Returns:
            The wrapped grid's attribute.

        Raises:
            AttributeError: The wrapped grid has none, or it is private: those of a copy in the
                making are asked for before there is a wrapped grid.
        """
        if name.startswith("_"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self._grid, name)

    def set_run(self, run: Any) -> None:  # noqa: ANN401  Flower's Run moved between versions
        """Set the wrapped grid's run."""
        self._grid.set_run(run)

    @property
    def run(self) -> Any:  # noqa: ANN401
        """The wrapped grid's run."""
        return self._grid.run

    def create_message(self, *args: Any, **kwargs: Any) -> Message:  # noqa: ANN401
        """Create a message as the wrapped grid does (deprecated by Flower)."""
        return self._grid.create_message(*args, **kwargs)

    def get_node_ids(self) -> Iterable[int]:
        """Return the wrapped grid's nodes."""
        return self._grid.get_node_ids()

    def get_nodes(self) -> Iterable[Any]:
        """Return what the wrapped grid knows of its nodes."""
        return self._grid.get_nodes()

    def bound_by(self, bounds: Bounds) -> None:
        """Let the wrapped grid refuse what a plan does not allow, where it can."""
        bind(self._grid, bounds)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Push messages through the wrapped grid."""
        return self._grid.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Pull replies through the wrapped grid."""
        return self._grid.pull_messages(message_ids)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Exchange messages through the wrapped grid."""
        return self._grid.send_and_receive(messages, timeout=timeout)


Said = TypeVar("Said", bound=Message | Carried)
PassiveHook = Callable[[Event], object]
ActiveHook = Callable[[Event], Event | None]

_OUTSTANDING = 8
"""Pushed messages of a node that are kept for their replies; a reply to an older one is told
without what it answers."""

_log = logging.getLogger("leakbed")


@offers_calls
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
            hooks: Called with every event as it crosses the wire; what they return is ignored. One
                whose attribute ``draws_nothing`` is True promises to leave global generators alone;
                one whose attribute ``only_reads`` is True gets the events without a copy, their
                arrays read-only views of the messages, and must not change them.
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
        self._outstanding: dict[int, list[str]] = {}
        self._ended: set[int] = set()
        self._lock = RLock()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Show messages to the hooks, then push them."""
        outgoing = [self._outgoing(message) for message in messages]
        ids = list(self._grid.push_messages(outgoing))
        with self._lock:
            for message in outgoing:
                self._keep(message)
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

    def typed(self, kind: str) -> Call | None:
        """Return the wrapped grid's way of handing requests over, shown to the hooks both ways.

        Args:
            kind: Type of the message a request would travel in.

        Returns:
            None where the wrapped grid has none.
        """
        call = typed_call(self._grid, kind)
        return None if call is None else partial(self._called, call, kind)

    def _called(
        self, call: Call, kind: str, node: int, request: Carried, timeout: float | None
    ) -> Wait:
        """Show a request, hand it over, and return the wait that shows its reply."""
        part = self._node(node)
        with self._lock:
            for event in self._decoded(request_events, kind, request, part):
                request = self._asked(event, request, replaced)
            self.bytes_down += request.array_bytes()
            self._show(lambda: request_events(kind, request, part), part)
        wait = call(node, request, timeout)
        return lambda: self._answered(kind, part, request, wait())

    def _answered(self, kind: str, node: int, request: Carried, reply: Answer) -> Answer:
        with self._lock:
            if isinstance(reply, Failure):
                self._note(kind, node, shortened(reply.reason))
                self._show(lambda: reply_events(kind, request, reply, node), node)
                return reply
            self.bytes_up += reply.array_bytes()
            self._show(lambda: reply_events(kind, request, reply, node), node)
            own: Carried = reply
            for event in self._decoded(reply_events, kind, request, reply, node):
                own = self._asked(event, own, replaced)
            return own

    def _keep(self, message: Message) -> None:
        """Keep a pushed message until its reply is pulled, or its node was sent many more."""
        self._pending[message.metadata.message_id] = message
        node = message.metadata.dst_node_id
        kept = [*self._outstanding.get(node, ()), message.metadata.message_id]
        kept = [each for each in kept if each in self._pending]  # those not answered yet
        for each in kept[:-_OUTSTANDING]:
            del self._pending[each]
        self._outstanding[node] = kept[-_OUTSTANDING:]

    def _outgoing(self, message: Message) -> Message:
        if message.metadata.message_type in HARNESS:
            return message
        node = self._node(message.metadata.dst_node_id)
        with self._lock:
            for event in self._decoded(events_down, message, node):
                message = self._asked(event, message, _rewritten)
            self.bytes_down += count_bytes(message)
            other = partial(unread, message, node, up=False)
            self._show(lambda: events_down(message, node), node, other)
        return message

    def _incoming(self, reply: Message) -> Message:
        with self._lock:
            sent = self._pending.pop(reply.metadata.reply_to_message_id, None)
            kind = (reply if sent is None else sent).metadata.message_type
            if kind in HARNESS:
                return reply
            node = self._node(reply.metadata.src_node_id)
            self.bytes_up += count_bytes(reply)
            if reply.has_error():
                self._note(kind, node, shortened(reply.error.reason))
            other = partial(unread, reply, node, up=True)
            if sent is None:  # pushed before the tap was there, or long ago
                self._show(lambda: unasked(reply, node), node, other)
                return reply
            self._show(lambda: events_up(sent, reply, node), node, other)
            for event in self._decoded(events_up, sent, reply, node):
                reply = self._asked(event, reply, _rewritten)
            return reply

    def _decoded(self, decode: Callable[..., list[Event]], *args: Any) -> list[Event]:  # noqa: ANN401
        return decode(*args) if self._active else []

    def _asked(self, event: Event, said: Said, rewrite: Callable[[Said, Event], Said]) -> Said:
        """Return what was said, or a copy with what the active hook returned in its place."""
        with guarded():
            wanted = self._active(_copied(event)) if self._active else None
        return said if wanted is None else rewrite(said, wanted)

    def _show(
        self,
        decode: Callable[[], list[Event]],
        node: int,
        undecoded: Callable[..., Event] | None = None,
    ) -> None:
        """Give every hook its own copies of the events, undoing its draws unless it has none.

        Args:
            decode: Returns them.
            node: At the other end.
            undecoded: Makes the event of what cannot be decoded, from ``why``; None where all can.
        """
        if not self._hooks:
            return
        try:
            events = decode()
        except Exception as error:  # noqa: BLE001  a message that cannot be read must not stop the app
            self._failed("decoding a message", error)
            events = [] if undecoded is None else [undecoded(why=repr(error))]
        for event in events:
            for index, hook in enumerate(self._hooks):
                if index in self._ended:
                    continue
                own = event if _says(hook, "only_reads") else _copied(event)
                try:
                    with nullcontext() if _says(hook, "draws_nothing") else guarded():
                        hook(own)
                except Exception as error:  # noqa: BLE001  recorded; raised where strict
                    if isinstance(error, ClosedTraceError):  # it would say so for ever
                        self._ended.add(index)
                    self._failed(f"hook {hook!r} on node {node}'s {type(event).__name__}", error)

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
                    self._note(message.metadata.message_type, node, "no reply")
                    self._show(partial(silence, message, node), node)

    def _note(self, kind: str, node: int, reason: str) -> None:
        self.failures.append(f"node {node}, {kind}: {reason}")

    def _node(self, flower_id: int) -> int:
        return self._roster.get(flower_id, flower_id)


def _rewritten(message: Message, event: Event) -> Message:
    return with_content(message, rewritten(message, event))


def _says(hook: PassiveHook, promise: str) -> bool:
    return getattr(hook, promise, False) is True


def _copied(event: Event) -> Event:
    """Return an event whose arrays and records may be written."""
    changes: dict[str, Any] = {}
    for name, value in vars(event).items():
        if isinstance(value, np.ndarray):
            changes[name] = value.copy()
        elif isinstance(event, Records) and name == "content":
            changes[name] = copy_records(value)
        elif isinstance(value, Mapping):
            changes[name] = _copied_arrays(value)
    return replace(event, **changes)


def _copied_arrays(arrays: Arrays) -> Arrays:
    return {name: array.copy() for name, array in arrays.items()}
