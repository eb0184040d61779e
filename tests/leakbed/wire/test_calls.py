"""Typed calls say what messages say, and are made past nobody."""

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from leakbed.events import CutGradientDown, Event, Failed, SmashedUp
from leakbed.grids import DeterministicGrid, LocalGrid, NodeFailed
from leakbed.mods import defend
from leakbed.tap.wiretap import GridWrapper, Wiretap
from leakbed.wire.bounds import Bounds
from leakbed.wire.calls import Failure, before, handler_of, offers_calls, serve, typed_call
from leakbed.wire.event_codec import (
    events_down,
    events_up,
    replaced,
    reply_events,
    request_events,
)
from leakbed.wire.fields import Carried, Finding
from leakbed.wire.messages import (
    BACKWARD_STEP,
    HEAD_EVALUATE,
    HEAD_STEP,
    SPLIT_EVALUATE,
    SPLIT_STEP,
    BackwardReply,
    EvaluateRequest,
    HeadEvaluateReply,
    HeadEvaluateRequest,
    HeadReply,
    HeadRequest,
    SplitReply,
    SplitRequest,
    Stopped,
)
from leakbed.wire.records import WireError, count_bytes
from strategies.node_channel import NodeChannel
from tests.support import tiny
from tests.support.waiting import timer_free

pytestmark = pytest.mark.usefixtures("identity")

X = np.arange(6, dtype=np.float32).reshape(2, 3)
PART = {"0.weight": X, "count": np.array(3)}
ALARMS = {"splitout": Finding(10, 0.9, 0.8, 31)}
ASKED = SplitRequest(round=2, step=1, gradient=X)
PAIRS: list[tuple[str, Carried, Carried]] = [
    (SPLIT_STEP, ASKED, SplitReply(steps=3, examples=6, step=1, smashed=X.T, labels=np.arange(3))),
    (
        SPLIT_STEP,
        SplitRequest(round=1, step=0, bottom=PART, share=0.5),
        SplitReply(steps=3, examples=6, smashed=X, rows=np.arange(2)),
    ),
    (
        SPLIT_STEP,
        SplitRequest(round=1, step=0, bottom=PART, bottoms="relayed", received=X),
        SplitReply(steps=3, examples=6, bottom=PART, bottoms="relayed", alarms=ALARMS),
    ),
    (SPLIT_STEP, ASKED, SplitReply(steps=3, examples=6, labels=np.arange(2), bottoms="relayed")),
    (SPLIT_STEP, ASKED, SplitReply(steps=3, examples=6, bottom=PART, alarms={})),
    (SPLIT_STEP, ASKED, Stopped(by="splitout", alarms=ALARMS)),
    (
        SPLIT_EVALUATE,
        EvaluateRequest(round=1, start=4, stop=6, bottom=PART),
        SplitReply(steps=0, examples=2, step=4, smashed=X),
    ),
    (HEAD_STEP, HeadRequest(round=1, step=2, features=X), HeadReply(step=2, gradient=X)),
    (
        HEAD_EVALUATE,
        HeadEvaluateRequest(round=1, start=0, stop=2, features=X, bottom=PART),
        HeadEvaluateReply(correct=1, examples=2),
    ),
    (BACKWARD_STEP, ASKED, BackwardReply(step=1, gradient=PART)),
]


def plain(value: Any) -> Any:
    """Arrays as what may be compared."""
    if isinstance(value, np.ndarray):
        return str(value.dtype), value.shape, value.tobytes()
    if isinstance(value, dict):
        return {name: plain(each) for name, each in value.items()}
    return value


def said(carried: Carried) -> dict[str, Any]:
    return {name: plain(getattr(carried, name)) for name in carried.FIELDS}


def told(events: Iterable[Event]) -> list[Any]:
    return [(type(event), {k: plain(v) for k, v in vars(event).items()}) for event in events]


def as_message(kind: str, request: Carried) -> Message:
    return Message(request.records(), dst_node_id=1, message_type=kind)


