from dataclasses import replace

import numpy as np
import pytest
from flwr.app import Message, RecordDict

from leakbed.events import (
    CutGradientDown,
    Event,
    SmashedUp,
    WeightsDown,
)
from leakbed.tap.wiretap import Wiretap
from leakbed.wire.messages import SplitReply, SplitRequest
from leakbed.wire.records import pack, unpack
from tests.support.stranger import X, grid, mutate, out, split, square, train

pytestmark = pytest.mark.usefixtures("identity")


def test_an_active_hook_stands_at_the_server() -> None:
    """Down: everyone behind it sees the forgery. Up: the passive hooks see the wire's truth."""
    wire: list[Event] = []
    met: list[Event] = []

    def forge(event: Event) -> Event | None:
        met.append(event)
        if isinstance(event, CutGradientDown):
            return replace(event, gradient=event.gradient * 10)
        if isinstance(event, SmashedUp):
            return replace(event, smashed=event.smashed + 0.5)
        return None

    tap = Wiretap(grid(), [wire.append], active=forge, strict=True)
    message = split()
    (reply,) = tap.send_and_receive([message])
    assert np.array_equal(wire[0].gradient, 10 * X)  # type: ignore[attr-defined]
    assert np.array_equal(wire[1].smashed, 10 * X)  # type: ignore[attr-defined]
    assert np.array_equal(SplitReply.of(reply).smashed, 10 * X + 0.5)
    assert np.array_equal(met[0].gradient, X)  # type: ignore[attr-defined]
    assert np.array_equal(SplitRequest.of(message).gradient, X)  # the strategy's own is unchanged
    assert SplitReply.of(reply).steps == 9


def test_an_active_hook_that_returns_nothing_changes_nothing() -> None:
    tap = Wiretap(grid(), active=mutate)
    message, asked = train(), square()
    (reply,) = tap.send_and_receive([message])
    (answer,) = tap.send_and_receive([asked])
    assert np.array_equal(out(reply), X + 1)
    assert np.array_equal(out(answer, "out", "x"), X**2)
    assert np.array_equal(out(message), X)


def test_an_active_hooks_exception_always_stops_the_run() -> None:
    def bad(event: Event) -> Event | None:
        raise ValueError("not today")

    with pytest.raises(ValueError, match="not today"):
        Wiretap(grid(), active=bad).send_and_receive([train()])


def test_one_record_shared_by_many_messages_is_forged_for_one() -> None:
    shared = RecordDict({"arrays": pack({"w": X})})
    sent = [Message(shared, dst_node_id=node, message_type="train") for node in (1, 2)]

    def forge(event: Event) -> Event | None:
        chosen = isinstance(event, WeightsDown) and event.node == 2
        return replace(event, arrays={"w": -X}) if chosen else None  # type: ignore[call-arg]

    one, two = Wiretap(grid(), active=forge).send_and_receive(sent)
    assert np.array_equal(out(one), X + 1)
    assert np.array_equal(out(two), -X + 1)
    assert np.array_equal(unpack(shared["arrays"])["w"], X)
