import logging
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp.strategy import FedAvg

from leakbed.events import (
    Event,
    Failed,
    Foreign,
    UpdateUp,
    WeightsDown,
)
from leakbed.seeds import derive
from leakbed.tap.trace import Recorder
from leakbed.tap.wiretap import GridWrapper, Wiretap
from leakbed.wire.records import pack, unpack
from tests.support import tiny
from tests.support.stranger import X, grid, mutate, out, split, square, train

pytestmark = pytest.mark.usefixtures("identity")


class Silent(GridWrapper):
    """A grid on which the second message of each exchange is never answered."""

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        replies = list(self._grid.send_and_receive(messages, timeout=timeout))
        return [reply for index, reply in enumerate(replies) if index != 1]


def test_hooks_see_both_directions_under_the_rosters_names() -> None:
    events: list[Event] = []
    tap = Wiretap(grid(), [events.append], roster={1: 70}, strict=True)
    replies = list(tap.send_and_receive([train(1), train(2)]))
    assert [type(event) for event in events] == [WeightsDown, WeightsDown, UpdateUp, UpdateUp]
    assert [event.node for event in events] == [70, 2, 70, 2]
    assert np.array_equal(events[2].after["w"], events[2].before["w"] + 1)  # type: ignore[attr-defined]
    assert np.array_equal(out(replies[0]), X + 1)
    assert tap.failures == []


def test_pushing_and_pulling_shows_the_same() -> None:
    events: list[Event] = []
    tap = Wiretap(grid(), [events.append], strict=True)
    ids = list(tap.push_messages([train(1), square(2)]))
    assert [type(event) for event in events] == [WeightsDown, Foreign]
    (second,) = tap.pull_messages([ids[1]])
    assert np.array_equal(out(second, "out", "x"), X**2)
    (first,) = tap.pull_messages([ids[0]])
    assert np.array_equal(out(first), X + 1)
    assert [type(event) for event in events[2:]] == [Foreign, UpdateUp]
    assert list(tap.pull_messages(ids)) == []
    assert len(events) == 4


def test_a_passive_hook_changes_nothing() -> None:
    after: list[Event] = []
    tap = Wiretap(grid(), [mutate, after.append, mutate], strict=True)
    message, asked = train(), square()
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    (reply,) = tap.send_and_receive([message])
    (answer,) = tap.send_and_receive([asked])
    assert torch.equal(torch.rand(1), expected)
    assert np.array_equal(out(message), X)
    assert np.array_equal(out(reply), X + 1)
    assert np.array_equal(out(asked, "in", "x"), X)
    assert np.array_equal(out(answer, "out", "x"), X**2)
    seen, _, foreign, _ = after  # each hook has copies of its own
    assert np.array_equal(seen.arrays["w"], X)  # type: ignore[attr-defined]
    assert np.array_equal(unpack(foreign.content["in"])["x"], X)  # type: ignore[attr-defined]


