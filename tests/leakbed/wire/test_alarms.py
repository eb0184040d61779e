from collections.abc import Iterator
from typing import Any

import pytest
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from leakbed.events import Sealed
from leakbed.wire.alarms import ALARMS, alarms_of, pack_alarms
from leakbed.wire.messages import SPLIT_STEP, SplitReply, SplitRequest
from leakbed.wire.records import SEALED, WireError, pack
from leakbed.wire.translation import events_up
from tests import tiny


@pytest.fixture(autouse=True)
def identity() -> Iterator[None]:
    with tiny.identity():
        yield


FOUND = {"splitout": (10, 0.9), "splitguard": (-1, 0.5)}


def reply(record: Any) -> Message:
    content = RecordDict({} if record is None else {ALARMS: record})
    return Message(content, dst_node_id=1, message_type=SPLIT_STEP)


def test_alarms_survive_the_wire() -> None:
    assert alarms_of(reply(pack_alarms(FOUND))) == FOUND
    assert alarms_of(reply(None)) is None


@pytest.mark.parametrize(
    "record",
    [
        ConfigRecord({"splitout.alarm-step": 1}),
        ArrayRecord(),
        MetricRecord({"splitout.alarm-step": 1}),
        MetricRecord({"splitout.alarm-step": 1.5, "splitout.score": 1.0}),
        MetricRecord({"splitout.alarm-step": 1, "splitout.score": [1.0]}),
        MetricRecord({"splitout.other": 1, "splitout.alarm-step": 1, "splitout.score": 1.0}),
    ],
)
def test_what_is_no_record_of_alarms_is_refused(record: Any) -> None:
    with pytest.raises(WireError, match=r"sealed\.alarms|no alarm and score"):
        alarms_of(reply(record))


def test_a_reply_without_detectors_carries_nothing_of_them() -> None:
    bottom = pack({"w": tiny.images()[0].numpy()})
    assert bottom  # what a closing reply consists of, and no more
    for alarms in (None, {}):
        records = SplitReply(steps=1, examples=2, alarms=alarms).records()
        assert list(records) == ["metrics"]


def test_no_tap_sees_an_alarm() -> None:
    sent = Message(SplitRequest(round=1, step=1).records(), dst_node_id=1, message_type=SPLIT_STEP)
    weights = {"w": tiny.images()[0].numpy()}
    closing = SplitReply(steps=1, examples=2, bottom=weights, alarms=FOUND)
    answer = Message(closing.records(), reply_to=sent)
    (event,) = events_up(sent, answer, 0)
    assert isinstance(event, Sealed)
    assert not any("alarm" in name or "score" in name for name in vars(event))
    assert ALARMS.startswith(SEALED)