@pytest.mark.parametrize(("kind", "request_", "reply"), PAIRS)
def test_what_is_handed_over_is_what_a_message_would_have_brought(
    kind: str, request_: Carried, reply: Carried
) -> None:
    for carried in (request_, reply):
        message = as_message(kind, carried)
        handed = carried.handed_over()
        assert said(handed) == said(type(carried).of(message))
        assert handed.array_bytes() == carried.array_bytes() == count_bytes(message)


@pytest.mark.parametrize(("kind", "request_", "reply"), PAIRS)
def test_hooks_are_told_the_same_of_a_call_and_of_its_messages(
    kind: str, request_: Carried, reply: Carried
) -> None:
    sent = as_message(kind, request_)
    answer = Message(reply.records(), reply_to=sent)
    asked, came = request_.handed_over(), reply.handed_over()
    assert told(request_events(kind, asked, 7)) == told(events_down(sent, 7))
    assert told(reply_events(kind, asked, came, 7)) == told(events_up(sent, answer, 7))


def test_what_was_handed_over_is_its_receivers_alone() -> None:
    array = X.copy()
    handed = SplitRequest(round=1, step=1, gradient=array).handed_over()
    array += 1
    assert np.array_equal(handed.gradient, X)
    with pytest.raises(ValueError, match="read-only"):
        handed.gradient += 1


@pytest.mark.parametrize("array", [np.array(["a"]), np.array([object()]), np.array([b"x"])])
def test_what_is_no_number_cannot_be_handed_over(array: Any) -> None:
    with pytest.raises(WireError, match=r"array 'gradient' of .* cannot travel; send numbers"):
        SplitRequest(round=1, step=1, gradient=array).handed_over()
    with pytest.raises(WireError, match=r"needs a whole number 'step', got 1\.5"):
        SplitRequest(round=1, step=1.5).handed_over()  # type: ignore[arg-type]


def answering(answer: Callable[[SplitRequest], Any], *mods: Any) -> ClientApp:
    app = ClientApp(mods=list(mods))

    @serve(app, SPLIT_STEP, SplitRequest)
    def step(request: SplitRequest, context: Context) -> Any:
        return answer(request)

    return app


def batch(request: SplitRequest, **fields: Any) -> SplitReply:
    return SplitReply(steps=3, examples=6, step=request.step, smashed=X, **fields)


def by_message(message: Message, context: Context, call_next: Any) -> Message:
    reply: Message = call_next(message, context)
    return reply


@Grid.register
class Stranger:
    """A grid around another, as anybody may write one: it knows of messages alone."""

    def __init__(self, grid: Any) -> None:
        self._grid, self.pushed = grid, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_grid"], name)

    def push_messages(self, messages: Any) -> Any:
        self.pushed += 1
        return self._grid.push_messages(messages)


class Derived(LocalGrid):
    pass


class DerivedTap(Wiretap):
    pass


class Delegating(GridWrapper):
    pass


def replaced_on_the_grid(grid: LocalGrid) -> LocalGrid:
    grid.push_messages = grid.push_messages  # type: ignore[method-assign]
    return grid


def local() -> LocalGrid:
    return LocalGrid(answering(batch), nodes=1)


def ordered(grid: Any) -> DeterministicGrid:
    return DeterministicGrid(grid, stream=0, roster={1: 0})