def test_a_hooks_exception_is_recorded_and_the_others_still_run(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def bad(event: Event) -> None:
        raise ValueError("not today")

    events: list[Event] = []
    tap = Wiretap(grid(), [bad, events.append])
    with caplog.at_level(logging.WARNING, logger="leakbed"):
        (reply,) = tap.send_and_receive([train()])
    assert np.array_equal(out(reply), X + 1)
    assert len(events) == 2
    assert len(tap.failures) == 2
    assert "WeightsDown: ValueError('not today')" in tap.failures[0]
    assert "not today" in caplog.text
    with pytest.raises(ValueError, match="not today"):
        Wiretap(grid(), [bad], strict=True).send_and_receive([train()])


def test_a_message_that_cannot_be_read_is_recorded_and_passes() -> None:
    tap = Wiretap(grid(), [print])
    message = split()
    del message.content["config"]
    list(tap.send_and_receive([message]))
    assert "decoding a message: WireError" in tap.failures[0]


@pytest.mark.parametrize("hooks", [0, 1])
def test_errors_and_silences_are_recorded_with_and_without_hooks(hooks: int) -> None:
    events: list[Event] = []
    tap = Wiretap(Silent(grid(3)), [events.append] * hooks, roster={1: 0, 2: 1, 3: 2}, strict=True)
    failing = train(3, fail=ConfigRecord())
    replies = list(tap.send_and_receive([train(1), train(2), failing]))
    assert len(replies) == 2
    assert replies[1].has_error()
    assert len(tap.failures) == 2
    assert tap.failures[0].startswith("node 2, train: RuntimeError: disk full")
    assert tap.failures[1] == "node 1, train: no reply"
    failed = [event for event in events if isinstance(event, Failed)]
    assert [(event.node, event.reason[:8], event.round) for event in failed] == [
        (2, "RuntimeE", 1),
        (1, "no reply", 1),
    ][: 2 * hooks]


def test_bytes_are_counted_both_ways_without_the_harness() -> None:
    tap = Wiretap(grid())
    size = train().content["arrays"].count_bytes()
    list(tap.send_and_receive([train(1), train(2)]))
    tap.pull_messages(tap.push_messages([train(1)]))
    assert (tap.bytes_down, tap.bytes_up) == (3 * size, 3 * size)
    events: list[Event] = []
    tap = Wiretap(grid(), [events.append], active=events.append)
    setup = Message(RecordDict({"a": pack({"x": X})}), dst_node_id=1, message_type="query.setup")
    (reply,) = tap.send_and_receive([setup])
    assert np.array_equal(out(reply, "a", "x"), X)
    assert (tap.bytes_down, tap.bytes_up, events) == (0, 0, [])


def test_flowers_own_strategy_trains_to_the_same_bits_when_tapped() -> None:
    def trained(**hooks: Any) -> Any:
        inner = tiny.ready(3, model="stateful", plan=tiny.plan(momentum=0.9))
        chosen = Wiretap(inner, **hooks) if hooks else inner
        first = tiny.architecture("stateful").build(derive(tiny.SEED, "victim-init")).state_dict()
        random.seed(1)
        strategy = FedAvg(fraction_evaluate=0.0, fraction_train=0.7, min_train_nodes=2)
        result = strategy.start(chosen, ArrayRecord(dict(first)), num_rounds=2)
        return result.arrays.to_torch_state_dict()

    trained()  # the first makes more calls, and checks of lists draw from `random`
    assert tiny.same(trained(), trained(hooks=[mutate], strict=True))


def test_a_recorder_that_is_closed_says_so_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recorder, events = Recorder(tmp_path / "trace"), list[Event]()
    recorder.close()
    tap = Wiretap(grid(), [recorder, events.append])
    with caplog.at_level(logging.WARNING, logger="leakbed"):
        for _ in range(3):
            list(tap.send_and_receive([train(1), train(2)]))
    assert len(events) == 12
    assert len(tap.failures) == len(caplog.records) == 1
    assert f"hook Recorder('{tmp_path / 'trace'}') on node 1's WeightsDown" in tap.failures[0]


def test_pushed_messages_whose_replies_nobody_pulls_are_let_go() -> None:
    events: list[Event] = []
    tap = Wiretap(grid(), [events.append], strict=True)
    ids = [next(iter(tap.push_messages([train(1)]))) for _ in range(50)]
    assert len(tap._pending) < 10
    assert len(events) == 50
    list(tap.pull_messages([ids[-1]]))
    assert isinstance(events[-1], UpdateUp)
    list(tap.pull_messages([ids[0]]))  # its message was let go, but its reply is told
    assert isinstance(events[-1], Foreign)
    assert events[-1].up
    assert set(events[-1].content) == {"arrays"}


def test_a_late_reply_is_told_with_what_it_answers() -> None:
    events: list[Event] = []
    tap = Wiretap(grid(), [events.append], strict=True)
    (late,) = tap.push_messages([train(1)])
    for _ in range(50):
        list(tap.pull_messages(tap.push_messages([train(1)])))
    list(tap.pull_messages([late]))
    assert isinstance(events[-1], UpdateUp)


def test_a_message_that_cannot_be_read_is_shown_as_it_is() -> None:
    events: list[Event] = []
    tap = Wiretap(grid(), [events.append])
    message = split()
    del message.content["config"]
    list(tap.send_and_receive([message]))
    down, up = events
    assert isinstance(down, Foreign)
    assert down.skipped is not None
    assert down.skipped.startswith("its meaning: WireError")
    assert isinstance(up, Foreign | Failed)
