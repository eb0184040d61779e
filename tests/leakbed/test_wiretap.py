import logging
import random
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg

from leakbed.events import (
    CutGradientDown,
    Event,
    Failed,
    Foreign,
    SmashedUp,
    UpdateUp,
    WeightsDown,
    arrays_of,
)
from leakbed.grid_wrapper import GridWrapper
from leakbed.grids import LocalGrid
from leakbed.seeds import derive
from leakbed.wire.messages import SplitReply, SplitRequest
from leakbed.wire.records import pack, unpack
from leakbed.wiretap import Wiretap
from tests import tiny


@pytest.fixture(autouse=True)
def identity() -> Iterator[None]:
    with tiny.identity():
        yield


X = np.arange(6, dtype=np.float32).reshape(2, 3)


def stranger() -> ClientApp:
    """Somebody's app: adds one to its weights, squares its query, fails or is silent on demand."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        if "fail" in message.content:
            raise RuntimeError("disk full")
        weights = {k: v + 1 for k, v in unpack(message.content["arrays"]).items()}
        return Message(RecordDict({"arrays": pack(weights)}), reply_to=message)

    @app.query("square")
    def square(message: Message, context: Context) -> Message:
        squared = {k: v**2 for k, v in unpack(message.content["in"]).items()}
        return Message(RecordDict({"out": pack(squared)}), reply_to=message)

    @app.train("split")
    def split(message: Message, context: Context) -> Message:
        request = SplitRequest.of(message)
        smashed = X if request.gradient is None else request.gradient
        return Message(SplitReply(steps=9, examples=2, smashed=smashed).records(), reply_to=message)

    @app.query("setup")
    def setup(message: Message, context: Context) -> Message:
        return Message(message.content, reply_to=message)

    return app


class Silent(GridWrapper):
    """A grid on which the second message of each exchange is never answered."""

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        replies = list(self._grid.send_and_receive(messages, timeout=timeout))
        return [reply for index, reply in enumerate(replies) if index != 1]


def grid(nodes: int = 2) -> LocalGrid:
    return LocalGrid(stranger(), nodes=nodes)


def train(node: int = 1, *, value: float = 0.0, **records: Any) -> Message:
    content = {"arrays": pack({"w": X + value}), "config": ConfigRecord({"server-round": 1})}
    return Message(RecordDict(content | records), dst_node_id=node, message_type="train")


def square(node: int = 1) -> Message:
    return Message(RecordDict({"in": pack({"x": X})}), dst_node_id=node, message_type="query.square")


def split(*, step: int = 1) -> Message:
    request = SplitRequest(round=1, step=step, gradient=X if step else None)
    return Message(request.records(), dst_node_id=1, message_type="train.split")


def out(reply: Message, key: str = "arrays", name: str = "w") -> Any:
    return unpack(reply.content.array_records[key])[name]


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


def mutate(event: Event) -> None:
    """Do everything to an event that a hook must not be able to do to the training."""
    if isinstance(event, Foreign):
        for record in event.content.values():
            record.clear()
        event.content.clear()
    for group in arrays_of(event).values():
        for array in group.values():
            array[...] = -7
    random.random()
    np.random.rand()  # noqa: NPY002
    torch.rand(1)
    torch.manual_seed(3)


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
    tap = Wiretap(grid(), active=lambda event: mutate(event))
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


def run_threads(work: Callable[[int], None], count: int) -> None:
    errors: list[BaseException] = []

    def guarded(index: int) -> None:
        try:
            work(index)
        except BaseException as error:  # noqa: BLE001  shown to the test below
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


class Slow(GridWrapper):
    """A grid that lets other threads run in the middle of each exchange."""

    def __init__(self, inner: LocalGrid) -> None:
        super().__init__(inner)
        self._one = threading.Lock()  # LocalGrid itself makes no promise about threads

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        with self._one:
            return list(self._grid.push_messages(messages))

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        with self._one:
            return list(self._grid.pull_messages(message_ids))

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        return self.pull_messages(self.push_messages(messages))


def test_many_threads_lose_and_mix_up_nothing() -> None:
    inside, seen = threading.Lock(), []

    def hook(event: Event) -> None:
        assert inside.acquire(blocking=False), "two hooks ran at once"
        seen.append(event)
        inside.release()

    tap = Wiretap(Slow(grid(8)), [hook], strict=True)

    def work(index: int) -> None:
        for turn in range(20):
            value = 100.0 * index + turn
            message = train(index + 1, value=value)
            if turn % 2:
                (reply,) = tap.send_and_receive([message])
            else:
                (reply,) = tap.pull_messages(tap.push_messages([message]))
            assert np.array_equal(out(reply), X + value + 1)

    run_threads(work, 8)
    updates = [event for event in seen if isinstance(event, UpdateUp)]
    assert len(seen) == 2 * len(updates) == 320
    assert all(np.array_equal(e.after["w"], e.before["w"] + 1) for e in updates)
    assert all(e.before["w"][0, 0] // 100 == e.node - 1 for e in updates)
    size = train().content["arrays"].count_bytes()
    assert (tap.bytes_down, tap.bytes_up) == (160 * size, 160 * size)
    assert tap._pending == {}


def test_flowers_own_strategy_trains_to_the_same_bits_when_tapped() -> None:
    def trained(**hooks: Any) -> Any:
        inner = tiny.ready(3, model="stateful", plan=tiny.plan(momentum=0.9))
        chosen = Wiretap(inner, **hooks) if hooks else inner
        first = tiny.architecture("stateful").build(derive(tiny.SEED, "victim-init")).state_dict()
        random.seed(1)
        strategy = FedAvg(fraction_evaluate=0.0, fraction_train=0.7, min_train_nodes=2)
        result = strategy.start(chosen, ArrayRecord(dict(first)), num_rounds=2)
        return result.arrays.to_torch_state_dict()

    assert tiny.same(trained(), trained(hooks=[mutate], strict=True))