WAYS: dict[str, tuple[Callable[[], Any], bool]] = {
    "a grid of ours": (local, True),
    "in order": (lambda: ordered(local()), True),
    "tapped": (lambda: Wiretap(ordered(local())), True),
    "tapped twice": (lambda: Wiretap(Wiretap(local())), True),
    "a stranger's around it": (lambda: Stranger(local()), False),
    "a stranger's under the tap": (lambda: Wiretap(ordered(Stranger(local()))), False),
    "a stranger's in between": (lambda: Wiretap(Stranger(ordered(local()))), False),
    "a wrapper derived from ours": (lambda: Wiretap(Delegating(local())), False),
    "a tap derived from ours": (lambda: DerivedTap(local()), False),
    "a grid derived from ours": (lambda: Derived(answering(batch), nodes=1), False),
    "a method replaced": (lambda: Wiretap(replaced_on_the_grid(local())), False),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_call_is_made_past_nobody(way: str) -> None:
    make, offered = WAYS[way]
    assert (typed_call(make(), SPLIT_STEP) is not None) is offered
    assert typed_call(make(), HEAD_STEP) is None  # which the app does not serve
    channel = NodeChannel(make(), timeout=5.0)
    reply = channel.exchange(1, SPLIT_STEP, ASKED)
    assert said(reply) == said(batch(ASKED))


def test_a_strangers_grid_sees_every_message() -> None:
    stranger = Stranger(local())
    channel = NodeChannel(Wiretap(stranger), timeout=5.0)  # type: ignore[arg-type]
    for _ in range(3):
        channel.exchange(1, SPLIT_STEP, ASKED)
    assert stranger.pushed == 3


def test_a_method_replaced_in_the_class_is_not_passed_by(monkeypatch: pytest.MonkeyPatch) -> None:
    pushed: list[Any] = []
    original = LocalGrid.push_messages

    def spying(self: LocalGrid, messages: Any) -> Any:
        pushed.append(messages)
        return original(self, messages)

    monkeypatch.setattr(LocalGrid, "push_messages", spying)
    NodeChannel(Wiretap(local()), timeout=5.0).exchange(1, SPLIT_STEP, ASKED)
    assert len(pushed) == 1


class OwnApp(ClientApp):
    pass


def with_lifespan() -> ClientApp:
    app = answering(batch)

    @app.lifespan()
    def lifespan(context: Context) -> Iterator[None]:
        yield

    return app


def test_an_app_that_does_more_than_its_handlers_is_sent_messages() -> None:
    seen: list[int] = []
    knowing = before(lambda context: seen.append(context.node_id))
    assert handler_of(answering(batch), SPLIT_STEP) is not None
    assert handler_of(answering(batch, knowing, defend(lambda _: ((), 0))), SPLIT_STEP) is not None
    assert handler_of(answering(batch, by_message), SPLIT_STEP) is None
    assert handler_of(answering(batch, knowing, by_message), SPLIT_STEP) is None
    assert handler_of(with_lifespan(), SPLIT_STEP) is None
    assert handler_of(OwnApp(), SPLIT_STEP) is None
    grid = LocalGrid(answering(batch, knowing), nodes=1)
    NodeChannel(grid, timeout=None).exchange(1, SPLIT_STEP, ASKED)
    NodeChannel(Stranger(grid), timeout=None).exchange(1, SPLIT_STEP, ASKED)  # type: ignore[arg-type]
    assert seen == [1, 1]


@contextmanager
def failing(match: str) -> Iterator[list[str]]:
    causes: list[str] = []
    with pytest.raises(NodeFailed, match=match) as caught:
        yield causes
    causes.append(caught.value.cause)


def broken(request: SplitRequest) -> SplitReply:
    raise RuntimeError("disk full")


def test_a_node_that_fails_says_the_same_both_ways() -> None:
    found: list[tuple[list[str], list[Any], list[str]]] = []
    for way in (Wiretap, lambda grid, hooks: Wiretap(Stranger(grid), hooks)):  # type: ignore[arg-type]
        events: list[Event] = []
        tap = way(LocalGrid(answering(broken), nodes=1), [events.append])
        channel = NodeChannel(tap, timeout=5.0)
        with failing("RuntimeError: disk full") as causes:
            channel.exchange(1, SPLIT_STEP, ASKED)
        found.append((causes, told(events), tap.failures))
    assert found[0] == found[1]
    assert found[0][1][-1][0] is Failed


def test_a_node_that_takes_too_long_is_a_failure_that_names_the_setting() -> None:
    def slow(request: SplitRequest) -> SplitReply:
        threading.Event().wait()
        return batch(request)

    channel = NodeChannel(Wiretap(LocalGrid(answering(slow), nodes=1)), timeout=0.05)
    with timer_free(), failing(r"no reply within 0\.05 s; raise protocol\.timeout"):
        channel.exchange(1, SPLIT_STEP, ASKED)


def test_a_node_that_is_not_there_is_a_failure() -> None:
    with failing("no such node; this grid has nodes 1 to 1"):
        NodeChannel(local(), timeout=None).exchange(2, SPLIT_STEP, ASKED)


WIDE = Bounds(batch_size=2, local_steps=3, row_bytes=12, numbers=np.dtype(np.float32))
EXCESSIVE: dict[str, Callable[[SplitRequest], Any]] = {
    "has 9 rows": lambda r: replace(batch(r), smashed=np.zeros((9, 3), np.float32)),
    "bytes": lambda r: replace(batch(r), smashed=np.zeros((2, 9999), np.float32)),
    "server's part is float32": lambda r: replace(batch(r), smashed=X.astype(np.float64)),
    "whole numbers": lambda r: batch(r, labels=np.zeros(2, np.float32)),
    "where the plan is 3": lambda r: replace(batch(r), steps=10**9),
    "an unknown record": lambda r: replace(batch(r), bottom=PART),
    "a HeadReply came": lambda r: HeadReply(step=1, gradient=X),
}


@pytest.mark.parametrize("what", EXCESSIVE)
def test_what_the_plan_does_not_allow_is_seen_by_nobody(what: str) -> None:
    events: list[Event] = []
    grid = ordered(LocalGrid(answering(EXCESSIVE[what]), nodes=1))
    channel = NodeChannel(Wiretap(grid, [events.append]), timeout=None, bounds=WIDE)
    with failing(what):
        channel.exchange(1, SPLIT_STEP, ASKED)
    assert [type(event) for event in events] == [CutGradientDown, Failed]


def test_what_is_no_reply_at_all_is_the_nodes_failure() -> None:
    with failing("'dict' object has no attribute 'handed_over'"):
        NodeChannel(LocalGrid(answering(lambda _: {}), nodes=1), timeout=None).exchange(
            1, SPLIT_STEP, ASKED
        )


def test_an_active_hook_changes_a_call_both_ways_as_it_does_messages() -> None:
    found = []
    for under in (local, lambda: Stranger(local())):
        wire: list[Event] = []

        def forge(event: Event) -> Event | None:
            if isinstance(event, CutGradientDown):
                return replace(event, gradient=event.gradient * 10)
            if isinstance(event, SmashedUp):
                event.smashed[:] += 0.5  # its own copy
                return event
            return None

        tap = Wiretap(under(), [wire.append], active=forge, strict=True)  # type: ignore[arg-type]
        reply = NodeChannel(tap, timeout=None).exchange(1, SPLIT_STEP, ASKED)
        found.append((said(reply), told(wire), tap.bytes_up, tap.bytes_down))
    assert found[0] == found[1]
    assert found[0][0]["smashed"] == plain(X + 0.5)


def test_an_event_that_a_call_cannot_carry_is_refused() -> None:
    with pytest.raises(WireError, match="Failed cannot be rewritten"):
        replaced(ASKED, Failed(node=1, round=1, message_type=SPLIT_STEP, reason="x"))


def test_a_passive_hook_cannot_change_a_call() -> None:
    def spoil(event: Event) -> None:
        for value in vars(event).values():
            if isinstance(value, np.ndarray):
                value[:] = 0

    tap = Wiretap(local(), [spoil], strict=True)
    reply = NodeChannel(tap, timeout=None).exchange(1, SPLIT_STEP, ASKED)
    assert said(reply) == said(batch(ASKED))


def test_a_failure_is_no_reply() -> None:
    (event,) = reply_events(SPLIT_STEP, ASKED, Failure("gone"), 3)
    assert isinstance(event, Failed)
    assert (event.node, event.round, event.reason) == (3, 2, "gone")


def test_a_marked_class_must_say_what_it_offers() -> None:
    @offers_calls
    class Offering(LocalGrid):
        def typed(self, kind: str) -> None:
            return None

    assert typed_call(Offering(tiny.node_app, nodes=1), SPLIT_STEP) is None
