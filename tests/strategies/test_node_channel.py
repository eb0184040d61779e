from typing import Any

import pytest
from flwr.app import ConfigRecord, Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp

from leakbed.grids import LocalGrid, NodeFailed
from leakbed.wire.fields import STOPPED, Finding
from leakbed.wire.messages import SPLIT_STEP, SplitReply, SplitRequest, Stopped
from strategies.node_channel import NodeChannel, NodeStopped, checked, partition, refuse_stopped
from tests.support import tiny

pytestmark = pytest.mark.usefixtures("identity")


ASKED = SplitRequest(round=1, step=0)


def numbered(count: int) -> list[Message]:
    messages = [
        Message(RecordDict(), dst_node_id=node, message_type="train.split")
        for node in range(1, count + 1)
    ]
    for sent in messages:
        tiny.set_message_id(sent, f"id-{sent.metadata.dst_node_id}")
    return messages


def test_replies_are_put_in_the_order_of_the_messages() -> None:
    sent = numbered(3)
    replies = [Message(RecordDict(), reply_to=one) for one in sent]
    assert checked([replies[2], replies[0], replies[1]], sent) == replies


def test_an_error_a_silence_or_a_second_answer_stops_the_run() -> None:
    sent = numbered(2)
    fine = Message(RecordDict(), reply_to=sent[0])
    with pytest.raises(NodeFailed, match=r"node 2 failed on 'train\.split': no reply"):
        checked([fine], sent)
    bad = Message(Error(0, "out of memory"), reply_to=sent[1])
    with pytest.raises(NodeFailed, match=r"node 2 failed on 'train\.split': out of memory"):
        checked([bad, fine], sent)
    with pytest.raises(NodeFailed, match=r"node 1 failed on 'train\.split': answered 2 times"):
        checked([fine, fine], sent[:1])


class Arriving(LocalGrid):
    """Replies that come only at the third look, and maybe twice."""

    def __init__(self, *, copies: int, looks: int = 3) -> None:
        app = ClientApp()

        @app.train("split")
        def step(message: Message, context: Context) -> Message:
            step = message.metadata.dst_node_id
            return Message(SplitReply(steps=9, examples=9, step=step).records(), reply_to=message)

        super().__init__(app, nodes=2)
        self.looked, self._copies, self._looks = 0, copies, looks

    def pull_messages(self, message_ids: Any) -> Any:
        self.looked += 1
        return list(super().pull_messages(message_ids)) * self._copies if self._due() else []

    def _due(self) -> bool:
        return self.looked >= self._looks


def test_a_reply_is_waited_for() -> None:
    grid = Arriving(copies=1)
    channel = NodeChannel(grid, timeout=None)
    channel.send(2, SPLIT_STEP, ASKED)
    reply = channel.receive(2)
    assert isinstance(reply, SplitReply)
    assert reply.step == 2
    assert grid.looked == 3


def test_a_reply_that_comes_twice_stops_the_run() -> None:
    channel = NodeChannel(Arriving(copies=2), timeout=None)
    channel.send(2, SPLIT_STEP, ASKED)
    with pytest.raises(NodeFailed, match=r"node 1 failed on .train\.split.: answered 2 times"):
        channel.receive(2)


def test_a_reply_that_never_comes_stops_the_run_in_time() -> None:
    channel = NodeChannel(Arriving(copies=1, looks=10**9), timeout=0.05)
    channel.send(1, SPLIT_STEP, ASKED)
    with pytest.raises(NodeFailed, match=r"no reply within 0\.05 s; raise protocol\.timeout"):
        channel.receive(1)


def test_an_exchange_sends_and_waits() -> None:
    channel = NodeChannel(Arriving(copies=1), timeout=10.0)
    reply = channel.exchange(1, SPLIT_STEP, ASKED)
    assert isinstance(reply, SplitReply)
    assert reply.step == 1


def test_a_node_is_called_by_its_partition_where_the_grid_knows_it() -> None:
    assert partition(LocalGrid(ClientApp(), nodes=3), 3) == 2
    assert partition(LocalGrid(ClientApp(), nodes=3), 17) == 17


def test_a_node_s_word_that_it_stopped_ends_the_exchange_with_what_it_found() -> None:
    app, alarms = ClientApp(), {"splitout": Finding(10, 1.0, 0.9, 10)}

    @app.train("split")
    def step(message: Message, context: Context) -> Message:
        return Message(Stopped(by="splitout", alarms=alarms).records(), reply_to=message)

    channel = NodeChannel(LocalGrid(app, nodes=2), timeout=None)
    channel.send(2, SPLIT_STEP, ASKED)
    with pytest.raises(NodeStopped, match=r"node 1 .*splitout takes the server for a") as caught:
        channel.receive(2)
    assert (caught.value.by, caught.value.alarms) == ("splitout", alarms)


def test_a_stop_that_cannot_be_read_is_a_failure_of_its_node() -> None:
    (sent,) = numbered(1)
    broken = Message(RecordDict({STOPPED: ConfigRecord()}), reply_to=sent)
    with pytest.raises(NodeFailed, match=r"node 7 .*what stopped the node") as caught:
        refuse_stopped(broken, 7)
    assert not isinstance(caught.value, NodeStopped)
    refuse_stopped(Message(RecordDict(), reply_to=sent), 7)
