import pickle
import re
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from leakbed.flower_internals import CLIENT_RAISED, task_identity
from leakbed.grids.base import MessageIds, node_ids
from leakbed.grids.ray.parcels import (
    Answer,
    Parcel,
    ParcelHost,
    TypedCall,
    answers,
    opened,
    packed,
    prepared,
    seal,
)
from leakbed.wire.bounds import Weight
from leakbed.wire.calls import Failure, serve
from leakbed.wire.messages import SPLIT_STEP, SplitReply, SplitRequest
from tests.support import strange_nodes
from tests.support.strange_nodes import message, said

app = ClientApp()


@app.query("store")
def store(message: Message, context: Context) -> Message:
    """Keep the array that came, or hand out the one that is kept."""
    if "arrays" in message.content:
        context.state["kept"] = message.content["arrays"]
        return Message(RecordDict(), reply_to=message)
    return Message(RecordDict({"kept": context.state["kept"]}), reply_to=message)


@app.query("nothing")
def nothing(message: Message, context: Context) -> Message:
    return "not a message"  # type: ignore[return-value]


@app.query("spoil")
def spoil(message: Message, context: Context) -> Message:
    context.state.__dict__["_data"]["odd"] = object()
    return Message(RecordDict(), reply_to=message)


@pytest.fixture(autouse=True)
def identity() -> Iterator[None]:
    with task_identity():
        yield


def asked(
    host: ParcelHost, sent: Message | TypedCall, state: Parcel | None = None, *, here: bool = False
) -> Answer:
    (answer,) = answers(host.handle([(prepared(sent), state, here)]), [sent])
    return answer


def contexts(host: ParcelHost) -> list[int]:
    return list(host._host._contexts)


def test_a_node_that_keeps_nothing_alive_goes_home_and_goes_on_anywhere() -> None:
    state: Parcel | None = None
    for calls in (1, 2, 3):
        host = ParcelHost(strange_nodes.app, node_ids(5))  # each time another worker
        answer = asked(host, message(3, "remember"), state)
        assert said(answer.reply)["calls"] == calls
        assert not answer.stays
        assert contexts(host) == []
        assert answer.state is not None
        state = answer.state


def test_a_node_that_keeps_something_alive_stays() -> None:
    host = ParcelHost(strange_nodes.app, node_ids(5))
    answer = asked(host, message(3, "count"))
    assert (answer.stays, answer.state, contexts(host)) == (True, None, [3])
    answer = asked(host, message(3, "count"), here=True)
    assert said(answer.reply)["calls"] == 2
    answer = asked(host, message(3, "remember"), here=True)  # clears what is alive
    assert not answer.stays
    assert contexts(host) == []


def test_a_state_that_comes_along_replaces_what_the_worker_has() -> None:
    host = ParcelHost(strange_nodes.app, node_ids(5))
    asked(host, message(3, "count"))
    assert said(asked(host, message(3, "count")).reply)["calls"] == 1


@pytest.mark.parametrize("size", [3, 100_000], ids=["in the frame", "beside it"])
def test_a_state_that_is_only_read_is_not_sent_again(size: int) -> None:
    arrays = ArrayRecord({"x": Array(np.arange(float(size)))})
    host = ParcelHost(app, node_ids(2))
    stored = asked(host, message(1, "store", RecordDict({"arrays": arrays})))
    assert stored.state is not None
    _, (kept,) = opened(stored.state)
    assert isinstance(memoryview(kept).obj, bytes | np.ndarray)
    handed = asked(host, message(1, "store"), stored.state)
    assert handed.state is None
    assert not handed.stays
    assert handed.reply.content["kept"] == arrays
    again = asked(host, message(1, "store", RecordDict({"arrays": arrays})), stored.state)
    assert again.state is not None


def test_several_messages_have_their_own_copy_of_a_broadcast() -> None:
    records = RecordDict({"arrays": ArrayRecord(), "config": ConfigRecord({"value": 1})})
    sent = [message(node, "change", records) for node in (1, 2, 3)]
    parcels = [(prepared(each, content=False), None, False) for each in sent]
    host = ParcelHost(strange_nodes.app, node_ids(3))
    came = answers(host.handle(parcels, seal(packed(records))), sent)
    assert [said(answer.reply) for answer in came] == [{"before": 1, "size": 0}] * 3


def test_of_several_messages_one_that_fails_leaves_the_others() -> None:
    ids = MessageIds("x")
    kinds = ["remember", "raise", "unsendable", "count"]
    sent = [message(node + 1, kind) for node, kind in enumerate(kinds)]
    for each in sent:
        ids.stamp(each)
    host = ParcelHost(strange_nodes.app, node_ids(4))
    came = answers(host.handle([(prepared(each), None, False) for each in sent]), sent)
    first, raised, unsendable, last = [answer.reply for answer in came]
    assert [r.metadata.reply_to_message_id for r in (first, raised, unsendable, last)] == [
        "x-0",
        "x-1",
        "x-2",
        "x-3",
    ]
    assert (said(first)["node"], said(last)["node"]) == (1, 4)
    assert raised.error.reason.startswith("ZeroDivisionError: no reason at all")
    assert unsendable.error.code == CLIENT_RAISED
    assert "lock" in unsendable.error.reason
    assert [answer.stays for answer in came] == [False, False, False, True]


