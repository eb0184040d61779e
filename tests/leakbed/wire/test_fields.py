import pickle
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from leakbed.events import Sealed
from leakbed.wire.event_codec import events_up
from leakbed.wire.fields import ALARMS, STOPPED, Finding, alarms_of, pack_alarms, stop_of
from leakbed.wire.messages import SPLIT_STEP, SplitReply, SplitRequest, Stopped
from leakbed.wire.records import SEALED, WireError, pack
from tests.support import tiny

pytestmark = pytest.mark.usefixtures("identity")


FOUND = {"splitout": Finding(10, 0.9, 0.8, 31), "splitguard": Finding(-1, 0.5, 1.0, 7)}
WHOLE = {"splitout.alarm": 1, "splitout.score": 1.0, "splitout.last": 1, "splitout.gradients": 2}


def reply(record: Any) -> Message:
    content = RecordDict({} if record is None else {ALARMS: record})
    return Message(content, dst_node_id=1, message_type=SPLIT_STEP)


def test_groups_are_made_once_and_do_not_travel() -> None:
    request = SplitRequest(round=1, step=1, gradient=np.ones((2, 3), np.float32))
    size = len(pickle.dumps(request))
    assert request.groups() is request.groups()
    assert len(pickle.dumps(request)) == size


def test_alarms_survive_the_wire() -> None:
    assert alarms_of(reply(pack_alarms(FOUND))) == FOUND
    assert alarms_of(reply(None)) is None


@pytest.mark.parametrize(
    "record",
    [
        ConfigRecord(WHOLE),  # type: ignore[arg-type]
        ArrayRecord(),
        MetricRecord({"splitout.alarm": 1}),
        MetricRecord({**WHOLE, "splitout.alarm": 1.5}),
        MetricRecord({**WHOLE, "splitout.score": [1.0]}),
        MetricRecord({**WHOLE, "splitout.other": 1}),
        MetricRecord({**WHOLE, "alarm": 1}),
    ],
)
def test_what_is_no_record_of_alarms_is_refused(record: Any) -> None:
    with pytest.raises(WireError, match=r"sealed\.alarms|no finding of a detector|is not whole"):
        alarms_of(reply(record))


def test_a_whole_record_is_read() -> None:
    assert alarms_of(reply(MetricRecord(WHOLE))) == {"splitout": Finding(1, 1.0, 1, 2)}  # type: ignore[arg-type]


def test_a_node_s_word_that_it_stopped_survives_the_wire_and_findings_stay_sealed() -> None:
    sent = Message(SplitRequest(round=1, step=1).records(), dst_node_id=1, message_type=SPLIT_STEP)
    answer = Message(Stopped(by="splitout", alarms=FOUND).records(), reply_to=sent)
    assert stop_of(answer) == "splitout"
    assert alarms_of(answer) == FOUND
    assert events_up(sent, answer, 0) == []  # nothing an adversary could read, no tensor at all
    assert stop_of(reply(pack_alarms(FOUND))) is None


@pytest.mark.parametrize(
    "record", [MetricRecord({"by": 1}), ConfigRecord(), ConfigRecord({"by": 1})]
)
def test_a_stop_that_names_no_detector_is_refused(record: Any) -> None:
    content = RecordDict({STOPPED: record})
    with pytest.raises(WireError, match="what stopped the node"):
        stop_of(Message(content, dst_node_id=1, message_type=SPLIT_STEP))


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