@pytest.mark.parametrize(("kind", "reason"), [("nothing", "AttributeError"), ("spoil", "odd")])
def test_what_cannot_travel_is_an_error_and_the_node_keeps_its_last_state(
    kind: str, reason: str
) -> None:
    host = ParcelHost(app, node_ids(2))
    answer = asked(host, message(1, kind), seal(([], [])))
    assert reason in answer.reply.error.reason
    assert (answer.stays, answer.state, contexts(host)) == (False, None, [])


@pytest.mark.parametrize(
    ("most", "refused"),
    [
        (Weight(bytes=5000, parts=2), None),
        (Weight(bytes=1000, parts=2), r"\d+ bytes, where the plan allows 1000"),
        (Weight(bytes=5000, parts=1), "2 records and arrays, where the plan allows 1"),
        (None, None),
    ],
)
def test_a_worker_sends_no_reply_that_weighs_more_than_the_plan_allows(
    most: Weight | None, refused: str | None
) -> None:
    host = ParcelHost(app, node_ids(1))
    sent = message(1, "store")
    sent.content["arrays"] = ArrayRecord({"a": Array(np.zeros(1000, np.float32))})
    state = asked(host, sent).state
    back = message(1, "store")
    parcels = host.handle([(prepared(back, most=most), state, False)])
    (answer,) = answers(parcels, [back])
    if refused is None:
        assert "kept" in answer.reply.content
        return
    assert re.search(refused, answer.reply.error.reason)
    assert len(pickle.dumps(parcels)) < 1000  # nothing of it travelled


calling = ClientApp()


@serve(calling, SPLIT_STEP, SplitRequest)
def step(request: SplitRequest, context: Context) -> SplitReply:
    if request.step == 9:
        raise ZeroDivisionError("no reason at all")
    calls = context.live["calls"] = context.live.get("calls", 0) + 1  # type: ignore[attr-defined]
    return SplitReply(steps=calls, examples=2, step=request.step, smashed=request.gradient)


def test_a_call_is_served_and_its_node_stays() -> None:
    host = ParcelHost(calling, node_ids(3))
    assert host.kinds == {SPLIT_STEP}
    request = SplitRequest(round=1, step=1, gradient=np.ones((2, 3), np.float32)).handed_over()
    for calls in (1, 2):
        answer = asked(host, TypedCall(2, SPLIT_STEP, request), here=calls == 2)
        assert isinstance(answer.reply, SplitReply)
        assert (answer.reply.steps, answer.stays, contexts(host)) == (calls, True, [2])
        assert np.array_equal(answer.reply.smashed, request.gradient)


def test_a_call_that_fails_is_a_failure_in_the_words_of_a_message() -> None:
    host = ParcelHost(calling, node_ids(3))
    call = TypedCall(2, SPLIT_STEP, SplitRequest(round=1, step=9))
    answer = asked(host, call)
    assert isinstance(answer.reply, Failure)
    assert answer.reply.reason.startswith("ZeroDivisionError: no reason at all")
    heavy = Weight(bytes=10, parts=1)
    big = TypedCall(2, SPLIT_STEP, SplitRequest(round=1, step=1, gradient=np.ones((2, 3))))
    (refused,) = answers(host.handle([(prepared(big, most=heavy), None, False)]), [big])
    assert isinstance(refused.reply, Failure)
    assert "where the plan allows" in refused.reply.reason


class Unreadable(SplitReply):
    """Of a module that the driver does not have, in the test below."""


class Raising(SplitReply):
    """Travels, and raises where it is read."""

    def __reduce__(self) -> Any:
        return divmod, (1, 0)


@pytest.mark.parametrize(
    ("kind", "said"), [(Unreadable, "No module named 'of_a_worker'"), (Raising, "ZeroDivisionErr")]
)
def test_a_reply_that_cannot_be_read_is_a_failure_of_its_node_alone(
    kind: type[SplitReply], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, module = ClientApp(), ModuleType("of_a_worker")
    module.Unreadable = Unreadable  # type: ignore[attr-defined]
    monkeypatch.setattr(Unreadable, "__module__", module.__name__)

    @serve(own, SPLIT_STEP, SplitRequest)
    def reply(request: SplitRequest, context: Context) -> SplitReply:
        context.live["kept"] = True  # type: ignore[attr-defined]
        return (kind if request.step == 1 else SplitReply)(steps=1, examples=2, step=request.step)

    host = ParcelHost(own, node_ids(3))
    sent = [TypedCall(node, SPLIT_STEP, SplitRequest(round=1, step=node)) for node in (1, 2)]
    with monkeypatch.context() as there:
        there.setitem(sys.modules, module.__name__, module)
        parcels = host.handle([(prepared(each), None, False) for each in sent])
    unread, other = answers(parcels, sent)
    assert isinstance(unread.reply, Failure)
    assert unread.reply.reason.startswith("the reply of node 1 cannot be read where the run is ")
    assert said in unread.reply.reason
    assert isinstance(other.reply, SplitReply)
    assert [unread.stays, other.stays] == [True, True]  # the driver still knows where they are
